"""A server in this process: its event loop on a thread, its application called as ASGI, over the numpy model (a support module, no tests)."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy_model import NumpyBackend, NumpyModel, random_weights
from templated import SETTINGS, TEMPLATE

from sessa_deploy.config import SessaConfig
from sessa_deploy.runtime.bundle import Bundle, write_bundle
from sessa_deploy.runtime.serve.app import make_app
from sessa_deploy.runtime.serve.engine import Engine
from sessa_deploy.runtime.serve.service import Service, Settings
from sessa_deploy.runtime.tokenizer import byte_level_tokenizer

CONFIG = SessaConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=257, max_context=96, eos_token_id=256)
MODEL = NumpyModel(CONFIG, random_weights(CONFIG, 3))
JSON = {"Content-Type": "application/json"}


class SlowBackend(NumpyBackend):
    """Steps wait until `open` is set, and fail while `broken`; each takes at least `pause` seconds."""

    def __init__(self, batch: int, capacity: int | None = None) -> None:
        super().__init__(MODEL, batch, capacity)
        self.open, self.broken, self.pause = threading.Event(), False, 0.0
        self.open.set()

    def _forward(self, ids: Any, new: Any) -> Any:
        assert self.open.wait(60)
        time.sleep(self.pause)
        if self.broken:
            raise RuntimeError("the card fell off the bus")
        return super()._forward(ids, new)


def bundle(folder: Path, tokenizer: str | None = None, template: str | None = TEMPLATE, config: SessaConfig = CONFIG) -> Bundle:
    """A bundle with a tokenizer ("" for none) and a chat template (None for none), whose graph nobody reads."""
    files = {"model.onnx": b"unused"}
    if tokenizer != "":
        files["tokenizer.json"] = (tokenizer or byte_level_tokenizer()).encode()
        if template is not None:
            special = {"bos_token": SETTINGS["bos_token"], "eos_token": SETTINGS["eos_token"]["content"]}  # type: ignore[index]
            files |= {"chat_template.jinja": template.encode(), "tokenizer_config.json": json.dumps(special).encode()}
    return write_bundle(folder, files, config, "fp32", {})


class Served:
    """An application that answers. `post` and `get` from any thread."""

    def __init__(self, of: Bundle, slots: int = 2, queue: int = 8, queue_timeout: float | None = 30.0, backend: Any = None, chunk: int | None = None,
                 **settings: Any) -> None:
        self.backend = backend or SlowBackend(slots)
        self.engine = Engine(of, self.backend, queue, queue_timeout, chunk)
        self.service = Service(Settings("tiny", **settings))
        self.app = make_app(self.service)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        self.engine.batcher.start()
        self.do(self._begin())
        return self

    async def _begin(self) -> None:
        self.service.begin(self.engine)

    def __exit__(self, *caught: object) -> None:
        self.backend.open.set()
        self.engine.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    def do(self, work: Coroutine[Any, Any, Any], timeout: float = 60) -> Any:
        """What a coroutine gives, run on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://tiny") as client:
                return await client.request(method, path, **more)

        return self.do(send())  # type: ignore[no-any-return]

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.request("GET", path, **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **more)

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        """The answer of /v1/completions, greedy unless the body says otherwise."""
        answer = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def chat(self, messages: Any, **body: Any) -> dict[str, Any]:
        answer = self.post("/v1/chat/completions", {"messages": [{"role": r, "content": c} for r, c in messages], "temperature": 0, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, which ends with [DONE]."""
        answer = self.post(path, {"temperature": 0, **body, "stream": True})
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
        lines = [line for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
        return [json.loads(line[6:]) for line in lines[:-1]]

    def free(self) -> bool:
        """Whether nothing runs and nothing waits."""
        stats = self.engine.batcher.stats()
        return stats.queued + stats.reading + stats.running == 0


class Client:
    """One request whose client can go away: what was sent is in `sent`, `leave` hangs up."""

    def __init__(self, served: Served, path: str, body: dict[str, Any], reads: bool = True) -> None:
        self.sent: list[dict[str, Any]] = []
        self._served, self._body = served, json.dumps(body).encode()
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "http_version": "1.1", "scheme": "http",
                 "headers": [(b"content-type", b"application/json")], "server": ("tiny", 80), "client": ("me", 1), "asgi": {"version": "3.0"}}
        self._left, self._reading = asyncio.Event(), asyncio.Event()
        if reads:
            self._reading.set()
        self._asked = False
        self.done = asyncio.run_coroutine_threadsafe(served.app(scope, self._receive, self._send), served.loop)  # type: ignore[arg-type]

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self._reading.wait()  # as where a socket's reader does not read
        self.sent.append(message)

    def read(self) -> None:
        self._served.loop.call_soon_threadsafe(self._reading.set)

    def leave(self) -> None:
        self._served.loop.call_soon_threadsafe(self._left.set)


def until(what: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until something is so."""
    for _ in _ticks(seconds):
        if what():
            return
    raise AssertionError("it never came about")


def one_is_cancelled(batcher: Any) -> bool:
    """Whether a request that has a slot is to give it back at the next step."""
    turns = batcher._turns
    return any(task.cancelled for task in (*turns.reading, *turns.running))


def let_wait(batcher: Any, seconds: float) -> None:
    """As if the requests in the queue had waited for so long already."""
    for task in batcher._waiting:
        task.born -= seconds


def _ticks(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.005)


def greedy(prompt: list[int], count: int) -> list[int]:
    """What the oracle writes behind a prompt, its end token included where it comes."""
    out = MODEL.greedy(prompt, count)
    return out[: out.index(256) + 1] if 256 in out else out


def oracle_logprobs(tokens: list[int]) -> np.ndarray:
    """(T,V) log probabilities behind each token."""
    logits = MODEL.logits(tokens)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
