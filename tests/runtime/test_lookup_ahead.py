"""Prompt lookup where the backend looks ahead: the next draft is on its way while the tokens of a step are shown, and comes to nothing where they end."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batching import Toy
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


class Counted(Watched):
    """Counts the steps that are begun, of every kind, and those that are waited for."""

    begun = ended = 0

    def _begin(self, begun: Any) -> None:
        self.begun += 1

    def _begin_next(self, begun: Any) -> bool:
        self.begun += 1
        return True

    def _begin_row_picks(self, row: int, ids: Any) -> None:
        self.begun += 1

    def _end(self, begun: Any) -> Any:
        self.ended += 1
        return super()._end(begun)

    def _pick_row_all(self, row: int, ids: Any) -> Any:
        self.ended += 1
        return super()._pick_row_all(row, ids)


class Two(Toy):
    """Two sequences with the logits of every token."""

    all_logits = True

    def _forward_all(self, ids: Any, new: Any) -> Any:
        found, before = [], self.length.copy()
        for at in range(ids.shape[1]):
            found.append(self._forward(ids[:, at : at + 1], (new > at).astype(np.int32)))
            self.length += new > at
        self.length[:] = before
        return np.stack(found, 1)


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


def test_note_is_taken_while_the_step_runs(session: Session) -> None:
    behind, end = [], session.backend._pick_row_all

    def picks(row: int, ids: Any) -> Any:
        drafter = session._slots[0].drafter
        assert drafter is not None
        behind.append(len(drafter.tokens) - drafter._known)
        return end(row, ids)

    session.backend._pick_row_all = picks
    list(shown(session))
    drafter = session._slots[0].drafter
    assert len(behind) > 3 and not any(behind)
    list(shown(session))
    assert session._slots[0].drafter is drafter, "what was learnt serves the next turn"


class Interrupt:
    """Ctrl-C at the n-th line of what draws and drafts."""

    FILES = ("/runtime/session.py", "/runtime/lookup.py", "/runtime/generation.py", "/runtime/backend.py")

    def __init__(self, lines: int) -> None:
        self.left = lines

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(self.FILES):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("lookup", [8, 0])
def test_ctrl_c_at_many_lines_leaves_a_conversation_that_goes_on(session: Session, lookup: int, first: int) -> None:
    session.lookup, interrupted, tracing = lookup, 0, sys.gettrace()
    for lines in itertools.count(60 + 5 * first, 20):
        session.reset()
        session.prefill([[*SOURCE, *SOURCE[:24]]])
        stream = session.stream([SOURCE[24:25]], 24, stop_tokens=())
        try:
            sys.settrace(Interrupt(lines))
            list(stream)
            break
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(tracing)
        found = session.generate([[7]], 12, stop_tokens=())[0].tokens
        plain = Session(session.bundle, Context(WORDS, seed=2))
        assert found == plain.generate([session.tokens()[:-12]], 12, stop_tokens=())[0].tokens, lines
        assert session.backend.length[0] == len(session.tokens()) - 1, lines
    assert interrupted > 50


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
    others: dict[str, Any] = {"step": lambda: backend.step(one, new), "greedy": lambda: backend.begin_greedy(one, new), "rewind": lambda: backend.rewind(0, 3),
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
    assert backend.under_way == 0, "and it calls off what was begun for its sequence"
    length = int(backend.length[0])
    for wrong in (np.array([257]), np.array([], np.int64), np.array([[1]])):
        with pytest.raises(UserError):
            backend.begin_row_picks(0, wrong)
    assert backend.length[0] == length


def test_other_sequences_keep_what_was_begun_for_them() -> None:
    backend = Two(WORDS, 2, 50)
    backend.begin_greedy(np.array([[1], [2]]), np.ones(2, np.int32))
    backend.step_row_picks(0, np.array([3, 4]))
    backend.end_greedy()
    assert backend.length.tolist() == [2, 1]


def test_nothing_is_begun_that_nobody_waits_for(tmp_path: Path, eager: None) -> None:
    session = Session(write_bundle(tmp_path / "b", {"model.onnx": b"unused"}, WORDS, "fp32", {}), Counted(WORDS, seed=2), lookup=8)
    for prompt in (SOURCE, [1, 2, 3]):
        session.generate([prompt], 60, stop_tokens=())
        assert session.backend.begun == session.backend.ended > 20


def test_somebody_else_at_the_backend_costs_a_step_and_nothing_else(session: Session) -> None:
    expected = list(shown(session))
    for other in (lambda: session.backend.rewind(0, int(session.backend.length[0])), session.backend.call_off):
        session.reset()
        found = []
        for token in shown(session):
            found.append(token)
            other()
        assert found == expected


@pytest.mark.parametrize("tokens", range(1, 40, 2))
def test_a_stream_that_is_dropped_leaves_what_was_learnt(session: Session, tokens: int) -> None:
    stream = shown(session)
    for _ in range(tokens):
        next(stream)
    drafter = session._slots[0].drafter
    assert drafter is not None
    stream.close()
    learnt = sum(drafter._tries)
    more = session.generate([[7, 8]], 20, stop_tokens=())[0]
    assert session._slots[0].drafter is drafter and drafter.tokens == session.tokens()[: len(drafter.tokens)] and sum(drafter._tries) >= learnt - 1
    plain = Session(session.bundle, Context(WORDS, seed=2))
    assert plain.generate([session.tokens()[: -len(more.tokens)]], 20, stop_tokens=())[0].tokens == more.tokens


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
    assert Drafter(list(range(30)), 8, (0.0, 0.0)).draft_behind([], 4) == [], "the end is no place to go on from"
    loop = Drafter([5, 6, 7] * 6, 8, (0.0, 0.0))
    assert loop.draft_behind([5, 6], 8)[:4] == [7, 5, 6, 7]
    assert loop.draft_behind([], 0) == []
