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


def check_laid(backend: Any, reference: Any, row: int, alignment: int) -> None:
    """Prompts of one sequence give `reference`'s logits and cached rows, with new rows laid in the caches where they begin at a multiple of `alignment`
    bytes and fit, and appended elsewhere: in buffers of their own nothing is then written. More tokens a step than are recorded, up to a full cache."""
    rng, ids = np.random.default_rng(5), np.ones((backend.batch, 1), np.int64)
    for tokens, keep in ((20, 20), (17, 37), (2, 16), (20, 36), (backend.capacity - 36, 3), (17, 20)):
        backend.poison()
        before = int(backend.length[row])
        fed = rng.integers(0, 257, tokens)
        np.testing.assert_allclose(backend.step_row(row, fed), reference.step_row(row, fed), rtol=1e-5, atol=1e-5)
        for (name, mine), theirs in zip(backend.cached(row).items(), reference.cached(row).values(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
        for entry in backend._buffers.entries:
            laid = (tokens > backend.recorded_tokens or backend.batch > 1) and all(before * e.row % alignment == 0 for e in backend._buffers.entries)
            assert np.isnan(np.frombuffer(backend._cuda.read(entry.fresh, entry.row), np.float32)).all() == laid, (tokens, before)
        for each in (backend, reference):
            each.rewind(row, keep)
        np.testing.assert_array_equal(backend.step_greedy(ids, ids[:, 0]), reference.step_greedy(ids, ids[:, 0]))
        for each in (backend, reference):
            each.rewind(row, keep)
