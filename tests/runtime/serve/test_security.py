"""Who may ask, and where a server without a key may listen."""

from __future__ import annotations

import hmac
from typing import Any

import pytest
from served import Served, bundle
from test_refusals import BASE, error

from sessa_deploy.errors import UserError
from sessa_deploy.runtime.serve import security
from sessa_deploy.runtime.serve.security import KEY_VARIABLE, chosen_key, is_loopback

KEY = "sk-of-the-house"
GUARDED = [*(("POST", path) for path in BASE), ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/v1"), ("GET", "/v1/anything"),
           ("GET", "/tokenizer_info"), ("DELETE", "/tokenize")]
OPEN = ["/health/live", "/health/ready", "/metrics", "/", "/docs", "/openapi.json"]
WRONG = ["", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, f"Bearer {KEY.upper()}", f"Bearer x {KEY}", "Bearer \u00e9"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Served(bundle(tmp_path_factory.mktemp("guarded") / "b"), key=KEY) as server:
        yield server


def test_the_key_guards_what_answers_and_nothing_else(guarded: Served) -> None:
    for method, path in GUARDED:
        more = {"json": BASE[path]} if method == "POST" else {}
        answer = guarded.request(method, path, **more)
        assert error(answer, 401)["code"] == "missing_api_key" and answer.headers["www-authenticate"] == "Bearer"
        for value in WRONG:
            found = error(guarded.request(method, path, headers={"Authorization": value.encode("utf-8")}, **more), 401)  # type: ignore[dict-item]
            assert found["type"] == "authentication_error" and KEY not in found["message"], value
        for scheme in ("Bearer", "bearer"):
            assert guarded.request(method, path, headers={"Authorization": f"{scheme} {KEY}"}, **more).status_code in (200, 404, 405), path
    for path in OPEN:
        assert guarded.get(path).status_code == 200, path
    two = [(b"authorization", b"Bearer x"), (b"authorization", f"Bearer {KEY}".encode())]
    assert guarded.get("/v1/models", headers=two).status_code == 401


def test_a_wrong_key_is_refused_before_the_body_is_read(guarded: Served) -> None:
    async def never() -> Any:
        raise AssertionError("the body was read")
        yield b""

    assert guarded.request("POST", "/v1/completions", content=never(), headers={"Content-Type": "application/json"}).status_code == 401


def test_keys_are_compared_in_constant_time(guarded: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: (seen.append((a, b)), real(a, b))[1])
    guarded.get("/v1/models", headers={"Authorization": "Bearer abc"})
    guarded.get("/v1/models")
    assert seen == [(b"abc", KEY.encode()), (b"", KEY.encode())]


def test_openapi_says_that_a_key_is_asked_for(guarded: Served, served: Served) -> None:
    told = guarded.get("/openapi.json").json()
    assert told["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert told["paths"]["/v1/completions"]["post"]["security"] and "security" not in told["paths"]["/health/live"]["get"]
    assert "securitySchemes" not in served.get("/openapi.json").json()["components"]


@pytest.mark.parametrize(("host", "own"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("192.168.1.4", False),
    ("10.0.0.1", False),
    ("no.such.host.invalid", False), ("", False), ("a" * 300, False),
])
def test_which_addresses_are_this_machine_s_own(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_where_the_key_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert chosen_key(None, False, "127.0.0.1") is None and chosen_key("k", False, "0.0.0.0") == "k" and chosen_key(None, True, "0.0.0.0") is None
    with pytest.raises(UserError, match=r"others can reach.*SESSA_API_KEY.*--no-api-key"):
        chosen_key(None, False, "0.0.0.0")
    with pytest.raises(UserError, match="one of them"):
        chosen_key("k", True, "127.0.0.1")
    for odd in ("a b", "k\n", "\u00e9", " k"):
        with pytest.raises(UserError, match="printable ASCII"):
            chosen_key(odd, False, "127.0.0.1")
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    with pytest.raises(UserError, match="SESSA_API_KEY"):
        chosen_key(None, False, "127.0.0.1")
    monkeypatch.setenv(KEY_VARIABLE, "env")
    assert chosen_key(None, False, "0.0.0.0") == "env" and chosen_key("k", False, "127.0.0.1") == "k"
    with pytest.raises(UserError, match="unset SESSA_API_KEY"):
        chosen_key(None, True, "0.0.0.0")
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(UserError, match="others can reach"):
        chosen_key(None, False, "0.0.0.0")


def test_pages_load_nothing_from_elsewhere(served: Served) -> None:
    import base64
    import hashlib
    import re

    for path in ("/", "/docs"):
        answer = served.get(path)
        policy, text = answer.headers["content-security-policy"], answer.text
        assert answer.headers["content-type"].startswith("text/html") and "default-src 'none'" in policy and "connect-src 'self'" in policy
        assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+|@import|src=|href=\"(?!data:,|/)|url\(", text), path
        for tag in ("script", "style"):
            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL):
                assert base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() in policy
            assert f"<{tag}" not in text.replace(f"<{tag}>", "")
        assert " style=" not in text and " onclick=" not in text and len(text) < 40_000
