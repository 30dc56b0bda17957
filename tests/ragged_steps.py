"""Steps over three sequences of a byte model that every session on a GPU is driven through."""

from __future__ import annotations

from typing import Any

import numpy as np


def drive(backend: Any, poison: bool = False) -> list[np.ndarray]:
    """Logits of a ragged prefill over several chunks, decode steps with a row that stands still, a reset, a rewind, and more prefill."""
    rng = np.random.default_rng(0)
    steps = [(19, [19, 7, 0]), (1, [1, 1, 0]), (1, [1, 0, 0]), (5, [0, 5, 5]), (1, [1, 1, 1]), (1, [1, 1, 1]), (11, [3, 11, 1]), (1, [0, 1, 1])]
    found = []
    for i, (tokens, new) in enumerate(steps):
        if poison:
            backend.poison()
        counts = np.array(new, np.int32)
        found.append(np.where(counts[:, None] > 0, backend.step(rng.integers(0, 257, (3, tokens)), counts), 0.0))
        if i == 4:
            backend.reset([1])
            backend.rewind(0, 12)
    return found
