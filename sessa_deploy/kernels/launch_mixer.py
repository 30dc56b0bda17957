"""The kernels of a mixer's decode step as data; see launch_kernels.py. Standard library only."""

from __future__ import annotations

from sessa_deploy.kernels.launch_causal import GROUP, head_variant
from sessa_deploy.kernels.launch_kernels import Kernel, Param, integers, pointers

_MODULE = "sessa_deploy.kernels.mixer_step"
WIDTHS = (1024, 2048, 4096)  # a row of feedback attention is padded to the next of these
HEADS = (64, 128)  # a head of causal attention likewise
_STEPS = tuple(f"{w}.{h}{g}" for w in WIDTHS for h in HEADS for g in ("", f"x{GROUP}"))
_HALF = ("fp16", "bf16")  # a float32 engine keeps TensorRT's own layers
_FLOATS = pointers("part_f", "stat_f", "part_b", "stat_b", type="*fp32")

MIXER_KERNELS: dict[str, Kernel] = {
    k.name: k
    for k in (
        Kernel("mixer_step_partial", _MODULE,
               (*pointers("q", "k", "v", "past_k", "past_v", "q_b", "past_kb", "past_s"), Param("past_length", "*i32"), *_FLOATS,
                *integers("batch", "splits_f", "splits_b", "capacity", "heads", "group", "units"), Param("width", "i32", True), Param("scale_f", "fp32"),
                Param("scale_b", "fp32"), *integers("programs_f")),
               ("ROWS_F", "HEADS_F", "GROUP_F", "LANES_F", "STAGES_F", "TILES_F", "ROWS_B", "CHUNKS_B", "LANES_B", "STAGES_B", "TILES_B", "OWN_B", "PDL"),
               _STEPS, dtypes=_HALF, scalar_loads=16, early=_STEPS, early_rows=0),
        Kernel("mixer_step_combine", _MODULE,
               (*_FLOATS, Param("past_length", "*i32"), Param("gamma", "*fp32"), *pointers("o"), *pointers("add", type="*fp32"),
                *integers("capacity", "splits_f", "rows_f", "splits_b", "rows_b", "heads", "units"), Param("width", "i32", True)),
               ("BLOCK_F", "BLOCK_B", "BLOCK_D", "PDL"), ("any",), dtypes=_HALF, scalar_loads=20, early=("any",), early_rows=64),
    )
}  # fmt: skip


def mixer_variant(width: int, head: int, group: int) -> str:
    """The variant for rows of `width` and heads of `head`; group: query heads of one key/value head. Raises ValueError beyond the largest."""
    padded = next((w for w in WIDTHS if width <= w), 0)
    if not padded or head > HEADS[-1]:
        raise ValueError(f"the mixer has no kernel for D = {width} and heads of {head}; the largest are {WIDTHS[-1]} and {HEADS[-1]}")
    return f"{padded}.{head_variant(head, group)}"


def shares(pieces_f: int, blocks: int, pieces_b: int, width_f: int, width_b: int, resident: int) -> tuple[int, int]:
    """Programs for causal and for feedback attention on a device that holds `resident`: one a split if they fit, else by the widths of their rows.

    pieces_f, pieces_b: B * splits of each; blocks: blocks of heads, each of which takes all splits of causal attention.
    """
    if pieces_f * blocks + pieces_b <= resident:
        return pieces_f * blocks, pieces_b
    programs_f = resident * width_f // (width_f + width_b)
    each = min(pieces_f, max(1, programs_f // blocks))
    programs_b = min(pieces_b, max(1, resident - each * blocks))
    return min(pieces_f, max(each, (resident - programs_b) // blocks)) * blocks, programs_b
