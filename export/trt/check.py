"""What TensorRT tells of a built engine: whether the caches that our plugins read are read by nothing else, so that no step copies one."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sessa_deploy import contract
from sessa_deploy.errors import SessaError

_PROFILE = re.compile(r" \[profile \d+\]$")
_REGION = re.compile(r"_myl\d+_\d+$")  # which of the compiler's regions a layer is in
_SAID = re.compile(r"^Name: (.*?), LayerType: ([^,]*), Inputs: \[(.*?)\], (?:Constants|Outputs): \[", re.MULTILINE)
_SAID_INPUT = re.compile(r"\{ Name: (.*?), (?:Location|Dimensions): ")


@dataclass(frozen=True)
class Layer:
    """A layer of an engine. name, inputs: without the marks of profiles and regions, so that a plugin's are those of the graph."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    plugin: str = ""  # the plugin's type, where TensorRT says it


def layers(information: str) -> list[Layer]:
    """All layers, out of the inspector's JSON or the builder's list on the log, at detailed verbosity. Raises SessaError on anything else."""
    found = list(_from_list(information)) if information.startswith("Layers:") else list(_from_json(information))
    if not found:
        raise SessaError("TensorRT lists no layers of the engine it built; fix: report it, with the log of build --verbose")
    return found


def wrong_readers(information: str, caches: Collection[str], plugins: Collection[str]) -> list[str]:
    """`LAYER reads INPUT` for every layer that reads one of `caches` and is none of our `plugins` (names of nodes), and `nothing reads INPUT`.

    A copy made by a fused region counts like one that TensorRT calls a reformat: its name does not matter.
    """
    found, read = [], set[str]()
    for layer in layers(information):
        mine = [x for x in layer.inputs if x in caches]
        # the networks we build hold no plugins but ours; 8.6 may say of one no more than that it is one
        if layer.name in plugins or layer.plugin in contract.ENGINE_OPS or layer.kind.startswith("Plugin"):
            read.update(mine)
        else:
            found += [f"{layer.name} ({layer.kind}) reads {x}" for x in mine]
    return found + [f"none of our plugins reads {x}" for x in sorted(set(caches) - read)]


def require_caches_in_place(information: str, caches: Collection[str], plugins: Collection[str]) -> None:
    """Raise SessaError if anything but one of our plugins reads one of the cache inputs: every step would copy the whole capacity."""
    wrong = wrong_readers(information, caches, plugins)
    if wrong:
        raise SessaError(f"{len(wrong)} cache input(s) are not read by our plugins alone, so that every step would copy whole caches: "
                         f"{'; '.join(wrong[:4])}; fix: this is a bug of the plugin or of this TensorRT, use --backend ort-cuda")  # fmt: skip


def _from_json(information: str) -> Iterator[Layer]:
    try:
        listed = json.loads(information, strict=False)["Layers"]  # 8.6 leaves control characters in its strings
    except (ValueError, KeyError, TypeError) as error:
        raise SessaError(f"the engine inspector's answer cannot be read: {error}") from None
    if not all(isinstance(layer, dict) for layer in listed):
        raise SessaError("the engine inspector gave layer names only; the engine was not built at detailed verbosity")
    for layer in listed:
        inputs = tuple(_plain(x.get("Name", "") if isinstance(x, dict) else str(x)) for x in layer.get("Inputs", []))
        yield Layer(_plain(str(layer.get("Name", ""))), str(layer.get("LayerType", "")), inputs, str(layer.get("PluginType", "")))


def _from_list(text: str) -> Iterator[Layer]:
    for name, kind, inputs in _SAID.findall(text):
        yield Layer(_plain(name), kind, tuple(_plain(x) for x in _SAID_INPUT.findall(inputs)))


def _plain(name: str) -> str:
    return _PROFILE.sub("", _REGION.sub("", name))
