"""The kernels that only an engine runs as data: the layer around its attentions, the decode step of a mixer, what stands around a decode step.

Standard library only.
"""

from __future__ import annotations

from dataclasses import replace

from sessa_deploy.contract import FEW_ROWS, WIDTH_MULTIPLE
from sessa_deploy.kernels.causal.spec import head_variant
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.limits import (
    AHEAD_DEPTH,
    GROUP,
    LAYER_WIDTHS,
    MANY_ROWS,
    MANY_WORK,
    MIXER_BROAD,
    MIXER_HEADS,
    MIXER_WIDTHS,
    PRODUCT_ROWS,
    QUANTISED_ROWS,
    ROWS_HEADS,
    ROWS_WIDTHS,
    WHOLE_DEPTHS,
)  # fmt: skip
from sessa_deploy.kernels.launch.spec import QUANTISED, Kernel, Param, by_name, integers, pointers

_LAYER, _MIXER, _DECODE, _DRAFT = (f"sessa_deploy.kernels.engine.{name}" for name in ("layer", "mixer", "decode_io", "decode_draft"))
_ANY = ("any",)
_HALF = ("fp16", "bf16")  # a float32 engine keeps TensorRT's own layers
_QUANTISED = tuple(dtype + kind for kind in QUANTISED for dtype in _HALF)
_PRODUCT = (*_HALF, *_QUANTISED)
_MATRIX = (*pointers("weight", type="*weight"), *pointers("scale", type="*fp32"))  # scale: of each column of 8-bit weights; of others not looked at
_WIDTHS = tuple(map(str, LAYER_WIDTHS))
_PRODUCTS = (*map(str, PRODUCT_ROWS), "any")
_FEW = _PRODUCTS[:-1]  # short enough to gain from an early start
_ONE = _PRODUCTS[:1]
_AHEAD = f"{PRODUCT_ROWS[1]}.{AHEAD_DEPTH}"  # of few rows, no deeper
_ONE_AHEAD = f"{PRODUCT_ROWS[0]}.{AHEAD_DEPTH}"
WIDE_ROW = f"{PRODUCT_ROWS[0]}.wide"  # of one row that is wider than AHEAD_DEPTH, and with weights of 8 bits than WHOLE_DEPTHS
_WHOLE = tuple(f"{PRODUCT_ROWS[0]}.{depth}" for depth in WHOLE_DEPTHS)  # of one row and 8-bit weights, no deeper; of _ONE_AHEAD's depth, and deeper
_ONES = (WIDE_ROW, *_WHOLE)
_SHARING, _FILLING = (*_ONE, _ONE_AHEAD), (WIDE_ROW, _WHOLE[1])
_EARLY_ROWS = PRODUCT_ROWS[-1]
_BATCH = 32  # rows of one tile of the output projection's 8-bit weights: twice its programs are more than there are multiprocessors
_TILES = ("BM", "BN", "BK", "KS", "AHEAD", "FORM", "PDL")
_SIZES = (Param("rows", "i32"), Param("depth", "i32", True))
_SHORT = f"{PRODUCT_ROWS[2]}.{AHEAD_DEPTH}"  # of more rows than a few, no deeper than those
_EIGHT, _EIGHT_WIDE = f"{FEW_ROWS}.{AHEAD_DEPTH}", f"{FEW_ROWS}.wide"  # of at most FEW_ROWS rows, no deeper than AHEAD_DEPTH and deeper
_EIGHTS = (_EIGHT, _EIGHT_WIDE)
_DESCRIPTOR = 128  # bytes that one takes of a program's memory

_LAYERS = (
    Kernel("layer_rotary", _LAYER, (Param("past_length", "*i32"), *pointers("limbs", "cos", "sin", type="*fp32"), *integers("tokens", "pairs")),
           ("BD", "PDL"), _ANY, dtypes=("fp32",), scalar_loads=16, wide=False, early=_ANY, early_rows=_EARLY_ROWS),
    Kernel("layer_norm", _LAYER, (*pointers("x", "weight", "bias", "out"), Param("width", "i32", True), Param("eps", "fp32")),
           ("BD", "PDL"), _WIDTHS, dtypes=_HALF, early=_WIDTHS, shares=_WIDTHS[1:2], early_rows=_EARLY_ROWS),
    Kernel("layer_norm_last", "sessa_deploy.kernels.engine.last",
           (*pointers("x"), Param("new_length", "*i32"), *pointers("weight", "bias", "out"), *integers("tokens"), Param("width", "i32", True),
            Param("eps", "fp32")),
           ("BD", "PDL"), _WIDTHS, dtypes=_HALF, scalar_loads=1, early=_WIDTHS, opens=_WIDTHS, shares=_WIDTHS[1:2], early_rows=_EARLY_ROWS),
    Kernel("layer_widen", _LAYER, (*_MATRIX[:1], *pointers("out"), Param("count", "i32", True)), ("BLOCK",), _ANY, dtypes=_QUANTISED),
    Kernel("layer_norm_enter", _LAYER,
           (*pointers("x", "norm_weight", "norm_bias"), *_MATRIX, *pointers("bias", "out"), Param("depth", "i32", True), Param("eps", "fp32")),
           ("BN", "BK", "KS", "PDL"), _WIDTHS, dtypes=_PRODUCT, scalar_loads=16, early=_WIDTHS, opens=_WIDTHS, shares=_WIDTHS, fills=_WIDTHS[1:]),
    Kernel("layer_norm_enter_rows", f"{_LAYER}_rows",
           (*pointers("x", "norm_weight", "norm_bias", "weight", "bias", "out"), Param("rows", "i32"), Param("depth", "i32", True), Param("eps", "fp32")),
           ("BM", "BN", "BK", "KS", "PDL"), (*_WIDTHS[:1], _EIGHT), dtypes=_HALF, scalar_loads=32, early=(*_WIDTHS[:1], _EIGHT),
           optional=(*_WIDTHS[:1], _EIGHT)),
    Kernel("layer_linear", _LAYER, (*pointers("x"), *_MATRIX, *pointers("bias", "out"), *_SIZES, *integers("columns")), _TILES, _PRODUCTS,
           dtypes=_PRODUCT, scalar_loads=128, early=_FEW, early_rows=1),
    Kernel("layer_logits", _LAYER, (*pointers("x"), *_MATRIX, *pointers("out", type="*fp32"), *_SIZES, *integers("columns")), _TILES, (*_PRODUCTS, *_ONES),
           dtypes=_PRODUCT, scalar_loads=16, early=(*_FEW, *_ONES), shares=_SHARING, fills=_FILLING, optional=_ONES, early_rows=_EARLY_ROWS),
    Kernel("layer_tail", _LAYER, (*pointers("s", "h"), *_MATRIX, *pointers("bias", "x", "out"), *_SIZES), _TILES,
           (*_PRODUCTS, _AHEAD, _SHORT, *_ONES, *_EIGHTS), dtypes=_PRODUCT, scalar_loads=32, early=(*_FEW, _AHEAD, _SHORT, *_ONES, *_EIGHTS),
           opens=(*_ONE, *_ONES), shares=(*_SHARING, _EIGHT_WIDE), fills=_FILLING, optional=(_AHEAD, _SHORT, *_ONES, *_EIGHTS), always_early=(_SHORT,),
           early_rows_8=_EARLY_ROWS),
    Kernel("layer_out", _LAYER, (*pointers("x"), *_MATRIX, *pointers("bias"), *pointers("add", type="*fp32"), *pointers("out"), *_SIZES), _TILES,
           (*_PRODUCTS, *_ONES), dtypes=_PRODUCT, scalar_loads=32, early=(*_FEW, *_ONES), opens=(*_ONE, *_ONES), shares=_SHARING, fills=_FILLING,
           optional=_ONES, early_rows=1, early_rows_8=_BATCH),
    Kernel("layer_enter", _LAYER, (*pointers("x"), *_MATRIX, *pointers("bias", "out"), *_SIZES), _TILES,
           (*_PRODUCTS[1:], _EIGHT_WIDE), dtypes=_PRODUCT, scalar_loads=32, early=(*_FEW[1:], _EIGHT_WIDE), shares=(_EIGHT_WIDE,), optional=(_EIGHT_WIDE,),
           early_rows=_EARLY_ROWS),
    Kernel("layer_project_gain", _LAYER,
           (*pointers("h"), *_MATRIX, *pointers("bias_q", "bias_k", "bias_v", "bias_fb"), *pointers("cos", "sin", "gamma_weight", type="*fp32"),
            Param("gamma_bias", "*fp32"), *pointers("q", "k", "v", "q_b", "k_b"), Param("gamma", "*fp32"), *_SIZES, Param("kv_width", "i32"),
            *integers("units"), Param("gamma_max", "fp32")),
           _TILES, (*_PRODUCTS, _AHEAD, _SHORT, *_ONES, *_EIGHTS), dtypes=_PRODUCT, scalar_loads=136,
           early=(*_FEW, _AHEAD, _SHORT, *_ONES, *_EIGHTS), opens=(_ONE_AHEAD,), shares=(*_SHARING, _EIGHT_WIDE), fills=_FILLING,
           early_rows=_EARLY_ROWS, optional=(_AHEAD, _SHORT, *_ONES, *_EIGHTS)),
)  # fmt: skip



def _many(name: str, descriptors: int, *more: str) -> Kernel:
    """The product of that name for many rows, by so many descriptors: engine/layer_many.py."""
    own = next(k.params for k in _LAYERS if k.name == name) if name != "layer_tail" else _TAIL_MANY
    params = tuple(replace(p, type="*storage") if p.type == "*weight" else p for p in own)
    constexprs, variants = ("BM", "BN", "BK", "PARTS", *more), ("small", "any") if name in ("layer_linear", "layer_tail") else _ANY
    return Kernel(f"{name}_many", f"{_LAYER}_many", params, constexprs, variants, dtypes=_HALF, scalar_loads=256, optional=variants,
                  scratch=descriptors * _DESCRIPTOR)


_TAIL_MANY = (*pointers("x"), *_MATRIX, *pointers("bias", "add", "out"), *_SIZES)
_LAYERS_MANY = (
    Kernel("layer_gate", f"{_LAYER}_many", (*pointers("s", "h", "out"), *_SIZES), ("BT", "BD"), _ANY, dtypes=_HALF, optional=_ANY),
    *(_many(f"layer_{name}", 3) for name in ("linear", "enter", "tail")), _many("layer_project_gain", 7, "ROWS"),
)

_STEPS = tuple(f"{w}.{h}{g}" for w in MIXER_WIDTHS for h in MIXER_HEADS for g in ("", f"x{GROUP}"))
# Of one sequence, with the splits of a batch. That of narrow rows wishes for the share of shared memory that its neighbours have.
_ALONE, _WIDE_ALONE = f"{_STEPS[0]}.1", f"{MIXER_WIDTHS[1]}.{MIXER_HEADS[1]}.1"
_WIDE_STEPS = tuple(v for v in _STEPS if not _WIDE_ALONE.startswith(f"{v}.") and not v.startswith(f"{MIXER_WIDTHS[0]}."))
_COMBINES = ("1", "any", "wide", WIDE_ROW)
_FLOATS = pointers("part_f", "stat_f", "part_b", "stat_b", type="*fp32")

_MIXERS = (
    Kernel("mixer_step_partial", _MIXER,
           (*pointers("q", "k", "v", "past_k", "past_v", "q_b", "past_kb", "past_s"), Param("past_length", "*i32"), *_FLOATS,
            *integers("batch", "splits_f", "splits_b", "capacity", "heads", "group", "units"), Param("width", "i32", True), Param("scale_f", "fp32"),
            Param("scale_b", "fp32"), *integers("programs_f")),
           ("ROWS_F", "HEADS_F", "GROUP_F", "LANES_F", "STAGES_F", "TILES_F", "ROWS_B", "CHUNKS_B", "LANES_B", "STAGES_B", "TILES_B", "OWN_B", "PDL"),
           (*_STEPS, _ALONE, _WIDE_ALONE), dtypes=_HALF, scalar_loads=16, early=(*_STEPS, _ALONE, _WIDE_ALONE), shares=(_ALONE,),
           fills=(_WIDE_ALONE, *_WIDE_STEPS), optional=(_ALONE, _WIDE_ALONE), early_rows=_EARLY_ROWS),
    Kernel("mixer_step_combine", _MIXER,
           (*_FLOATS, Param("past_length", "*i32"), Param("gamma", "*fp32"), *pointers("o"), *pointers("add", type="*fp32"),
            *integers("capacity", "splits_f", "rows_f", "splits_b", "rows_b", "heads", "units"), Param("width", "i32", True)),
           ("BLOCK_F", "BLOCK_B", "BLOCK_D", "CHUNK", "PDL"), _COMBINES, dtypes=_HALF, scalar_loads=32, early=_COMBINES, opens=(*_ONE, WIDE_ROW),
           shares=_ONE, fills=(WIDE_ROW,), optional=(WIDE_ROW,), early_rows=64),
)  # fmt: skip

_BATCHES = tuple(map(str, MIXER_HEADS))
_MIXER_BATCH = (
    Kernel("mixer_batch_combine", f"{_MIXER}_batch",
           (*_FLOATS, Param("past_length", "*i32"), Param("gamma", "*fp32"), *pointers("o"), *pointers("add", type="*fp32"),
            *integers("batch", "capacity", "splits_f", "rows_f", "splits_b", "rows_b", "heads", "units"), Param("width", "i32", True)),
           ("BLOCK_F", "BLOCK_B", "BLOCK_D", "CHUNK", "HEADS", "LANES", "SPAN", "PDL"), _BATCHES, dtypes=_HALF, scalar_loads=128, early=_BATCHES,
           optional=_BATCHES, early_rows=_EARLY_ROWS),
)  # fmt: skip

_ROWS = "sessa_deploy.kernels.engine.mixer_rows"
_ROWS_STEPS = tuple(f"{w}.{h}" for w in ROWS_WIDTHS for h in ROWS_HEADS)
_WIDE_ROWS = _ROWS_STEPS[len(ROWS_HEADS):]
_ROWS_FEW = tuple(f"{v}.{FEW_ROWS}" for v in _ROWS_STEPS)
_ROWS_COMBINES = (*_ANY, "wide")
_ROWS_OUTS = (*_ANY, str(AHEAD_DEPTH), *_EIGHTS)
_PARTS = pointers("part_f", "stat_f", "part_b", "stat_b", "scores", type="*fp32")

_MIXER_ROWS = (
    Kernel("mixer_rows_partial", _ROWS,
           (*pointers("q", "k", "v", "past_k", "past_v", "q_b", "k_b", "past_kb", "past_s"), Param("past_length", "*i32"), *_PARTS,
            *integers("tokens", "splits_f", "splits_b", "capacity", "heads", "group", "units"), Param("width", "i32", True), Param("scale_f", "fp32"),
            Param("scale_b", "fp32"), *integers("programs_f")),
           ("ROWS_F", "HEADS_F", "LANES_F", "STAGES_F", "ROWS_B", "CHUNKS_B", "LANES_B", "STAGES_B", "QUERIES", "PDL"),
           (*_ROWS_STEPS, *_ROWS_FEW), dtypes=_HALF, scalar_loads=16, early=(*_ROWS_STEPS, *_ROWS_FEW), optional=(*_WIDE_ROWS, *_ROWS_FEW)),
    Kernel("mixer_rows_combine", _ROWS,
           (*_PARTS, Param("past_length", "*i32"), Param("gamma", "*fp32"), *pointers("o"), *pointers("add", "inverse", type="*fp32"),
            *integers("tokens", "capacity", "splits_f", "rows_f", "splits_b", "rows_b", "heads", "units"), Param("width", "i32", True)),
           ("BLOCK_F", "BLOCK_B", "MOST_F", "MOST_B", "NF", "NB", "DF", "DB", "PDL"), _ROWS_COMBINES, dtypes=_HALF, scalar_loads=64, early=_ROWS_COMBINES,
           shares=_ROWS_COMBINES[1:], optional=_ROWS_COMBINES[1:], early_rows=_EARLY_ROWS),
    Kernel("mixer_rows_out", _ROWS,
           (*pointers("x"), *_MATRIX, *pointers("bias"), *pointers("add", "inverse", type="*fp32"), *pointers("out"), *integers("tokens"),
            Param("depth", "i32", True)),
           _TILES, _ROWS_OUTS, dtypes=_PRODUCT, scalar_loads=32, early=_ROWS_OUTS, shares=(_EIGHT_WIDE,), optional=_ROWS_OUTS[1:], early_rows=_EARLY_ROWS),
)  # fmt: skip

_LENGTHS = (Param("past_length", "*i32"), Param("new_length", "*i32"))

# They see words and float32 logits only, whatever the storage type: one binary an architecture.
_DECODES = (
    Kernel("decode_append", _DECODE, (Param("table", "*i64"), *_LENGTHS, *integers("tokens", "capacity")),
           ("BLOCK", "PDL"), _ANY, dtypes=("fp32",), scalar_loads=6, early=_ANY, early_rows=_EARLY_ROWS),
    Kernel("decode_end", _DECODE,
           (Param("table", "*i64"), Param("logits", "*fp32"), *pointers("best", type="*fp32"), *pointers("where", type="*i32"), Param("ended", "*i32"),
            *_LENGTHS, Param("ids", "*i32"), Param("next_ids", "*i32"), *integers("words", "entries", "capacity", "vocabulary")),
           ("SPLITS", "BLOCK", "PDL"), _ANY, dtypes=("fp32",), scalar_loads=64, early=_ANY, early_rows=_EARLY_ROWS),
    Kernel("decode_draft", _DRAFT,
           (Param("text", "*i32"), Param("drafted", "*i32"), Param("told", "*i32"), *_LENGTHS, Param("ids", "*i32"), *integers("words", "rows")),
           ("BLOCK",), _ANY, dtypes=("fp32",), scalar_loads=64, wide=False),
)  # fmt: skip

KERNELS = by_name((*_LAYERS, *_LAYERS_MANY, *_MIXERS, *_MIXER_BATCH, *_MIXER_ROWS, *_DECODES))


def product_variant(rows: int, weights: str = "") -> str:
    """The variant of a matrix product for `rows` rows; weights: of `jit.weights_name`. Those of 8 bits have fewer."""
    return next((str(r) for r in (QUANTISED_ROWS if weights else PRODUCT_ROWS) if rows <= r), "any")


def product_choice(kernel: str, rows: int, weights: str) -> tuple[str, str]:
    """(variant, weights) of the binary of a product whose weights are of 8 bits, or "": beyond QUANTISED_ROWS it reads what layer_widen made of them.

    But not that of the logits: the vocabulary's matrix would be the largest of all buffers, and many rows of logits are rare.
    """
    variant = product_variant(rows, weights)
    if not weights or variant != "any":
        return variant, weights
    return (str(QUANTISED_ROWS[-1]), weights) if kernel == "layer_logits" else (variant, "")


def many_kernel(kernel: str, rows: int, columns: int, weights: str) -> str:
    """The kernel by tensor descriptors that takes a product's place for so many rows of 16-bit weights; "" where there is none."""
    name = f"{kernel}_many"
    return name if rows > MANY_ROWS and columns % WIDTH_MULTIPLE == 0 and not weights and name in KERNELS else ""


def many_variant(name: str, rows: int, columns: int) -> str:
    """The variant of a kernel that `many_kernel` names, for a result of this size. The bits are the same in each: only tiles differ, and no order of sums."""
    return "small" if rows * columns < MANY_WORK and "small" in KERNELS[name].variants else "any"


def ahead_variant(kernel: str, variant: str, weights: str, depth: int) -> str:
    """The optional variant in place of `variant` for rows so short that all weights are read ahead or other tiles pay, or for a wide row; "" if none."""
    one, optional = variant == _ONE[0], table.kernel(kernel).optional
    bound = next((str(most) for most in (WHOLE_DEPTHS if one and weights else (AHEAD_DEPTH,)) if depth <= most), "")
    other = f"{variant}.{bound}" if variant != "any" else bound
    if not bound:
        other = WIDE_ROW if one else ""
    elif weights and not one:  # of several rows, 8-bit weights have none
        other = ""
    return other if other in optional else ""


def few_variant(kernel: str, rows: int, weights: str, depth: int) -> str:
    """The optional variant of a product for 2 to FEW_ROWS rows, which goes before any other; "" if none. The bits are those of 16: tiles have half
    the rows, or only wish for other shared memory."""
    variant = _EIGHT if depth <= AHEAD_DEPTH else _EIGHT_WIDE
    return variant if 1 < rows <= FEW_ROWS and not weights and variant in table.kernel(kernel).optional else ""


def mixer_variant(width: int, head: int, group: int) -> str:
    """The variant for rows of `width` and heads of `head`; group: query heads of one key/value head. Raises ValueError beyond the largest."""
    padded = next((w for w in MIXER_WIDTHS if width <= w), 0)
    if not padded or head > MIXER_HEADS[-1]:
        raise ValueError(f"the mixer has no kernel for D = {width} and heads of {head}; the largest are {MIXER_WIDTHS[-1]} and {MIXER_HEADS[-1]}")
    return f"{padded}.{head_variant(head, group)}"


def step_variants(batch: int, width: int, head: int, group: int) -> tuple[str, ...]:
    """Variants of mixer_step_partial, the first of which that a device has is taken."""
    variant = mixer_variant(width, head, group)
    alone = f"{variant}.1"
    return (alone, variant) if batch == 1 and alone in table.kernel("mixer_step_partial").optional else (variant,)


def combine_variant(batch: int, width: int) -> str:
    """The variant of mixer_step_combine: that of one sequence has few programs, each of which is to end soon; wide rows have many."""
    return "1" if batch == 1 else "wide" if width > MIXER_WIDTHS[0] else "any"


def mixer_rows_variants(tokens: int, width: int, head: int) -> tuple[str, ...]:
    """`step_variants` for a step of several rows. Raises ValueError beyond the largest."""
    padded = next((w for w in ROWS_WIDTHS if width <= w), 0)
    if not padded or head > ROWS_HEADS[-1]:
        raise ValueError(f"a step of several rows has no kernel for D = {width} and heads of {head}; the largest are {ROWS_WIDTHS[-1]} and {ROWS_HEADS[-1]}")
    variant = f"{padded}.{table.width_variant('causal_rows_partial', head)}"
    return (f"{variant}.{FEW_ROWS}", variant) if tokens <= FEW_ROWS else (variant,)


def rows_combines(width: int) -> tuple[str, ...]:
    """Variants of mixer_rows_combine, the first of which that a device has is taken; how many splits there are is in their tiles."""
    return _ROWS_COMBINES[::-1] if width > MIXER_BROAD else _ANY


def rows_early(tokens: int, width: int) -> bool:
    """Whether a step of several rows begins to read its pasts early: where the queries' registers leave room for it."""
    return tokens <= FEW_ROWS or width <= ROWS_WIDTHS[0]


def batch_variant(batch: int, width: int, head: int) -> str:
    """The optional variant of mixer_batch_combine, which takes the place of mixer_step_combine for several sequences of rows not wide; "" where none does."""
    return head_variant(head) if batch > 1 and width <= MIXER_WIDTHS[0] else ""
