"""What weights and logits take, by arithmetic on a model's shape: in a file, in a plan, in a device's memory. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sessa_deploy.config import SessaConfig
from sessa_deploy.contract import HEAD, PRECISIONS, Weights

_FLOAT32 = 4
_MOST_LOGITS = 256 << 20  # bytes


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a bundle's weights. eight: the matrices in 8 bits, scales included; instead_of: what the same would take in the precision; total: all weights;
    wide: all of them in the precision."""

    eight: int
    instead_of: int
    total: int
    wide: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with both ratios (None: nothing is in 8 bits)."""
        ratios = {"ratio": self.eight / self.instead_of, "total_ratio": self.total / self.wide} if self.eight else {"ratio": None, "total_ratio": None}
        return {**asdict(self), **ratios}


def matrices(config: SessaConfig) -> dict[str, tuple[int, int]]:
    """Name -> (columns, depth) of every matrix that can be in 8 bits, the head's among them, also where it is tied to the embedding."""
    width, kv = config.d_model, config.kv_heads * config.head_dim
    kinds = {"W_in": (2 * width, width), "mixer.q_proj": (width, width), "mixer.k_proj": (kv, width), "mixer.v_proj": (kv, width),
             "mixer.proj_fb": (2 * width, width), "W_out": (width, width)}  # fmt: skip
    if config.n_heads > 1:
        kinds["mixer.out_proj"] = (width, width)
    found = {f"layers.{i}.{kind}.weight": shape for i in range(config.n_layers) for kind, shape in kinds.items()}
    return {**found, HEAD: (config.vocab_size, width)}


def matrix_bytes(config: SessaConfig, precision: str, weights: Weights | None = None) -> dict[str, int]:
    """Name -> bytes of each of `matrices`, with its scales where it is in 8 bits."""
    item = PRECISIONS[precision].itemsize
    eight = set() if weights is None else set(matrices(config)) - set(weights.kept)
    return {name: columns * (depth + _FLOAT32 if name in eight else depth * item) for name, (columns, depth) in matrices(config).items()}


def other_bytes(config: SessaConfig, precision: str) -> int:
    """Bytes of norms, biases, and gamma's own, which is float32 in 16 bits too; without the embedding."""
    item, width = PRECISIONS[precision].itemsize, config.d_model
    biases = sum(columns for columns, _ in list(matrices(config).values())[:-1])
    biases -= config.n_layers * width if config.n_heads > 1 else 0  # out_proj has none
    return (biases + config.n_layers * 2 * width + 2 * width) * item + config.n_layers * (width + 1) * max(item, _FLOAT32)


def weight_sizes(config: SessaConfig, precision: str, weights: Weights | None = None) -> WeightBytes:
    """What a bundle's weights take. With tied embeddings a head in 8 bits is a tensor of its own."""
    stored, wide = matrix_bytes(config, precision, weights), matrix_bytes(config, precision)
    eight = [name for name in stored if weights is not None and name not in weights.kept]
    embedding, others = config.vocab_size * config.d_model * PRECISIONS[precision].itemsize, other_bytes(config, precision)
    instead_of = sum(wide[name] for name in eight)
    if config.tie_word_embeddings:
        wide[HEAD] = 0
        stored[HEAD] = stored[HEAD] if HEAD in eight else 0
    return WeightBytes(sum(stored[name] for name in eight), instead_of, sum(stored.values()) + embedding + others, sum(wide.values()) + embedding + others)


def bounded_chunk(chunk: int, batch: int, vocab_size: int) -> int:
    """Tokens a step may take of a graph that gives all their logits (B,T,V) float32, so that these stay below 256 MiB."""
    return max(1, min(chunk, _MOST_LOGITS // (_FLOAT32 * batch * vocab_size)))
