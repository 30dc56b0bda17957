"""What the worker uses of NVIDIA Dynamo, as plain Python (a support module, no tests). test_dynamo.py compares it with the real package where that is there."""

from __future__ import annotations

import argparse
import types
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any


class DynamoException(Exception):
    pass


class InvalidArgument(DynamoException):
    pass


class Unknown(DynamoException):
    pass


class Disconnected(DynamoException):
    pass


class EngineShutdown(DynamoException):
    pass


class HttpError(Exception):
    def __init__(self, code: int, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(f"HTTP {code}: {message}")


@dataclass
class LlmRegistration:
    context_length: int | None = None
    kv_cache_block_size: int | None = None
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None


@dataclass
class EngineConfig:
    model: str
    served_model_name: str | None = None
    llm: LlmRegistration | None = None


@dataclass
class WorkerConfig:
    namespace: str
    component: str = "backend"
    endpoint: str = "generate"
    model_name: str = ""
    served_model_name: str | None = None
    endpoint_types: str = "chat,completions"
    discovery_backend: str = "etcd"

    @classmethod
    def from_runtime_config(cls, runtime_cfg: Any, model_name: str, served_model_name: str | None = None, model_input: Any = None,
                            **overrides: Any) -> WorkerConfig:
        names = ("namespace", "component", "endpoint", "endpoint_types", "discovery_backend")
        return cls(**{name: getattr(runtime_cfg, name) for name in names}, model_name=model_name, served_model_name=served_model_name, **overrides)


class LLMEngine(ABC):
    @classmethod
    @abstractmethod
    async def from_args(cls, argv: list[str] | None = None) -> Any: ...

    @abstractmethod
    async def start(self, worker_id: int) -> EngineConfig: ...

    @abstractmethod
    async def generate(self, request: Any, context: Any) -> AsyncGenerator[Any, None]:
        yield

    async def abort(self, context: Any) -> None:
        return None

    @abstractmethod
    async def cleanup(self) -> None: ...

    async def health_check_payload(self) -> dict[str, Any] | None:
        return None


class DynamoRuntimeArgGroup:
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--namespace", default="dynamo")
        parser.add_argument("--endpoint", default=None)
        parser.add_argument("--endpoint-types", default="chat,completions")
        parser.add_argument("--discovery-backend", default="etcd", choices=["kubernetes", "etcd", "file", "mem"])


class DynamoRuntimeConfig(types.SimpleNamespace):
    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> DynamoRuntimeConfig:
        return cls(**vars(args))

    def validate(self) -> None: ...


def build_health_check_payload(bos_token_id: int, *, extras: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"token_ids": [bos_token_id], "stop_conditions": {"max_tokens": 1, "ignore_eos": True}, "sampling_options": {"temperature": 0.0}, **(extras or {}),
            "_HEALTH_CHECK": True}


def normalize_request_token_ids(request: Any) -> Any:
    return request


def run(engine_cls: Any, argv: list[str] | None = None, engine_factory: Any = None) -> None: ...


@dataclass
class Context:
    name: str = "request"
    trace_id: str | None = None
    stopped: bool = False

    def is_stopped(self) -> bool:
        return self.stopped

    def id(self) -> str:
        return self.name


# module -> the names in it that the worker imports
NAMES = {
    "dynamo.common.backend": ("EngineConfig", "LLMEngine", "LlmRegistration", "WorkerConfig"),
    "dynamo.common.backend.health_check": ("build_health_check_payload",),
    "dynamo.common.backend.run": ("run",),
    "dynamo.common.configuration.groups.runtime_args": ("DynamoRuntimeArgGroup", "DynamoRuntimeConfig"),
    "dynamo.common.utils.token_ids": ("normalize_request_token_ids",),
    "dynamo.llm.exceptions": ("Disconnected", "EngineShutdown", "HttpError", "InvalidArgument", "Unknown"),
}


def modules() -> Iterator[tuple[str, types.ModuleType]]:
    """Modules by name, for sys.modules."""
    made: dict[str, types.ModuleType] = {}
    for name, contents in NAMES.items():
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            made.setdefault(".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
        for what in contents:
            setattr(made[name], what, globals()[what])
    yield from made.items()
