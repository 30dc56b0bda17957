"""The runtime's own kernels against numpy: ragged appends that write nothing else, argmax with ties and broken logits, lengths that advance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from sessa_deploy.kernels.engine import decode_io
from sessa_deploy.kernels.launch import jit
from sessa_deploy.kernels.launch.spec import WAITS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def table(entries: list[tuple[torch.Tensor, torch.Tensor, int]]) -> torch.Tensor:
    """(entries, 3) int64: addresses of new rows and cache, and 32-bit words a row."""
    return torch.tensor([[new.data_ptr(), cache.data_ptr(), words] for new, cache, words in entries], dtype=torch.int64, device=DEVICE)


def options(name: str) -> dict[str, Any]:
    pinned = jit.pinned((name,), torch.device(DEVICE), torch.float32, "any")[name]
    found = {k: v for k, v in pinned.items() if k != jit.SHARE}
    return found | {"SPLITS": 8} if "SPLITS" in found and jit.interpreted() else found  # fewer programs one by one


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("tokens", [1, 3])
def test_append_writes_the_valid_new_rows_and_nothing_else(tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    batch, capacity, widths = 4, 7, (4, 8, 516)  # the last is more than one block
    past, new = ints(0, 5, 7, 6), ints(tokens, min(2, tokens), tokens, 0)  # the third row is full, the fourth stands still
    rows = [torch.from_numpy(rng.integers(-(2**31), 2**31, (batch, tokens, w), dtype=np.int64).astype(np.int32)).to(DEVICE) for w in widths]
    caches = [torch.from_numpy(rng.integers(-(2**31), 2**31, (batch, capacity, w), dtype=np.int64).astype(np.int32)).to(DEVICE) for w in widths]
    expected = [c.cpu().numpy().copy() for c in caches]
    for b in range(batch):
        for t in range(int(new[b])):
            if int(past[b]) + t < capacity:
                for want, row in zip(expected, rows, strict=True):
                    want[b, int(past[b]) + t] = row[b, t].cpu().numpy()
    entries = table([(r, c, w) for r, c, w in zip(rows, caches, widths, strict=True)])
    decode_io.decode_append[(tokens, batch, len(widths))](entries, past, new, tokens, capacity, **options("decode_append"))
    for want, cache in zip(expected, caches, strict=True):
        np.testing.assert_array_equal(cache.cpu().numpy(), want)


@pytest.mark.parametrize("vocabulary", [1, 257, 70001])
def test_argmax_is_numpys_and_lengths_advance(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = rng.standard_normal((5, vocabulary)).astype(np.float32)
    logits[1] = 2.5  # all equal: the first
    logits[2, vocabulary // 2 :] = logits[2].max() + 1  # many equals beyond the first split
    logits[3] = -np.inf
    logits[3, -1] = -3e38
    logits[4, -1] = -np.inf if vocabulary > 1 else 0.0
    past, new = ints(0, 3, 9, 1, 4), ints(1, 0, 1, 7, 1)
    np.testing.assert_array_equal(run(logits, past, new), np.argmax(logits, axis=-1))
    assert past.tolist() == [1, 3, 10, 8, 5]


def test_broken_logits_give_minus_one_to_their_row_only() -> None:
    logits = np.zeros((5, 300), np.float32)
    logits[:, 7] = 1.0
    logits[0, 3], logits[1, 299], logits[2] = np.nan, np.inf, -np.inf
    logits[3, 8] = -np.inf
    assert run(logits, ints(0, 0, 0, 0, 0), ints(1, 1, 1, 1, 1)).tolist() == [-1, -1, -1, 7, 7]


def run(logits: np.ndarray, past: torch.Tensor, new: torch.Tensor, tokens: int = 1, *entries: tuple[torch.Tensor, torch.Tensor, int]) -> np.ndarray:
    """ids (B T,) of logits (B T,V), by one kernel that also appends the entries, for either type of the engine's ids; lengths advance once."""
    rows, vocabulary = logits.shape
    end, batch = options("decode_end"), rows // tokens
    best = torch.full((rows, end["SPLITS"]), torch.nan, device=DEVICE)
    where, ids, ended = torch.full_like(best, -5, dtype=torch.int32), ints(*[-5] * rows), ints(*[0] * batch)
    rows_of, capacity = table(list(entries) or [(best, best, 0)]), entries[0][1].shape[1] if entries else 0
    length = past.clone()
    for kind, words in ((torch.int32, 1), (torch.int64, 2)):  # of the engine's ids; what lies behind the batch is somebody else's
        past.copy_(length)
        following = torch.full((rows + 1,), -7, dtype=kind, device=DEVICE)
        decode_io.decode_end[(len(entries) + end["SPLITS"], tokens, batch)](
            rows_of, torch.from_numpy(logits).to(DEVICE), best, where, ended, past, new, ids, following.view(torch.int32), words, len(entries), capacity,
            vocabulary, **end)  # fmt: skip
        assert following.tolist() == [*ids.clamp(min=0).tolist(), -7] and not ended.any()
    return ids.cpu().numpy()


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_kernel_appends_and_picks_behind_every_row(tokens: int) -> None:
    """Rows go where the lengths stood before they advanced, to no sequence that is full or stands still, and to nobody else."""
    rng = np.random.default_rng(tokens)
    batch, capacity, widths = 4, 7, (4, 516)
    past, new = ints(0, 4, 7, 6), ints(tokens, min(2, tokens), tokens, 0)
    before = past.tolist()
    words = lambda *shape: torch.from_numpy(rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)).to(DEVICE)  # noqa: E731
    rows, caches = [words(batch, tokens, w) for w in widths], [words(batch, capacity, w) for w in widths]
    expected = [c.cpu().numpy().copy() for c in caches]
    for b, t in np.ndindex(batch, tokens):
        if t < int(new[b]) and before[b] + t < capacity:
            for want, row in zip(expected, rows, strict=True):
                want[b, before[b] + t] = row[b, t].cpu().numpy()
    logits = rng.standard_normal((batch * tokens, 300)).astype(np.float32)
    logits[-1, 5] = np.nan
    want = np.argmax(logits, axis=-1)
    want[-1] = -1
    np.testing.assert_array_equal(run(logits, past, new, tokens, *zip(rows, caches, widths, strict=True)), want)
    assert past.tolist() == [n + c for n, c in zip(before, new.tolist(), strict=True)]
    for want, cache in zip(expected, caches, strict=True):
        np.testing.assert_array_equal(cache.cpu().numpy(), want)


@pytest.mark.skipif(not jit.interpreted(), reason="the interpreter alone runs programs in an order of the test's")
def test_whoever_ends_last_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in the opposite order, so that one that copies is the last: it sees what all found, and no program a length that has advanced."""
    from triton.runtime import interpreter

    end, seat = options("decode_end"), interpreter.interpreter_builder.set_grid_idx
    grid = (1 + end["SPLITS"], 2, 1)
    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", lambda x, y, z: seat(grid[0] - 1 - x, grid[1] - 1 - y, z))
    rows, cache = torch.arange(16, dtype=torch.int32).reshape(1, 2, 8), torch.zeros(1, 4, 8, dtype=torch.int32)
    logits = np.stack([np.arange(300, dtype=np.float32), -np.arange(300, dtype=np.float32)])
    past = ints(1)
    assert run(logits, past, ints(2), 2, (rows, cache, 8)).tolist() == [299, 0]
    assert past.tolist() == [3] and cache[0, 1:3].flatten().tolist() == list(range(16)) and not cache[0, 0].any() and not cache[0, 3].any()


@pytest.mark.skipif(not jit.interpreted(), reason="the interpreter alone shows who reads what before the wait")
def test_kernels_that_start_early_wait_before_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel before writes is there once a program has waited: new rows and logits; what it does not write, lengths and addresses, is read ahead."""

    from triton.runtime import interpreter

    from sessa_deploy.kernels import device

    seat, done = interpreter.interpreter_builder.set_grid_idx, list[list[str]]()
    written: dict[str, torch.Tensor] = {}
    ahead: dict[str, torch.Tensor] = {}

    def begins(*at: int) -> None:
        seat(*at)
        done.append([])
        for name, x in ahead.items():
            written[name] = x.clone()
            x.fill_(-9)

    def waits() -> None:
        done[-1].append("waits")
        for name, x in ahead.items():
            x.copy_(written[name])

    monkeypatch.setattr(device, "gdc_wait", waits)
    monkeypatch.setattr(device, "gdc_launch_dependents", lambda: done[-1].append("opens"))
    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", begins)
    past, new, ids, following = ints(2), ints(1), ints(-5), ints(-5)
    row, cache, logits = torch.arange(8, dtype=torch.int32), torch.zeros(4, 8, dtype=torch.int32), torch.arange(300.0)
    ahead = {"row": row}
    decode_io.decode_append[(1, 1, 1)](table([(row, cache, 8)]), past, new, 1, 4, **options("decode_append"), PDL=WAITS)
    assert done == [["waits", "opens"]] and cache[2].tolist() == list(range(8)) and not cache[:2].any()
    cache.zero_()
    ahead, end = {"row": row, "logits": logits}, options("decode_end")
    best, where, ended = torch.zeros(1, end["SPLITS"]), torch.zeros(1, end["SPLITS"], dtype=torch.int32), ints(0)
    arguments = table([(row, cache, 8)]), logits, best, where, ended, past, new, ids, following, 1
    done[:] = []
    decode_io.decode_end[(1 + end["SPLITS"], 1, 1)](*arguments, 1, 4, 300, **end, PDL=WAITS)
    assert done == [["waits", "opens"]] * (1 + end["SPLITS"]) and ids.tolist() == following.tolist() == [299] and past.tolist() == [3]
    assert cache[2].tolist() == list(range(8)) and not cache[:2].any()
