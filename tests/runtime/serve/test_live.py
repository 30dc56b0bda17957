"""The engines of others for real, on a CPU: NVIDIA Dynamo's frontend with two workers of which one is killed, and a stock Triton Inference Server.

Each needs an interpreter that has it, this package and onnxruntime: SESSA_DYNAMO_PYTHON (ai-dynamo), SESSA_PYTRITON_PYTHON (nvidia-pytriton, for the server
that its wheel carries). Skipped without one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from templated import templated_checkpoint

from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.sampling import SamplingParams
from sessa_deploy.runtime.serve.triton_export import export_triton
from sessa_deploy.runtime.session import Session
from sessa_deploy.runtime.template import ChatTemplate

pytestmark = pytest.mark.live
CONTEXT = 4096
LONG = 3000  # tokens that take a second or more


def interpreter(variable: str, package: str) -> str:
    """The interpreter to run `package` with, or a skip that says what is missing."""
    python = os.environ.get(variable, sys.executable)
    found = subprocess.run([python, "-c", f"import {package}, sessa_deploy.runtime.batcher, onnxruntime"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{variable} names no interpreter with {package}, sessa_deploy and onnxruntime: {found.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def dynamo_python() -> str:
    return interpreter("SESSA_DYNAMO_PYTHON", "dynamo.frontend")


@pytest.fixture(scope="module")
def triton_python() -> str:
    return interpreter("SESSA_PYTRITON_PYTHON", "pytriton")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    pytest.importorskip("torch")
    from sessa_deploy.export.to_onnx import export_bundle

    root = tmp_path_factory.mktemp("live")
    export_bundle(templated_checkpoint(root / "checkpoint", max_context=CONTEXT), root / "tiny")
    return Bundle.open(root / "tiny")


def solo(made: Bundle, prompt: str, count: int, ignore_eos: bool = False, **sampling: Any) -> str:
    with Session(made, "ort", threads=1) as session:
        return session.generate([prompt], count, SamplingParams(**sampling), [] if ignore_eos else None)[0].text


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(url: str, body: dict[str, Any], each: Callable[[int], None] | None = None) -> tuple[int, list[dict[str, Any]]]:
    """(status, what came: one value, or one a line of a stream); each: called with the number of lines so far."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    values: list[dict[str, Any]] = []
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            if not answer.headers["content-type"].startswith("text/event-stream"):
                return answer.status, [json.load(answer)]
            for line in answer:
                if line.startswith(b"data: {"):
                    values.append(json.loads(line[6:]))
                    if each is not None:
                        each(len(values))
            return answer.status, values
    except urllib.error.HTTPError as error:
        return error.code, [json.load(error)]


def wait_until(what: Callable[[], bool], processes: list[subprocess.Popen[bytes]], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert all(process.poll() is None for process in processes), "a process ended"
        with contextlib.suppress(OSError):
            if what():
                return
        time.sleep(0.1)
    raise AssertionError("not ready in time")


@contextlib.contextmanager
def running(commands: dict[str, list[str]], folder: Path, **environment: str) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Processes by name, their output in folder/NAME.log; ended with the block."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment})
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def test_dynamo_with_two_workers_of_which_one_is_killed(dynamo_python: str, made: Bundle, tmp_path: Path) -> None:
    python, port = dynamo_python, free_port()
    discovery = ["--discovery-backend", "file"]
    worker = [python, "-m", "sessa_deploy.runtime.serve.dynamo", str(made.path), "--backend", "ort", "--threads", "1", "--slots", "2", "--queue", "2",
              "--files", str(tmp_path / "files"), *discovery]
    commands = {"front": [python, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port), "--migration-limit", "3", *discovery],
                "one": worker, "two": worker}
    base = f"http://127.0.0.1:{port}/v1"

    def received(name: str) -> int:
        return (tmp_path / f"{name}.log").read_text(errors="replace").count("request received")

    def both() -> bool:
        if all("Serving" in (tmp_path / f"{name}.log").read_text(errors="replace") for name in ("one", "two")):
            with urllib.request.urlopen(f"{base}/models", timeout=5) as answer:
                return bool(json.load(answer)["data"])
        return False

    with running(commands, tmp_path, DYN_FILE_KV=str(tmp_path / "kv"), HOME=str(tmp_path), DYN_LOG="info") as processes:
        wait_until(both, list(processes.values()))
        time.sleep(1.0)  # the frontend has seen one of them; the other is on its way
        seeded = {"model": "tiny", "prompt": "ab c", "max_tokens": 40, "temperature": 0.7, "seed": 5}
        code, (answer,) = ask(f"{base}/completions", seeded)
        assert (code, answer["choices"][0]["text"]) == (200, solo(made, "ab c", 40, temperature=0.7, seed=5))
        messages = [{"role": "user", "content": "hi"}]
        template = ChatTemplate.of(made)
        assert template is not None
        code, (answer,) = ask(f"{base}/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 30, "temperature": 0})
        assert (code, answer["choices"][0]["message"]["content"]) == (200, solo(made, template.render(messages), 30))
        for wrong, what in (({"max_tokens": CONTEXT}, f"{CONTEXT + 4} together"), ({"n": 2}, "n is out of range"), ({"min_tokens": 3}, "min_tokens")):
            code, (answer,) = ask(f"{base}/completions", {**seeded, **wrong})
            assert code == 400 and what in answer["message"], answer

        long = {**seeded, "max_tokens": LONG, "stream": True, "presence_penalty": 0.5, "ignore_eos": True, "stream_options": {"include_usage": True}}
        code, whole = ask(f"{base}/completions", long)
        before = {name: received(name) for name in ("one", "two")}

        def kill(lines: int) -> None:
            busy = next((name for name in before if received(name) > before[name]), None)
            if lines >= 3 and busy is not None and processes[busy].poll() is None and received(busy) == before[busy] + 1 and len(killed) == 0:
                killed.append(busy)
                os.kill(processes[busy].pid, signal.SIGKILL)

        killed: list[str] = []
        code, moved = ask(f"{base}/completions", long, kill)
        assert code == 200 and len(killed) == 1 and "migration retry scheduled" in (tmp_path / "front.log").read_text(errors="replace")
        texts = ["".join(choice["text"] for line in lines for choice in line["choices"]) for lines in (whole, moved)]
        assert texts[0] == texts[1] == solo(made, "ab c", LONG, True, temperature=0.7, seed=5, presence_penalty=0.5) and len(texts[0]) > LONG // 8
        usages = [next(line["usage"] for line in reversed(lines) if line.get("usage")) for lines in (whole, moved)]
        assert usages[0]["completion_tokens"] == usages[1]["completion_tokens"] == LONG and usages[1]["prompt_tokens"] == 4
        left = next(name for name in before if name not in killed)
        processes[left].send_signal(signal.SIGTERM)
        assert processes[left].wait(30) == 0
        processes["front"].terminate()


def test_triton_serves_what_run_writes(triton_python: str, made: Bundle, tmp_path: Path) -> None:
    python, ports = triton_python, (free_port(), free_port())
    site, version, libraries = subprocess.run(
        [python, "-c", "import pytriton, sys, sysconfig; print(pytriton.__path__[0], '%d.%d' % sys.version_info[:2], sysconfig.get_config_var('LIBDIR'))"],
        capture_output=True, text=True, check=True).stdout.split()
    server = Path(site) / "tritonserver"
    shutil.copytree(server / "backends", tmp_path / "backends")
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", tmp_path / "backends" / "python")
    export_triton(made, tmp_path / "repository", "sessa", backend="ort", slots=2, queue=1, threads=1)
    command = [str(server / "bin" / "tritonserver"), "--model-repository", str(tmp_path / "repository"), "--backend-directory", str(tmp_path / "backends"),
               "--http-port", str(ports[0]), "--grpc-port", str(ports[1]), "--http-address", "127.0.0.1", "--allow-metrics", "false"]
    environment = {"PATH": f"{Path(python).parent}:{os.environ['PATH']}", "VIRTUAL_ENV": str(Path(python).parent.parent),
                   "LD_LIBRARY_PATH": f"{Path(site).parent / 'nvidia_pytriton.libs'}:{libraries}"}
    base = f"http://127.0.0.1:{ports[0]}/v2"

    def ready() -> bool:
        with urllib.request.urlopen(f"{base}/health/ready", timeout=5) as answer:
            return answer.status == 200

    with running({"triton": command}, tmp_path, **environment) as processes:
        wait_until(ready, list(processes.values()))
        seeded = {"text_input": "ab c", "max_tokens": 40, "temperature": 0.7, "seed": 5}
        wanted = solo(made, "ab c", 40, temperature=0.7, seed=5)
        code, (answer,) = ask(f"{base}/models/sessa/generate", seeded)
        assert (code, answer["text_output"]) == (200, wanted) and answer["finish_reason"] in ("stop", "length")
        code, lines = ask(f"{base}/models/sessa/generate_stream", {**seeded, "stream": True})
        assert "".join(line["text_output"] for line in lines) == wanted and [line["finish_reason"] for line in lines[:-1]] == [""] * (len(lines) - 1)
        for wrong, what in (({"n": 2}, "no such input: got n"), ({"max_tokens": 5000}, f"capacity of {CONTEXT}"), ({"top_p": 3}, "top_p")):
            code, (answer,) = ask(f"{base}/models/sessa/generate", {**seeded, **wrong})
            assert code >= 400 and what in answer["error"], answer
        begun = time.monotonic()
        for _ in range(4):  # more than there are slots and places in the queue: each is given up after its first line
            with urllib.request.urlopen(urllib.request.Request(
                    f"{base}/models/sessa/generate_stream", json.dumps({"text_input": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()),
                    timeout=30) as stream:
                assert stream.readline().startswith(b"data: ")
            time.sleep(0.3)
        assert ask(f"{base}/models/sessa/generate", seeded)[1][0]["text_output"] == wanted and time.monotonic() - begun < 20
        processes["triton"].terminate()
        assert processes["triton"].wait(30) == 0
