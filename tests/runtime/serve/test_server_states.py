"""Clients that go away, queues that are full, steps that fail, limits of time, draining; what health and metrics say meanwhile."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import Client, Served, bundle, one_is_cancelled, until
from test_refusals import BASE, CHAT, COMPLETION, error

from sessa_deploy.runtime.serve.app import make_app
from sessa_deploy.runtime.serve.service import Service, Settings

LONG = {COMPLETION: {"prompt": "abc", "max_tokens": 80, "ignore_eos": True}, CHAT: {**BASE[CHAT], "max_tokens": 70, "ignore_eos": True}}


@pytest.fixture
def slow(tmp_path: Path) -> Any:
    """One slot, and a queue of two; its steps wait for `backend.open`."""
    with Served(bundle(tmp_path / "b"), slots=1, queue=2) as server:
        yield server


def metric(server: Served, name: str) -> float:
    page = server.get("/metrics").text
    return next(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(name + " "))


@pytest.mark.parametrize("path", LONG)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["in the queue", "before the first token", "while it generates"])
def test_a_client_that_goes_away_frees_its_slot(slow: Served, path: str, stream: bool, when: str) -> None:
    slow.backend.open.clear()
    blocker = Client(slow, COMPLETION, LONG[COMPLETION]) if when == "in the queue" else None
    if blocker is not None:
        until(lambda: metric(slow, "sessa_slots_busy") == 1)
    client = Client(slow, path, {**LONG[path], "stream": stream})
    until(lambda: slow.engine.batcher.stats().accepted == (2 if blocker else 1))
    if when == "while it generates":
        slow.backend.pause = 0.01
        slow.backend.open.set()
        until(lambda: slow.engine.batcher.stats().new_tokens >= 3)
        slow.backend.open.clear()  # or it might end before the client has gone
        until(lambda: not stream or len(client.sent) >= 2)
    else:
        until(lambda: slow.engine.batcher.stats().queued == (1 if blocker else 0))
        assert client.sent == []
    client.leave()
    until(lambda: client.done.done() or one_is_cancelled(slow.engine.batcher))
    if blocker is not None:
        until(lambda: client.done.done())
        blocker.leave()
        until(lambda: blocker.done.done() or one_is_cancelled(slow.engine.batcher))
    slow.backend.open.set()
    client.done.result(60)
    until(slow.free)
    stats = slow.engine.batcher.stats()
    assert stats.finished["cancelled"] == (2 if blocker else 1) and stats.new_tokens < 60
    assert metric(slow, "sessa_cancels_total") == stats.finished["cancelled"]
    assert slow.complete("abc", max_tokens=2)


def test_a_third_of_many_clients_vanishes_and_no_slot_is_lost(tmp_path: Path) -> None:
    with Served(bundle(tmp_path / "b"), slots=4, queue=300) as server:
        wanted = server.complete("abc", max_tokens=3, ignore_eos=True)["choices"]
        body = {"prompt": "abc", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        clients = [Client(server, COMPLETION, {**body, "stream": n % 2 == 0}) for n in range(200)]
        for n in range(0, 200, 3):
            clients[n].leave()
        for client in clients:
            client.done.result(60)
        until(server.free)
        for n, client in enumerate(clients):
            if n % 3 and n % 2:
                assert json.loads(client.sent[1]["body"])["choices"] == wanted
            elif n % 3:
                assert client.sent[-1]["body"].endswith(b"data: [DONE]\n\n") and client.sent[-1]["more_body"] is False
        stats = server.engine.batcher.stats()
        assert stats.accepted == 201 and sum(stats.finished.values()) == 201


def test_a_full_queue_says_when_to_try_again(slow: Served) -> None:
    slow.backend.open.clear()
    held = [Client(slow, COMPLETION, {**LONG[COMPLETION], "max_tokens": 2}) for _ in range(3)]
    until(lambda: slow.engine.batcher.stats().accepted == 3)
    for path in LONG:
        answer = slow.post(path, LONG[path])
        found = error(answer, 429)
        assert (found["type"], found["code"]) == ("rate_limit_error", "queue_full") and int(answer.headers["retry-after"]) >= 1
    assert metric(slow, "sessa_requests_rejected_total") == 2 and metric(slow, "sessa_requests_waiting") == 2
    held[1].leave()
    until(lambda: slow.engine.batcher.stats().queued == 1 or held[1].done.done())
    slow.backend.open.set()
    for client in (held[0], held[2]):
        client.done.result(60)
        assert client.sent[0]["status"] == 200


def test_choices_are_taken_on_together_or_not_at_all(slow: Served) -> None:
    slow.backend.open.clear()
    held = Client(slow, COMPLETION, {**LONG[COMPLETION], "max_tokens": 1, "n": 2})
    until(lambda: slow.engine.batcher.stats().accepted == 2)
    error(slow.post(COMPLETION, {**LONG[COMPLETION], "n": 2}), 429)
    slow.backend.open.set()
    held.done.result(60)
    until(slow.free)
    assert slow.complete("a", n=3, max_tokens=1, temperature=1.0)["usage"]["completion_tokens"] == 3


def test_waiting_too_long_is_503_and_taking_too_long_504(tmp_path: Path) -> None:
    with Served(bundle(tmp_path / "b"), slots=1) as server:
        server.backend.pause = 0.1
        held = Client(server, COMPLETION, LONG[COMPLETION])
        until(lambda: server.engine.batcher.stats().running == 1)
        server.engine.batcher._patience = 0.2
        answer = server.post(COMPLETION, {"prompt": "a", "stream": True})
        assert error(answer, 503)["code"] == "queue_timeout" and answer.headers["retry-after"]
        held.leave()
    with Served(bundle(tmp_path / "c"), slots=1, timeout=0.5) as server:
        server.backend.pause = 0.02
        answer = server.post(COMPLETION, LONG[COMPLETION])
        assert error(answer, 504)["code"] == "timeout" and answer.headers["x-should-retry"] == "false"
        until(server.free)
        stream = server.post(COMPLETION, {**LONG[COMPLETION], "stream": True})
        lines = stream.text.strip().split("\n\n")
        assert stream.status_code == 200 and json.loads(lines[-2][6:])["error"]["code"] == "timeout" and lines[-1] == "data: [DONE]" and len(lines) > 3
        until(server.free)


def test_a_step_that_fails_is_said_and_three_turn_readiness_red(slow: Served) -> None:
    assert slow.get("/health/ready").json() == {"status": "ready"}
    slow.backend.broken = True
    for turn in range(3):
        answer = slow.post(COMPLETION, {"prompt": "abc", "stream": turn == 1})
        found = error(answer, 500)
        assert "the card fell off the bus" in found["message"] and found["type"] == "server_error"
    assert error(slow.get("/health/ready"), 503)["code"] == "unhealthy" and slow.get("/health/live").status_code == 200
    assert metric(slow, "sessa_ready") == 0 and metric(slow, "sessa_errors_total") == 3
    slow.backend.broken = False
    assert slow.complete("abc", max_tokens=1) and slow.get("/health/ready").status_code == 200


def test_a_stream_that_fails_midway_says_so(slow: Served) -> None:
    slow.backend.pause = 0.02
    client = Client(slow, CHAT, {**LONG[CHAT], "stream": True})
    until(lambda: slow.engine.batcher.stats().new_tokens > 3)
    slow.backend.broken = True
    client.done.result(60)
    slow.backend.broken = False
    lines = b"".join(m.get("body", b"") for m in client.sent).decode().strip().split("\n\n")
    assert json.loads(lines[-2][6:])["error"]["type"] == "server_error" and lines[-1] == "data: [DONE]" and client.sent[-1]["more_body"] is False


def test_a_server_that_loads_answers_health_and_503(tmp_path: Path) -> None:
    server = Served(bundle(tmp_path / "b"))
    server.service = Service(Settings("tiny"))
    server.app = make_app(server.service)
    begin, server._begin = server._begin, _nothing  # type: ignore[method-assign]
    with server:
        assert server.get("/health/live").status_code == 200 and server.get("/v1/models").json()["data"][0]["max_model_len"] is None
        for answer in (server.get("/health/ready"), *(server.post(path, body) for path, body in BASE.items())):
            assert error(answer, 503)["code"] == "loading" and answer.headers["retry-after"]
        assert server.get("/metrics").status_code == 200
        server.do(begin())
        assert server.get("/health/ready").status_code == 200 and server.complete("a", max_tokens=1)


async def _nothing() -> None:
    return


def test_draining_lets_what_runs_end_and_takes_no_more(slow: Served) -> None:
    slow.backend.pause = 0.02
    client = Client(slow, COMPLETION, {**LONG[COMPLETION], "max_tokens": 20, "stream": True})
    until(lambda: slow.engine.batcher.stats().new_tokens > 1)
    slow.service.draining = True
    drained = threading.Thread(target=slow.engine.batcher.drain, args=(20,))
    drained.start()
    assert error(slow.get("/health/ready"), 503)["code"] == "draining"
    for path, body in BASE.items():
        answer = slow.post(path, body)
        assert error(answer, 503)["code"] == "draining" and answer.headers["retry-after"]
    drained.join(20)
    client.done.result(60)
    text = b"".join(m.get("body", b"") for m in client.sent).decode()
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in text


def test_what_a_drain_cuts_hears_of_it(slow: Served) -> None:
    slow.backend.pause = 0.05
    clients = [Client(slow, COMPLETION, {**LONG[COMPLETION], "stream": stream}) for stream in (True, False)]
    until(lambda: slow.engine.batcher.stats().new_tokens > 1)
    slow.engine.batcher.drain(0)
    for client in clients:
        client.done.result(60)
    assert b'"code": "cancelled"' in clients[0].sent[-1]["body"] and clients[1].sent[0]["status"] == 503


def test_slow_readers_stall_nobody(tmp_path: Path) -> None:
    with Served(bundle(tmp_path / "b"), slots=1) as server:
        stuck = Client(server, COMPLETION, {**LONG[COMPLETION], "stream": True}, reads=False)
        assert server.complete("abc", max_tokens=40, ignore_eos=True)["usage"]["completion_tokens"] == 40, "the slot is free though nobody read its answer"
        assert stuck.sent == [] and not stuck.done.done()
        stuck.read()
        stuck.done.result(60)
        assert stuck.sent[-1]["body"].endswith(b"data: [DONE]\n\n")


def test_metrics_tell_what_happened(tmp_path: Path) -> None:
    with Served(bundle(tmp_path / "b")) as server:
        server.complete("abcdef", max_tokens=5, ignore_eos=True)
        page = server.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain")
        lines = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
        wanted = {"sessa_slots": 2, "sessa_slots_busy": 0, "sessa_requests_waiting": 0, "sessa_requests_accepted_total": 1, "sessa_prompt_tokens_total": 6,
                  "sessa_generated_tokens_total": 5, "sessa_time_to_first_token_seconds_count": 1, "sessa_time_between_tokens_seconds_count": 4,
                  "sessa_cancels_total": 0, "sessa_prefix_hits_total": 0, "sessa_errors_total": 0, "sessa_ready": 1, "sessa_queue_seconds_count": 1,
                  'sessa_requests_ended_total{finish="length"}': 1, 'sessa_http_requests_total{path="/v1/completions",status="200"}': 1,
                  'sessa_time_to_first_token_seconds_bucket{le="+Inf"}': 1}
        assert {name: float(lines[name]) for name in wanted} == wanted
        assert float(lines["sessa_time_to_first_token_seconds_sum"]) > 0
        from prometheus_client.parser import text_string_to_metric_families

        assert len(list(text_string_to_metric_families(page.text))) > 15
    with Served(bundle(tmp_path / "c"), metrics=False) as server:
        error(server.get("/metrics"), 404)


def test_the_log_has_no_prompts_unless_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for shown in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="sessa_deploy"), Served(bundle(tmp_path / str(shown)), log_prompts=shown) as server:
            server.complete("a secret", max_tokens=2, user="nobody", ignore_eos=True)
            server.chat([("user", "a secret")], max_tokens=1)
            server.post(COMPLETION, {"prompt": "a secret", "temperature": -1})
            server.get("/health/live")
        lines = [r.getMessage() for r in caplog.records if r.name == "sessa_deploy.serve"]
        assert len(lines) == 3 and all(("a secret" in line) is shown and "\n" not in line for line in lines), lines
        assert "POST /v1/completions 200" in lines[0] and "8 prompt tokens, 2 new" in lines[0] and "POST /v1/completions 400" in lines[2]


def test_an_error_of_ours_is_a_500_with_a_name_to_look_for(slow: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow.engine, "encode", lambda *_: 1 / 0)
    answer = slow.post(COMPLETION, {"prompt": "a"}, headers={"X-Request-Id": "look-here"})
    assert "look-here" in error(answer, 500)["message"] and "ZeroDivisionError" not in answer.text
    assert "ZeroDivisionError" in caplog.text and "look-here" in caplog.text


def test_many_clients_at_once_each_get_their_own_answer(served: Served) -> None:
    prompts = [f"prompt {n}" for n in range(8)]
    wanted = [served.complete(p, max_tokens=6)["choices"][0]["text"] for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda p: served.complete(p, max_tokens=6)["choices"][0]["text"], prompts)) == wanted
