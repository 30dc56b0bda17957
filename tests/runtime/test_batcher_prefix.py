"""What caches already hold of a prompt is not computed again, and changes no token."""

from __future__ import annotations

import numpy as np
import pytest
from batching import Plan, Played, Toy, alone, play

from sessa_deploy.config import SessaConfig
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.requests import Request
from sessa_deploy.runtime.sampling import SamplingParams

TOY = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257, max_context=64)


def toy(batch=3, chunk=4, **options) -> Batcher:
    return Batcher(Toy(TOY, batch, 64), None, chunk, **options)


def run(batcher: Batcher, prompt, new=5, **options) -> Played:
    found = Played()
    batcher.submit(Request(tuple(prompt), max_new_tokens=new, **options), found.events.append)
    batcher.backend.poison()
    while batcher.turn():
        batcher.backend.poison()
    assert found.tokens == alone(toy, Request(tuple(prompt), max_new_tokens=new, **options)).tokens
    return found


def read(batcher: Batcher) -> list[tuple[int, int]]:
    """(slot, tokens) of the chunks read since the last look."""
    found = [(row, counts[0]) for row, counts in batcher.backend.calls if row is not None]
    batcher.backend.calls.clear()
    return found


def test_a_conversation_goes_on_where_it_stands():
    batcher = toy()
    prompt = list(range(10))
    first = run(batcher, prompt)
    assert first.events[0].cached == 0 and read(batcher) == [(0, 4), (0, 4), (0, 2)]
    whole = [*prompt, *first.tokens]  # 15 tokens, of which 14 are in the cache
    second = run(batcher, [*whole, 30, 31])
    assert second.events[0].cached == 12 and read(batcher) == [(0, 4), (0, 1)], "from the last chunk's end before, in the chunks of a run alone"
    assert run(batcher, [*whole, 30, 31, *second.tokens]).events[0].cached == 20
    stats = batcher.stats()
    assert (stats.prefix_hits, stats.cached_tokens, stats.prefix_copies, stats.prompt_tokens) == (2, 32, 0, 10 + 17 + 22)
    assert stats.resting == 1 and [batcher.backend.held(row) for row in range(3)] == [26, 0, 0]


def test_the_last_token_of_a_prompt_is_always_read():
    batcher = toy()
    run(batcher, range(12), 1)
    read(batcher)
    assert run(batcher, range(12), 3).events[0].cached == 8 and read(batcher) == [(0, 4)]
    assert run(batcher, range(8), 3).events[0].cached == 4, "a beginning of it is copied, and the whole stays"
    assert batcher.stats().prefix_copies == 1 and [batcher.backend.held(row) for row in range(3)] == [14, 10, 0]


def test_a_shared_beginning_is_copied_from_one_that_runs():
    batcher = toy()
    running = Played()
    system = list(range(16))
    batcher.submit(Request((*system, 50), max_new_tokens=30), running.events.append)
    for _ in range(6):
        batcher.turn()
    read(batcher)
    other = Played()
    batcher.submit(Request((*system, 51, 52), max_new_tokens=4), other.events.append)
    while batcher.turn():
        pass
    assert other.events[0].cached == 16 and read(batcher) == [(1, 2)] and batcher.stats().prefix_copies == 1
    assert other.tokens == alone(toy, Request((*system, 51, 52), max_new_tokens=4)).tokens
    assert running.tokens == alone(toy, Request((*system, 50), max_new_tokens=30)).tokens


def test_answers_to_one_prompt_read_it_once():
    """Submitted together: each chunk is computed by one of them and copied by the others."""
    batcher = toy(4)
    requests = [Plan(Request(tuple(range(17)), SamplingParams(1.0, seed=3), 5, choice=choice)) for choice in range(4)]
    found = play(batcher, requests)
    assert [one.tokens for one in found] == [alone(toy, plan.request).tokens for plan in requests]
    assert sum(n for _, n in read(batcher)) == 17 + 3 and sum(one.events[0].cached for one in found) == 3 * 16 == batcher.stats().cached_tokens


def test_the_conversation_let_go_longest_ago_makes_place():
    batcher = toy(2)
    starts = {name: [n] * 8 for n, name in enumerate("abc", start=1)}
    run(batcher, starts["a"])
    run(batcher, starts["b"])
    assert run(batcher, [*starts["a"], 9]).events[0].cached == 8, "it is now the younger"
    run(batcher, starts["c"])
    assert run(batcher, [*starts["a"], 8]).events[0].cached == 8 and run(batcher, [*starts["b"], 9]).events[0].cached == 0


def test_a_beginning_is_copied_and_the_conversation_it_comes_from_stays():
    batcher = toy(2)
    first = run(batcher, range(12))
    other = run(batcher, [*range(8), 99, 98])
    assert other.events[0].cached == 8
    assert run(batcher, [*range(12), *first.tokens, 5]).events[0].cached == 16, "neither is lost"
    only = toy(1)
    run(only, range(12))
    assert run(only, [*range(8), 99, 98]).events[0].cached == 8 and only.stats().prefix_copies == 0, "where there is no other slot"


def test_a_prompt_that_is_scored_takes_nothing_and_leaves_nothing():
    batcher = toy(2)
    run(batcher, range(12))
    found = run(batcher, range(12), prompt_logprobs=0)
    assert found.events[0].cached == 0 and len(found.events[0].prompt) == 12 and batcher.stats().prefix_hits == 0
    assert batcher.stats().resting == 1
    read(batcher)
    scored = toy(2)
    run(scored, range(12), prompt_logprobs=0)
    assert run(scored, range(12)).events[0].cached == 0


def test_without_reuse_everything_is_read():
    batcher = toy(2, prefix_reuse=False)
    for _ in range(2):
        assert run(batcher, range(12)).events[0].cached == 0 and sum(n for _, n in read(batcher)) == 12
    assert batcher.stats().resting == 0 and not batcher.backend.kept().any()


def test_a_cancelled_prompt_leaves_what_it_read():
    batcher, gone = toy(2), Played()
    handle = batcher.submit(Request(tuple(range(20))), gone.events.append)
    batcher.turn()
    batcher.turn()
    handle.cancel()
    batcher.turn()
    assert run(batcher, range(20)).events[0].cached == 8


def test_a_backend_that_cannot_copy_goes_on_in_place(monkeypatch):
    monkeypatch.setattr(Toy, "copies_rows", False)
    batcher = toy(2)
    first = run(batcher, range(10))
    assert run(batcher, [*range(10), *first.tokens, 1]).events[0].cached == 12
    assert run(batcher, [*range(8), 77]).events[0].cached == 0 and batcher.stats().prefix_copies == 0


@pytest.mark.parametrize("chunk", [4, 16])
def test_rows_taken_over_are_bit_for_bit_those_of_a_run_alone(tiny_bundle, chunk):
    """Of the prompt's whole chunks, on ONNX Runtime."""
    def make() -> Batcher:
        return Batcher(OrtBackend(tiny_bundle, 3, 64, threads=1), None, chunk)

    prompt = tuple(np.random.default_rng(0).integers(0, 257, 37).tolist())
    batcher, other = make(), Played()
    for n, shared in enumerate((prompt, (*prompt[:20], 1, 2, 3), prompt[:34])):
        other = Played()
        batcher.submit(Request(shared, max_new_tokens=1), other.events.append)
        while batcher.turn():
            pass
        assert (other.events[0].cached > 0) == (n > 0)
        solo, single = make(), Played()
        solo.submit(Request(shared, max_new_tokens=1), single.events.append)
        while solo.turn():
            pass
        row = next(slot.index for slot in batcher._slots.all if tuple(slot.tokens[:-1]) == shared)
        batcher.backend.wake(row, len(shared))
        solo.backend.wake(0, len(shared))
        for name, values in solo.backend.cached(0).items():
            np.testing.assert_array_equal(batcher.backend.cached(row)[name], values, err_msg=name)
        batcher.backend.rest(row)
        assert single.tokens == other.tokens
