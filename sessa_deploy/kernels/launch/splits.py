"""How a decode step deals a past out to programs. Standard library only.

How a past is split depends on capacity and tiles alone, never on the batch, the lengths or the number of multiprocessors; who computes a split depends on
what the device holds, and changes no bit of it. The kernels' side of this is device.py.
"""

from __future__ import annotations

from sessa_deploy.kernels.launch.limits import MIXER_BROAD, MIXER_MANY_B, MIXER_MANY_F, MIXER_SHORT, STEP_MAX_SPLITS


def step_splits(capacity: int, rows: int, most: int = STEP_MAX_SPLITS) -> int:
    """Splits that a past of `capacity` rows may have, of `rows` at least."""
    return max(1, min(most, -(-capacity // rows)))


def least_rows(rows_f: int, rows_b: int, capacity: int, width: int) -> tuple[int, int]:
    """Rows that a split of the mixer's step takes at least, of causal and of feedback attention, whose tiles make rows_f and rows_b.

    A batch of wide rows wants few splits, each of which ends with a wait that little beside it hides; one sequence wants many, and has the larger cache.
    """
    broad = width > MIXER_BROAD and capacity <= MIXER_SHORT
    return rows_f * (MIXER_MANY_F if broad else 1), rows_b * (MIXER_MANY_B if broad else 1)


def step_programs(pieces: int, blocks: int, resident: int) -> int:
    """Programs that share `pieces` = B * splits splits of the batch, in each of `blocks` blocks of heads, on a device that holds `resident` at once.

    No more than it holds (but one for each block): a program that finds nothing to read costs a place behind those that work.
    """
    return min(pieces, max(1, resident // blocks))


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
