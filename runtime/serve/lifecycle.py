"""A server's life: the address is taken, the engine loads while health answers, requests are served, a signal drains it, and it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from sessa_deploy.errors import SessaError, UserError
from sessa_deploy.process import leave
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.engines import open_slots
from sessa_deploy.runtime.manifest import parse_manifest, read_manifest
from sessa_deploy.runtime.report import ignored_note
from sessa_deploy.runtime.serve.app import make_app
from sessa_deploy.runtime.serve.engine import Engine
from sessa_deploy.runtime.serve.security import chosen_key
from sessa_deploy.runtime.serve.service import Service, Settings

_LAST_SECONDS = 3.0  # for what is written already to reach slow readers, once all requests have ended
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PORT_FIX = "name another with --port, or --port 0 for any that is free"
_LINES = 10_000  # of the log that may wait to be written
_LONG_LOAD = 3.0  # seconds after which it is said that loading takes its time
Say = Callable[[str], None]


@dataclass(frozen=True)
class ServeOptions:
    """What `serve` is told; see its command line. slots None: what the engine takes, 8 on a CPU. capacity None: the model's max_context."""

    backend: str = "auto"
    slots: int | None = None
    capacity: int | None = None
    threads: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    no_api_key: bool = False
    served_model_name: str | None = None
    queue: int = 256
    queue_timeout: float | None = 30.0
    timeout: float | None = 600.0
    drain_timeout: float = 30.0
    metrics: bool = True
    log_prompts: bool = False


def serve(path: str | Path, options: ServeOptions, say: Say) -> int:
    """Serve a bundle until a signal ends it; the exit code: 0 after a drain, 130 where a second interruption cut it short.

    say: hears a line when requests are served, when they are not any more, and where loading takes long. Raises UserError, before or while
    the engine loads, on a bundle or an engine that cannot be opened, an address that cannot be taken, and a key that is missing or wrong.
    """
    path = Path(path)
    key = chosen_key(options.api_key, options.no_api_key, options.host)
    parse_manifest(read_manifest(path), path)  # the whole of it is checked while the port is open already
    name = options.served_model_name or Path(os.path.realpath(path)).name or "sessa"
    service = Service(Settings(name, key, options.timeout, options.metrics, log_prompts=options.log_prompts))
    with _bound(options.host, options.port) as listener:
        log = logging.getLogger("sessa_deploy")
        lines = _Log(say)
        life = _Life(service, path, options, lines.line, _url(listener))
        log.addHandler(lines)
        log.setLevel(logging.INFO)
        try:
            asyncio.run(life.run(listener))
        except (KeyboardInterrupt, SystemExit):
            if not life.told:
                raise
            life.cut_short = True  # while the engine was closed
        finally:
            log.removeHandler(lines)
            lines.close()
    if not life.cut_short and life.loading.is_alive():
        life.loading.join(_LAST_SECONDS)
    failed = life.failed if not life.told else None
    code = 130 if life.cut_short else 0 if failed is None else getattr(failed, "exit_code", 1)
    if life.cut_short or life.loading.is_alive() or lines.stuck:  # a thread is inside an engine library, which must not lose its interpreter there
        leave(code, said=not lines.stuck)
    if failed is not None:
        raise failed
    return code


class _Life(uvicorn.Server):
    """uvicorn's server with our own idea of a signal: the first drains, a second one ends at once."""

    def __init__(self, service: Service, path: Path, options: ServeOptions, say: Say, url: str) -> None:
        super().__init__(uvicorn.Config(
            make_app(service, self._lifespan), log_config=None, log_level="critical", access_log=False, lifespan="on", server_header=False, ws="none",
            timeout_graceful_shutdown=int(_LAST_SECONDS), timeout_keep_alive=75))
        self._service, self._path, self._options, self._say, self._url = service, path, options, say, url
        self._engine: Engine | None = None
        self._draining: asyncio.Task[None] | None = None
        # A daemon: where a signal comes first, nobody waits for an engine that takes minutes to load.
        self.loading = threading.Thread(target=self._load, name="loading", daemon=True)
        self.failed: BaseException | None = None
        self.cut_short = False

    async def run(self, listener: socket.socket) -> None:  # type: ignore[override]
        """Serve on a bound socket until the end."""
        try:
            await self.serve(sockets=[listener])
        finally:
            if self._engine is not None and not self.cut_short:
                self._engine.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup is respected
        before = {number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(self._hear)) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def told(self) -> bool:
        """Whether a signal came."""
        return self._draining is not None

    def _hear(self) -> None:
        if self._draining is not None:
            self.cut_short = self.force_exit = self.should_exit = True
        else:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        self._service.draining = True
        if self._engine is not None:
            stats = self._engine.batcher.stats()
            left = stats.queued + stats.reading + stats.running
            if left:
                self._say(f"draining: {left} requests have {self._options.drain_timeout:g} s to end; a second signal ends them")
            await asyncio.to_thread(self._engine.batcher.drain, self._options.drain_timeout)
        self.should_exit = True

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.loading.start()
        late = self._loop.call_later(_LONG_LOAD, self._still_loading)
        yield
        late.cancel()
        if self._engine is not None:
            self._say("stopped")

    def _still_loading(self) -> None:
        if self.loading.is_alive():
            self._say(f"loading {self._path}; {self._url}/health/ready says when it is done")

    def _load(self) -> None:
        try:
            engine = load(self._path, self._options)
        except BaseException as error:
            self.failed = error
            call: Callable[[], Any] = self._give_up
        else:
            call = lambda: self._begin(engine)  # noqa: E731
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(call)

    def _give_up(self) -> None:
        self.should_exit = True

    def _begin(self, engine: Engine) -> None:
        self._engine = engine
        engine.batcher.start()
        self._service.begin(engine)
        gc.freeze()  # what loading left lives as long as the process: no collection need look at it
        key = "a key is asked for" if self._service.settings.key is not None else "no key"
        chat = "chat" if engine.template is not None else "no chat template"
        note = ignored_note(engine.tokenizer)
        if note:
            self._say(note)
        what = f"{engine.slots} slots of {engine.capacity} tokens, {chat}, {key}"
        self._say(f"serving {self._service.settings.name} at {self._url} on {engine.backend.name}: {what}")


def load(path: Path, options: ServeOptions) -> Engine:
    """A bundle, checked, on an engine with as many slots as are asked for. Raises UserError as the bundle and the engine do."""
    bundle = Bundle.open(path)
    backend = open_slots(bundle, options.backend, options.slots, options.capacity, options.threads)
    try:
        return Engine(bundle, backend, options.queue, options.queue_timeout)
    except BaseException:
        backend.close()
        raise


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to an address. Raises UserError, one line, where it cannot be had."""
    where = f"{host}:{port}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UserError("there is no such host", got=f"--host {host} ({getattr(error, 'strerror', None) or error})", allowed="an address of this machine",
                        fix="--host 127.0.0.1") from None
    with socket.socket(family, kind, proto) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            what = {errno.EADDRINUSE: "the port is taken", errno.EACCES: "the port needs rights that this user lacks",
                    errno.EADDRNOTAVAIL: "that address is not this machine's"}.get(error.errno or 0, "the address cannot be listened on")
            fix = "--host 127.0.0.1" if error.errno == errno.EADDRNOTAVAIL else _PORT_FIX
            raise UserError(what, got=f"{where} ({error.strerror})", fix=fix) from None
        yield listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class _Log(logging.Handler):
    """Lines, and log records as lines, written in their order on a thread of its own: where nobody reads them no request waits, and lines are lost."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self._say = say
        self._lines: queue.Queue[str | None] = queue.Queue(_LINES)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def line(self, text: str | None) -> None:
        """Write a line, soon."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(text)

    def emit(self, record: logging.LogRecord) -> None:
        self.line(self.format(record))

    def close(self) -> None:
        self.line(None)
        self._thread.join(_LAST_SECONDS)
        super().close()

    @property
    def stuck(self) -> bool:
        """Whether, once it is closed, it is still in the middle of a line, which nobody reads."""
        return self._thread.is_alive()

    def _write(self) -> None:
        for text in iter(self._lines.get, None):
            with contextlib.suppress(SessaError, SystemExit):  # standard error takes nothing any more
                self._say(text)
