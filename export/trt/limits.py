"""What an engine is built for, what identifies it, and whether it will fit: numbers only, no TensorRT."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import numpy as np

from sessa_deploy.checks import integer
from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import CAUSAL_OP, MODEL_DATA_FILE, MODEL_FILE, PRECISIONS, cache_entries, cache_row_shape
from sessa_deploy.errors import UserError
from sessa_deploy.export.engine.prepare import PLUGIN
from sessa_deploy.runtime.bundle import Bundle

RECIPE_VERSION = 8  # goes up when to_engine.py asks TensorRT for something else
DEFAULT_PROMPT = 512
OPT_LEVELS = (0, 5)
LAYERS = (PLUGIN, "tensorrt")  # who computes what stands around the attentions
_HEADROOM = 0.95  # share of the free memory that may be planned with


@dataclass(frozen=True)
class Shapes:
    """max_batch: sequences; capacity: rows of each cache, fixed; max_prompt: tokens of one prefill step, at most the capacity."""

    max_batch: int
    capacity: int
    max_prompt: int


@dataclass(frozen=True)
class Machine:
    """Where the engine is built: GPU's name and architecture ("sm_90", "rtx-80_86" where it is built for others), free and total memory in bytes
    (0: not known), TensorRT's and the driver's version."""

    gpu: str
    arch: str
    free: int
    total: int
    tensorrt: str
    driver: str


@dataclass(frozen=True)
class Recipe:
    """How an engine is built: for which shapes, where, with which of TensorRT's options, and who computes what stands around the attentions.

    workspace: bytes TensorRT may take for scratch, None: what it likes; opt_level: None: TensorRT's own; targets: compute capabilities, of which the
    machine's `arch` tells (none: its GPU's); key: see `keyed`.
    """

    shapes: Shapes
    machine: Machine
    workspace: int | None = None
    opt_level: int | None = None
    layers: str = PLUGIN
    targets: tuple[int, ...] = ()
    key: str = ""

    def keyed(self, bundle: Bundle, plugin_sha256: str) -> Recipe:
        """The same with its key: sha256 of everything that shapes a plan: graph, plugin, shapes, TensorRT, driver, architecture, options."""
        graph = {name: bundle.sha256(name) for name in (MODEL_FILE, MODEL_DATA_FILE) if name in bundle}
        parts = {"recipe": RECIPE_VERSION, "graph": graph, "plugin": plugin_sha256, "shapes": dataclasses.asdict(self.shapes), "precision": bundle.precision,
                 "tensorrt": self.machine.tensorrt, "driver": self.machine.driver, "arch": self.machine.arch, "workspace": self.workspace,
                 "opt_level": self.opt_level, "layers": self.layers}  # fmt: skip
        return dataclasses.replace(self, key=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())


def shapes_for(config: SessaConfig, max_batch: int = 1, max_context: int | None = None, max_prompt: int = DEFAULT_PROMPT) -> Shapes:
    """Checked shapes; max_context None is the model's own. Raises UserError on a number below 1."""
    capacity = config.max_context if max_context is None else max_context
    max_batch, capacity = integer("--max-batch", max_batch, 1), integer("--max-context", capacity, 1)
    max_prompt = integer("--max-prompt", max_prompt, 1)
    return Shapes(max_batch, capacity, min(max_prompt, capacity))


def estimate(config: SessaConfig, precision: str, weights: int, shapes: Shapes, inlined: tuple[str, ...] = (CAUSAL_OP,),
             all_logits: bool = False) -> dict[str, int]:
    """Bytes of GPU memory a build needs at its peak, by what takes them. weights: bytes of the graph. all_logits: it gives those of every token.

    A build holds the weights about twice (as read, as laid out for the kernels) and runs all profiles on real buffers. An inlined causal attention
    keeps float32 scores (B,Hq,T,P+T) and float32 keys and values of the whole capacity; feedback attention's workspace holds (B,T,P+T) routing tiles.
    """
    item, (b, p, t) = PRECISIONS[precision].itemsize, (shapes.max_batch, shapes.capacity, shapes.max_prompt)
    row = sum(int(np.prod(cache_row_shape(f, config.d_model, config.kv_heads, config.head_dim))) for _, f in cache_entries(config.n_layers)) * item
    parts = {
        "weights": 2 * weights,
        "caches": b * p * row,
        "activations": b * t * (row + 12 * 4 * config.d_model) + 4 * b * config.vocab_size * (t if all_logits else 1),
        "feedback workspace": 4 * b * t * (p + t),
    }
    if CAUSAL_OP in inlined:
        parts["causal scores"] = 3 * 4 * b * config.n_heads * t * (p + t) + 4 * 4 * b * p * config.kv_heads * config.head_dim
    return parts


def require_memory(config: SessaConfig, precision: str, weights: int, shapes: Shapes, free: int, inlined: tuple[str, ...] = (CAUSAL_OP,),
                   all_logits: bool = False) -> int:
    """The estimate's sum in bytes. Raises UserError that says what to lower, and to what, if it exceeds the free memory."""

    def need(**changes: int) -> int:
        return sum(estimate(config, precision, weights, dataclasses.replace(shapes, **changes), inlined, all_logits).values())

    total, room = need(), int(free * _HEADROOM)
    if total <= room:
        return total
    hints = []
    for option, field in (("--max-prompt", "max_prompt"), ("--max-context", "capacity"), ("--max-batch", "max_batch")):
        value = getattr(shapes, field)
        while value > 1:
            value //= 2
            if need(**{field: value}) <= room:
                hints.append(f"{option} {value}")
                break
    if need(max_batch=1, capacity=1, max_prompt=1) > room:
        fix = "use a GPU with more memory, or export with --precision fp16"
    else:
        fix = " or ".join(hints) or "lower --max-batch, --max-context and --max-prompt together"
    largest = max(estimate(config, precision, weights, shapes, inlined, all_logits).items(), key=lambda pair: pair[1])
    raise UserError("the engine will not fit into the GPU's memory", fix=fix, allowed=f"{_gib(room)} free",
                    got=f"about {_gib(total)} needed, most of it for {largest[0]} ({_gib(largest[1])})")  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
