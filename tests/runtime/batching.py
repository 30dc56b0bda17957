"""Requests that come, go and are cancelled at given turns, and what each would have got alone: for the tests of the batcher on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.requests import Event, Request
from sessa_deploy.runtime.sampling import SamplingParams


def examples(count: int) -> int:
    """`count` examples, and more in proportion under --hypothesis-profile full."""
    return max(1, count * settings.default.max_examples // 100)


@dataclass
class Plan:
    """A request, the turn before which it is submitted, and after how many more turns it is cancelled (None: never)."""

    request: Request
    at: int = 0
    cancel: int | None = None


@dataclass
class Played:
    """What came of a plan."""

    events: list[Event] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events if event.token is not None]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def finish(self) -> str | None:
        return self.events[-1].finish if self.events else None


class Toy(Backend):
    """A model of no size: logits are numbers drawn from a hash of all the tokens before, with every row of a cache in place. `calls` holds (row or None for a
    decode step, tokens a row), and each fault that is due is raised first: faults[n] at the n-th call into the backend."""

    name = "toy"

    def __init__(self, config: Any, batch: int = 1, capacity: int | None = None, faults: dict[int, Exception] | None = None) -> None:
        super().__init__(config, batch, capacity)
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.calls: list[tuple[int | None, list[int]]] = []
        self.faults, self.entered = faults or {}, 0

    def _enter(self) -> None:
        self.entered += 1
        if self.entered - 1 in self.faults:
            raise self.faults[self.entered - 1]

    def _feed(self, row: int, ids: list[int]) -> np.ndarray:
        self.rows[row][int(self.length[row]) :] = ids
        state = 17
        for token in self.rows[row]:
            state = (state * 1000003 + token) % 2**31
        return np.random.default_rng(state).normal(size=self.config.vocab_size).astype(np.float32) * 2

    def _forward(self, ids, new):
        self._enter()
        self.calls.append((None, new.tolist()))
        logits = np.full((self.batch, self.config.vocab_size), np.nan, np.float32)
        for row in np.flatnonzero(new):
            logits[row] = self._feed(row, ids[row, : new[row]].tolist())
        return logits

    def _forward_row(self, row, ids):
        self._enter()
        self.calls.append((row, [len(ids)]))
        return self._feed(row, ids.tolist())

    def _copy_row(self, source, target, length):
        self._enter()
        self.rows[target] = self.rows[source][:length]

    def reset(self, rows=None):
        if hasattr(self, "entered"):
            self._enter()
        super().reset(rows)

    def cached(self, row):
        return {}

    def poison(self):
        for row, kept in zip(self.rows, self.kept(), strict=True):
            row[int(kept) :] = [-1] * (len(row) - int(kept))


def play(batcher: Batcher, plans: list[Plan], poison: bool = True, most: int = 5000) -> list[Played]:
    """Drive a batcher through plans to the end, its caches poisoned before every turn. Checks what must always hold."""
    played, handles = [Played() for _ in plans], {}
    left, turn = True, 0
    while left or len(handles) < len(plans):
        for number, plan in enumerate(plans):
            if plan.at == turn:
                handles[number] = batcher.submit(plan.request, played[number].events.append)
            if number in handles and plan.cancel is not None and plan.at + plan.cancel == turn:
                handles[number].cancel()
        if poison:
            batcher.backend.poison()
        left = batcher.turn()
        assert left == any(played[number].finish is None for number in handles)
        turn += 1
        assert turn < most, "the batcher does not come to an end"
    for plan, one in zip(plans, played, strict=True):
        assert [event.finish is None for event in one.events] == [True] * (len(one.events) - 1) + [False], "one last event, and it is the last"
        assert sum(event.cached for event in one.events[1:]) == 0
        if one.finish == "cancelled":
            assert plan.cancel is not None
    stats = batcher.stats()
    assert (stats.queued, stats.reading, stats.running) == (0, 0, 0) and batcher._slots.free == batcher.backend.batch, "a slot is lost"
    assert sum(stats.finished.values()) == stats.accepted == len(plans) and stats.new_tokens == sum(len(one.tokens) for one in played)
    assert not batcher.backend.length.any(), "what is done rests or is forgotten"
    return played


def alone(make: Callable[[], Batcher], request: Request) -> Played:
    """What a request gets with nothing beside it and nothing before it."""
    return play(make(), [Plan(request)], poison=False)[0]


def plans(vocabulary: int, capacity: int, most: int = 7, tokens: int = 9) -> st.SearchStrategy[list[Plan]]:
    """Requests of all kinds. Half of the prompts share one of three beginnings, some of them several chunks long."""
    beginnings = [list(range(20)), [5, 4, 3, 2, 1, 5, 4, 3, 2, 1, 7], list(range(12)) + [40] * 5]
    free = st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=capacity - tokens)
    shared = st.builds(lambda which, cut, rest: (beginnings[which][:cut] + rest)[: capacity - tokens], st.integers(0, 2), st.integers(1, 20),
                       st.lists(st.integers(0, vocabulary - 1), max_size=6))
    sampling = st.one_of(
        st.just(SamplingParams()), st.builds(SamplingParams, st.sampled_from([0.7, 1.5]), seed=st.integers(0, 9)),
        st.builds(SamplingParams, st.sampled_from([0.0, 1.0]), st.sampled_from([0, 5]), st.sampled_from([0.8, 1.0]), st.sampled_from([0.0, 0.1]),
                  st.sampled_from([1.0, 1.3]), st.integers(0, 9), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.5])))
    some = st.sampled_from([None, None, None, 0, 2])
    requests = st.builds(
        lambda prompt, params, new, choice, logprobs, scored, bias, ends: Request(
            tuple(prompt), params, new, stop_tokens=tuple(ends), choice=choice, logprobs=logprobs, prompt_logprobs=scored, logit_bias=bias),
        free | shared, sampling, st.integers(0, tokens), st.sampled_from([0, 0, 0, 1, 2]), some, some,
        st.sampled_from([{}, {}, {3: 4.0, 6: -100.0}]), st.lists(st.integers(0, vocabulary - 1), max_size=3))
    return st.lists(st.builds(Plan, requests, st.integers(0, 25), st.none() | st.none() | st.integers(0, 25)), min_size=1, max_size=most)


def check_alike(found: Played, expected: Played, plan: Plan, tolerance: float = 1e-6) -> None:
    """One request's events against those it has alone; of a cancelled one, as far as it came."""
    assert found.tokens == expected.tokens[: len(found.tokens)]
    if found.finish != "cancelled":
        assert (found.tokens, found.finish, found.text) == (expected.tokens, expected.finish, expected.text)
    for one, other in zip(found.events, expected.events, strict=False):
        if one.token is None and one.finish == "cancelled":
            continue
        assert (one.logprob is None) == (other.logprob is None) and len(one.top) == len(other.top)
        if one.logprob is not None:
            np.testing.assert_allclose(one.logprob, other.logprob, atol=tolerance)
            np.testing.assert_allclose([p for _, p in one.top], [p for _, p in other.top], atol=tolerance)
        assert (one.prompt is None) == (other.prompt is None)
        for (score, top), (wanted, best) in zip(one.prompt or (), other.prompt or (), strict=True):
            assert (score is None) == (wanted is None) and len(top) == len(best)
            if score is not None:
                np.testing.assert_allclose([score, *(p for _, p in top)], [wanted, *(p for _, p in best)], atol=tolerance)
    if plan.request.prompt_logprobs is not None and found.events[0].prompt is not None:
        assert len(found.events[0].prompt) == len(plan.request.prompt) and found.events[0].cached == 0
