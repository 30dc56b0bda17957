"""/v1/chat/completions in this process: what the template makes of messages, and the answer in OpenAI's shape."""

from __future__ import annotations

from typing import Any

import pytest
from served import Served, bundle, greedy
from templated import rendered

from sessa_deploy.runtime.tokenizer import Tokenizer, byte_level_tokenizer

TOKENIZER = Tokenizer.from_json(byte_level_tokenizer())
ASKED = [("user", "hi")]
PROMPT = TOKENIZER.encode(rendered(*ASKED))


def text(tokens: list[int]) -> str:
    return TOKENIZER.decode([t for t in tokens if t != 256])


def test_a_conversation_is_rendered_and_answered(served: Served) -> None:
    answer = served.chat(ASKED, max_tokens=10)
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text(greedy(PROMPT, 10)), "refusal": None} and choice["logprobs"] is None
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-") and answer["usage"]["prompt_tokens"] == len(PROMPT)
    assert served.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"] == PROMPT
    without = served.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}).json()["tokens"]
    assert TOKENIZER.decode(without, skip_special=False) == rendered(*ASKED).removesuffix("<assistant>")


def test_special_tokens_of_the_template_are_tokens_and_come_once(served: Served) -> None:
    assert PROMPT.count(256) == 1 and PROMPT[0] == ord("^")


@pytest.mark.parametrize("messages", [
    [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
    [{"role": "user", "content": "hi", "name": None}], [{"role": "user", "content": "hi", "refusal": None, "tool_calls": None, "annotations": None}],
    [{"role": "user", "content": "hi", "name": "me"}],
])
def test_messages_as_clients_write_them(served: Served, messages: Any) -> None:
    answer = served.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 4})
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == len(PROMPT), answer.text


def test_a_developer_is_the_system(served: Served) -> None:
    turns = [("developer", "short"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    count = served.chat(turns, max_tokens=1)["usage"]["prompt_tokens"]
    assert count == len(TOKENIZER.encode(rendered(*[("system" if role == "developer" else role, words) for role, words in turns])))


def test_the_default_is_the_rest_of_the_context(served: Served) -> None:
    answer = served.chat(ASKED, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 96 and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(served: Served, name: str) -> None:
    assert served.chat(ASKED, ignore_eos=True, **{name: 3})["usage"]["completion_tokens"] == 3
    assert served.chat(ASKED, ignore_eos=True, max_tokens=3, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_a_stream_names_the_role_gives_the_text_and_ends(served: Served) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "n": 2, "seed": 4, "temperature": 1.0, "logprobs": True,
                            "top_logprobs": 2}
    whole = served.chat(ASKED, **{k: v for k, v in body.items() if k != "messages"})
    parts = served.stream("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in parts if p["choices"] and p["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""} and mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == choice["finish_reason"]
        assert "".join(p["delta"].get("content", "") for p in mine) == choice["message"]["content"]
        assert [x for p in mine if p["logprobs"] for x in p["logprobs"]["content"]] == choice["logprobs"]["content"]
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == {**whole["usage"], "prompt_tokens_details": parts[-1]["usage"]["prompt_tokens_details"]}
    assert {p["object"] for p in parts} == {"chat.completion.chunk"}


def test_log_probabilities_name_bytes(served: Served) -> None:
    found = served.chat(ASKED, max_tokens=4, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(found) == 4
    for token, entry in zip(greedy(PROMPT, 4), found, strict=True):
        assert entry["bytes"] == [token] and entry["logprob"] == entry["top_logprobs"][0]["logprob"] < 0 and len(entry["top_logprobs"]) == 3
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"] or entry["token"].startswith("bytes:")
    bare = served.chat(ASKED, max_tokens=1, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert bare[0]["top_logprobs"] == []


def test_no_template_and_a_template_that_refuses(served: Served, plain: Served, tmp_path: Any) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    with Served(bundle(tmp_path / "b", template=None)) as server:
        for bare, word in ((server, "no chat template"), (plain, "no tokenizer")):
            for path in ("/v1/chat/completions", "/tokenize"):
                answer = bare.post(path, body)
                assert answer.status_code == 400 and word in answer.json()["error"]["message"] and answer.json()["error"]["code"] == "no_chat_template"
    answer = served.post("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "x"}]})
    assert answer.status_code == 400 and "a conversation begins with the user" in answer.json()["error"]["message"]


def test_the_template_s_own_end_ends_an_answer(tmp_path: Any) -> None:
    """eos_token of the tokenizer's settings, where the model's configuration names another or none."""
    import dataclasses

    from served import CONFIG

    with Served(bundle(tmp_path / "b", config=dataclasses.replace(CONFIG, eos_token_id=None))) as server:
        assert server.chat(ASKED, max_tokens=5, logit_bias={"256": 100})["choices"][0]["finish_reason"] == "stop"
        assert server.chat(ASKED, max_tokens=5, logit_bias={"256": 100}, ignore_eos=True)["choices"][0]["finish_reason"] == "length"
