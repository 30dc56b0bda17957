"""Forward of feedback attention: routing tiles, block inverses, then the solve as one dataflow kernel. See README.md for the algorithm.

Rows go in panels so that the workspace is panel x (P + T) in the work type (float16 for 16-bit storage, else float32), never T x T in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels import launch
from sessa_deploy.kernels.feedback_tiles import apply_inverse, feedback_combine, feedback_scores, finite, grouped_size, store_split

PANEL_BYTES = 1 << 30  # routing tiles of one panel
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit(do_not_specialize=launch.do_not_specialize("feedback_pack"))
def feedback_pack(past_s, past_length, w, w_low, scales, P, D, C, BT: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    """Grid (P tiles, D tiles, B): past_s in the form the solve reads, zeros from past_length on. Tiles without a live row stay unwritten."""
    i_t, i_n, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    length = tl.minimum(tl.load(past_length + i_b), P)
    if i_t * BT < length:
        o_t, o_n = tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
        m_n = (o_n < D)[None, :]
        m_t = (i_t * BT + o_t < length)[:, None]
        b_x = tl.load(past_s + (i_b * P + i_t * BT) * D + o_t[:, None] * D + o_n[None, :], mask=m_t & m_n, other=0.0).to(tl.float32)
        p_tile = (i_b * C + i_t * BT) * D + o_t[:, None] * D + o_n[None, :]
        p_scale = (i_b * (C // BT) + i_t) * tl.num_programs(1) + i_n
        store_split(b_x, tl.max(tl.max(tl.abs(b_x), axis=1), axis=0), w, w_low, scales, p_tile, p_scale, m_n, SPLIT)


@triton.jit
def wait_for(p_done, tiles):
    """Spin until the counter reaches `tiles`; returns what it reads."""
    ready = tl.atomic_add(p_done, 0, sem="acquire", scope="gpu")
    while ready < tiles:
        ready = tl.atomic_add(p_done, 0, sem="acquire", scope="gpu")
    return ready


@triton.jit
def near_product(b_near, b_low, w, w_low, p_tile, m_n, FULL: tl.constexpr, SPLIT: tl.constexpr):
    """near @ s of one block, both as pairs: two products, with FULL also near's low half."""
    b_w = tl.load(w + p_tile, mask=m_n, other=0.0, cache_modifier=".cg")
    if SPLIT:
        b_l = tl.load(w_low + p_tile, mask=m_n, other=0.0, cache_modifier=".cg")
        acc = tl.dot(b_near, b_l)
        if FULL:
            acc = tl.dot(b_low, b_w, acc)
        acc = tl.dot(b_near, b_w, acc)
    else:
        acc = tl.dot(b_near, b_w, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=launch.do_not_specialize("feedback_solve"))
def feedback_solve(
    e, peak, row_peak, gain, inverse, inverse_low, near, near_low, near_scale, f, s, w, w_low, scales, past_length, sync,
    T, D, C, R, NP, NT, row0, B, panel, panels,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One program per (block of BT rows, sequence, BN columns of D): s = inverse (f + sum_far r_j (e_j @ s_j)) + near[1] s_{i-2} + near[0] s_{i-1}.

    r_j = gain exp(peak_j - row_peak). A ticket hands the tiles out in the order of their dependencies, so a waiting program always waits for one
    that runs. sync: a ticket per panel, then for each (sequence, columns) the number of row blocks that are done. Tiles are summed in ascending
    order, whoever is ready. s reaches later blocks as a scaled float16 pair; far blocks use its high half alone unless FULL.
    """
    tiles_n = tl.cdiv(D, BN)
    ticket = tl.atomic_add(sync + panel, 1, sem="relaxed", scope="gpu")
    i_n = ticket % tiles_n
    i_b = ((ticket // tiles_n) % B).to(tl.int64)
    i_r = ticket // (tiles_n * B)
    block = row0 // BT + i_r
    p_done = sync + panels + i_b * tiles_n + i_n
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BT)
    far = past_tiles + tl.maximum(block - 2, 0)

    o_r, o_k, o_n = tl.arange(0, BT), tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    p_e = e + (i_b * R + i_r * BT) * C + o_r[:, None] * C + o_k[None, :]
    p_w = i_b * C * D + o_k[:, None] * D + o_n[None, :]
    p_peak = peak + i_b * NT * R + i_r * BT + o_r
    p_scale = scales + i_b * NT * tiles_n + i_n
    p_row = i_b * R + i_r * BT + o_r
    b_top = tl.load(row_peak + p_row)
    b_gain = tl.load(gain + p_row)

    acc = tl.zeros([BT, BN], dtype=tl.float32)
    i = 0
    while i < far:
        stop = past_tiles
        if i >= past_tiles:
            stop = tl.minimum(past_tiles + wait_for(p_done, i - past_tiles + 1), far)
        for j in tl.range(i, stop, num_stages=STAGES):
            i_t = tl.where(j < past_tiles, j, j - past_tiles + NP)
            b_e = tl.load(p_e + i_t * BT)
            b_w = tl.load(w + p_w + i_t.to(tl.int64) * BT * D, mask=m_n, other=0.0, cache_modifier=".cg")
            b_r = b_gain * tl.exp(tl.load(p_peak + i_t.to(tl.int64) * R) - b_top)
            if SPLIT:
                b_r = b_r * tl.load(p_scale + i_t * tiles_n)
            b_y = tl.dot(b_e, b_w, input_precision="ieee")
            if FULL:
                b_l = tl.load(w_low + p_w + i_t.to(tl.int64) * BT * D, mask=m_n, other=0.0, cache_modifier=".cg")
                b_y = tl.dot(b_e, b_l, b_y)
            acc += b_y * b_r[:, None]
        i = stop

    start = row0 + i_r * BT
    m_f = (start + o_r < T)[:, None] & m_n
    p_f = (i_b * T + start) * D + o_r[:, None] * D + o_n[None, :]
    p_i = (i_b * R + i_r * BT) * BT + o_r[:, None] * BT + o_k[None, :]
    b_x = acc + tl.load(f + p_f, mask=m_f, other=0.0).to(tl.float32)
    m_ok = finite(b_x) & finite(b_gain)[:, None]
    b_s = apply_inverse(tl.load(inverse + p_i), tl.load(inverse_low + p_i), tl.where(m_ok, b_x, 0.0), SPLIT)
    if tl.max(tl.max(tl.where(m_ok, 0, 1), axis=1), axis=0) > 0:  # rare: poison each column from its first bad row on, not the rows before it
        b_first = tl.min(tl.where(m_ok, BT, o_r[:, None]), axis=0)
        b_s = tl.where(o_r[:, None] >= b_first[None, :], float("nan"), b_s)
    if block > 1:
        i_t = NP + block - 2
        b_near = tl.load(near + p_i + B * R * BT)
        b_low = tl.load(near_low + p_i + B * R * BT)
        b_r = tl.load(near_scale + p_row + B * R)
        wait_for(p_done, block - 1)
        if SPLIT:
            b_r = b_r * tl.load(p_scale + i_t * tiles_n)
        b_s += near_product(b_near, b_low, w, w_low, p_w + i_t.to(tl.int64) * BT * D, m_n, FULL, SPLIT) * b_r[:, None]
    if block > 0:
        i_t = NP + block - 1
        b_near = tl.load(near + p_i)
        b_low = tl.load(near_low + p_i)
        b_r = tl.load(near_scale + p_row)
        wait_for(p_done, block)
        if SPLIT:
            b_r = b_r * tl.load(p_scale + i_t * tiles_n)
        b_s += near_product(b_near, b_low, w, w_low, p_w + i_t.to(tl.int64) * BT * D, m_n, FULL, SPLIT) * b_r[:, None]
    amax = tl.max(tl.max(tl.abs(b_s), axis=1), axis=0)
    p_tile = (i_b * C + (NP + block) * BT) * D + o_r[:, None] * D + o_n[None, :]
    store_split(b_s, amax, w, w_low, scales, p_tile, (i_b * NT + NP + block) * tiles_n + i_n, m_n, SPLIT)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, block + 1, sem="release", scope="gpu")
    tl.store(s + p_f, b_s.to(s.dtype.element_ty), mask=m_f)


@dataclass(frozen=True)
class Shape:
    """Tile counts of one call: NP past tiles and NT column tiles of BT, panels of `rows` rows (a multiple of the score tile's)."""

    batch: int
    tokens: int
    past: int
    width: int
    tile: int
    rows: int

    @property
    def past_tiles(self) -> int:
        return -(-self.past // self.tile)

    @property
    def tiles(self) -> int:
        return self.past_tiles + -(-self.tokens // self.tile)

    @property
    def columns(self) -> int:
        return self.tiles * self.tile

    @property
    def panels(self) -> int:
        return -(-self.tokens // self.rows)


def plan(batch: int, tokens: int, past: int, width: int, tile: int, score_rows: int, itemsize: int, panel_bytes: int) -> Shape:
    """Panels as tall as `panel_bytes` of routing tiles allow, at least one score tile."""
    columns = (-(-past // tile) + -(-tokens // tile)) * tile
    fit = panel_bytes // (batch * columns * itemsize) // score_rows * score_rows
    rows = min(max(fit, score_rows), -(-tokens // score_rows) * score_rows)
    return Shape(batch, tokens, past, width, tile, rows)


@lru_cache(maxsize=64)
def arch_of(index: int) -> int:
    """Compute capability of a CUDA device as an integer, 90 for the interpreter (no device)."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def pinned(names: tuple[str, ...], device: torch.device, dtype: torch.dtype, variant: str) -> dict[str, dict[str, Any]]:
    """The pinned launch options of `names`."""
    return _pinned(names, arch_of(device.index or 0), DTYPE_NAMES[dtype], variant)


@lru_cache(maxsize=64)
def _pinned(names: tuple[str, ...], arch: int, dtype: str, variant: str) -> dict[str, dict[str, Any]]:
    return {name: launch.options(name, arch, dtype, variant) for name in names}


FORWARD = ("feedback_pack", "feedback_scores", "feedback_combine", "feedback_solve")


def forward(
    q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor, need_lse: bool = True,
    options: dict[str, dict[str, Any]] | None = None, panel_bytes: int = PANEL_BYTES,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """s (B,T,D) in the storage dtype and lse (B,T) float32 (None unless wanted). Shapes and meaning as in `ops.feedback_attention`.

    options: launch options by kernel name in place of the pinned ones (tuning, small tiles under the interpreter).
    """
    q, k, gamma, f, past_k, past_s = (x.contiguous() for x in (q, k, gamma, f, past_k, past_s))
    batch, tokens, width = q.shape
    opt = options or pinned(FORWARD, q.device, q.dtype, "fwd")
    split = q.dtype != torch.float32
    scores, combine, solve = (opt[n] for n in FORWARD[1:])
    tile, block_n = solve["BT"], solve["BN"]
    work = torch.float16 if split else torch.float32
    shape = plan(batch, tokens, past_k.shape[1], width, tile, scores["BM"], work.itemsize, panel_bytes)
    past_tiles, tiles, columns, rows, panels = shape.past_tiles, shape.tiles, shape.columns, shape.rows, shape.panels
    tiles_n = -(-width // block_n)
    if past_length.dtype != torch.int32:
        past_length = past_length.to(torch.int32)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=q.device)

    s = torch.empty_like(f)
    lse = empty(batch, tokens)
    e = empty(batch, rows, columns, dtype=work)
    stats = empty(2, batch, tiles, rows)
    row_stats = empty(2, batch, rows)
    x = empty(batch, rows, tile)
    inverse = empty(2, batch, rows, tile, dtype=torch.bfloat16) if split else x[None].expand(2, -1, -1, -1)
    near = empty(4, batch, rows, tile, dtype=work)
    near_scale = empty(2, batch, rows)
    w = empty(2, batch, columns, width, dtype=work) if split else empty(1, batch, columns, width).expand(2, -1, -1, -1)
    scales = empty(batch, tiles, tiles_n)
    n_sync = panels + batch * tiles_n
    sync = empty(n_sync, dtype=torch.int32)

    if past_tiles:
        feedback_pack[(past_tiles, tiles_n, batch)](past_s, past_length, w[0], w[1], scales, shape.past, width, columns, **opt["feedback_pack"])
    for panel in range(panels):
        row0 = panel * rows
        here = min(rows, tokens - row0)
        blocks = -(-here // tile)
        grid = grouped_size(-(-here // scores["BM"]), past_tiles + row0 // tile, scores["BM"], tile, scores["GROUP"])
        feedback_scores[(grid, batch)](
            q, k, past_k if past_tiles else k, past_length, lse, sync, e, stats[0], stats[1], sync, tokens, shape.past, width, columns, rows,
            past_tiles, tiles, row0, 0 if panel else n_sync, 1 / math.sqrt(width), **scores,
        )  # fmt: skip
        feedback_combine[(blocks, batch)](
            e, stats[0], stats[1], gamma, past_length, row_stats[0], row_stats[1], lse, x, inverse[0], inverse[1],
            near, near[2:], near_scale, tokens, columns, rows, past_tiles, tiles, row0, batch, blocks, **combine,
        )  # fmt: skip
        feedback_solve[(blocks * batch * tiles_n,)](
            e, stats[0], row_stats[0], row_stats[1], inverse[0], inverse[1], near, near[2:], near_scale, f, s, w[0], w[1], scales,
            past_length, sync, tokens, width, columns, rows, past_tiles, tiles, row0, batch, panel, panels, **solve,
        )  # fmt: skip
    return s, lse if need_lse else None
