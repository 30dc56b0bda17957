"""Steps over three sequences of a byte model that every session on a GPU is driven through."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest


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
        _check_cached(backend, reference, row)
        for entry in backend._buffers.entries:
            laid = (tokens > backend.recorded_tokens or backend.batch > 1) and all(before * e.row % alignment == 0 for e in backend._buffers.entries)
            assert np.isnan(np.frombuffer(backend._cuda.read(entry.fresh, entry.row), np.float32)).all() == laid, (tokens, before)
        for each in (backend, reference):
            each.rewind(row, keep)
        np.testing.assert_array_equal(backend.step_greedy(ids, ids[:, 0]), reference.step_greedy(ids, ids[:, 0]))
        for each in (backend, reference):
            each.rewind(row, keep)
    # one step of all sequences, whose rows never are laid there: they do not lie one behind the other
    ids = rng.integers(0, 257, (backend.batch, backend.recorded_tokens + 2))
    counts = np.full(backend.batch, ids.shape[1], np.int32)
    np.testing.assert_allclose(backend.step(ids, counts), reference.step(ids, counts), rtol=1e-5, atol=1e-5)
    for each in range(backend.batch):
        _check_cached(backend, reference, each)


def check_torn(backend: Any, reference: Any, patch: pytest.MonkeyPatch, calls: Sequence[tuple[Any, str, int, int]]) -> None:
    """A prompt's step that Ctrl-C ends in a call of a function leaves nothing behind: what is fed then gives `reference`'s logits and cached rows.

    calls: (owner, name, which call; 0: behind the first, rows of the torn step). It lays its rows elsewhere than the one before it, of 16, in the same sequence
    or, where there are others, in another; then the first goes on, or begins anew.
    """
    rng, other = np.random.default_rng(6), backend.batch - 1
    ids, one = np.ones((backend.batch, 1), np.int64), np.ones(backend.batch, np.int32)
    for (owner, name, count, rows), torn, goes_on in itertools.product(calls, (0, other), (True, False)):
        said = f"{name} {count} {torn} {goes_on}"
        for each in (backend, reference):
            each.reset()
        backend.poison()
        first, cut, more, again = rng.integers(0, 257, (4, 16))
        for each in (backend, reference):
            each.step_row(other, again[: 8 if goes_on else 16])
            each.reset([0])
            each.step_row(0, first)
        with patch.context() as during:
            during.setattr(owner, name, _cut_short(getattr(owner, name), count))
            with pytest.raises(KeyboardInterrupt):
                backend.step_row(torn, cut[:rows])
        np.testing.assert_array_equal(backend.length, reference.length)
        for each in (backend, reference):
            each.reset([] if goes_on else None)
        for row, fed in ((0, more), (other, again)):
            np.testing.assert_allclose(backend.step_row(row, fed), reference.step_row(row, fed), rtol=1e-5, atol=1e-5, err_msg=said)
        np.testing.assert_array_equal(backend.step_greedy(ids, one), reference.step_greedy(ids, one), err_msg=said)
        for row in {0, other}:
            _check_cached(backend, reference, row)


def _cut_short(function: Any, count: int) -> Any:
    """The function, until its count-th call; 0: behind its first."""
    calls = itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        number = next(calls)
        if number == count:
            raise KeyboardInterrupt
        done = function(*arguments, **named)
        if count == 0:
            raise KeyboardInterrupt
        return done

    return call


def _check_cached(backend: Any, reference: Any, row: int) -> None:
    for (name, mine), theirs in zip(backend.cached(row).items(), reference.cached(row).values(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5, err_msg=f"{name} of {row}")
