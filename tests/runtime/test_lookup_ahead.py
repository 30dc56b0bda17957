"""Prompt lookup where the backend looks ahead: the next draft is on its way while the tokens of a step are shown, and comes to nothing where they end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_lookup import SOURCE, WORDS, Context

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.bundle import write_bundle
from sessa_deploy.runtime.generation import settled
from sessa_deploy.runtime.lookup import MOST_DRAFTED, Drafter
from sessa_deploy.runtime.session import Session


class Watched(Context):
    """A toy that looks ahead and says when steps of one sequence are begun and ended."""

    looks_ahead = True

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.seen: list[str] = []

    def _begin_row_picks(self, row: int, ids: Any) -> None:
        assert len(ids) > 1 and not self.under_way
        self.seen.append("begin")

    def _pick_row_all(self, row: int, ids: Any) -> Any:
        self.seen.append("end")
        return super()._pick_row_all(row, ids)


@pytest.fixture
def session(tmp_path: Path, eager: None) -> Session:
    return Session(write_bundle(tmp_path / "b", {"model.onnx": b"unused"}, WORDS, "fp32", {}), Watched(WORDS, seed=2), lookup=8)


def shown(session: Session, prompt: list[int] = SOURCE, **end: Any) -> Iterator[int]:
    for chunk in session.stream([prompt], 60, **{"stop_tokens": (), **end}):
        session.backend.seen.append("token")
        yield chunk.token


def test_a_draft_is_begun_before_the_tokens_of_the_step_before_are_shown(session: Session) -> None:
    tokens, seen = list(shown(session)), session.backend.seen
    assert len(tokens) == 60 and seen.count("begin") == seen.count("end") > 3, "each is waited for"
    steps = " ".join(seen).split("end")[1:]
    early = [step.split().index("begin") == 0 for step in steps if "begin" in step and step.count("token") > 1]
    assert len(early) > 3 and all(early)
    assert session.backend.length[0] == len(session.tokens()) - 1


def test_a_text_that_ends_calls_off_what_was_begun(session: Session) -> None:
    prompt = [*SOURCE, *shown(session), SOURCE[-1]]  # what follows depends on the last token alone, and was said before
    session.reset()
    whole = list(shown(session, prompt))
    called_off = 0
    for token in dict.fromkeys(whole):
        session.reset()
        session.backend.seen.clear()
        found = list(shown(session, prompt, stop_tokens=token))
        assert found == whole[: whole.index(token) + 1]
        assert session.backend.length[0] == len(session.tokens()) - 1
        called_off += session.backend.seen.count("begin") - session.backend.seen.count("end")
        with pytest.raises(UserError, match="no step of one sequence to end"):
            session.backend.end_row_picks()
    assert called_off > 0, "one of them ended with a step under way"


def test_a_session_that_is_used_while_a_stream_is_open(session: Session) -> None:
    """Whatever is under way then: what the other call computes is its own, and the stream says what happened."""
    expected = session.generate([[5, 6, 7]], 9)
    for tokens in range(1, 30):
        session.reset()
        stream = session.stream([SOURCE], 60, stop_tokens=())
        for _ in range(tokens):
            next(stream)
        session.reset()
        assert session.generate([[5, 6, 7]], 9) == expected
        with pytest.raises(UserError, match="used for something else"):
            next(stream)
            next(stream)


def test_what_is_begun_advances_nothing_and_another_step_calls_it_off() -> None:
    backend, plain = Watched(WORDS, seed=2), Context(WORDS, seed=2)
    backend.step(np.array([[1, 2]]), np.array([2]))
    plain.step(np.array([[1, 2]]), np.array([2]))
    with pytest.raises(UserError, match=r"no step of one sequence to end.*begin_row_picks first"):
        backend.end_row_picks()
    backend.begin_row_picks(0, np.array([3, 4, 5]))
    assert backend.length[0] == 2
    expected = plain.step_row_picks(0, np.array([3, 4, 5]))
    np.testing.assert_array_equal(backend.end_row_picks(), expected)
    assert backend.length[0] == plain.length[0] == 5
    one, new = np.array([[7]]), np.array([1])
    others = {"step": lambda: backend.step(one, new), "greedy": lambda: backend.begin_greedy(one, new), "rewind": lambda: backend.rewind(0, 3),
              "row": lambda: backend.step_row(0, one[0]), "reset": backend.reset, "call_off": backend.call_off, "this": lambda: backend.call_off(0)}
    for name, other in others.items():
        backend.begin_row_picks(0, np.array([3, 4, 5]))
        other()
        with pytest.raises(UserError, match="no step"):
            backend.end_row_picks()
        backend.call_off()
        assert backend.under_way == 0, name
    backend.begin_greedy(one, new)
    backend.begin_row_picks(0, np.array([3, 4]))
    assert backend.under_way == 0, "and it calls off what was begun before"
    length = int(backend.length[0])
    for wrong in (np.array([257]), np.array([], np.int64), np.array([[1]])):
        with pytest.raises(UserError):
            backend.begin_row_picks(0, wrong)
    assert backend.length[0] == length


@pytest.mark.parametrize(("found", "draft", "expected"), [
    ([7], [], [7]), ([7, 8, 9], [7, 8], [7, 8, 9]), ([7, 8, 9], [7, 1], [7, 8]), ([7, 8, 9], [1, 8], [7]), ([-1, 8, 9], [7, 8], []), ([7, -1], [1], []),
    ([np.zeros(3, np.float32)], [], []),
])  # fmt: skip
def test_what_a_step_settles(found: list[Any], draft: list[int], expected: list[int]) -> None:
    assert settled(found, draft) == expected


@pytest.mark.parametrize("seed", range(6))
def test_drafting_before_note_is_taken_teaches_the_same(seed: int) -> None:
    """Texts that repeat themselves, in steps of what was drafted and one token more: what is known afterwards is what it is token by token."""
    rng = np.random.default_rng(seed)
    phrases = [rng.integers(0, 9, rng.integers(4, 20)).tolist() for _ in range(4)]
    text = [int(t) for _ in range(60) for t in (*phrases[rng.integers(4)], *rng.integers(0, 9, rng.integers(0, 3)))]
    early, late = Drafter(text[:40], MOST_DRAFTED, (0.2, 0.05)), Drafter(text[:40], MOST_DRAFTED, (0.2, 0.05))
    draft, agreed, drafted, same, steps = early.draft(MOST_DRAFTED), 0, 0, 0, 0
    while len(early.tokens) < len(text) - MOST_DRAFTED - 1:
        ahead = text[len(early.tokens) :]
        right = next((i for i, token in enumerate(draft) if ahead[i] != token), len(draft))
        agreed, drafted = agreed + right, drafted + len(draft)
        coming = ahead[: right + 1]
        draft = early.draft_behind(coming, MOST_DRAFTED)
        late.tokens += coming
        expected = late.draft(MOST_DRAFTED)
        same, steps = same + (draft == expected), steps + 1
        early.sees_more()
        assert {k: v for k, v in vars(early).items() if k != "drafting"} == {k: v for k, v in vars(late).items() if k != "drafting"}
        assert early.tokens == text[: len(early.tokens)]
    assert agreed > 0.3 * drafted > 50 and same > 0.9 * steps, "and so are most drafts"


def test_a_draft_behind_a_wrong_token_is_found_anew_and_one_behind_a_loop_goes_round() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 3 + [20, 21, 22, 23, 24, 25, 26, 27] * 3
    made = Drafter([*text, 1, 2, 3, 4, 5, 6, 7], 7, (0.0, 0.0))
    assert made.draft(7)[0] == 8
    assert made.draft_behind([8, 9, 20], 7) == [], "nobody knows what follows these"
    made.sees_more()
    assert made.draft_behind([21, 22, 23, 24, 25], 3) == [26, 27, 1], "known again"
    loop = Drafter([5, 6, 7] * 6, 8, (0.0, 0.0))
    assert loop.draft_behind([5, 6], 8)[:4] == [7, 5, 6, 7]
    assert loop.draft_behind([], 0) == []
