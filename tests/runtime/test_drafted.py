"""When drafts are made, how long, and until when, where the backend makes them itself or the host does; what its steps do at their edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drafting import WORDS
from test_lookup import SOURCE
from test_lookup_ahead import ONE, Reciting, Watched

from sessa_deploy.errors import SessaError
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.drafted import Verified
from sessa_deploy.runtime.generation import Row
from sessa_deploy.runtime.lookup import Drafter
from sessa_deploy.runtime.sampling import Sampler, SamplingParams
from sessa_deploy.runtime.session import Session

REST = np.random.default_rng(0).permutation(np.arange(30, 250)).tolist()  # in which nothing repeats


def recited(words_bundle: Bundle, text: list[int]) -> Session:
    """A session that has drawn a text from its 50th token on."""
    toy = Reciting(text, WORDS, 700)
    toy.draft_cost = (0.1, 0.02)
    session = Session(words_bundle, toy, lookup=15)
    assert session.generate([text[:50]], len(text) - 50, stop_tokens=())[0].tokens == text[50:]
    return session


def test_what_comes_to_an_end_is_soon_known(words_bundle: Bundle) -> None:
    session = recited(words_bundle, [*list(range(20)) * 15, *REST])
    assert 16 < len(session.backend.ended_rows) < 40
    drafter = session._slots[0].drafter
    assert drafter is not None and not drafter.drafting, "it would begin anew by the stricter measure"


def test_a_step_that_was_wrong_makes_the_next_ones_narrow(words_bundle: Bundle) -> None:
    text = list(range(20)) * 15
    text[150] = 99
    rows = recited(words_bundle, text).backend.ended_rows
    assert 8 in rows[rows.index(16) :] and rows.count(16) > 4


def test_where_nothing_repeats_note_is_taken_of_many_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And yet of all of them: what comes again is soon seen to, and what was said meanwhile is remembered."""
    rng = np.random.default_rng(5)
    noise = rng.permutation(100000)[:400].tolist()
    text, notes = list[int](), list[int]()
    made = Drafter(text, 8, (0.2, 0.05))
    take = made._take
    monkeypatch.setattr(made, "_take", lambda at: (notes.append(at), take(at))[1])
    for at, token in enumerate(noise):
        text.append(token)
        rests = made.rests(len(text))
        assert made.draft(8) == [] and (not rests or len(notes) <= at)
    assert len(notes) < 64 + (400 - 64) / 12 and notes[:60] == list(range(60)) and made._known > 380
    at = -1
    while not (draft := made.draft(8)):
        at += 1
        text.append(noise[200 + at])  # said while it rested
    assert 3 <= at < 20 and draft == noise[201 + at :][: len(draft)]
    known, taken = made._known, len(notes)
    text.append(noise[201 + at])
    assert not made.rests(len(text)) and made.draft(1) == [noise[202 + at]] and made._known == known + 1 == len(text) and len(notes) == taken + 1
    text += rng.permutation(np.arange(200000, 200100)).tolist()
    made.draft(8)
    for token in range(300000, 300070):
        text.append(token)
        made.draft(8)
    assert made.rests(made._known + 1) and made.follow([*text[: made._known], *SOURCE * 2]), "a turn that is long is learnt from"
    notes.clear()
    assert made.draft(8) and len(notes) > 100


def test_what_is_under_way_comes_before_a_draft_of_the_host() -> None:
    class Always:
        tokens, most, more = list[int](), 3, False

        def draft(self, room: int) -> list[int]:
            return [1, 2] if self.more else []

        def sees_more(self) -> bool:
            return self.more

        def keeps_up(self, tokens: list[int]) -> bool:
            return True

    drafter: Any = Always()
    backend, tokens = Watched(WORDS, 64, seed=2), [1, 2, 3]
    backend.step(np.array([[1, 2]]), np.array([2]))
    row = Row(0, tokens, Sampler(SamplingParams(), 257, tokens), None, capacity=64)
    steps = Verified(backend, drafter)
    tokens.append(int(steps(row).found[0]))
    assert backend.under_way == 1
    drafter.more = True
    step = steps(row)
    assert step.drafted == 0 and backend.under_way == 0
    tokens.append(int(step.found[0]))
    assert steps(row).drafted == 2


@pytest.mark.parametrize("capacity", [19, 20])
def test_a_step_for_which_there_is_just_room(capacity: int) -> None:
    backend, text = Watched(WORDS, capacity, seed=2), [1, 2, 3] * 4
    backend.expect_rows(8)
    backend.step(np.array([text[:-1]]), np.array([len(text) - 1]))
    backend.begin_greedy(np.array([text[-1:]]), ONE)
    backend.tell(text, 0)
    assert backend.begin_drafted(8) == (capacity == 20)


def test_an_error_leaves_nothing_under_way(words_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(words_bundle, Watched(WORDS, seed=2), lookup=8)

    def fails(begun: Any) -> bool:
        raise SessaError("no more")

    monkeypatch.setattr(session.backend, "_begin_next", fails)
    with pytest.raises(SessaError, match="no more"):
        session.generate([list(range(30))], 20, stop_tokens=())
    assert session.backend.under_way == 0


def test_a_length_does_not_advance_by_what_is_not_finite() -> None:
    backend = Watched(WORDS, 64, seed=2, broken=(5,))
    backend.expect_rows(4)
    backend.step(np.array([[1, 2]]), np.array([2]))
    backend.begin_greedy(np.array([[5]]), ONE)
    assert backend.end_drafted() == ([-1], 0) and backend.length[0] == 2
