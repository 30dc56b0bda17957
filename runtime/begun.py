"""A greedy step that was begun before the host has what came of the one before it. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class Begun:
    """A greedy step that was begun and is not ended. ids (B,T): what it is fed; None: the tokens of the step before it. new (B,): new_length, 0 for sequences
    that were called off since. slot: where on the host its tokens arrive; picked (B,): they, once they are there."""

    ids: NDArray[np.int64] | None
    new: NDArray[np.int32]
    slot: int = 0
    picked: NDArray[np.int64] | None = None
