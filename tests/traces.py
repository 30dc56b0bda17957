"""Traced graphs that all processes of a test run share (a support module, no tests): tracing is what a tiny model's export takes, seconds a layer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

from sessa_deploy.config import SessaConfig
from sessa_deploy.export.graph import capture

_trace = capture._captured.__wrapped__
# What no graph depends on; the rest of a configuration shapes it.
_LEFT_OUT = {"max_context": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def share(folder: Path) -> None:
    """From here on this process takes a shape's trace from `folder`, where another test left it, and leaves its own there."""

    @functools.cache
    def captured(config: SessaConfig, precision: str, all_logits: bool) -> tuple[bytes, tuple[str, ...]]:
        shape = dataclasses.replace(config, **_LEFT_OUT)
        path = folder / hashlib.sha256(repr((shape, precision, all_logits)).encode()).hexdigest()
        if not path.is_file():
            graph, weights = _trace(config, precision, all_logits)
            mine = path.with_suffix(f".{os.getpid()}")
            mine.write_bytes("\n".join((*weights, "")).encode() + b"\0" + graph)
            mine.rename(path)
        names, _, graph = path.read_bytes().partition(b"\0")
        return graph, tuple(names.decode().split())

    folder.mkdir(exist_ok=True)
    capture._captured = captured  # type: ignore[assignment]
