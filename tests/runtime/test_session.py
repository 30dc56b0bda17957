"""The session's logic against a numpy oracle: chunks, ragged batches, conversations, stops, limits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy_model import NumpyBackend, NumpyModel, random_weights

from sessa_deploy.config import SessaConfig
from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.session import Generation, Session
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

CONFIG = SessaConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=257, max_context=64)
MODEL = NumpyModel(CONFIG, random_weights(CONFIG, 1))
PROMPTS = [[1, 2, 3], [7], list(range(40, 53)), [200, 100]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    files = {"model.onnx": b"unused", "tokenizer.json": byte_level_tokenizer().encode()}
    return write_bundle(tmp_path_factory.mktemp("bundles") / "b", files, CONFIG, "fp32", {})


def session(bundle, batch=1, capacity=None, chunk=5) -> Session:
    return Session(bundle, NumpyBackend(MODEL, batch, capacity), chunk=chunk)


def test_oracle_and_torch_model_agree():
    torch = pytest.importorskip("torch")
    from sessa_deploy.model import SessaLM

    ids = np.random.default_rng(0).integers(0, 257, 24)
    for changes in ({}, {"n_heads": 1, "n_kv_heads": 1}, {"use_forward_rope": False}):
        config = dataclasses.replace(CONFIG, **changes)
        weights = random_weights(config, 2)
        model = SessaLM(config).double()
        model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        with torch.no_grad():
            expected = model(torch.tensor(ids)[None])[0].numpy()
        np.testing.assert_allclose(NumpyModel(config, weights).logits(ids), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 13, 64])
def test_prefill_in_chunks_of_a_ragged_batch(bundle, chunk):
    s = session(bundle, batch=4, chunk=chunk)
    logits = s.prefill(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(logits[row], MODEL.logits(prompt)[-1], rtol=1e-5, atol=1e-5)
    assert s.backend.length.tolist() == [3, 1, 13, 2] and all(t <= chunk for t, _ in s.backend.calls)
    assert s.tokens(2) == PROMPTS[2]


def test_generate_on_a_batch_equals_single_runs(bundle):
    batch = session(bundle, batch=4).generate(PROMPTS, 12)
    for prompt, result in zip(PROMPTS, batch, strict=True):
        assert result.tokens == MODEL.greedy(prompt, 12) == session(bundle).generate([prompt], 12)[0].tokens
        assert result.finish == "length" and result.text == session(bundle).tokenizer.decode(result.tokens)


def test_a_sampled_batch_equals_single_runs_with_the_same_seed(bundle):
    params = [SamplingParams(temperature=1.5, top_p=0.95, repetition_penalty=1.2, seed=s) for s in (0, 1, 2, 2)]
    batch = session(bundle, batch=4).generate(PROMPTS, 10, params)
    for prompt, p, result in zip(PROMPTS, params, batch, strict=True):
        assert session(bundle).generate([prompt], 10, p)[0].tokens == result.tokens
    assert batch[0].tokens != MODEL.greedy(PROMPTS[0], 10)


def test_fewer_prompts_than_sequences(bundle):
    s = session(bundle, batch=3)
    assert s.generate(PROMPTS[:1], 3)[0].tokens == MODEL.greedy(PROMPTS[0], 3)
    assert s.backend.length.tolist() == [5, 0, 0]


def test_continuing_a_conversation_feeds_only_what_is_new(bundle):
    s = session(bundle)
    first = s.generate([PROMPTS[0]], 4)[0].tokens
    s.backend.calls.clear()
    second = s.generate([[9, 8]], 4)[0].tokens
    whole = [*PROMPTS[0], *first, 9, 8]
    assert second == MODEL.greedy(whole, 4) and s.tokens() == [*whole, *second]
    assert s.backend.calls[0] == (3, [3]), "the last token drawn and the prompt; nothing again"
    assert s.generate([[]], 2)[0].tokens == MODEL.greedy([*whole, *second], 2)
    s.reset()
    assert s.generate([PROMPTS[0]], 4)[0].tokens == first


def test_one_sequence_continues_while_another_begins_anew(bundle):
    s = session(bundle, batch=2)
    first = s.generate(PROMPTS[:2], 3)
    s.reset([1])
    again = s.generate([[5], PROMPTS[2]], 3)
    assert again[0].tokens == MODEL.greedy([*PROMPTS[0], *first[0].tokens, 5], 3) and again[1].tokens == MODEL.greedy(PROMPTS[2], 3)


def test_a_dropped_stream_keeps_what_was_drawn(bundle):
    s = session(bundle, batch=2)
    stream = s.stream(PROMPTS[:2], 10)
    drawn = [next(stream) for _ in range(3)]
    stream.close()
    assert [c.row for c in drawn] == [0, 1, 0]
    expected = [MODEL.greedy(p, 2) for p in PROMPTS[:2]]
    assert s.tokens(0) == [*PROMPTS[0], *expected[0]] and s.tokens(1) == [*PROMPTS[1], *expected[1]]
    more = s.generate([[], []], 3)
    assert [m.tokens for m in more] == [MODEL.greedy(p, 5)[2:] for p in PROMPTS[:2]]


def test_an_overtaken_stream_says_so(bundle):
    s = session(bundle)
    stream = s.stream([PROMPTS[0]], 10)
    next(stream)
    s.reset()
    with pytest.raises(UserError, match="stream"):
        next(stream)


def test_stop_tokens_end_one_sequence_and_the_others_go_on(bundle):
    expected = [MODEL.greedy(p, 12) for p in PROMPTS]
    end = expected[0][3]
    s = session(bundle, batch=4)
    results = s.generate(PROMPTS, 12, stop_tokens=[end])
    for result, tokens in zip(results, expected, strict=True):
        at = tokens.index(end) + 1 if end in tokens else 12
        assert result.tokens == tokens[:at] and result.finish == ("stop" if end in tokens else "length")
    assert len(results[0].tokens) <= 4 and s.backend.length[0] == len(PROMPTS[0]) + len(results[0].tokens) - 1
    assert s.backend.calls[-1][1][0] == 0, "a finished sequence stands still"


def test_eos_of_the_model_is_the_default_stop_and_bos_begins_a_text(tmp_path):
    end = MODEL.greedy([256, 104, 105], 3)[2]
    config = SessaConfig.from_dict({**CONFIG.to_dict(), "eos_token_id": end, "bos_token_id": 256})
    made = write_bundle(tmp_path / "b", {"model.onnx": b"", "tokenizer.json": byte_level_tokenizer().encode()}, config, "fp32", {})
    s = Session(made, NumpyBackend(MODEL))
    result = s.generate("hi", 9)[0]
    assert result.tokens[-1] == end and result.finish == "stop" and result.text == s.tokenizer.decode(result.tokens[:-1])
    assert s.tokens()[:3] == [256, 104, 105]
    s.prefill(["!"])
    assert s.tokens()[-1] == 33 and 256 not in s.tokens()[1:]


def test_a_prompt_of_none_leaves_its_sequence_alone(bundle):
    s = session(bundle, batch=3)
    s.prefill([None, [9, 8], None])
    before = s.tokens(1)
    results = s.generate(["def f", None, [7]], 3, [SamplingParams(1.0, seed=1), SamplingParams(), None])
    assert results[1] == Generation() and s.tokens(1) == before and s.backend.length[1] == 2
    assert results[2].tokens == MODEL.greedy([7], 3)
    assert results[0].tokens == session(bundle).generate("def f", 3, SamplingParams(1.0, seed=1))[0].tokens
    assert s.generate([None, None]) == [Generation(), Generation()] and list(s.stream([None], 2)) == []


def test_new_tokens_for_each_prompt(bundle):
    results = session(bundle, batch=4).generate(PROMPTS, [1, 5, None, 2])
    assert [len(r.tokens) for r in results] == [1, 5, 52, 2] and [r.finish for r in results] == ["length", "length", "context", "length"]
    assert [r.tokens for r in results] == [MODEL.greedy(p, len(r.tokens)) for p, r in zip(PROMPTS, results, strict=True)]
    with pytest.raises(UserError, match="wrong length"):
        session(bundle, batch=4).generate(PROMPTS, [1, 2])


INTEGERS = [np.int64, np.int32, np.uint8, np.array]


@pytest.mark.parametrize("kind", INTEGERS, ids=lambda kind: kind.__name__)
def test_integers_and_floats_of_numpy_are_numbers(bundle, kind):
    single = np.float32
    params = SamplingParams(single(0.75), kind(40), single(0.5), single(0.25), single(1.5), kind(3))
    assert params == SamplingParams(0.75, 40, 0.5, 0.25, 1.5, 3) and type(params.seed) is int and type(params.top_p) is float
    expected = session(bundle).generate([[1, 2, 3]], 5, params)[0].tokens
    s = Session(bundle, NumpyBackend(MODEL, kind(2), kind(40)), chunk=kind(2))
    for prompt in ([kind(1), kind(2), kind(3)], np.array([1, 2, 3], np.int32), (1, 2, 3), range(1, 4)):
        s.reset([kind(0)])
        assert s.generate([prompt], kind(5), params, stop_tokens=kind(200))[0].tokens == expected
    s.reset()
    assert s.generate(np.array([[1, 2], [3, 4]]), np.array([2, 3]), stop_tokens=[kind(201)])[1].tokens == MODEL.greedy([3, 4], 3)
    s.backend.rewind(kind(1), kind(2))
    assert s.backend.room(kind(1)) == 38 and s.tokens(kind(1))[:2] == [3, 4]


@pytest.mark.parametrize("bad", [True, np.True_, np.array([True])[0], 1.0, np.float64(1), "1", None])
def test_booleans_floats_and_texts_are_no_integers(bundle, bad):
    calls = [lambda s: s.generate([[bad]], 1), lambda s: s.backend.rewind(0, bad), lambda s: s.generate([[1]], 1, stop_tokens=[bad]), lambda s: s.tokens(bad)]
    if bad is not None:
        calls += [lambda s: s.generate([[1]], bad), lambda s: Session(s.bundle, s.backend, chunk=bad), lambda s: NumpyBackend(MODEL, bad),
                  lambda s: NumpyBackend(MODEL, 1, bad), lambda s: SamplingParams(seed=bad), lambda s: s.generate([[1]], [bad])]
    for number, call in enumerate([*calls, lambda s: SamplingParams(top_k=bad)]):
        with pytest.raises(UserError) as caught:
            call(session(bundle))
        assert "\n" not in str(caught.value), number
    if not isinstance(bad, float):
        with pytest.raises(UserError):
            SamplingParams(bad)


def test_every_one_of_several_stop_tokens_of_the_model_ends_a_text(bundle):
    expected = MODEL.greedy(PROMPTS[0], 6)
    for ends in ((expected[3], next(i for i in range(9) if i not in expected)), [expected[3]], expected[3]):
        s = session(bundle)
        s.config = dataclasses.replace(s.config, eos_token_id=ends)
        assert s.generate([PROMPTS[0]], 6)[0].tokens == expected[: expected.index(expected[3]) + 1]


def test_a_tokenizers_template_begins_a_conversation_once(tmp_path):
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    library = Library.from_str(byte_level_tokenizer())
    library.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 256)])
    library.enable_truncation(4)
    for bos, first in ((None, 256), (256, 256), (7, 7)):
        config = dataclasses.replace(CONFIG, bos_token_id=bos)
        made = write_bundle(tmp_path / str(bos), {"model.onnx": b"", "tokenizer.json": library.to_str().encode()}, config, "fp32", {})
        s = Session(made, NumpyBackend(MODEL))
        s.prefill("hello")
        s.prefill([" you"])
        assert s.tokens() == [first, *b"hello you"] and s.tokenizer.ignored[0] == "truncation to 4 tokens"


def test_each_of_several_end_tokens_ends_a_text(tmp_path):
    greedy = MODEL.greedy(PROMPTS[0], 12)
    first, second = greedy[3], next(token for token in greedy[5:] if token not in greedy[:5])
    for ends in ((first, second), (second, first), (second,)):
        files = {"model.onnx": b"", "tokenizer.json": byte_level_tokenizer().encode()}
        made = write_bundle(tmp_path / "-".join(map(str, ends)), files, dataclasses.replace(CONFIG, eos_token_id=ends), "fp32", {})
        assert Bundle.open(made.path).config.eos_token_ids == ends
        found = Session(made, NumpyBackend(MODEL)).generate([PROMPTS[0]], 12)[0]
        at = min(greedy.index(token) for token in ends)
        assert (found.tokens, found.finish) == (greedy[: at + 1], "stop") and found.text == Session(made, NumpyBackend(MODEL)).tokenizer.decode(greedy[:at])


def test_stop_strings_are_not_shown(bundle):
    s = session(bundle)
    greedy = MODEL.greedy(PROMPTS[0], 12)
    text = s.tokenizer.decode(greedy)
    stop = text[2:4]
    cut = text.index(stop)
    result = s.generate([PROMPTS[0]], 12, stop=["never to be seen", stop])[0]
    assert result.text == text[:cut] and result.finish == "stop"
    held = session(bundle)
    pieces = [c.text for c in held.stream([PROMPTS[0]], 12, stop=[text + "x"])]
    assert "".join(pieces) == text and set(pieces[:-1]) == {""}, "what may begin a stop string waits"


def test_capacity_exactly_full(bundle):
    prompt = PROMPTS[2]
    s = session(bundle, capacity=len(prompt))
    assert s.generate([prompt], 1)[0].tokens == MODEL.greedy(prompt, 1) and s.backend.room(0) == 0
    s = session(bundle, capacity=20)
    assert s.generate([prompt], 8)[0].tokens == MODEL.greedy(prompt, 8) and s.backend.room(0) == 0
    endless = session(bundle, capacity=20).generate([prompt])[0]
    assert endless.tokens == MODEL.greedy(prompt, 8) and endless.finish == "context"


def test_a_full_context_says_how_long_prompt_and_capacity_are(bundle):
    s = session(bundle, batch=2, capacity=16)
    for prompts, new, words in ((([1] * 17, [2]), 1, ("17", "16")), (([1] * 4, [2] * 13), 5, ("13", "5", "16", "--capacity 18"))):
        with pytest.raises(UserError) as caught:
            s.generate(prompts, new)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="17"):
        s.prefill([[1] * 17])
    assert s.backend.length.tolist() == [0, 0] and s.backend.calls == []
    s.prefill([[1] * 15, [2] * 3])
    s.decode([4, None])
    with pytest.raises(UserError, match="full"):
        s.decode([4, None])
    s.decode([None, 4])
    assert s.backend.length.tolist() == [16, 4]


def test_one_free_row_beside_a_long_prompt(bundle):
    """Sequence 0 has one row left when sequence 1 takes a long prompt in chunks."""
    s = session(bundle, batch=2, capacity=30, chunk=4)
    s.prefill([list(range(29)), [5]])
    long = list(range(60, 87))
    logits = s.prefill([[77], long])
    np.testing.assert_allclose(logits[0], MODEL.logits([*range(29), 77])[-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[1], MODEL.logits([5, *long])[-1], rtol=1e-5, atol=1e-5)
    assert s.backend.length.tolist() == [30, 28]


@pytest.mark.parametrize("call", [
    lambda s: s.generate([], 1), lambda s: s.generate([[1]] * 9, 1), lambda s: s.generate([[]], 1), lambda s: s.generate("", 1),
    lambda s: s.generate([[257]], 1), lambda s: s.generate([[-1]], 1), lambda s: s.generate([[1]], 0), lambda s: s.generate([[1]], True),
    lambda s: s.generate([1, 2], 1), lambda s: s.generate([b"ab"], 1), lambda s: s.generate([[1.5]], 1), lambda s: s.generate([np.ones(2)], 1),
    lambda s: s.generate([[1]], 1, stop_tokens="a"), lambda s: s.reset([1]), lambda s: s.reset([-1]), lambda s: s.tokens(3), lambda s: s.backend.reset([-1]),
    lambda s: s.backend.rewind(1, 0),
    lambda s: s.generate([[1]], 1, stop="a"), lambda s: s.generate([[1]], 1, stop=[""]),
    lambda s: s.generate([[1]], 1, [SamplingParams()] * 2), lambda s: Session(s.bundle, s.backend, chunk=0), lambda s: Session(s.bundle, "tpu"),
    lambda s: s.backend.step(np.zeros((1, 1)), np.ones(1, int)), lambda s: s.backend.step(np.zeros((1, 1), int), np.array([2])),
    lambda s: s.backend.step(np.zeros((1, 1), int), np.array([0])), lambda s: NumpyBackend(MODEL, 0), lambda s: NumpyBackend(MODEL, 1, -3),
    lambda s: s.backend.rewind(0, 4), lambda s: Session(s.bundle, "trt"),
])
def test_bad_input_is_refused_and_changes_nothing(bundle, call):
    s = session(bundle)
    with pytest.raises(UserError) as caught:
        call(s)
    assert "\n" not in str(caught.value)
    assert s.backend.length.tolist() == [0] and s.tokens() == []


def test_a_bundle_without_a_tokenizer_takes_ids(tmp_path):
    s = Session(write_bundle(tmp_path / "b", {"model.onnx": b""}, CONFIG, "fp32", {}), NumpyBackend(MODEL))
    assert s.generate([[1, 2, 3]], 4)[0].tokens == MODEL.greedy([1, 2, 3], 4)
    for call in (lambda: s.generate("text", 1), lambda: s.generate([[1]], 1, stop=["x"])):
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            call()


def test_logits_that_are_not_finite_stop_the_run(bundle, monkeypatch):
    s = session(bundle)
    monkeypatch.setattr(MODEL, "w", {**MODEL.w, "norm.weight": np.full(16, np.nan)})
    with pytest.raises(SessaError, match="finite"):
        s.generate([[1, 2]], 2)


def test_logits_of_one_sequence_that_are_not_finite_leave_the_conversations_as_they_were(bundle, monkeypatch):
    s = session(bundle, batch=2)
    forward = s.backend._forward
    monkeypatch.setattr(s.backend, "_forward", lambda *given: np.where([[False], [True]], np.nan, forward(*given)))
    with pytest.raises(SessaError, match="finite"):
        s.generate([[1, 2], [3]], 2, SamplingParams(1.0, seed=1))
    assert s.tokens(0) == [1, 2] and s.tokens(1) == [3]
    monkeypatch.setattr(s.backend, "_forward", forward)
    s.reset()
    assert s.generate([[1, 2], [3]], 3)[0].tokens == MODEL.greedy([1, 2], 3)
