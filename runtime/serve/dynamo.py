"""A worker for NVIDIA Dynamo: `python -m sessa_deploy.runtime.serve.dynamo BUNDLE`. Dynamo's frontend brings HTTP, routing, failover and autoscaling.

The frontend reads a folder of Hugging Face files, which this program writes from the bundle. It turns text into token ids, and hands requests to the
LLMEngine here, which hands them to the batcher. Answers carry their text, so that it is that of `sessa-deploy run`, stop strings and characters included.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sessa_deploy.checks import integer
from sessa_deploy.contract import TEMPLATE_FILE
from sessa_deploy.errors import MissingPackage, SessaError, UserError, install_command
from sessa_deploy.runtime.backend import Backend
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.engines import BACKENDS, open_slots
from sessa_deploy.runtime.environment import check_threads
from sessa_deploy.runtime.requests import Handle, NotAccepting, QueueFull
from sessa_deploy.runtime.serve.dynamo_requests import Asked, Chunks, Expired, Failed, Served, asked
from sessa_deploy.runtime.serve.folders import write_hugging_face
from sessa_deploy.runtime.serve.mailbox import Mailbox

_BLOCK = 16  # tokens of what Dynamo counts as a block of cache
_DRAIN = 10.0  # seconds that running requests get when the worker ends; Dynamo has waited for them before


@dataclass(frozen=True)
class Options:
    """What the command line says beside Dynamo's own options. files: where the Hugging Face files go; first: whether a prompt gets the model's first token
    where it does not begin with it."""

    bundle: Bundle
    backend: str = "auto"
    slots: int | None = None
    capacity: int | None = None
    queue: int = 256
    queue_timeout: float = 30.0
    threads: int | None = None
    files: Path | None = None
    served_model_name: str | None = None
    first: bool = True

    @property
    def name(self) -> str:
        """The model's name for clients."""
        return self.served_model_name or self.bundle.path.resolve().name


def engine_class() -> type[Any]:
    """The LLMEngine of this package. Raises MissingPackage where Dynamo is not installed."""
    try:
        from dynamo.common.backend import EngineConfig, LLMEngine, LlmRegistration, WorkerConfig
        from dynamo.common.backend.health_check import build_health_check_payload
        from dynamo.common.utils.token_ids import normalize_request_token_ids
        from dynamo.llm.exceptions import Disconnected, EngineShutdown, HttpError, InvalidArgument, Unknown
    except ImportError as error:
        raise MissingPackage("this needs the package ai-dynamo", got=str(error), fix=install_command("dynamo")) from None

    class SessaEngine(LLMEngine):  # type: ignore[misc,unused-ignore]
        """Requests of Dynamo's frontend on a batcher."""

        def __init__(self, options: Options) -> None:
            self.options = options
            context = options.capacity or options.bundle.config.max_context
            self.folder = str(write_hugging_face(options.bundle, context, options.files))
            self._served: Served | None = None
            self._backend: Backend | None = None
            self._batcher: Batcher | None = None
            self._mailbox: Mailbox | None = None
            self._running: dict[str, Handle] = {}

        @classmethod
        async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
            return cls.of(*parse(argv))

        @classmethod
        def of(cls, options: Options, config: Any) -> tuple[Any, Any]:
            """(an engine that is not started, Dynamo's configuration of its worker)."""
            engine = cls(options)
            return engine, WorkerConfig.from_runtime_config(config, model_name=engine.folder, served_model_name=options.name)

        async def start(self, worker_id: int) -> Any:
            del worker_id
            options = self.options
            backend = await asyncio.to_thread(open_slots, options.bundle, options.backend, options.slots, options.capacity, options.threads)
            self._backend = backend
            self._served, self._mailbox = Served.of(options.bundle, backend.capacity), Mailbox()
            batcher = self._batcher = Batcher(backend, self._served.tokenizer, queue=options.queue, queue_timeout=options.queue_timeout)
            batcher.start()
            return EngineConfig(model=self.folder, served_model_name=options.name, llm=LlmRegistration(
                context_length=backend.capacity, kv_cache_block_size=_BLOCK, total_kv_blocks=backend.batch * backend.capacity // _BLOCK,
                max_num_seqs=backend.batch, max_num_batched_tokens=batcher.chunk))

        async def generate(self, request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:
            assert self._served is not None
            try:
                job = asked(normalize_request_token_ids(request), self._served, self.options.first, context.trace_id)
                async for chunk in self._chunks(job, context.id()):
                    if chunk.get("finish_reason") == "cancelled" and not context.is_stopped():
                        raise NotAccepting("the worker ends")
                    yield chunk
            except QueueFull as error:
                raise HttpError(429, str(error)) from None
            except Expired as error:
                raise HttpError(503, str(error)) from None
            except NotAccepting as error:
                raise Disconnected(str(error)) from None  # the frontend asks another worker
            except Failed as error:  # so it does here, and with EngineShutdown it leaves this one alone from then on
                healthy = self._batcher is not None and self._batcher.ready
                raise (Disconnected if healthy else EngineShutdown)(str(error)) from None
            except UserError as error:
                raise InvalidArgument(str(error)) from None
            except SessaError as error:
                raise Unknown(str(error)) from None

        async def _chunks(self, job: Asked, name: str) -> AsyncIterator[dict[str, Any]]:
            assert self._served is not None and self._batcher is not None and self._mailbox is not None
            chunks, came, mailbox = Chunks(job, self._served), asyncio.Event(), self._mailbox

            def receive(event: Any) -> None:
                chunks.add(event)
                came.set()

            handle = self._batcher.submit(job.request, lambda event: mailbox.post(receive, event))
            self._running[name] = handle
            try:
                while not chunks.done:
                    await came.wait()
                    came.clear()
                    chunk = chunks.take()
                    if chunk is not None:
                        yield chunk
            finally:  # the client may have gone
                if self._running.get(name) is handle:  # a request that moved may have come back under its name
                    del self._running[name]
                handle.cancel()

        async def abort(self, context: Any) -> None:
            if context.id() in self._running:
                self._running[context.id()].cancel()

        async def health_check_payload(self) -> dict[str, Any]:
            bos = self.options.bundle.config.bos_token_id
            payload: dict[str, Any] = build_health_check_payload(0 if bos is None else bos)
            return payload

        async def cleanup(self) -> None:
            batcher, self._batcher = self._batcher, None
            if batcher is not None:
                await asyncio.to_thread(batcher.drain, _DRAIN)
                await asyncio.to_thread(batcher.close)
            backend, self._backend = self._backend, None
            if backend is not None:
                backend.close()

    return SessaEngine


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, as this package's other commands have it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=f"{self.prog} --help")


def parse(argv: Sequence[str] | None) -> tuple[Options, Any]:
    """(this package's options, Dynamo's) of a command line. Raises UserError on what either refuses, and on a bundle that is not right."""
    from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup, DynamoRuntimeConfig

    parser = _Parser(prog="python -m sessa_deploy.runtime.serve.dynamo", allow_abbrev=False,
                     description="Serve a bundle as a worker of NVIDIA Dynamo. Without etcd: --discovery-backend file, here and at the frontend.")
    parser.add_argument("bundle", metavar="BUNDLE", help="A folder that export wrote; it needs a tokenizer.")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--slots", type=int, help="Requests that run at once; default: as many as the TensorRT engine takes, else 8.")
    parser.add_argument("--capacity", type=int, help="Tokens of prompt and answer together; default: the model's max_context.")
    parser.add_argument("--queue", type=int, default=256, help="Requests that wait; more get status 429. Default: 256.")
    parser.add_argument("--queue-timeout", type=float, default=30.0, metavar="SECONDS", help="Longest wait for a slot, then status 503; default: 30.")
    parser.add_argument("--threads", type=int, help="Threads of the CPU backend; default: all.")
    parser.add_argument("--served-model-name", metavar="NAME", help="The model's name for clients; default: the bundle's folder.")
    parser.add_argument("--files", type=Path, metavar="DIR", help="Where the Hugging Face files for the frontend go; default: the user's cache. The frontend "
                        "reads them there, or, with DYN_SYSTEM_PORT set here, asks this worker for them.")
    parser.add_argument("--no-bos", action="store_true", help="Take prompts as they come. Else one that does not begin with the model's first token gets it, "
                        "since the frontend turns text into token ids without it.")
    DynamoRuntimeArgGroup().add_arguments(parser)
    given = parser.parse_args(None if argv is None else list(argv))
    for name, low in (("slots", 1), ("capacity", 1), ("queue", 0), ("threads", 1)):
        if getattr(given, name) is not None:
            integer(f"--{name}", getattr(given, name), low)
    if not 0 < given.queue_timeout < math.inf:
        raise UserError("--queue-timeout is out of range", got=given.queue_timeout, allowed="seconds > 0")
    bundle = Bundle.open(given.bundle)
    options = Options(bundle, given.backend, given.slots, given.capacity, given.queue, given.queue_timeout, check_threads(given.threads), given.files,
                      given.served_model_name, not given.no_bos)
    config = DynamoRuntimeConfig.from_cli_args(given)
    try:
        config.validate()
    except ValueError as error:
        raise UserError(str(error)) from None
    if TEMPLATE_FILE not in bundle:
        kinds = [kind for kind in config.endpoint_types.split(",") if kind.strip() != "chat"]
        config.endpoint_types = ",".join(kinds) or "completions"
    config.component, config.endpoint = endpoint_of(config.endpoint)
    return options, config


def endpoint_of(text: str | None) -> tuple[str, str]:
    """(component, endpoint) of dyn://namespace.component.endpoint; Dynamo's own where there is none."""
    if not text:
        return "backend", "generate"
    parts = text.removeprefix("dyn://").split(".")
    if len(parts) != 3 or not all(parts):
        raise UserError("--endpoint is no endpoint", got=text, allowed="dyn://namespace.component.endpoint")
    return parts[1], parts[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker until it is told to stop; the exit code. What a user or a machine can cause is one line on stderr."""
    try:
        engine = engine_class()
        from dynamo.common.backend.run import run

        options, config = parse(argv)  # before the runtime starts, whose threads would outlive a mistake

        async def made(_: Any) -> tuple[Any, Any]:
            return engine.of(options, config)

        run(engine, None, made)
    except SessaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
