"""What the engine inspector tells of a built engine: whether the caches that a plugin reads are read where they lie."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from sessa_deploy.errors import SessaError

_PROFILE = re.compile(r" \[profile \d+\]$")


def reformats(information: str, names: Collection[str]) -> list[str]:
    """`layer reads input` for every layer of the inspector's JSON that copies one of the named inputs into another format.

    Raises SessaError if the JSON is not what the inspector writes at detailed verbosity.
    """
    try:
        layers = json.loads(information, strict=False)["Layers"]  # 8.6 leaves control characters in its strings
    except (ValueError, KeyError, TypeError) as error:
        raise SessaError(f"the engine inspector's answer cannot be read: {error}") from None
    if layers and not all(isinstance(layer, dict) for layer in layers):
        raise SessaError("the engine inspector gave layer names only; the engine was not built at detailed verbosity")
    found = []
    for layer in layers:
        name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
        if kind != "Reformat" and not name.startswith("Reformatting CopyNode"):
            continue
        found += [f"{name} reads {x}" for x in _inputs(layer) if x in names]
    return found


def require_caches_in_place(information: str, names: Collection[str]) -> None:
    """Raise SessaError if the engine copies one of the named cache inputs, which would cost every step the whole capacity."""
    wrong = reformats(information, names)
    if wrong:
        raise SessaError(f"the engine reformats {len(wrong)} cache input(s), so that every step would copy whole caches: {'; '.join(wrong[:4])}; "
                         "fix: this is a bug of the plugin or of this TensorRT, use --backend ort-cuda")  # fmt: skip


def _inputs(layer: dict[str, Any]) -> list[str]:
    names = [x.get("Name", "") if isinstance(x, dict) else str(x) for x in layer.get("Inputs", [])]
    return [_PROFILE.sub("", name) for name in names]
