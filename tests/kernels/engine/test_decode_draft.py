"""The kernel that drafts against plain lists: what is settled of a step, where the conversation said the same before, and nothing else written."""

from __future__ import annotations

import fake_cuda
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from sessa_deploy.contract import STEP_ROWS
from sessa_deploy.kernels.engine import decode_draft
from sessa_deploy.kernels.launch import jit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOM = 5000 if DEVICE == "cuda" else 100


def options(block: int) -> dict[str, int]:
    pinned = jit.pinned(("decode_draft",), torch.device(DEVICE), torch.float32, "any")["decode_draft"]
    return {k: v for k, v in pinned.items() if k != jit.SHARE} | ({"BLOCK": block} if jit.interpreted() else {})


def check(text: list[int], picks: list[int], right: int, fed: int, rows: int, words: int = 1, block: int = 64) -> tuple[int, list[int]]:
    """(tokens settled, the next draft) of a step that fed `fed` rows behind text, whose draft was right in its first `right` tokens; all that a kernel may
    write is compared."""
    count, kind = len(text), np.int64 if words == 2 else np.int32
    whole = np.full(count + STEP_ROWS + 1, -5, np.int32)
    whole[:count] = text
    bets = np.array([99, *(pick + (at >= right) for at, pick in enumerate(picks[:-1]))], np.int32)
    start = [whole, bets, np.full(STEP_ROWS, -9, np.int32), np.array([count - 1 + fed], np.int32), np.array([fed], np.int32), np.array(picks, kind)]
    found = [torch.from_numpy(x.copy()).to(DEVICE) for x in start]
    decode_draft.decode_draft[(1,)](*found[:5], found[5].view(torch.int32), words, rows, **options(block))
    fake_cuda.draft((1, 1, 1), *(x.ctypes.data for x in start), words, rows)
    new = int(start[4][0])
    for mine, wanted, end in zip(found, start, (None, new, new, None, None, new), strict=True):
        np.testing.assert_array_equal(mine.cpu().numpy()[:end], wanted[:end])
    ids, drafted, told = (found[i].tolist() for i in (5, 1, 2))
    assert ids[new:rows] == [0] * (rows - new), "rows that do not count are fed what exists"
    assert ids[rows:] == picks[rows:] and drafted[rows:] == bets[rows:].tolist() and told[rows:] == [-9] * (STEP_ROWS - rows)
    return int(found[3][0]) - count + 1, told[1:new]


@pytest.mark.parametrize("seed", range(40))
def test_settled_tokens_and_drafts_are_those_of_lists(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary, count = int(rng.choice([2, 3, 5, 200])), int(rng.integers(1, ROOM))
    text = rng.integers(0, vocabulary, count)
    if seed % 3 == 0:
        text = np.resize(text[: 1 + seed], count)  # a text that goes round
    check(text.tolist(), rng.integers(0, vocabulary, STEP_ROWS).tolist(), int(rng.integers(0, 17)), int(rng.integers(1, 17)), int(rng.integers(1, 17)),
          int(rng.integers(1, 3)), int(rng.choice([16, 64, 256])))


def test_a_token_is_settled_as_far_as_the_draft_was_right() -> None:
    text, picks = [1, 2, 3, 4], list(range(10, 26))
    assert [check(text, picks, right, 8, 4)[0] for right in range(9)] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert check(text, picks, 9, 1, 4)[0] == 1, "a plain step settles one, whatever the draft of another was"
    assert check(text, picks, 15, 16, 16)[0] == 16


def test_the_longest_match_counts_and_of_equals_the_latest() -> None:
    picks = [7] * STEP_ROWS
    assert check([5, 6, 7, 1, 2, 6, 7, 3, 3, 5, 6], picks, 0, 1, 3) == (1, [1, 2])
    assert check([6, 7, 1, 2, 6, 7, 3, 3, 5, 6], picks, 0, 1, 3) == (1, [3, 3])
    assert check([1, 2, 3], picks, 0, 1, 8) == (1, []), "nothing like it was said"
    assert check([1, 7, 7], picks, 0, 1, 5) == (1, [7, 7, 7, 7]), "what runs out goes round"
    assert check([7], picks, 3, 4, 4) == (4, [7, 7, 7]), "the draft's own tokens are part of the conversation by then"
    assert check([8, 1, *range(20, 36), 9, 2, *range(20, 35)], [35] * STEP_ROWS, 0, 1, 2, block=16) == (1, [9])


def test_how_deep_places_are_told_apart() -> None:
    """By up to 16 tokens, and no further; 15 do not end the search."""
    long = list(range(100, 120))
    assert check([*long, 1, 200, *long[4:], 2, 201, *long[:-1]], [long[-1]] * STEP_ROWS, 0, 1, 2) == (1, [2])
    long = list(range(100, 116))
    assert check([*long, 1, 200, *long[4:], 2, 201, *long[:-1]], [long[-1]] * STEP_ROWS, 0, 1, 2) == (1, [1])
    assert check([*long, 1, *range(300, 340), *long[1:], 2, 201, *long[:-1]], [long[-1]] * STEP_ROWS, 0, 1, 2, block=16) == (1, [1])
    assert check([7, 1, 2], [7] * STEP_ROWS, 0, 1, 4) == (1, [1, 2, 7]), "behind the first token alone"


def test_high_words_of_ids_are_zeroed() -> None:
    text = torch.tensor([1, 7, 2, 3, *[-5] * 20], dtype=torch.int32, device=DEVICE)
    drafted, told = (torch.full((STEP_ROWS,), -9, dtype=torch.int32, device=DEVICE) for _ in range(2))
    past, new = (torch.tensor([x], dtype=torch.int32, device=DEVICE) for x in (4, 1))
    ids = torch.full((STEP_ROWS,), -1, dtype=torch.int64, device=DEVICE)  # memory that nobody has written
    ids[0] = 7
    decode_draft.decode_draft[(1,)](text, drafted, told, past, new, ids.view(torch.int32), 2, 4, **options(64))
    assert ids.tolist() == [7, 2, 3, 7, *[-1] * (STEP_ROWS - 4)]
