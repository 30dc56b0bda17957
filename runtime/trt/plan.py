"""TensorRT's engines in a bundle: how they are described, and which of them may be loaded here. Standard library only.

engines/<sm>-<TensorRT version>-<precision>/ holds model.plan and engine.json; of TensorRT for RTX, rtx-<compute capabilities>-<version>-<precision>/. A
plan is code: it reaches TensorRT only if its checksum, TensorRT's version, the GPU's architecture and the state of its plugins match.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from sessa_deploy.contract import ENGINES_DIR, ORT_ENGINE, PLUGIN_STATE, STEP_ROWS
from sessa_deploy.errors import UserError
from sessa_deploy.process import command
from sessa_deploy.reading import open_plain, parse_json
from sessa_deploy.runtime.bundle import Bundle

ENGINE_SCHEMA = 3
PLAN_FILE, ENGINE_FILE = "model.plan", "engine.json"
_TEXTS = ("key", "plan_sha256", "tensorrt", "arch", "gpu", "driver", "precision", "plugin_sha256", "layers")
_INTEGERS = ("schema_version", "plan_size", "max_batch", "capacity", "max_prompt")
_KINDS: dict[str, Any] = {**dict.fromkeys(_TEXTS, str), **dict.fromkeys(_INTEGERS, int), "seconds": (int, float), "inlined": list}
_LATER: dict[str, Any] = {"product": str, "archs": list, "profiles": dict, "plugins": dict, "state": int}  # that descriptions of before do not have
PREFILL, DECODE, ROWS = 0, 1, 2  # optimisation profiles, in the order in which they are added; engines of before have no ROWS


@dataclass(frozen=True)
class EngineInfo:
    """What engine.json says. capacity: rows of every cache; max_prompt: tokens of one prefill step; inlined: ops that run without a plugin;
    layers: who computes what stands around the attentions, "plugin" or "tensorrt"; product: which TensorRT, "tensorrt" or "rtx"; archs: compute capabilities
    it was built for, 86 for 8.6; profiles: name -> (B,T) of input_ids at least, at best, at most; plugins: op -> how many of them the plan holds; state: of
    those plugins (contract.PLUGIN_STATE), 0 where a description of before does not say it."""

    key: str
    plan_sha256: str
    plan_size: int
    tensorrt: str
    arch: str
    gpu: str
    driver: str
    precision: str
    max_batch: int
    capacity: int
    max_prompt: int
    plugin_sha256: str
    seconds: float
    inlined: list[str] = field(default_factory=list)
    layers: str = "tensorrt"
    product: str = "tensorrt"
    archs: list[int] = field(default_factory=list)
    profiles: dict[str, list[list[int]]] = field(default_factory=dict)
    plugins: dict[str, int] = field(default_factory=dict)
    state: int = PLUGIN_STATE
    schema_version: int = ENGINE_SCHEMA

    @property
    def rows_profile(self) -> int:
        """The optimisation profile of steps that verify a draft."""
        return ROWS if "rows" in self.profiles else PREFILL

    def serves(self, arch: int) -> bool:
        """Whether the plan runs on a GPU of compute capability `arch`."""
        return arch in self.archs if self.archs else self.arch == f"sm_{arch}"

    def to_json(self) -> bytes:
        """engine.json's bytes."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def engine_folder(arch: str, tensorrt: str, precision: str) -> str:
    """Name of an engine's folder in a bundle: engines/sm_90-8.6.0-fp16, engines/rtx-80_86-1.7.1.116-fp16."""
    return f"{ENGINES_DIR}/{arch}-{tensorrt}-{precision}"


def place(product: str, archs: tuple[int, ...]) -> str:
    """What an engine that is built for named compute capabilities has in place of `sm_90`: rtx-80_86."""
    return f"{product}-{'_'.join(map(str, archs))}"


def profiles(max_batch: int, max_prompt: int) -> dict[str, list[list[int]]]:
    """(B,T) of input_ids at least, at best and at most, of every profile in their order."""
    rows = min(STEP_ROWS, max_prompt)
    tokens = {"prefill": (1, max_prompt, max_prompt), "decode": (1, 1, 1), **({"rows": (2, rows // 2 + 1, rows)} if rows > 1 else {})}
    return {name: [[1, least], [max_batch, best], [max_batch, most]] for name, (least, best, most) in tokens.items()}


def engines(bundle: Bundle) -> dict[str, EngineInfo]:
    """folder -> description of every engine of a TensorRT in a bundle. Raises UserError on a description that is damaged or of another version."""
    found = {}
    for name in bundle.names():
        path = PurePosixPath(name)
        if path.parts[0] == ENGINES_DIR and path.name == ENGINE_FILE and not path.parent.name.startswith(f"{ORT_ENGINE}-"):
            found[str(path.parent)] = _read(bundle, name)
    return found


def products(bundle: Bundle) -> list[str]:
    """Which TensorRTs a bundle has engines of, by the names of their folders alone."""
    folders = {PurePosixPath(n).parts[1] for n in bundle.names() if n.startswith(f"{ENGINES_DIR}/") and PurePosixPath(n).name == PLAN_FILE}
    return sorted({"tensorrt" if f.startswith("sm_") else f.partition("-")[0] for f in folders}, reverse=True)


def product_for(bundle: Bundle, arch: int | None, installed: Collection[str]) -> str | None:
    """Which of the `installed` TensorRTs is to run a bundle on a GPU of compute capability `arch` (None: without a GPU): one with an
    engine for it, else one with any engine, else one that is not installed but has engines; None without engines."""
    found = list(engines(bundle).values())
    serving = {info.product for info in found if arch is not None and info.serves(arch)}
    best = sorted({info.product for info in found}, key=lambda name: (name in installed, name in serving, name), reverse=True)
    return best[0] if best else None


def choose(bundle: Bundle, tensorrt: str, arch: str, product: str = "tensorrt") -> tuple[str, EngineInfo]:
    """(folder, description) of the engine for this TensorRT and this GPU ("sm_90"). Raises UserError that says which of the two differs, or that its plugins
    are of another version."""
    present = {folder: info for folder, info in engines(bundle).items() if info.product == product}
    number = int(arch.removeprefix("sm_"))
    mend = command("build", bundle.path, *([] if product == "tensorrt" else ["--for", product]))
    if not present:
        raise UserError("the bundle has no TensorRT engine", got=str(bundle.path), fix=mend)
    for folder, info in present.items():
        if info.tensorrt == tensorrt and info.serves(number) and info.precision == bundle.precision:
            if info.state != PLUGIN_STATE:
                raise UserError("the bundle's engine holds plugins of another version", got=f"state {info.state}" if info.state else "no state",
                                allowed=f"state {PLUGIN_STATE}", fix=f"{mend} --force")  # fmt: skip
            return folder, info
    here = [info for info in present.values() if info.serves(number)]
    if here:
        raise UserError("the bundle's engine is for another TensorRT version", got=f"built with {here[0].tensorrt}, installed is {tensorrt}",
                        allowed="the same version", fix=mend)  # fmt: skip
    built = ", ".join(sorted({f"sm_{a}" for info in present.values() for a in info.archs} or {info.arch for info in present.values()}))
    raise UserError("the bundle's engine is for another GPU architecture", got=f"built for {built}, this GPU is {arch}",
                    allowed="the same architecture", fix=mend)  # fmt: skip


def read_plan(bundle: Bundle, folder: str, info: EngineInfo) -> bytes:
    """The plan's bytes. Raises UserError unless both the manifest's and the description's checksum match what was read."""
    name = f"{folder}/{PLAN_FILE}"
    with open_plain(bundle.file(name)) as stream:
        data = stream.read()
    digest = hashlib.sha256(data).hexdigest()
    if digest != bundle.sha256(name) or digest != info.plan_sha256:
        raise UserError(f"{name} does not match its checksum", got=f"sha256 {digest[:16]}...", allowed=f"{info.plan_sha256[:16]}...",
                        fix=command("build", bundle.path, "--force"))
    return data


def _read(bundle: Bundle, name: str) -> EngineInfo:
    mend = command("build", bundle.path, "--force")
    data: Any = parse_json(bundle.read(name), name)
    if not isinstance(data, dict):
        raise UserError(f"{name} is not a JSON object", got=type(data).__name__, fix=mend)
    kinds = _KINDS | {k: kind for k, kind in _LATER.items() if k in data}
    wrong = [k for k, kind in kinds.items() if not isinstance(data.get(k), kind) or isinstance(data.get(k), bool)] + sorted(set(data) - set(kinds))
    wrong = wrong or ["archs" for a in data.get("archs", []) if type(a) is not int]
    wrong = wrong or [k for k in _INTEGERS if not 0 < data[k] < 2**63]
    if wrong or data["schema_version"] != ENGINE_SCHEMA:
        raise UserError(f"{name} is not an engine's description of this version", got=", ".join(wrong) or f"schema_version {data['schema_version']}",
                        allowed=f"schema_version {ENGINE_SCHEMA}", fix=mend)
    return EngineInfo(**{"state": 0, **data})
