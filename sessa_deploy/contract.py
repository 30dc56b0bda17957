"""Names that export, plugin and runtime share, so that the side that builds and the side that runs cannot drift apart.

Standard library only: this module is imported where there is no torch and no onnx.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DOMAIN = "sessa"
DOMAIN_VERSION = 1
ORT_API = 18  # the oldest version of ONNX Runtime's C API, and so the oldest 1.x, that our library compiles with and loads into
FEEDBACK_OP = "SessaFeedbackAttention"
CAUSAL_OP = "SessaCausalAttention"
GRAPH_OPS = (FEEDBACK_OP, CAUSAL_OP)  # of a bundle's graph; each has a body of standard operators beside it
# Ops of engines only, never of a bundle's graph: a layer around its attentions (see plugins/README.md).
ROTARY_OP, NORM_OP, NORM_ENTER_OP, PROJECT_GAIN_OP = "SessaRotary", "SessaNorm", "SessaNormEnter", "SessaProjectGain"
LINEAR_HEADS_OP, LOGITS_OP, TAIL_OP, MIXER_OP = "SessaLinearHeads", "SessaLogits", "SessaTail", "SessaMixer"
LAST_LOGITS_OP = "SessaLastLogits"
# Everything the plugin library brings, in the order of its creators; plugins/ops.py describes each.
ENGINE_OPS = (*GRAPH_OPS, ROTARY_OP, NORM_OP, LINEAR_HEADS_OP, LOGITS_OP, TAIL_OP, NORM_ENTER_OP, PROJECT_GAIN_OP, MIXER_OP, LAST_LOGITS_OP)
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""
PLUGIN_STATE = 5  # of what an engine holds of a node of ours; goes up with its form, its meaning, and where its kernels come to need more workspace
ATTR_SCALE = "scale"
ATTR_STORAGE = "storage"
ATTR_WEIGHTS = "weights"  # of an op with a matrix of weights: their ONNX type number (WEIGHT_FORMATS), 0 or left out where it is `storage`
WEIGHT, WEIGHT_SCALE = "weight", "weight_scale"  # operands: the matrix, and behind all others its scales
STEP_ROWS = 16  # of a sequence, in a step that verifies a draft: one CUDA graph for each number of rows
FEW_ROWS = 8  # rows up to which an architecture may have binaries of their own, of the same bits: tiles of 8 rows take half the registers
PLACE_BITS = 24  # of a place in a conversation, as the kernel that drafts has it
WIDTH_MULTIPLE, MAX_WIDTH = 16, 4096  # of D, for the kernels of feedback attention

FEEDBACK_INPUTS = ("q", "k", "gamma", "f", "past_k", "past_s", "past_length")
FEEDBACK_OUTPUTS = ("s",)
CAUSAL_INPUTS = ("q", "k", "v", "past_k", "past_v", "past_length")
CAUSAL_OUTPUTS = ("o",)

INPUT_IDS = "input_ids"  # (B,T) int64
PAST_LENGTH = "past_length"  # (B,) int32
NEW_LENGTH = "new_length"  # (B,) int32, 0..T
LOGITS = "logits"  # (B,V) float32, or (B,T,V) on request
LAST_LOGITS_RANK, ALL_LOGITS_RANK = 2, 3
CACHE_FIELDS = ("k_f", "v_f", "k_b", "s")
DIM_BATCH, DIM_TOKENS, DIM_PAST = "B", "T", "P"

BUNDLE_SCHEMA = 1
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
MODEL_DATA_FILE = "model.onnx.data"
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"  # in a bundle: the special tokens that a chat template names
PARITY_FILE = "parity.json"
SAMPLE_FILE = "held_out.txt"  # of a checkpoint: text it was not trained on
ENGINES_DIR = "engines"
ORT_ENGINE = "ort"  # what such a folder's name begins with where it holds a graph prepared for ONNX Runtime, in place of an architecture

MAX_POSITION = 2**18  # rotary tables are exact below it (see rope.py), and max_context is no limit of the graph

DEFAULT_OPSET = 17
OPSETS = tuple(range(17, 24))


@dataclass(frozen=True)
class Precision:
    """One storage type: its name on the command line, in numpy, in torch and in ONNX, and its size in bytes."""

    name: str
    numpy: str
    torch: str
    onnx: int
    itemsize: int
    eps: float


# onnx is TensorProto.DataType; bfloat16's numpy name needs ml_dtypes and is never used by the runtime on a CPU.
PRECISIONS = {
    "fp32": Precision("fp32", "float32", "float32", 1, 4, 2.0**-23),
    "fp16": Precision("fp16", "float16", "float16", 10, 2, 2.0**-10),
    "bf16": Precision("bf16", "bfloat16", "bfloat16", 16, 2, 2.0**-7),
    "fp64": Precision("fp64", "float64", "float64", 11, 8, 2.0**-52),
}
EXPORT_PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class WeightFormat:
    """An 8-bit form of a layer's matrices: its name in ONNX and torch, the largest magnitude that a scale is made for, and its oldest opset.

    max_loss: how many percent more bits per byte than the original weights parity takes by default. arch: the oldest architecture whose kernels read it.
    """

    name: str
    onnx: int
    torch: str
    largest: float
    opset: int
    max_loss: float
    arch: int


WEIGHT_FORMATS = {
    "int8": WeightFormat("int8", 3, "int8", 127.0, 17, 0.5, 0),  # -127..127: symmetric
    "fp8": WeightFormat("fp8", 17, "float8_e4m3fn", 448.0, 19, 1.0, 89),  # E4M3
}


@dataclass(frozen=True)
class Weights:
    """How a bundle stores its matrices: the format ("int8" or "fp8", see WEIGHT_FORMATS), and which of them stay in the bundle's precision."""

    format: str
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.format}, kept in the precision: {', '.join(self.kept)}" if self.kept else self.format

    def to_dict(self) -> dict[str, object]:
        """Plain values, as in the manifest."""
        return {"format": self.format, "kept": list(self.kept)}


HEAD = "lm_head.weight"
QUANTISED, SCALE = ".q", ".scale"  # suffixes of a matrix's 8-bit values and of its float32 scales, one an output channel, in model.onnx


def past_name(layer: int, field: str) -> str:
    """Graph input that holds `field` of layer `layer`'s cache: (B,P,Hkv,d) for k_f and v_f, (B,P,D) for k_b and s."""
    return f"past.{layer}.{field}"


def new_name(layer: int, field: str) -> str:
    """Graph output with the T new rows of `field` in layer `layer`, zeros from new_length[b] on."""
    return f"new.{layer}.{field}"


def cache_entries(n_layers: int) -> Iterator[tuple[int, str]]:
    """(layer, field) in the order in which the graph lists its past inputs and new outputs."""
    for layer in range(n_layers):
        for field in CACHE_FIELDS:
            yield layer, field


def graph_inputs(n_layers: int) -> list[str]:
    """Names of the graph's inputs, in order."""
    return [INPUT_IDS, PAST_LENGTH, NEW_LENGTH, *(past_name(i, f) for i, f in cache_entries(n_layers))]


def graph_outputs(n_layers: int) -> list[str]:
    """Names of the graph's outputs, in order."""
    return [LOGITS, *(new_name(i, f) for i, f in cache_entries(n_layers))]


def cache_row_shape(field: str, d_model: int, n_kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of one cached row: (Hkv,d) for the forward branch's k_f and v_f, (D,) for the feedback branch's k_b and s."""
    if field not in CACHE_FIELDS:
        raise ValueError(f"cache field {field!r} is not one of {CACHE_FIELDS}")
    return (n_kv_heads, head_dim) if field in ("k_f", "v_f") else (d_model,)
