"""A worker for NVIDIA Dynamo: `python -m sessa_deploy.runtime.serve.dynamo BUNDLE`. Dynamo's frontend brings HTTP, routing, failover and autoscaling.

The frontend reads a folder of Hugging Face files, which this program writes from the bundle. It turns text into token ids, and hands requests to the
LLMEngine here, which hands them to the batcher. Answers carry their text, so that it is that of `sessa-deploy run`, stop strings and characters included.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sessa_deploy.contract import TEMPLATE_FILE
from sessa_deploy.errors import MissingPackage, SessaError, UserError, install_command
from sessa_deploy.runtime.batcher import Batcher
from sessa_deploy.runtime.bundle import Bundle
from sessa_deploy.runtime.engines import BACKENDS, open_backend
from sessa_deploy.runtime.environment import check_threads
from sessa_deploy.runtime.requests import NotAccepting, QueueFull
from sessa_deploy.runtime.serve.dynamo_requests import Asked, Chunks, Expired, asked
from sessa_deploy.runtime.serve.engine import Engine
from sessa_deploy.runtime.serve.folders import write_hugging_face
from sessa_deploy.runtime.serve.mailbox import Mailbox
from sessa_deploy.runtime.session import open_tokenizer

_BLOCK = 16  # tokens of what Dynamo counts as a block of cache
_DRAIN = 10.0  # seconds that running requests get when the worker ends; Dynamo has waited for them before


@dataclass(frozen=True)
class Options:
    """What the command line says beside Dynamo's own options. files: where the Hugging Face files go; first: whether a prompt gets the model's first token
    where it does not begin with it."""

    bundle: Bundle
    backend: str = "auto"
    slots: int = 8
    capacity: int | None = None
    queue: int = 256
    queue_timeout: float | None = 30.0
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
        from dynamo.llm.exceptions import HttpError, InvalidArgument, Unknown, WorkerUnavailable
    except ImportError as error:
        raise MissingPackage("this needs the package ai-dynamo", got=str(error), fix=install_command("dynamo")) from None

    class SessaEngine(LLMEngine):  # type: ignore[misc,unused-ignore]
        """Requests of Dynamo's frontend on a batcher."""

        def __init__(self, options: Options) -> None:
            self.options = options
            self._engine: Engine | None = None
            self._mailbox: Mailbox | None = None
            self._running: dict[str, list[Any]] = {}

        @classmethod
        async def from_args(cls, argv: list[str] | None = None) -> tuple[Any, Any]:
            return cls.of(*parse(argv))

        @classmethod
        def of(cls, options: Options, config: Any) -> tuple[Any, Any]:
            """(an engine that is not started, Dynamo's configuration of its worker)."""
            return cls(options), WorkerConfig.from_runtime_config(config, model_name=options.name, served_model_name=options.name)

        async def start(self, worker_id: int) -> Any:
            del worker_id
            options = self.options
            backend = await asyncio.to_thread(open_backend, options.bundle, options.backend, options.slots, options.capacity, options.threads)
            batcher = Batcher(backend, open_tokenizer(options.bundle), queue=options.queue, queue_timeout=options.queue_timeout)
            self._engine, self._mailbox = Engine(options.bundle, backend, batcher), Mailbox()
            folder = write_hugging_face(options.bundle, backend.capacity, options.files)
            batcher.start()
            return EngineConfig(model=str(folder), served_model_name=options.name, llm=LlmRegistration(
                context_length=backend.capacity, kv_cache_block_size=_BLOCK, total_kv_blocks=backend.batch * backend.capacity // _BLOCK,
                max_num_seqs=backend.batch, max_num_batched_tokens=batcher.chunk))

        async def generate(self, request: Any, context: Any) -> AsyncIterator[dict[str, Any]]:
            assert self._engine is not None
            try:
                job = asked(normalize_request_token_ids(request), self._engine, self.options.first, context.trace_id)
                async for chunk in self._chunks(job, context.id()):
                    yield chunk
            except QueueFull as error:
                raise HttpError(429, str(error)) from None
            except Expired as error:
                raise HttpError(503, str(error)) from None
            except NotAccepting as error:
                raise WorkerUnavailable(str(error)) from None  # the frontend asks another worker
            except UserError as error:
                raise InvalidArgument(str(error)) from None
            except SessaError as error:
                raise Unknown(str(error)) from None

        async def _chunks(self, job: Asked, name: str) -> AsyncIterator[dict[str, Any]]:
            assert self._engine is not None and self._mailbox is not None
            chunks, came = Chunks(job, self._engine), asyncio.Event()
            mailbox, handles = self._mailbox, []

            def poster(choice: int) -> Any:
                def receive(event: Any, at: float) -> None:
                    chunks.add(choice, event)
                    came.set()

                return lambda event: mailbox.post(receive, event)

            try:
                for choice, request in enumerate(job.requests):
                    handles.append(self._engine.batcher.submit(request, poster(choice)))
                self._running[name] = handles
                while not chunks.done:
                    await came.wait()
                    came.clear()
                    for chunk in chunks.take():
                        yield chunk
            finally:  # the client may have gone, or a sibling failed
                self._running.pop(name, None)
                for handle in handles:
                    handle.cancel()

        async def abort(self, context: Any) -> None:
            for handle in self._running.get(context.id(), ()):
                handle.cancel()

        async def health_check_payload(self) -> dict[str, Any]:
            bos = self.options.bundle.config.bos_token_id
            payload: dict[str, Any] = build_health_check_payload(0 if bos is None else bos)
            return payload

        async def cleanup(self) -> None:
            engine, self._engine = self._engine, None
            if engine is not None:
                await asyncio.to_thread(engine.batcher.drain, _DRAIN)
                await asyncio.to_thread(engine.batcher.close)
                engine.backend.close()

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
    parser.add_argument("--slots", type=int, default=8, help="Requests that run at once; default: 8.")
    parser.add_argument("--capacity", type=int, help="Tokens of prompt and answer together; default: the model's max_context.")
    parser.add_argument("--queue", type=int, default=256, help="Requests that wait; more get status 429. Default: 256.")
    parser.add_argument("--queue-timeout", type=float, default=30.0, metavar="SECONDS", help="Longest wait, then status 503; 0 waits for ever. Default: 30.")
    parser.add_argument("--threads", type=int, help="Threads of the CPU backend; default: all.")
    parser.add_argument("--served-model-name", metavar="NAME", help="The model's name for clients; default: the bundle's folder.")
    parser.add_argument("--files", type=Path, metavar="DIR", help="Where the Hugging Face files for the frontend go; default: the user's cache. The frontend "
                        "reads them there, or, with DYN_SYSTEM_PORT set here, asks this worker for them.")
    parser.add_argument("--no-bos", action="store_true", help="Take prompts as they come. Else one that does not begin with the model's first token gets it, "
                        "since the frontend turns text into token ids without it.")
    DynamoRuntimeArgGroup().add_arguments(parser)
    given = parser.parse_args(None if argv is None else list(argv))
    for name, low in (("slots", 1), ("capacity", 1), ("queue", 1), ("queue_timeout", 0)):
        value = getattr(given, name)
        if value is not None and not value >= low:
            raise UserError(f"--{name.replace('_', '-')} is out of range", got=value, allowed=f"at least {low}")
    bundle = Bundle.open(given.bundle)
    options = Options(bundle, given.backend, given.slots, given.capacity, given.queue, given.queue_timeout or None, check_threads(given.threads), given.files,
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
