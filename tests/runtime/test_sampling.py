"""Sampling against a plain restatement of the rules, and its random streams."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.sampling import Sampler, SamplingParams, filter_logits, log_probabilities, most_likely, random_stream


def textbook(logits, p: SamplingParams, seen: set[int]) -> dict[int, float]:
    """token -> probability, from lists and dictionaries, in the documented order of steps."""
    scores = {i: float(x) for i, x in enumerate(logits)}
    for i in seen:
        scores[i] = scores[i] / p.repetition_penalty if scores[i] > 0 else scores[i] * p.repetition_penalty
    scores = {i: x / p.temperature for i, x in scores.items()}

    def chances(s):
        top = max(s.values())
        weight = {i: math.exp(x - top) for i, x in s.items()}
        return {i: w / sum(weight.values()) for i, w in weight.items()}

    if p.top_k and p.top_k < len(scores):
        kth = sorted(scores.values())[-p.top_k]
        scores = {i: x for i, x in scores.items() if x >= kth}
    if p.top_p < 1:
        mass, kept = 0.0, {}
        for i, c in sorted(chances(scores).items(), key=lambda item: -item[1]):
            if mass >= p.top_p and kept:
                break
            mass, kept[i] = mass + c, scores[i]
        scores = kept
    if p.min_p:
        c = chances(scores)
        scores = {i: x for i, x in scores.items() if c[i] >= p.min_p * max(c.values())}
    return chances(scores)


_TOP_P = st.floats(0.05, 0.999) | st.just(1.0)  # between them, the sums' rounding decides on the last token


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 3), st.integers(0, 30), _TOP_P, st.floats(0, 0.6), st.floats(0.5, 2), st.sets(st.integers(0, 19)))
def test_filter_against_the_textbook(seed, temperature, top_k, top_p, min_p, penalty, seen):
    logits = np.random.default_rng(seed).normal(size=20) * 2
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty)
    mask = np.zeros(20, bool)
    mask[list(seen)] = True
    scores = filter_logits(logits, params, mask)
    expected = textbook(logits, params, seen)
    assert set(np.flatnonzero(np.isfinite(scores))) == set(expected)
    weight = np.exp(scores - scores.max())
    np.testing.assert_allclose((weight / weight.sum())[sorted(expected)], [expected[i] for i in sorted(expected)], rtol=1e-9)


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3), 4)
    counts = np.bincount([sampler.next_token(logits) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.1, 0.2, 0.3, 0.4], atol=0.015)


def test_greedy_penalty_and_seeds():
    logits = np.array([1.0, 5.0, 4.9, -1.0])
    assert Sampler(SamplingParams(), 4).next_token(logits) == 1
    penalised = Sampler(SamplingParams(repetition_penalty=1.5), 4, seen=[1])
    assert [penalised.next_token(logits) for _ in range(2)] == [2, 1]
    assert Sampler(SamplingParams(temperature=2.0, top_k=1, seed=1), 4).next_token(logits) == 1
    assert Sampler(SamplingParams(temperature=2.0, top_p=1e-9, seed=1), 4).next_token(logits) == 1
    one, two, other = (Sampler(SamplingParams(temperature=5.0, seed=s), 4) for s in (7, 7, 8))
    draws = [[s.next_token(logits) for _ in range(30)] for s in (one, two, other)]
    assert draws[0] == draws[1] != draws[2]
    fresh = [Sampler(SamplingParams(temperature=5.0), 4) for _ in range(2)]
    assert len({tuple(s.next_token(np.zeros(4)) for _ in range(40)) for s in fresh}) == 2


@pytest.mark.parametrize("bad", [
    {"temperature": -1}, {"temperature": math.nan}, {"temperature": "1"}, {"temperature": True}, {"temperature": math.inf}, {"top_k": -1}, {"top_k": 1.5},
    {"top_p": 0}, {"top_p": 1.1}, {"min_p": 1}, {"min_p": -0.1}, {"repetition_penalty": 0}, {"seed": -1}, {"seed": 1.0},
    {"presence_penalty": 2.1}, {"presence_penalty": math.nan}, {"frequency_penalty": -2.1}, {"frequency_penalty": "1"},
])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(UserError) as caught:
        SamplingParams(**bad)
    assert next(iter(bad)) in str(caught.value) and "allowed" in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_stop_the_run(value):
    for params in (SamplingParams(), SamplingParams(temperature=1.0, seed=0)):
        with pytest.raises(SessaError, match="finite"):
            Sampler(params, 3).next_token(np.array([0.0, value, 1.0]))
        assert Sampler(params, 3).next_token(np.array([-np.inf, -np.inf, 1.0])) == 2


def test_numbers_are_keyed_by_seed_choice_and_position():
    assert random_stream(7).random() == np.random.Generator(np.random.PCG64(7)).random()
    for choice in (0, 1, 5):
        whole = random_stream(7, choice).random(20)
        for position in (0, 1, 13):
            np.testing.assert_array_equal(random_stream(7, choice, position).random(5), whole[position : position + 5])
    assert len({random_stream(seed, choice).random() for seed in range(5) for choice in range(5)}) == 25
    assert random_stream(None).random() != random_stream(None).random()


@pytest.mark.parametrize("params", [SamplingParams(1.0, top_p=0.9, seed=1), SamplingParams(0.7, 50, 0.8, seed=2), SamplingParams(5.0, top_p=0.999, seed=3)])
@pytest.mark.parametrize("spread", [0.001, 1.0, 4.0])
def test_a_large_vocabulary_keeps_what_sorting_all_of_it_keeps(params, spread):
    logits = np.random.default_rng(0).normal(size=40_000) * spread
    found = filter_logits(logits, params, np.zeros(40_000, bool))
    scores = logits / params.temperature
    if params.top_k:
        scores[np.argsort(scores)[: -params.top_k]] = -np.inf
    order = np.argsort(scores, kind="stable")
    weight = np.exp(scores[order] - scores.max())
    drop = np.cumsum(weight / weight.sum()) <= 1 - params.top_p
    assert np.isfinite(found).sum() == 40_000 - drop.sum() and (found[order[drop]] == -np.inf).all()
    np.testing.assert_array_equal(found[order[~drop]], scores[order[~drop]])


def test_penalties_count_what_was_drawn_and_not_the_prompt():
    logits = np.array([2.0, 1.5, 1.0])
    sampler = Sampler(SamplingParams(frequency_penalty=0.4), 3, seen=[0, 0, 0])
    assert [sampler.next_token(logits) for _ in range(5)] == [0, 0, 1, 0, 1]
    moved = Sampler(SamplingParams(frequency_penalty=0.4), 3, seen=[0, 0, 0], drawn=[0, 0])
    assert [moved.next_token(logits) for _ in range(3)] == [1, 0, 1]
    assert Sampler(SamplingParams(presence_penalty=0.7), 3).next_token(logits) == 0
    assert Sampler(SamplingParams(), 3, bias={2: 1.5}).next_token(logits) == 2 and not Sampler(SamplingParams(), 3, bias={2: 1.5}).greedy


def test_log_probabilities_and_the_most_likely():
    logits = np.array([[0.0, 3.0, -np.inf, 3.0, 1.0], [1e4, 0.0, 0.0, 0.0, 0.0]], np.float32)
    found = log_probabilities(logits)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1.0)
    assert [token for token, _ in most_likely(found[0], 3)] == [1, 3, 4] and [token for token, _ in most_likely(found[0], 9)] == [1, 3, 4, 0, 2]
    assert most_likely(found[0], 0) == () and most_likely(found[1], 1) == ((0, 0.0),)
    with pytest.raises(SessaError, match="finite"):
        log_probabilities(np.array([np.nan, 1.0]))
