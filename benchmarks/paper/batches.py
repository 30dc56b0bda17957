"""What every task hands out: a batch of tokens and where a model is asked what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """tokens (B,T); at (B,K): positions where the model is asked; labels (B,K): the tokens it should predict there; lags (B,K): how far back the answer
    stands, None where that means nothing. Rows are padded on the right, which a causal model does not see."""

    tokens: Ints
    at: Ints
    labels: Ints
    lags: Ints | None = None
