"""How a decode step deals a past out to programs. Standard library only.

How a past is split depends on capacity and tiles alone, never on the batch, the lengths or the number of multiprocessors; who computes a split depends on
what the device holds, and changes no bit of it. The kernels' side of this is device.py.
"""

from __future__ import annotations

from sessa_deploy.kernels.launch.limits import STEP_MAX_SPLITS


def step_splits(capacity: int, rows: int, most: int = STEP_MAX_SPLITS) -> int:
    """Splits that a past of `capacity` rows may have, of `rows` at least."""
    return max(1, min(most, -(-capacity // rows)))


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
