"""`sessa-deploy serve` as a process of its own, over a socket: its start, its end, what it is refused, and real clients that hang up."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from command import call
from served import bundle, until
from serving import Process, export_demo, kept_port

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_demo(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def running(exported: Path) -> Iterator[Process]:
    with Process(exported, "--slots", 2) as server:
        yield server


BODY = {"prompt": "def main():", "max_tokens": 8, "temperature": 0}


def test_it_serves_what_run_writes(running: Process, exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = httpx.post(f"{running.url}/v1/completions", json=BODY).json()["choices"][0]["text"]
    assert call("run", exported, "--prompt", BODY["prompt"], "--max-new-tokens", 8) == 0
    assert capfd.readouterr().out == text + "\n"
    for path, kind in (("/", "text/html"), ("/docs", "text/html"), ("/openapi.json", "application/json"), ("/metrics", "text/plain")):
        answer = httpx.get(running.url + path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind) and "server" not in answer.headers
    first = running.said().splitlines()[0]
    assert first.startswith("serving demo at") and "2 slots of" in first and "chat" in first


def test_openai_s_client_talks_to_it(running: Process) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == ["demo"] and client.models.retrieve("demo").id == "demo"
    whole = client.completions.create(model="demo", prompt="import ", max_tokens=12, temperature=0, logprobs=2, echo=True)
    assert whole.choices[0].text.startswith("import ") and len(whole.choices[0].logprobs.tokens) == 20 and whole.usage.total_tokens == 20
    assert whole.choices[0].logprobs.tokens[0] == "<|endoftext|>" and whole.choices[0].logprobs.text_offset[:4] == [0, 0, 1, 2]
    parts = list(client.completions.create(model="demo", prompt="import ", max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "import " + "".join(p.choices[0].text for p in parts if p.choices) == whole.choices[0].text and parts[-1].usage.completion_tokens == 12
    chat = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hi"}], max_completion_tokens=9, temperature=0, logprobs=True,
                                          top_logprobs=2, extra_body={"ignore_eos": True})
    assert chat.choices[0].finish_reason == "length" and len(chat.choices[0].logprobs.content) == 9 and chat.usage.prompt_tokens_details.cached_tokens >= 0
    turns = [{"role": "user", "content": "hi"}, chat.choices[0].message, {"role": "user", "content": "x"}]
    again = client.chat.completions.create(model="demo", messages=turns, max_tokens=2)
    assert again.usage.prompt_tokens > chat.usage.prompt_tokens
    stream = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "hi"}], max_tokens=9, temperature=0, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in stream) == chat.choices[0].message.content
    for wrong, error in (({"model": "gpt-4o"}, openai.NotFoundError), ({"temperature": -1}, openai.BadRequestError), ({"suffix": "x"}, openai.BadRequestError),
                         ({"max_tokens": 10**6}, openai.BadRequestError)):
        with pytest.raises(error) as caught:
            client.completions.create(**{"model": "demo", "prompt": "a", **wrong})
        assert caught.value.param in wrong and caught.value.message
    stream = client.completions.create(model="demo", prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()  # hangs up
    idle(running)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_talks_to_it(running: Process) -> None:
    body = json.dumps({"model": "demo", "prompt": "import ", "max_tokens": 5, "temperature": 0, "ignore_eos": True})

    def curl(body: str) -> str:
        command = ["curl", "-sSN", f"{running.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    whole, stream = json.loads(curl(body)), curl(body[:-1] + ', "stream": true}')
    parts = [json.loads(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
    assert "".join(p["choices"][0]["text"] for p in parts) == whole["choices"][0]["text"] and stream.endswith("data: [DONE]\n\n")


def metric(client: httpx.Client, name: str) -> float:
    return float(re.search(rf"^{name} (.*)$", client.get("/metrics").text, flags=re.MULTILINE)[1])  # type: ignore[index]


def idle(server: Process) -> None:
    """Wait until no slot is busy and nothing waits for one."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        until(lambda: metric(client, "sessa_slots_busy") == metric(client, "sessa_requests_waiting") == 0)


def drains(server: Process) -> None:
    """Wait until it has heard a signal: of two that come at once Python hears one."""
    until(lambda: "draining" in server.said() or server.process.poll() is not None)


@pytest.mark.parametrize("stream", [True, False])
def test_a_socket_that_closes_frees_its_slot(running: Process, stream: bool) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    body = json.dumps({**BODY, "max_tokens": 480, "ignore_eos": True, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with httpx.Client(base_url=running.url, timeout=60) as client:
        before, accepted = metric(client, "sessa_cancels_total"), metric(client, "sessa_requests_accepted_total")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head + body)
            if stream:
                assert connection.recv(100)
            until(lambda: metric(client, "sessa_requests_accepted_total") == accepted + 1)
        idle(running)
        assert metric(client, "sessa_cancels_total") == before + 1


def test_sigterm_lets_what_runs_end_and_then_ends(exported: Path) -> None:
    with Process(exported, "--slots", 1, "--drain-timeout", 60) as server, httpx.Client(timeout=60) as client, httpx.Client(timeout=60) as other:
        other.get(f"{server.url}/health/ready")  # its connection is there
        body = {**BODY, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            drains(server)
            ready, more = (other.get(f"{server.url}/health/ready"), other.post(f"{server.url}/v1/completions", json=BODY))
            assert {a.status_code for a in (ready, more)} == {503} and more.headers["retry-after"] and more.json()["error"]["code"] == "draining"
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        code, said = server.end(None)
        assert code == 0 and "draining: 1 requests" in said and said.endswith("stopped\n")


@pytest.mark.parametrize(("number", "twice", "code"), [(signal.SIGTERM, False, 0), (signal.SIGINT, False, 0), (signal.SIGINT, True, 130)])
def test_a_drain_has_a_limit_and_a_second_signal_none(exported: Path, number: int, twice: bool, code: int) -> None:
    with Process(exported, "--drain-timeout", 60 if twice else 0.2, "--threads", 1) as server, httpx.Client(timeout=60) as client:
        body = {**BODY, "max_tokens": 490, "ignore_eos": True, "stream": True, "n": 8, "temperature": 1}
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            begun = time.monotonic()
            if twice:
                server.process.send_signal(number)
                drains(server)
            server.process.send_signal(number)
            with contextlib.suppress(httpx.HTTPError):
                rest = [line for line in lines if line]
                assert '"code": "cancelled"' in rest[-2] or '"finish_reason": "length"' in rest[-2] or twice
        assert server.end(None)[0] == code and time.monotonic() - begun < 50


def test_it_answers_health_while_it_loads_and_a_signal_then_ends_it(exported: Path) -> None:
    with kept_port() as port, Process(exported, port=port) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        until(lambda: lives(client), 120)
        ready = client.get("/health/ready")
        assert (ready.status_code == 503 and ready.json()["error"]["code"] == "loading") or ready.status_code == 200
        code, said = server.end()
        assert code == 0 and "Traceback" not in said


def lives(client: httpx.Client, page: str = "/health/live") -> bool:
    with contextlib.suppress(httpx.ConnectError):
        return client.get(page).status_code == 200
    return False


ENDS = """
import os, signal, sys, time
sys.path[:0] = {path!r}
from served import SlowBackend
from sessa_deploy.cli import main
from sessa_deploy.runtime.serve import engine, lifecycle
lifecycle.open_slots, lifecycle._LAST_SECONDS = lambda *_: SlowBackend(1), 0.3
{closes}
main(["serve", {folder!r}, "--port", "{port}"])
"""
TOLD_AGAIN = "engine.Engine.close = lambda self: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))"


@pytest.mark.parametrize(("closes", "code"), [("", 0), (TOLD_AGAIN, 130)], ids=["nobody reads what it says", "told again while its engine is closed"])
def test_it_ends_though_a_thread_does_not(tmp_path: Path, closes: str, code: int) -> None:
    """One writes where nobody reads, or is inside an engine's library: Python's own end would wait for it, or abort the process under it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while not closes:
            os.write(write, b"x" * 512)
    os.set_blocking(write, True)
    with kept_port() as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        source = ENDS.format(path=sys.path, closes=closes, folder=str(bundle(tmp_path / "b").path), port=port)
        child = subprocess.Popen([sys.executable, "-c", source], stderr=write)
        os.close(write)
        try:
            until(lambda: lives(client, "/health/ready") or child.poll() is not None, 120)
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == code
        finally:
            child.kill()
            child.wait()
    with open(read, errors="replace") as said:
        assert not re.search("Traceback|Fatal|terminate", said.read())


def one_line(capfd: pytest.CaptureFixture[str], *args: object) -> str:
    assert call("serve", *args) == 2
    said = capfd.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and len(lines) == 1 and lines[0].startswith("error: "), said
    return lines[0]


def test_what_is_refused_at_the_start_is_one_line(exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SESSA_API_KEY", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"the port is taken: got 127.0.0.1:{port}" in one_line(capfd, exported, "--port", port)
    assert "no bundle" in one_line(capfd, tmp_path / "nowhere", "--port", 0)
    assert "checkpoint, not a bundle" in one_line(capfd, exported.parent / "checkpoint", "--port", 0)
    assert "--no-api-key" in one_line(capfd, exported, "--host", "0.0.0.0", "--port", 0)
    assert "no such host" in one_line(capfd, exported, "--host", "no.such.host.invalid", "--no-api-key", "--port", 0)
    assert "not this machine's" in one_line(capfd, exported, "--host", "192.0.2.7", "--no-api-key", "--port", 0)
    assert "one of them" in one_line(capfd, exported, "--api-key", "x", "--no-api-key", "--port", 0)
    broken = shutil.copytree(exported, tmp_path / "broken")
    data = bytearray((broken / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (broken / "model.onnx").write_bytes(data)
    assert "does not match its checksum" in one_line(capfd, broken, "--port", 0)
    (broken / "manifest.json").write_text("{")
    assert "is not JSON" in one_line(capfd, broken, "--port", 0)
    assert "TensorRT" in one_line(capfd, exported, "--backend", "trt", "--port", 0)


def test_the_help_is_quick_and_imports_no_server() -> None:
    code = ("import sys\nfrom sessa_deploy.cli import main\ntry:\n    main(['serve', '--help'])\nexcept SystemExit:\n    pass\n"
            "print(sorted({'fastapi', 'uvicorn', 'pydantic', 'numpy', 'onnxruntime', 'jinja2'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "--drain-timeout" in done.stdout
