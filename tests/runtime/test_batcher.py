"""Many requests on one backend: whatever comes and goes beside it, each gets the tokens it gets alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from batching import Plan, Played, Toy, alone, check_alike, examples, plans, play
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_model import NumpyBackend, NumpyModel, random_weights

from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import UserError
from sessa_deploy.runtime import generation
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.ort.backend import OrtBackend
from sessa_deploy.runtime.requests import Event, Request
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer

CONFIG = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=97, max_context=48)
MODEL = NumpyModel(CONFIG, random_weights(CONFIG, 1))
TOY = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=257, max_context=64)
TOKENIZER = Tokenizer.from_json(byte_level_tokenizer())
PROMPTS = [[1, 2, 3], [7], list(range(40, 53)), [96, 50]]


def toy(batch=3, chunk=4, capacity=64, faults=None, **options) -> Batcher:
    return Batcher(Toy(TOY, batch, capacity, faults), TOKENIZER, chunk, **options)


@settings(max_examples=examples(25), deadline=None)
@given(plans(97, 48), st.integers(1, 4), st.sampled_from([1, 3, 4, 16]), st.booleans())
def test_every_request_gets_what_it_gets_alone(requests, slots, chunk, reuse):
    def make() -> Batcher:
        return Batcher(NumpyBackend(MODEL, slots, 48), None, chunk, queue=99, prefix_reuse=reuse)

    for plan, found in zip(requests, play(make(), requests), strict=True):
        check_alike(found, alone(make, plan.request), plan)


@settings(max_examples=examples(60), deadline=None)
@given(plans(257, 64, most=20), st.integers(1, 6), st.sampled_from([1, 3, 4, 16, 64]), st.booleans())
def test_every_request_gets_what_it_gets_alone_from_a_model_of_no_size(requests, slots, chunk, reuse):
    """Many more of them, with text."""
    batcher = toy(slots, chunk, queue=99, prefix_reuse=reuse)
    for plan, found in zip(requests, play(batcher, requests), strict=True):
        check_alike(found, alone(lambda: toy(slots, chunk), plan.request), plan)
    read = sum(calls[0] for row, calls in batcher.backend.calls if row is not None)
    stats = batcher.stats()
    assert (stats.cached_tokens > 0) == (stats.prefix_hits > 0) <= reuse
    whole = [len(plan.request.prompt) for plan in requests if plan.cancel is None and plan.request.prompt_logprobs is None]
    assert read >= sum(whole) - stats.cached_tokens


@settings(max_examples=examples(20), deadline=None, derandomize=True)
@given(plans(257, 64, most=5, tokens=6), st.integers(1, 3), st.sampled_from([4, 16]), st.booleans(), st.booleans())
def test_every_request_gets_what_it_gets_alone_from_onnx_runtime(bundles, requests, slots, chunk, reuse, every):
    def make() -> Batcher:
        backend = backends.get((slots, every)) or backends.setdefault((slots, every), OrtBackend(bundles("fp32", every), slots, 64, threads=1))
        return Batcher(backend, None, chunk, queue=99, prefix_reuse=reuse)

    backends = _OPEN
    for plan, found in zip(requests, play(make(), requests), strict=True):
        check_alike(found, alone(make, plan.request), plan, 1e-4)


_OPEN: dict[tuple[int, bool], OrtBackend] = {}


def test_greedy_tokens_are_the_oracles():
    found = play(Batcher(NumpyBackend(MODEL, 3, 48), None, 4), [Plan(Request(tuple(p), max_new_tokens=6), at) for at, p in enumerate(PROMPTS)])
    assert [one.tokens for one in found] == [MODEL.greedy(p, 6) for p in PROMPTS] and {one.finish for one in found} == {"length"}


def test_a_turn_is_one_chunk_of_one_prompt_and_one_step_of_all_that_run():
    batcher = toy(3, 4)
    play(batcher, [Plan(Request(tuple(range(3)), max_new_tokens=9)), Plan(Request(tuple(range(20)), max_new_tokens=2)), Plan(Request((1,), max_new_tokens=2))])
    first = batcher.backend.calls[:9]
    assert first == [(0, [3]), (None, [1, 0, 0]), (1, [4]), (None, [1, 0, 0]), (2, [1]), (None, [1, 0, 1]), (1, [4]), (None, [1, 0, 0]), (1, [4])]


def test_a_long_prompt_neither_starves_nor_is_starved():
    """Short prompts behind two long ones have their first token within a round; the long ones go on by a chunk a round, and what runs draws every turn."""
    long, rounds = tuple(range(60)), 4
    batcher = toy(rounds, 4, queue=99)
    running = Played()
    batcher.submit(Request((9,), max_new_tokens=60, ignore_eos=True), running.events.append)
    batcher.turn()
    slow = [Played(), Played()]
    for one in slow:
        batcher.submit(Request((*long, len(slow)), max_new_tokens=1), one.events.append)
    shorts, drawn = [], len(running.tokens)
    for turn in range(40):
        if turn % 3 == 0:
            shorts.append((turn, Played()))
            batcher.submit(Request((turn, 2), max_new_tokens=1), shorts[-1][1].events.append)
        batcher.turn()
        assert len(running.tokens) == drawn + 1, "a running sequence waits for one chunk at most"
        drawn += 1
        for came, short in shorts:
            assert short.tokens or turn - came < rounds, "a short prompt waits for its turn, not for a long prompt"
    chunks = [row for row, _ in batcher.backend.calls if row is not None]
    assert all(one.tokens for one in slow), "the long ones came through"
    at = [i for i, row in enumerate(chunks) if row == 1]
    assert max(b - a for a, b in itertools.pairwise(at)) < rounds


def test_requests_get_slots_in_the_order_they_came_and_lowest_first():
    batcher, order = toy(2, 4), []
    for number in range(6):
        batcher.submit(Request((number,), max_new_tokens=3), lambda event, number=number: order.append(number) if event.finish else None)
    batcher.turn()
    assert [slot.busy for slot in batcher._slots.all] == [True, True] and batcher.backend.calls[0][0] == 0
    while batcher.turn():
        pass
    assert order == sorted(order)


DRAWN = [SamplingParams(1.3, seed=5), SamplingParams(0.9, 20, 0.9, 0.01, 1.2, 3, 0.5, 0.3), SamplingParams(presence_penalty=2.0)]


@pytest.mark.parametrize("params", DRAWN)
@pytest.mark.parametrize("choice", [0, 2])
def test_a_request_that_moves_draws_on_where_it_was(params, choice):
    prompt = (1, 2, 3, 4, 5, 6)
    whole = alone(toy, Request(prompt, params, 12, choice=choice)).tokens
    for done in (1, 5, 11):
        moved = Request((*prompt, *whole[:done]), params, 12 - done, choice=choice, position=done)
        assert alone(toy, moved).tokens == whole[done:]
    assert len({tuple(alone(toy, Request(prompt, params, 12, choice=c)).tokens) for c in range(4)}) == (4 if params.temperature else 1)


def test_choice_0_draws_what_a_session_does(tmp_path):
    from sessa_deploy.runtime.bundle import write_bundle
    from sessa_deploy.runtime.session import Session

    made = write_bundle(tmp_path / "b", {"model.onnx": b"", "tokenizer.json": byte_level_tokenizer().encode()}, TOY, "fp32", {})
    for params in (SamplingParams(1.5, seed=7), SamplingParams(0.8, 50, 0.95, 0.0, 1.3, 8, 1.0, 0.25)):
        wanted = Session(made, Toy(TOY), chunk=4).generate([[1, 2, 3, 4, 5]], 20, params)[0]
        found = alone(toy, Request((1, 2, 3, 4, 5), params, 20))
        assert (found.tokens, found.text, found.finish) == (wanted.tokens, wanted.text, wanted.finish)
    free = [tuple(alone(toy, Request((1,), SamplingParams(2.0), 20)).tokens) for _ in range(2)]
    assert free[0] != free[1], "without a seed every request draws its own"


def test_a_large_vocabulary_is_drawn_from_on_threads(monkeypatch):
    """The same draws, log probabilities and faults."""
    large = SessaConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=9000, max_context=64)
    started, threads = [], generation._threads
    monkeypatch.setattr(generation, "_threads", lambda: started.append(1) or threads())

    def make(slots=4) -> Batcher:
        return Batcher(Toy(large, slots, 64), None, 4)

    requests = [Plan(Request((n, 2), SamplingParams(1.0, seed=n), 6, logprobs=1)) for n in range(3)]
    requests += [Plan(Request((5, 2), max_new_tokens=6)), Plan(Request((3,) * 5, max_new_tokens=2, prompt_logprobs=1))]
    found = play(make(), requests)
    assert started
    for plan, one in zip(requests, found, strict=True):
        check_alike(one, alone(lambda: make(1), plan.request), plan)


def textbook_greedy(prompt, count, presence, frequency, repetition, bias):
    """Tokens by the definitions of OpenAI and vLLM, from lists and dictionaries."""
    drawn = []
    for _ in range(count):
        logits = [float(x) for x in Toy(TOY)._feed(0, [*prompt, *drawn])]
        for token, value in bias.items():
            logits[token] += value
        for token in {*prompt, *drawn}:
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in set(drawn):
            logits[token] -= frequency * drawn.count(token) + presence
        drawn.append(logits.index(max(logits)))
    return drawn


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(st.integers(0, 256), min_size=1, max_size=8), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.5, 2),
       st.dictionaries(st.integers(0, 256), st.floats(-6, 6), max_size=40))
def test_penalties_and_bias_against_the_definitions(prompt, presence, frequency, repetition, bias):
    params = SamplingParams(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    found = alone(toy, Request(tuple(prompt), params, 12, logit_bias=bias))
    assert found.tokens == textbook_greedy(prompt, 12, presence, frequency, repetition, bias)


@pytest.mark.parametrize("every", [False, True])
def test_log_probabilities_against_the_oracle(every, monkeypatch):
    """Of new tokens and of the prompt's, in chunks where the graph gives all logits and one token a step where it does not."""
    monkeypatch.setattr(NumpyBackend, "all_logits", every)
    monkeypatch.setattr(NumpyBackend, "_forward_row_all", lambda self, row, ids: np.array([self._forward_row(row, ids[t : t + 1]) for t in range(1)])
                        if len(ids) == 1 else _all_of(self, row, ids), raising=False)
    prompt = PROMPTS[2]
    batcher = Batcher(NumpyBackend(MODEL, 2, 48), None, 4)
    request = Request(tuple(prompt), SamplingParams(1.0, repetition_penalty=1.5, seed=1), 5, logprobs=3, prompt_logprobs=2)
    found = play(batcher, [Plan(request), Plan(Request((1, 2, 3, 4, 5), max_new_tokens=9))])[0]
    logits = MODEL.logits([*prompt, *found.tokens])
    wanted = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    scores = found.events[0].prompt
    assert scores[0] == (None, ()) and len(scores) == len(prompt) and all(event.prompt is None for event in found.events[1:])
    pairs = [*zip(scores[1:], prompt[1:], wanted, strict=False)]
    pairs += [((event.logprob, event.top), event.token, row) for event, row in zip(found.events, wanted[len(prompt) - 1 :], strict=False)]
    for (score, top), token, row in pairs:
        np.testing.assert_allclose(score, row[token], atol=1e-5)
        assert [t for t, _ in top] == np.argsort(-row)[: len(top)].tolist() and len(top) in (2, 3)
        np.testing.assert_allclose([p for _, p in top], np.sort(row)[::-1][: len(top)], atol=1e-5)
    only = play(Batcher(NumpyBackend(MODEL, 2, 48), None, 4), [Plan(Request(tuple(prompt), max_new_tokens=0, prompt_logprobs=0))])[0]
    assert [event.token for event in only.events] == [None] and only.finish == "length"
    np.testing.assert_allclose([s for s, _ in only.events[0].prompt[1:]], [s for s, _ in scores[1:]], atol=1e-6)


def _all_of(backend, row, ids):
    start, rows = int(backend.length[row]), []
    for t in range(len(ids)):
        rows.append(backend._forward_row(row, ids[t : t + 1]))
        backend.length[row] += 1
    backend.length[row] = start
    return np.array(rows)


def test_ends():
    whole = alone(toy, Request((1, 2), max_new_tokens=30))
    text, tokens = whole.text, whole.tokens
    assert "".join(event.text for event in whole.events) == TOKENIZER.decode(tokens)
    at = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    eos = {"eos": [tokens[at]]}
    cut = alone(lambda: toy(**eos), Request((1, 2), max_new_tokens=30))
    assert (cut.tokens, cut.finish, cut.text) == (tokens[: at + 1], "stop", TOKENIZER.decode(tokens[:at]))
    assert alone(lambda: toy(**eos), Request((1, 2), max_new_tokens=30, ignore_eos=True)).tokens == tokens
    both = alone(lambda: toy(**eos), Request((1, 2), max_new_tokens=30, ignore_eos=True, stop_tokens=(tokens[at],)))
    assert (both.tokens, both.finish) == (cut.tokens, "stop")
    stop = text[2:5]
    stopped = alone(toy, Request((1, 2), max_new_tokens=30, stop=("never to be seen", stop)))
    assert (stopped.text, stopped.finish) == (text[: text.index(stop)], "stop") and len(stopped.tokens) < len(tokens)
    full = alone(lambda: toy(capacity=10), Request((1, 2), max_new_tokens=None))
    assert (full.tokens, full.finish) == (tokens[:9], "context")
    assert alone(toy, Request((1, 2), max_new_tokens=0)).events == [Event(None, finish="length")]


def test_whole_characters_and_no_part_of_a_stop_string():
    """The model is made to say a text of wide characters that ends in a stop string, one byte a token."""
    said = "a\u00e9\u4e2d\U0001f600 END of it".encode()
    for stop, expected in ((("END",), "a\u00e9\u4e2d\U0001f600 "), ((), said.decode())):
        batcher, found = toy(1), Played()
        ids = iter(said)
        batcher.backend._feed = lambda row, fed, ids=ids: np.eye(257, dtype=np.float32)[next(ids)]
        batcher.submit(Request((1,), max_new_tokens=len(said), stop=stop), found.events.append)
        while batcher.turn():
            assert "\ufffd" not in found.text and not (stop and "E" in found.text)
        assert found.text == expected


@pytest.mark.parametrize(("make", "word"), [
    (lambda: Request(()), "empty"), (lambda: Request("abc"), "prompt"), (lambda: Request((1.5,)), "prompt"), (lambda: Request(None), "prompt"),
    (lambda: Request((1,), max_new_tokens=-1), "max_new_tokens"), (lambda: Request((1,), max_new_tokens=True), "max_new_tokens"),
    (lambda: Request((1,), stop="x"), "stop"), (lambda: Request((1,), stop=("",)), "stop"), (lambda: Request((1,), stop_tokens=("a",)), "stop_tokens"),
    (lambda: Request((1,), choice=-1), "choice"), (lambda: Request((1,), position=2), "position"), (lambda: Request((1,), logprobs=-1), "logprobs"),
    (lambda: Request((1,), prompt_logprobs=1.0), "prompt_logprobs"), (lambda: Request((1,), ignore_eos=1), "ignore_eos"),
    (lambda: Request((1,), logit_bias={1: 101}), "logit_bias"), (lambda: Request((1,), logit_bias={"1": 1}), "logit_bias"),
    (lambda: Request((1,), logit_bias=[1]), "logit_bias"), (lambda: Request((1,), sampling=None), "sampling"),
    (lambda: Request((1,), logit_bias={1: float("nan")}), "logit_bias"),
    (lambda: toy().submit(Request((257,))), "vocabulary"), (lambda: toy().submit(Request((1,), stop_tokens=(-1,))), "vocabulary"),
    (lambda: toy().submit(Request((1,), logit_bias={300: 1})), "vocabulary"), (lambda: toy(capacity=8).submit(Request((1,) * 9, max_new_tokens=0)), "9"),
    (lambda: toy(capacity=8).submit(Request((1,) * 5, max_new_tokens=5)), "5"), (lambda: toy(chunk=0), "chunk"), (lambda: toy(queue=-1), "queue"),
    (lambda: toy(queue_timeout=0), "queue_timeout"), (lambda: toy(queue_timeout="1"), "queue_timeout"), (lambda: toy(prefix_reuse=1), "prefix_reuse"),
    (lambda: toy(eos=["a"]), "eos"), (lambda: Batcher(Toy(TOY)).submit(Request((1,), stop=("x",))), "tokenizer"),
])
def test_bad_input_is_one_line_and_changes_nothing(make, word):
    with pytest.raises(UserError) as caught:
        make()
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    bias = {np.int64(5): np.float32(1)}
    one = Request(np.array([1, 2], np.int32), max_new_tokens=np.int64(3), stop_tokens=[np.uint8(4)], choice=np.int32(1), logit_bias=bias)
    two = Request((1, 2), max_new_tokens=3, stop_tokens=(4,), choice=1, logit_bias={5: 1.0})
    assert one == two and type(one.prompt[0]) is int
