"""/v1/completions in this process, against the numpy oracle: prompts of every kind, what is asked for, and what comes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy_model import NumpyBackend
from served import CONFIG, MODEL, Served, bundle, greedy, oracle_logprobs

from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer

TOKENIZER = Tokenizer.from_json(byte_level_tokenizer())


def text(tokens: list[int]) -> str:
    return TOKENIZER.decode([t for t in tokens if t != 256])


def ids(words: str) -> list[int]:
    return list(words.encode())


def test_text_ids_and_lists_of_either_are_the_same_prompts(served: Served) -> None:
    wanted = [text(greedy(ids(p), 12)) for p in ("abc", "Grüße")]
    for prompt in ("abc", ids("abc")):
        answer = served.complete(prompt, max_tokens=12)
        assert [c["text"] for c in answer["choices"]] == wanted[:1]
        assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-") and answer["created"] > 1e9
    for prompt in (["abc", "Grüße"], [ids("abc"), ids("Grüße")]):
        answer = served.complete(prompt, max_tokens=12)
        assert [c["text"] for c in answer["choices"]] == wanted and [c["index"] for c in answer["choices"]] == [0, 1]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == 3 + len(ids("Grüße")) and usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0


def test_the_default_is_16_tokens_of_temperature_1(served: Served) -> None:
    answer = served.post("/v1/completions", {"prompt": "abc", "seed": 5, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 16 and answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"] == session_text("abc", 16, SamplingParams(1.0, seed=5), stop_tokens=())


def session_text(prompt: str, count: int, params: SamplingParams, **more: Any) -> str:
    """What a session of its own gives: `run` with the same options."""
    with Session(Served.bundle, NumpyBackend(MODEL)) as session:  # type: ignore[attr-defined]
        return session.generate([prompt], count, params, **more)[0].text


@pytest.fixture(autouse=True)
def _bundle(served: Served) -> None:
    Served.bundle = served.engine.bundle  # type: ignore[attr-defined]


@pytest.mark.parametrize("asked", [
    {"temperature": 0.8, "seed": 7}, {"temperature": 1.2, "top_k": 5, "seed": 7}, {"temperature": 1.0, "top_p": 0.5, "seed": 1},
    {"temperature": 1.0, "min_p": 0.3, "seed": 2**64 - 1}, {"temperature": 0, "repetition_penalty": 1.5}, {"temperature": 0, "presence_penalty": 1.5},
    {"temperature": 0, "frequency_penalty": -1.5}, {"temperature": 0.7, "top_k": -1, "seed": 0}, {"temperature": 0.7, "top_k": 0, "seed": 0},
], ids=str)
def test_sampling_draws_what_run_draws(served: Served, asked: dict[str, Any]) -> None:
    params = SamplingParams(**{**asked, "top_k": max(0, asked.get("top_k", 0))})
    assert served.complete("to be", max_tokens=20, **asked)["choices"][0]["text"] == session_text("to be", 20, params)


def test_choices_of_a_seed_differ_repeat_and_begin_with_what_run_draws(served: Served) -> None:
    asked = {"max_tokens": 10, "n": 3, "seed": 11, "temperature": 1.0, "ignore_eos": True}
    one, again = (served.complete(["ab", "cd"], **asked) for _ in range(2))
    texts = [c["text"] for c in one["choices"]]
    assert texts == [c["text"] for c in again["choices"]] and len(set(texts)) == 6 and [c["index"] for c in one["choices"]] == list(range(6))
    assert one["usage"]["prompt_tokens"] == 4 and one["usage"]["completion_tokens"] == 60
    for at, prompt in ((0, "ab"), (3, "cd")):
        assert texts[at] == session_text(prompt, 10, SamplingParams(1.0, seed=11), stop_tokens=())
    assert served.complete("ab", **{**asked, "n": 1, "seed": -3})["choices"] == served.complete("ab", **{**asked, "n": 1, "seed": 2**64 - 3})["choices"]


def test_an_end_token_stops_unless_it_is_ignored(served: Served) -> None:
    bias = {"256": 100}
    answer = served.complete("abc", max_tokens=6, logit_bias=bias)
    assert answer["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"} and answer["usage"]["completion_tokens"] == 1
    answer = served.complete("abc", max_tokens=6, logit_bias=bias, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 6
    banned = {str(greedy(ids("abc"), 1)[0]): -100}
    assert served.complete("abc", max_tokens=1, logit_bias=banned)["choices"][0]["text"] != served.complete("abc", max_tokens=1)["choices"][0]["text"]


def test_stop_strings_end_the_text_and_never_leak(served: Served) -> None:
    whole = served.complete("abc", max_tokens=24, ignore_eos=True)["choices"][0]["text"]
    for stop in (whole[5:8], [whole[5:8]], ["nowhere in it", whole[5:8]]):
        end = whole.index(whole[5:8])
        choice = served.complete("abc", max_tokens=24, ignore_eos=True, stop=stop)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (whole[:end], "stop")
        parts = served.stream("/v1/completions", {"prompt": "abc", "max_tokens": 24, "ignore_eos": True, "stop": stop})
        assert "".join(p["choices"][0]["text"] for p in parts) == whole[:end] and parts[-1]["choices"][0]["finish_reason"] == "stop"


def test_only_whole_characters_are_streamed(served: Served) -> None:
    body = {"prompt": "a", "max_tokens": 12, "temperature": 1.0, "logprobs": 0, "logit_bias": {str(byte): 100 for byte in "\u00e9".encode()}}
    whole = 0
    for seed in range(12):
        parts = [p["choices"][0] for p in served.stream("/v1/completions", {**body, "seed": seed})]
        names = [name for part in parts for name in part["logprobs"]["tokens"]]
        raw = bytes(int(name[-2:], 16) if name.startswith("bytes:") else ord(name) for name in names)
        assert "".join(p["text"] for p in parts) == raw.decode("utf-8", "replace")
        whole += sum(p["text"].count("\u00e9") for p in parts)
    assert whole, "no character of several bytes came"


def test_a_stream_is_the_answer_in_pieces(served: Served) -> None:
    body = {"prompt": ["abc", "xyz"], "max_tokens": 9, "n": 2, "seed": 1, "temperature": 1.0, "logprobs": 2}
    whole = served.complete(**body)
    parts = served.stream("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    for index, choice in enumerate(whole["choices"]):
        mine = [p["choices"][0] for p in parts if p["choices"] and p["choices"][0]["index"] == index]
        assert "".join(p["text"] for p in mine) == choice["text"] and mine[-1]["finish_reason"] == choice["finish_reason"]
        assert all(p["finish_reason"] is None for p in mine[:-1])
        for name, values in choice["logprobs"].items():
            assert [x for p in mine for x in p["logprobs"][name]] == values
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert parts[-1]["usage"]["prompt_tokens"] == 6 and all(p["usage"] is None for p in parts[:-1]) and len({p["id"] for p in parts}) == 1
    assert all("usage" not in p for p in served.stream("/v1/completions", body))
    running = served.stream("/v1/completions", {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True}})
    counts = [p["usage"]["completion_tokens"] for p in running]
    assert counts == sorted(counts) and counts[0] >= 1


def test_log_probabilities_of_the_answer(served: Served) -> None:
    prompt = ids("abc")
    tokens = greedy(prompt, 8)
    found = served.complete(prompt, max_tokens=8, logprobs=3)["choices"][0]["logprobs"]
    wanted = oracle_logprobs([*prompt, *tokens])[len(prompt) - 1 : -1]
    assert found["token_logprobs"] == pytest.approx([wanted[i, t] for i, t in enumerate(tokens)], abs=1e-4)
    for at, best in enumerate(found["top_logprobs"]):
        assert list(best.values())[:3] == pytest.approx(sorted(wanted[at], reverse=True)[:3], abs=1e-4) and len(best) <= 4
        assert found["token_logprobs"][at] == max(best.values()) and found["tokens"][at] in best
    zero = served.complete(prompt, max_tokens=8, logprobs=0)["choices"][0]["logprobs"]
    assert zero["token_logprobs"] == found["token_logprobs"] and all(not best for best in zero["top_logprobs"])
    assert served.complete(prompt, max_tokens=8)["choices"][0]["logprobs"] is None


class AllLogits(NumpyBackend):
    """The graph that gives every position's logits."""

    all_logits = True

    def _forward_all(self, tokens: Any, new: Any) -> Any:
        out = np.zeros((*tokens.shape, CONFIG.vocab_size), np.float32)
        before = self.length.copy()
        for t in range(tokens.shape[1]):
            live = (new > t).astype(np.int32)
            out[:, t] = self._forward(np.ascontiguousarray(tokens[:, t : t + 1]), live)
            self.length += live
        self.length[:] = before
        return out


@pytest.mark.parametrize("every", [False, True], ids=["last logits", "all logits"])
def test_echo_scores_the_prompt_as_evaluation_harnesses_ask(tmp_path: Any, every: bool) -> None:
    from served import SlowBackend

    backend = type("Both", (AllLogits, SlowBackend), {})(2) if every else SlowBackend(2)
    prompt = [*ids("to be or"), 0xE2, 256, 98]
    wanted = oracle_logprobs(prompt)
    with Served(bundle(tmp_path / "b"), backend=backend) as server:
        for _ in range(2):  # the second time the prompt is known, and scored all the same
            answer = server.complete([prompt, prompt[:5]], max_tokens=1, logprobs=1, echo=True)
            for choice, given in zip(answer["choices"], (prompt, prompt[:5]), strict=True):
                found = choice["logprobs"]
                assert len(found["tokens"]) == len(given) + 1 and found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
                assert found["token_logprobs"][1:-1] == pytest.approx([wanted[i, t] for i, t in enumerate(given[1:])], abs=1e-4)
                for at in range(1, len(given)):  # what a harness looks at to know whether the token was the most likely one
                    assert max(found["top_logprobs"][at].values()) == pytest.approx(wanted[at - 1].max(), abs=1e-4)
                assert found["text_offset"] == sorted(found["text_offset"])
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert answer["choices"][0]["text"].startswith("to be or\ufffd<|endoftext|>b")
        only = server.complete(prompt, max_tokens=0, logprobs=1, echo=True)
        assert only["choices"][0]["text"] == "to be or\ufffd<|endoftext|>b" and len(only["choices"][0]["logprobs"]["tokens"]) == len(prompt)
        assert only["choices"][0]["finish_reason"] == "length" and only["usage"]["completion_tokens"] == 0
        parts = server.stream("/v1/completions", {"prompt": prompt, "max_tokens": 3, "echo": True})
        assert "".join(p["choices"][0]["text"] for p in parts) == only["choices"][0]["text"] + server.complete(prompt, max_tokens=3)["choices"][0]["text"]


def test_names_of_tokens_are_told_apart(served: Served) -> None:
    found = served.complete([256, 0xE2, 97], max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert found["tokens"] == ["<|endoftext|>", "bytes:\\xe2", "a"]


def test_without_a_tokenizer_ids_are_taken_and_given(plain: Served) -> None:
    tokens = greedy(ids("abc"), 5)
    answer = plain.complete(ids("abc"), max_tokens=5, logprobs=1)
    assert answer["choices"][0]["text"] == " ".join(map(str, tokens)) and answer["choices"][0]["logprobs"]["tokens"] == [f"token_id:{t}" for t in tokens]
    assert plain.complete(ids("abc"), max_tokens=0, echo=True)["choices"][0]["text"] == "97 98 99"
    for body, param in (({"prompt": "abc"}, "prompt"), ({"prompt": [1], "stop": "x"}, "stop")):
        error = plain.post("/v1/completions", body).json()["error"]
        assert error["param"] == param and "no tokenizer" in error["message"]
    assert "no tokenizer" in plain.post("/tokenize", {"prompt": "a"}).json()["error"]["message"]
    assert "no tokenizer" in plain.post("/detokenize", {"tokens": [1]}).json()["error"]["message"]


def test_a_prompt_is_counted_as_cached_when_it_was(tmp_path: Any) -> None:
    with Served(bundle(tmp_path / "b"), slots=1, chunk=4) as server:
        prompt = "a prompt that comes twice"
        first, second = (server.complete(prompt, max_tokens=4) for _ in range(2))
        assert first["choices"] == second["choices"] and first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 20
        page = server.get("/metrics").text
        assert "sessa_prefix_hits_total 1.0" in page


def test_tokenize_and_back(served: Served) -> None:
    answer = served.post("/tokenize", {"model": "tiny", "prompt": "Grüße<|endoftext|>"}).json()
    assert answer == {"tokens": [*ids("Grüße"), 256], "count": 8, "max_model_len": 96}
    assert served.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": "Grüße<|endoftext|>"}
    assert served.post("/tokenize", {"prompt": ""}).json()["tokens"] == [] and served.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_what_a_client_s_tokenizer_asks_for(served: Served, plain: Served) -> None:
    told = served.get("/tokenizer_info").json()
    assert (told["bos_token"], told["eos_token"]) == ("^", "<|endoftext|>") and "add_generation_prompt" in told["chat_template"]
    assert plain.get("/tokenizer_info").status_code == 400


def test_the_model_is_listed_and_named(served: Served) -> None:
    card = served.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 96) and served.get("/v1/models/tiny").json() == card
    assert served.get("/v1/models/other").status_code == 404
    assert served.complete("a", model="tiny", max_tokens=1)["model"] == "tiny"


def test_what_is_taken_without_effect(served: Served) -> None:
    more = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "best_of": 1, "suffix": None, "logit_bias": None, "stop": None, "n": 1}
    assert served.complete("abc", max_tokens=8, **more)["choices"] == served.complete("abc", max_tokens=8)["choices"]
