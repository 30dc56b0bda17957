"""Prompt lookup where the backend makes drafts itself: the next step is on its way while the tokens of one are shown, and comes to nothing where they end."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from batching import Toy
from drafting import WORDS
from fake_cuda import likely
from test_lookup import SOURCE, Context

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.sampling import NotFinite, SamplingParams
from sessa_deploy.runtime.session import Session

ONE = np.ones(1, np.int32)


class Watched(Context):
    """A toy that makes drafts itself and says when steps are begun and ended; `seen` holds their rows."""

    looks_ahead = itself = True

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.seen: list[str] = []

    def _begin(self, begun: Any) -> None:
        self.seen.append("begin 1")

    def _begin_next(self, begun: Any) -> bool:
        self.seen.append("begin 1")
        return True

    def _begin_drafted(self, begun: Any) -> bool:
        self.seen.append(f"begin {begun.rows}")
        return super()._begin_drafted(begun)

    def _end_drafted(self, begun: Any) -> tuple[list[int], list[int]]:
        self.seen.append(f"end {max(begun.rows, 1)}")
        return super()._end_drafted(begun)


class Reciting(Watched):
    """Says text[n] behind n tokens, whatever they are."""

    def __init__(self, text: list[int], *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.recited = text

    def _after(self, tokens: list[int]) -> np.ndarray:
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[self.recited[len(tokens)] if len(tokens) < len(self.recited) else 0] = 1.0
        return logits


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
def session(words_bundle: Bundle, eager: None) -> Session:
    return Session(words_bundle, Watched(WORDS, seed=2), lookup=8)


def shown(session: Session, prompt: list[int] = SOURCE, **end: Any) -> Iterator[int]:
    for chunk in session.stream([prompt], 60, **{"stop_tokens": (), **end}):
        session.backend.seen.append("token")
        yield chunk.token


def test_each_step_is_begun_before_the_one_before_it_is_waited_for(session: Session) -> None:
    tokens, seen = list(shown(session)), session.backend.seen
    plain = Session(session.bundle, Context(WORDS, seed=2))
    assert tokens == plain.generate([SOURCE], 60, stop_tokens=())[0].tokens
    steps = [event for event in seen if event != "token"]
    begun, ended = ([event.split()[1] for event in steps if what in event] for what in ("begin", "end"))
    assert begun[: len(ended)] == ended and len(begun) <= len(ended) + 1, "each is waited for, but one that is behind the end"
    assert steps[0].startswith("begin") and all(e.startswith("begin" if at % 2 == 0 else "end") for at, e in enumerate(steps[1 : 2 * len(ended) - 1]))
    assert {"8", "9"} & set(ended) and len(ended) < len(tokens) - 5, "several tokens come of one"
    assert session.backend.length[0] == len(session.tokens()) - 1


def test_only_what_is_new_is_told(session: Session) -> None:
    backend = session.backend
    list(shown(session))
    first = sum(backend.told)
    assert backend.told and first <= len(session.tokens()) and backend.text == session.tokens()[: len(backend.text)]
    drafter = session._slots[0].drafter
    list(shown(session))
    assert session._slots[0].drafter is drafter, "what was learnt serves the next turn"


@pytest.mark.parametrize("seed", range(8))
def test_drafting_begins_and_ends_by_what_it_brings(words_bundle: Bundle, seed: int) -> None:
    """Texts that go round, or nowhere, by turns; what is drawn is what plain decoding draws."""
    rng = np.random.default_rng(seed)
    loop, noise = rng.integers(0, 257, 40).tolist(), rng.integers(0, 257, 70).tolist()
    text = [*loop * 3, *noise, *loop * 2, *noise[:30], *loop, *rng.integers(0, 257, 50).tolist()]
    session = Session(words_bundle, Reciting(text, WORDS, 400), lookup=15)
    found = session.generate([text[:50]], len(text) - 50, stop_tokens=())[0].tokens
    assert found == text[50:]
    backend, stats = session.backend, session.drafts
    assert stats.accepted > 80 and stats.steps < 0.8 * len(found)
    assert set(backend.ended_rows) == {8, 16}, "more rows where the latest steps were right in full"
    plain = stats.steps - len(backend.ended_rows)
    assert plain > 40, "and one where nothing repeats"
    assert len(backend.told) > 1 and sum(backend.told) < 2 * len(text)


def test_nothing_is_drafted_where_nothing_repeats(words_bundle: Bundle) -> None:
    session = Session(words_bundle, Watched(WORDS, seed=2, order=400), lookup=8)  # a text in which every token depends on all before it
    session.generate([list(range(40))], 120, stop_tokens=())
    assert session.drafts.drafted == 0 and not session.backend.told


def test_rows_that_are_drawn_are_verified_here(words_bundle: Bundle, eager: None) -> None:
    session, plain = Session(words_bundle, Watched(WORDS, seed=2, sharp=4.0), lookup=8), Session(words_bundle, Context(WORDS, seed=2, sharp=4.0))
    params = SamplingParams(0.8, seed=3)
    assert session.generate([SOURCE], 60, params, ())[0] == plain.generate([SOURCE], 60, params, ())[0]
    assert session.drafts.drafted and not session.backend.seen


class Interrupt:
    """Ctrl-C at the n-th line of what draws and drafts."""

    FILES = tuple(f"/runtime/{name}.py" for name in ("session", "lookup", "drafted", "generation", "backend", "begun"))

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


def test_a_text_that_ends_anywhere(session: Session) -> None:
    prompt = [*SOURCE, *shown(session), SOURCE[-1]]  # what follows depends on the last token alone, and was said before
    session.reset()
    whole = list(shown(session, prompt))
    behind = 0
    for token in dict.fromkeys(whole):
        session.reset()
        found = list(shown(session, prompt, stop_tokens=token))
        assert found == whole[: whole.index(token) + 1]
        assert session.backend.length[0] == len(session.tokens()) - 1
        behind += session.backend.under_way
        plain = Session(session.bundle, Context(WORDS, seed=2))
        assert session.generate([[5]], 9, stop_tokens=())[0].tokens == plain.generate([session.tokens()[:-9]], 9, stop_tokens=())[0].tokens
        assert session.backend.under_way == 0, "a limit can be foreseen"
    assert behind > 0, "one of them ended with a step under way"


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


def test_somebody_else_at_the_backend_costs_a_step_and_nothing_else(session: Session) -> None:
    expected = list(shown(session))
    for other in (lambda: session.backend.rewind(0, int(session.backend.length[0])), session.backend.call_off):
        session.reset()
        found = []
        for token in shown(session):
            found.append(token)
            if len(found) % 3 == 0 and session.backend.length[0] == len(session.tokens()) - 1:  # between two steps
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


@pytest.mark.parametrize("capacity", range(111, 130))
def test_no_step_is_begun_for_which_there_is_no_room(words_bundle: Bundle, eager: None, capacity: int) -> None:
    made = [Session(words_bundle, toy, lookup=n) for toy, n in ((Watched(WORDS, capacity, seed=2), 8), (Context(WORDS, capacity, seed=2), 0))]
    found, expected = (session.generate([SOURCE], stop_tokens=())[0] for session in made)
    assert found == expected and found.finish == "context" and made[0].backend.under_way == 0 and made[0].backend.length[0] == capacity


def test_the_contract_of_steps_with_drafts_of_their_own() -> None:
    backend, plain = Watched(WORDS, 64, seed=2), Context(WORDS, 64, seed=2)
    text = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    for each in (backend, plain):
        each.step(np.array([text[:-1]]), np.array([len(text) - 1]))
    assert not backend.begin_drafted(8), "it was not told to expect them"
    backend.expect_rows(8)
    assert backend.draft_rows == (8,)
    with pytest.raises(UserError, match=r"no greedy step to end.*begin_greedy first"):
        backend.end_drafted()
    assert not backend.begin_drafted(8), "behind none"
    backend.begin_greedy(np.array([text[-1:]]), ONE)
    backend.tell(text, 0)
    assert not backend.begin_drafted(7) and backend.begin_drafted(8) and not backend.begin_drafted(8) and not backend.begin_next(ONE)
    assert backend.under_way == 2 and backend.length[0] == len(text) - 1
    tokens, drafted = backend.end_drafted()
    text += tokens
    assert drafted == 0 and len(tokens) == 1 and backend.length[0] == len(text) - 1 and backend.begin_drafted(8)
    for _ in range(6):
        draft = likely(text, 7)
        tokens, drafted = backend.end_drafted()
        picks = plain.step_row_picks(0, np.array([text[-1], *draft])) if plain.length[0] == len(text) - 1 else None
        if picks is None:
            plain.step(np.array([text[int(plain.length[0]) : -1]]), np.array([len(text) - 1 - int(plain.length[0])]))
            picks = plain.step_row_picks(0, np.array([text[-1], *draft]))
        assert drafted == len(draft) and tokens == picks[: len(tokens)].tolist() and draft[: len(tokens) - 1] == tokens[:-1]
        assert len(tokens) == len(picks) or draft[len(tokens) - 1] != tokens[-1]
        text += tokens
        plain.rewind(0, len(text) - 1)
        assert backend.length[0] == len(text) - 1 and (backend.begin_drafted(8) or len(text) + 15 > 64)
    length = int(backend.length[0])
    others: dict[str, Any] = {"step": lambda: backend.step(np.array([[7]]), ONE), "row": lambda: backend.step_row(0, np.array([7])), "reset": backend.reset,
                              "picks": lambda: backend.step_row_picks(0, np.array([7, 8])), "rewind": lambda: backend.rewind(0, 0),
                              "call_off": backend.call_off, "this": lambda: backend.call_off(0)}
    for name, other in others.items():
        backend.rewind(0, min(length, int(backend.length[0]), 9))
        backend.begin_greedy(np.array([[7]]), ONE)
        backend.tell([*backend.rows[0][: int(backend.length[0])], 7], 0)
        assert backend.begin_drafted(8), name
        other()
        assert backend.under_way == 0 and not backend.begin_drafted(8), name


def test_a_plain_step_behind_one_with_a_draft() -> None:
    backend, plain = Watched(WORDS, 64, seed=2), Context(WORDS, 64, seed=2)
    backend.expect_rows(4)
    text = [1, 2, 3, 1, 2, 3, 1]
    for each in (backend, plain):
        each.step(np.array([text[:-1]]), np.array([len(text) - 1]))
    backend.begin_greedy(np.array([text[-1:]]), ONE)
    backend.tell(text, 0)
    assert backend.begin_drafted(4)
    text += backend.end_drafted()[0]
    assert backend.begin_next(ONE)
    text += backend.end_drafted()[0]
    assert backend.begin_next(ONE)
    for _ in range(2):
        tokens, drafted = backend.end_drafted()
        assert (len(tokens), drafted) == (1, 0)
        text += tokens
    for at in range(7, len(text)):
        assert plain.step_greedy(np.array([text[at - 1 : at]]), ONE)[0] == text[at]


@pytest.mark.parametrize("broken", range(0, 60, 4))
def test_logits_that_are_not_finite_are_told_of_with_their_token(session: Session, broken: int) -> None:
    whole = list(shown(session))
    token = whole[broken]
    at = whole.index(token)
    toy = Watched(WORDS, seed=2, broken=(token,))
    again, found = Session(session.bundle, toy, lookup=8), []
    if token in SOURCE[-1:]:
        pytest.skip("the prompt ends with it")
    with pytest.raises(NotFinite):
        for one in shown(again):
            found.append(one)
    assert found == whole[: at + 1] and again.tokens() == [*SOURCE, *found]
    toy.broken = ()
    plain = Session(session.bundle, Context(WORDS, seed=2))
    assert again.generate([[]], 9, stop_tokens=())[0].tokens == plain.generate([again.tokens()[:-9]], 9, stop_tokens=())[0].tokens


def test_other_sequences_keep_what_was_begun_for_them() -> None:
    backend = Two(WORDS, 2, 50)
    backend.begin_greedy(np.array([[1], [2]]), np.ones(2, np.int32))
    backend.step_row_picks(0, np.array([3, 4]))
    backend.end_greedy()
    assert backend.length.tolist() == [2, 1]
