"""How the rows and tiles of one call of feedback attention are laid out: panels, buffers, grids of the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sessa_deploy.kernels.feedback.tiles import grouped_size
from sessa_deploy.kernels.launch.limits import SCORE_PROGRAMS


@dataclass(frozen=True)
class Shape:
    """Tile counts of one call: past and new columns in tiles of `tile`, both a multiple of `group` tiles; panels of `rows` rows."""

    batch: int
    tokens: int
    past: int
    width: int
    tile: int
    group: int
    rows: int

    @property
    def past_tiles(self) -> int:
        return -(-self.past // (self.tile * self.group)) * self.group

    @property
    def tiles(self) -> int:
        return self.past_tiles + -(-self.tokens // (self.tile * self.group)) * self.group

    @property
    def columns(self) -> int:
        return self.tiles * self.tile

    @property
    def panels(self) -> int:
        return -(-self.tokens // self.rows)


def plan(batch: int, tokens: int, past: int, width: int, scores: dict[str, Any], itemsize: int, panel_bytes: int) -> Shape:
    """Panels as tall as `panel_bytes` of routing tiles allow, at least one tile of the scores kernel."""
    tile, group = scores["BT"], scores["NB"]
    step = max(scores["BM"], tile * group)
    columns = Shape(batch, tokens, past, width, tile, group, 0).columns
    fit = panel_bytes // (batch * columns * itemsize) // step * step
    return Shape(batch, tokens, past, width, tile, group, min(max(fit, step), -(-tokens // step) * step))


def score_grid(rows: int, before: int, batch: int, options: dict[str, Any]) -> tuple[int, int]:
    """Programs of a kernel that makes routing tiles (`grouped_tile`): `rows` rows, `before` column tiles before the first row's own."""
    wide = options["NB"] * options["BT"]
    return grouped_size(-(-rows // options["BM"]), before // options["NB"], options["BM"], wide, options["GROUP"]), batch


def live_grid(rows: int, past_tiles: int, before: int, batch: int, options: dict[str, Any]) -> tuple[int, int]:
    """`score_grid` of a capacity of `past_tiles`, of which only the device knows how many are live: programs for the new columns, at least SCORE_PROGRAMS,
    take those of the past in turns. before: new column tiles before the first row's own."""
    if not options.get("PAST"):
        return score_grid(rows, past_tiles + before, batch, options)
    return min(score_grid(rows, past_tiles + before, batch, options)[0], max(score_grid(rows, before, batch, options)[0], SCORE_PROGRAMS)), batch


def workspace_sizes(shape: Shape, work: torch.dtype, pair: torch.dtype, tiles_n: int, split: bool, kept: int) -> dict[str, tuple[int, torch.dtype]]:
    """Buffers of the forward (elements, dtype): work is the type of routing tiles, pair that of a block inverse's two halves. kept: of `kept_blocks`."""
    rows, columns = shape.batch * shape.rows, shape.batch * shape.columns
    single = torch.float32
    sizes = {
        "e": (rows * shape.columns, work),
        "peak": (rows * shape.tiles, single),
        "total": (rows * shape.tiles, single),
        "row_peak": (rows, single),
        "factor": (rows, single),
        "lse": (shape.batch * shape.tokens, single),
        "x": (rows * shape.tile, single),
        "inverse": (rows * shape.tile, pair),
        "near": (kept * rows * shape.tile, work),
        "near_scale": (kept * rows, single),
        "w": (columns * shape.width, work),
        "scales": (shape.batch * shape.tiles * tiles_n, single),
        "sync": (shape.panels + shape.batch * tiles_n, torch.int32),
    }
    if split:
        sizes |= {"inverselow": sizes["inverse"], "nearlow": (2 * rows * shape.tile, work), "wlow": sizes["w"]}
    return sizes
