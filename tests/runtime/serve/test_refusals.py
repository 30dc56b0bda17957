"""Everything that is refused: the status, OpenAI's shape, the name of what is wrong; and every field at its bounds, walked by a table."""

from __future__ import annotations

import json
from typing import Any

import pytest
from served import CONFIG, JSON, Served, bundle

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
BASE: dict[str, dict[str, Any]] = {
    COMPLETION: {"prompt": "abc", "max_tokens": 1}, CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [97]},
}
ODD: list[Any] = ["1", [], {}, True, "x", [1], 1e400, "\ud800"]
# field -> (values at the ends of what is taken, values beyond); ODD is beyond for all numbers
NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 0.5, 2], [-0.1]), "top_p": ([0.001, 1], [0, -1, 1.1]), "top_k": ([-1, 0, 1, 10**6], [-2, 1.5]), "min_p": ([0, 0.99], [-0.1, 1]),
    "repetition_penalty": ([0.1, 2], [0, -1]), "presence_penalty": ([-2, 2], [-2.1, 2.1]), "frequency_penalty": ([-2, 2], [-2.1, 2.1]),
    "seed": ([-(2**63), 0, 2**64 - 1], [-(2**63) - 1, 2**64, 0.5]), "n": ([1, 3], [0, -1, 129, 1.5]), "max_tokens": ([1, 70], [-1, 1.5]),
}
FIELDS: dict[str, tuple[list[Any], list[Any]]] = {
    "stop": (["x", ["x", "y"], []], ["", [""], ["x"] * 65, 3, [3], {"a": 1}]), "stream": ([False], [1, "true"]), "ignore_eos": ([True, False], [1, "x"]),
    "logit_bias": ([{}, {"1": 100}, {"256": -100}], [{"1": 101}, {"x": 1}, {"257": 1}, {"-1": 1}, {"1": "a"}, [1], {"1.0": 1}, {"\u0663": 1}, {"9" * 50: 1}]),
    "user": (["me"], [3]), "metadata": ([{}, {"a": "b"}], ["x", [1]]), "store": ([True, False], ["x", 2]), "service_tier": (["auto"], [1]),
    "model": (["tiny"], [3]),
}
OWN: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    COMPLETION: {
        "prompt": (["a", ["a", "b"], [1, 2], [[1], [2]]], [
            "", [], [""], [[]], [[1], []], ["a", ""], ["a", 1], [1, "a"], [[1], "a"], 3, {}, None, [1.5], [True], [-1], [257], [[257]], [[1], [10**30]],
            [[[1]]], "\ud800", ["\ud800"]]),
        "echo": ([True, False], [1, "x"]), "logprobs": ([0, 5, 20], [-1, 21, True, 1.5, "x"]), "best_of": ([1], [0, 2, 5, True, "1"]),
        "suffix": ([], ["", "x"]),
    },
    CHAT: {
        "messages": ([[{"role": "system", "content": ""}, {"role": "user", "content": "a"}]], [
            [], None, "x", {}, [1], [{}], [{"role": "user"}], [{"content": "a"}], [{"role": "tool", "content": "a"}], [{"role": "user", "content": None}],
            [{"role": "user", "content": 3}], [{"role": "user", "content": []}], [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "a", "tool_calls": []}], [{"role": "user", "content": "a", "x": 1}],
            [{"role": "user", "content": "\ud800"}]]),
        "logprobs": ([True, False], [1, 0, "x"]), "max_completion_tokens": ([1], [0, -1, 2, True]), "tools": ([], [[], [{"type": "function"}]]),
        "response_format": ([], [{"type": "text"}, {"type": "json_object"}]),
    },
}
UNKNOWN = ["tool_choice", "functions", "function_call", "parallel_tool_calls", "modalities", "audio", "prediction", "reasoning_effort", "guided_json",
           "frobnicate", "Temperature", "max_token", "prompt ", ""]
NO_OBJECTS = [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b'{"prompt": "a",}', b'{"prompt": ' + b"[" * 100_000, b"{" * 5000, b'{"prompt": "a", "prompt": "b"}',
    b'{"a": ' + b"9" * 5000 + b"}", b'{"prompt": NaN}', b'{"prompt": "\xff"}', "{\"prompt\": \"a\"}".encode("utf-16"),
]


def error(answer: Any, status: int = 400) -> dict[str, Any]:
    """The error of an answer, proven to be of OpenAI's shape."""
    assert answer.status_code == status and answer.headers["content-type"] == "application/json", (answer.status_code, answer.text)
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    found = body["error"]
    assert found["message"] and "\n" not in found["message"] and isinstance(found["type"], str), found
    assert found["param"] is None or isinstance(found["param"], str)
    return found  # type: ignore[no-any-return]


def raw(served: Served, path: str, body: dict[str, Any]) -> Any:
    return served.request("POST", path, content=json.dumps(body).encode(), headers=JSON)


CASES = [pytest.param(path, name, *values, id=f"{path} {name}") for path in (COMPLETION, CHAT)
         for name, values in (*NUMBERS.items(), *FIELDS.items(), *OWN[path].items())]


@pytest.mark.parametrize(("path", "name", "taken", "refused"), CASES)
def test_every_field_at_its_bounds_and_beyond(served: Served, path: str, name: str, taken: list[Any], refused: list[Any]) -> None:
    for value in [*taken, *([None] if name not in ("prompt", "messages") else [])]:
        answer = raw(served, path, {**BASE[path], name: value})
        assert answer.status_code == 200, (value, answer.text)
    for value in [*refused, *(ODD if name in NUMBERS else [])]:
        found = error(raw(served, path, {**BASE[path], name: value}))
        assert found["type"] == "invalid_request_error" and (found["param"] or "").startswith(name) and name in found["message"], (value, found)


@pytest.mark.parametrize("path", BASE)
def test_unknown_keys_are_refused_by_name(served: Served, path: str) -> None:
    for name in UNKNOWN:
        for value in (1, None):
            found = error(raw(served, path, {**BASE[path], name: value}))
            assert found["param"] == name or not name
            assert "nothing is ignored" in found["message"]
    assert error(raw(served, path, {**BASE[path], "suffix" if path == CHAT else "messages!": "x"}))


@pytest.mark.parametrize("path", BASE)
@pytest.mark.parametrize("body", NO_OBJECTS, ids=lambda body: repr(body[:16]))
def test_bodies_that_are_no_json_objects(served: Served, path: str, body: bytes) -> None:
    error(served.request("POST", path, content=body, headers=JSON))


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx", "json"])
def test_a_body_that_is_not_said_to_be_json(served: Served, kind: str | None) -> None:
    """What a page of another site can send without asking the browser for leave."""
    headers = {} if kind is None else {"Content-Type": kind}
    assert "application/json" in error(served.request("POST", COMPLETION, content=b'{"prompt": "a"}', headers=headers))["message"]
    right = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert served.request("POST", COMPLETION, content=b'{"prompt": "a", "max_tokens": 1}', headers=right).status_code == 200


def test_what_does_not_go_together(served: Served) -> None:
    cases = [
        (COMPLETION, {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETION, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (COMPLETION, {"max_tokens": 0}, "max_tokens"), (CHAT, {"max_tokens": 0}, "max_tokens"), (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": False, "top_logprobs": 2}, "top_logprobs"), (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"), ("/tokenize", {"add_generation_prompt": True}, "add_generation_prompt"),
        ("/detokenize", {"tokens": [257]}, "tokens"), ("/detokenize", {"tokens": [-1]}, "tokens[0]"), ("/detokenize", {"tokens": "a"}, "tokens"),
    ]
    for path, more, param in cases:
        assert error(raw(served, path, {**BASE[path], **more}))["param"] == param, (path, more)


def test_the_prompt_and_the_answer_fit_or_both_numbers_are_said(served: Served) -> None:
    capacity = CONFIG.max_context
    assert served.complete([1] * (capacity - 1), max_tokens=1)["usage"]["total_tokens"] == capacity
    for prompt, more in ((capacity, {"max_tokens": 1}), (capacity - 1, {"max_tokens": 2}), (capacity - 15, {}), (10, {"max_tokens": 10**6}),
                         (capacity + 50, {})):
        asked = {k: v for k, v in {**BASE[COMPLETION], **more, "prompt": [1] * prompt}.items() if k != "max_tokens" or "max_tokens" in more}
        found = error(raw(served, COMPLETION, asked))
        assert found["code"] == "context_length_exceeded"
        assert all(str(number) in found["message"] for number in (prompt, asked.get("max_tokens", 16), capacity)), found
    long = [{"role": "user", "content": "a" * 200}]
    for more in ({"max_tokens": 96}, {"max_completion_tokens": 96, "max_tokens": None}, {"max_tokens": None, "messages": long}):
        assert error(raw(served, CHAT, {**BASE[CHAT], **more}))["code"] == "context_length_exceeded"


def test_a_text_that_is_far_too_long_is_not_encoded(served: Served) -> None:
    found = error(served.post(COMPLETION, {"prompt": "x" * 3_000_000}))
    assert "at least" in found["message"] and str(CONFIG.max_context) in found["message"] and len(found["message"]) < 300


@pytest.mark.parametrize("path", BASE)
def test_another_model_is_404(served: Served, path: str) -> None:
    found = error(raw(served, path, {**BASE[path], "model": "gpt-4o"}), 404)
    assert found["code"] == "model_not_found" and "gpt-4o" in found["message"] and "tiny" in found["message"]


def test_routes_and_methods_that_are_not_there(served: Served) -> None:
    for path in ("/v1/embeddings", "/nothing", "/v1/completions/", "/v1", "/static/../etc/passwd", "/redoc"):
        for method in ("GET", "POST"):
            assert error(served.request(method, path, **({"json": {}} if method == "POST" else {})), 404)["code"] == "unknown_route"
    for method, path in (("GET", COMPLETION), ("DELETE", CHAT), ("PUT", "/tokenize"), ("POST", "/v1/models"), ("PATCH", "/health/ready"), ("PUT", "/metrics"),
                         ("OPTIONS", COMPLETION)):
        assert error(served.request(method, path), 405)["code"] == "method_not_allowed"


def test_bodies_are_bounded_said_or_not(tmp_path: Any) -> None:
    with Served(bundle(tmp_path / "b"), body_limit=2000) as server:
        large = json.dumps({"prompt": "x" * 3000}).encode()

        async def pieces() -> Any:
            for at in range(0, len(large), 500):
                yield large[at : at + 500]

        for content in (large, pieces()):
            assert error(server.request("POST", COMPLETION, content=content, headers=JSON), 413)["code"] == "body_too_large"
        assert server.request("POST", COMPLETION, content=b"{}", headers={**JSON, "Content-Length": "9" * 30}).status_code == 413
        assert server.complete("abc", max_tokens=1)


def test_more_choices_than_are_ever_held(served: Served) -> None:
    found = error(raw(served, COMPLETION, {**BASE[COMPLETION], "prompt": ["a"] * 6, "n": 2}))
    assert found["param"] == "n" and "12" in found["message"] and "10" in found["message"]


def test_request_ids_come_back(served: Served) -> None:
    assert served.get("/health/live", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    answer = served.post(COMPLETION, BASE[COMPLETION], headers={"X-Request-Id": "mine-2"})
    assert answer.headers["x-request-id"] == "mine-2" and answer.json()["id"] == "cmpl-mine-2"
    for odd in ("a b", "x" * 129, "a\x01"):
        assert served.get("/health/live", headers={"X-Request-Id": odd}).headers["x-request-id"] != odd
