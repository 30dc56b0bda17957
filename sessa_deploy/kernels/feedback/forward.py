"""Forward of feedback attention: routing tiles, block inverses, then the solve as one dataflow kernel. See README.md for the algorithm.

Rows go in panels so that the workspace is panel x (P + T) in the work type (float16 for 16-bit storage, else float32), never T x T in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.feedback import parts
from sessa_deploy.kernels.feedback.halves import feedback_solve_halves
from sessa_deploy.kernels.feedback.inverse import feedback_inverse, feedback_near
from sessa_deploy.kernels.feedback.inverse_half import feedback_inverse_half, feedback_near_half
from sessa_deploy.kernels.feedback.many import ManyScores, feedback_scores_many, feedback_scores_past
from sessa_deploy.kernels.feedback.pack import feedback_pack
from sessa_deploy.kernels.feedback.shape import Shape, live_grid, plan, score_grid, workspace_sizes
from sessa_deploy.kernels.feedback.spec import HALVES, MANY, MANY_PAST, all_pinned, pack_variant, scores_many, scores_past, solve_variant, solver
from sessa_deploy.kernels.feedback.tiles import (
    apply_inverse,
    feedback_combine,
    feedback_scores,
    finite,
    near_product,
    store_split,
)
from sessa_deploy.kernels.feedback.waits import take_ticket, wait_for
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import EARLY, Launcher, Options, Workspace, address, aligned, arch_of, dtype_name, launcher, pinned, varied
from sessa_deploy.kernels.launch.limits import PACK_PROGRAMS, PANEL_BYTES, SCORE_COLUMNS


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve"))
def feedback_solve(
    e, peak, row_peak, factor, inverse, inverse_low, near, near_low, near_scale, f, s, s_low, w, w_low, scales, past_length, sync,
    T, D, C, R, NP, NT, row0, B, panel, panels, keep,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """One program per (block of BT rows, sequence, BN columns of D): s = inverse (f + sum_far r_j (e_j @ s_j)) + near[1] s_{i-2} + near[0] s_{i-1}.

    r_j = factor exp(peak_j - row_peak). A ticket hands the tiles out in the order of their dependencies, so a waiting program always waits for one
    that runs. sync: a ticket per panel, then for each (sequence, columns) the number of row blocks that are done. Tiles are summed in ascending
    order, whoever is ready. s reaches later blocks as a scaled float16 pair, whose low half only FULL reads from far and only LOW from the
    two nearest. keep: s_low receives what rounding to storage took from s.
    """
    tiles_n = tl.cdiv(D, BN)
    i_n, i_b, i_r = take_ticket(sync + panel, tiles_n, B)
    block = row0 // BT + i_r
    p_done = sync + panels + i_b * tiles_n + i_n
    past_tiles = tl.cdiv(tl.load(past_length + i_b), BT)
    far = past_tiles + tl.maximum(block - 2, 0)

    o_r, o_k, o_n = tl.arange(0, BT), tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    o_e = o_r[:, None] * C + o_k[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    p_e = e + (i_b * R + i_r * BT) * C
    p_w, p_l = w + i_b * C * D, w_low + i_b * C * D
    p_peak = peak + i_b * NT * R + i_r * BT + o_r
    p_scale = scales + i_b * NT * tiles_n + i_n
    p_row = i_b * R + i_r * BT + o_r
    b_top = tl.load(row_peak + p_row)
    b_factor = tl.load(factor + p_row)

    acc = tl.zeros([BT, BN], dtype=tl.float32)
    i = 0
    while i < far:
        stop = past_tiles
        if i >= past_tiles:
            stop = tl.minimum(past_tiles + wait_for(p_done, i - past_tiles + 1), far)
        for j in tl.range(i, stop, num_stages=STAGES):
            i_t = tl.where(j < past_tiles, j, j - past_tiles + NP)
            b_e = tl.load(p_e + i_t * BT + o_e)
            b_w = tl.load(p_w + i_t.to(tl.int64) * BT * D + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
            b_r = b_factor * tl.exp(tl.load(p_peak + i_t.to(tl.int64) * R) - b_top)
            if SPLIT:
                b_r = b_r * tl.load(p_scale + i_t * tiles_n)
            b_y = tl.dot(b_e, b_w, input_precision="ieee")
            if FULL:
                b_l = tl.load(p_l + i_t.to(tl.int64) * BT * D + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
                b_y = tl.dot(b_e, b_l, b_y)
            acc += b_y * b_r[:, None]
        i = stop

    start = row0 + i_r * BT
    m_f = (start + o_r < T)[:, None] & m_n
    p_f = (i_b * T + start) * D
    o_i = o_r[:, None] * BT + o_k[None, :]
    p_i = (i_b * R + i_r * BT) * BT
    b_x = acc + tl.load(f + p_f + o_w, mask=m_f, other=0.0).to(tl.float32)
    m_ok = finite(b_x) & finite(b_factor)[:, None]
    b_s = apply_inverse(tl.load(inverse + p_i + o_i), tl.load(inverse_low + p_i + o_i), tl.where(m_ok, b_x, 0.0), SPLIT)
    if tl.max(tl.max(tl.where(m_ok, 0, 1), axis=1), axis=0) > 0:  # rare: poison each column from its first bad row on, not the rows before it
        b_first = tl.min(tl.where(m_ok, BT, o_r[:, None]), axis=0)
        b_s = tl.where(o_r[:, None] >= b_first[None, :], float("nan"), b_s)
    nearest = tl.minimum(block, 2)
    for d in tl.range(0, nearest, num_stages=1):
        back = nearest - d  # 2, then 1
        i_t = NP + block - back
        p_near = p_i + (back - 1).to(tl.int64) * B * R * BT
        b_near = tl.load(near + p_near + o_i)
        b_low = tl.load(near_low + p_near + o_i)
        b_r = tl.load(near_scale + p_row + (back - 1) * B * R)
        wait_for(p_done, block - back + 1)
        if SPLIT:
            b_r = b_r * tl.load(p_scale + i_t * tiles_n)
        p_tile = i_t.to(tl.int64) * BT * D
        b_s += near_product(b_near, b_low, p_w + p_tile, p_l + p_tile, o_w, m_n, FULL, LOW, SPLIT) * b_r[:, None]
    amax = tl.max(tl.max(tl.abs(b_s), axis=1), axis=0)
    p_tile = (NP + block).to(tl.int64) * BT * D
    store_split(b_s, amax, p_w + p_tile, p_l + p_tile, scales, o_w, (i_b * NT + NP + block) * tiles_n + i_n, m_n, SPLIT, LOW)
    tl.debug_barrier()
    tl.atomic_xchg(p_done, block + 1, sem="release", scope="gpu")
    b_out = b_s.to(s.dtype.element_ty)
    tl.store(s + p_f + o_w, b_out, mask=m_f)
    if SPLIT:
        tl.store(s_low + p_f + o_w, (b_s - b_out.to(tl.float32)).to(s.dtype.element_ty), mask=m_f & (keep != 0))


FORWARD = ("feedback_pack", "feedback_scores", "feedback_combine", "feedback_solve")
KERNELS = (feedback_pack, feedback_scores, feedback_combine, feedback_solve)
SOLVES = (feedback_solve_halves, feedback_solve)  # the first that options hold
APART = ("feedback_inverse", "feedback_near")  # in place of feedback_combine, where options hold them
APART_HALF = ("feedback_inverse_half", "feedback_near_half")  # likewise, in float16


def kept_blocks(options: Options) -> int:
    """Tiles that the combination leaves of each row block in `near`: products with the two nearest blocks, and the inverse itself where kernels stand in."""
    return 3 if APART[0] in options else 2


def combination(device: torch.device, dtype: torch.dtype, options: Options) -> list[tuple[int, Launcher]]:
    """What goes between scores and solve: each kernel's programs a block, and its launcher."""
    if APART_HALF[0] in options:
        return [(each, launcher(kernel, device, dtype, options[kernel.__name__])) for each, kernel in ((1, feedback_inverse_half), (2, feedback_near_half))]
    if APART[0] not in options:
        return [(1, launcher(feedback_combine, device, dtype, options["feedback_combine"]))]
    return [(each, launcher(kernel, device, dtype, options[kernel.__name__])) for each, kernel in ((1, feedback_inverse), (4, feedback_near))]


def score_launches(device: torch.device, dtype: torch.dtype, options: Options, shape: Shape) -> tuple[Callable[..., None], bool]:
    """What launches the scores, and whether it is the kernel by descriptors, which takes (rows, sequences) for a grid."""
    name = MANY_PAST if shape.past else MANY
    if name in options and (shape.panels == 1 or shape.rows % SCORE_COLUMNS == 0):
        kernel = feedback_scores_past if shape.past else feedback_scores_many
        return ManyScores(launcher(kernel, device, dtype, options[name]), shape.past > 0), True
    return launcher(feedback_scores, device, dtype, options["feedback_scores"]), False


def tiles(device: torch.device, dtype: torch.dtype, width: int, rows: int = 0, past: int = 0, batch: int = 1) -> Options:
    """The pinned launch options of the forward of `batch` sequences at D = width, for B T = rows (0: as many as may be) behind a capacity of `past`."""
    arch, kind = arch_of(device.index or 0), dtype_name(dtype)
    solve = solve_variant(arch, kind, width, "fwd", rows, batch)
    found = pinned(FORWARD[1:2], device, dtype, "past" if past else "fwd") | pinned(FORWARD[2:3], device, dtype, "fwd")
    found |= pinned(FORWARD[:1], device, dtype, pack_variant(solve)) | pinned((solver(arch, kind, "fwd", width),), device, dtype, solve)
    apart = next((names for names in (APART, APART_HALF) if all_pinned(names, arch, kind, "fwd")), ())
    tokens = rows // batch
    many, taken = (MANY_PAST, scores_past(arch, kind, batch, tokens)) if past else (MANY, scores_many(arch, kind, "fwd", batch, tokens))
    found |= pinned((*apart, *(many,) * taken), device, dtype, "fwd")
    return found | {name: varied(found[name], PAST=past > 0) for name in HALVES[:1] if name in found}


class Plan:
    """What calls of one shape on one device share: buffers, compiled kernels, and each launch's grid and integers."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, batch: int, tokens: int, past: int, width: int, options: Options | None, panel_bytes: int
    ) -> None:
        opt = options or tiles(device, dtype, width, batch * tokens, past, batch)
        solving = next(k for k in SOLVES if k.__name__ in opt)
        scores, solve = opt["feedback_scores"], opt[solving.__name__]
        tile = solve["BT"]
        split = dtype != torch.float32
        work, pair = (torch.float16, torch.bfloat16) if split else (torch.float32, torch.float32)
        shape = plan(batch, tokens, past, width, scores, work.itemsize, panel_bytes)
        past_tiles, all_tiles, columns, rows, panels = shape.past_tiles, shape.tiles, shape.columns, shape.rows, shape.panels
        tiles_n = -(-width // solve["BN"])
        sizes = workspace_sizes(shape, work, pair, tiles_n, split, kept_blocks(opt))
        self.shape, self.workspace = shape, Workspace(sizes)
        self.low = "low" if split else ""
        self.run_pack, self.run_solve = (launcher(k, device, dtype, opt[k.__name__]) for k in (KERNELS[0], solving))
        self.run_scores, many = score_launches(device, dtype, opt, shape)
        self.combination = combination(device, dtype, opt)
        self.pack = ((min(past_tiles, PACK_PROGRAMS), tiles_n, batch), (past, width, columns)) if past_tiles else None
        self.panels: list[tuple[Any, ...]] = []
        for panel in range(panels):
            row0 = panel * rows
            here = min(rows, tokens - row0)
            blocks = -(-here // tile)
            self.panels.append((
                (here, batch) if many else live_grid(here, past_tiles, row0 // tile, batch, scores),
                (tokens, past, width, columns, rows, past_tiles, all_tiles, row0, 0 if panel else sizes["sync"][0], 1 / math.sqrt(width)),
                (blocks, batch),
                (tokens, columns, rows, past_tiles, all_tiles, row0, batch, blocks),
                (blocks * batch * tiles_n,),
                (tokens, width, columns, rows, past_tiles, all_tiles, row0, batch, panel, panels),
            ))  # fmt: skip
        self.scores_whole = parts.scores_whole(tokens, many)
        rows_of = parts.cuts(batch, tokens, many) if APART[0] in opt and panels == 1 and past == 0 else ()
        self.parts = list(itertools.pairwise((*rows_of, tokens))) if rows_of else []
        few = opt[solving.__name__].get("ALONE", False)
        self.in_parts = {name: parts.beside_others(name, opt[name], few) for name in ("feedback_scores", *APART, solving.__name__)} if self.parts else {}
        if self.parts:
            own = self.in_parts[solving.__name__]
            self.run_solve = launcher(solving, device, dtype, own)
            self.combination = combination(device, dtype, self.in_parts)
            if not self.scores_whole:
                first = self.in_parts["feedback_scores"]
                self.run_parts = [launcher(feedback_scores, device, dtype, o) for o in (first, varied(first, **{EARLY: True}))]
            # with near tiles, where no scores of later rows want its places, by a kernel that waits for them
            self.early = bool(own.get("PDL")) and (few or self.scores_whole)
            self.run_first = launcher(solving, device, dtype, varied(own, **{EARLY: True})) if self.early else self.run_solve


P = TypeVar("P")


def planner(made: Callable[..., P]) -> Callable[..., P]:
    """Plans of a class, which keeps those where the options are the pinned ones."""
    kept = lru_cache(maxsize=256)(made)

    def plan_of(
        device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], past: int = 0, options: Options | None = None, panel_bytes: int = PANEL_BYTES
    ) -> P:
        """The plan of calls with q (B,T,D) of this shape and a past of so many rows."""
        batch, tokens, width = shape
        where = (device, dtype, batch, tokens, past, width)
        return made(*where, options, panel_bytes) if options else kept(*where, None, panel_bytes)

    return plan_of


plan_of = planner(Plan)
Queue = Callable[[Hashable, torch.device, Sequence[Tensor | None], Callable[[], None]], None]


def at_once(what: Hashable, device: torch.device, tensors: Sequence[Tensor | None], work: Callable[[], None]) -> None:
    """Queue work, of which `what` and the places of the tensors say everything: whoever does not want it replayed."""
    work()


class Call:
    """The launches of one forward: `route`, which needs no f, then `solve`. What is written: s, lse and low, as `forward` gives them.

    memory: of the plan's workspace. Every tensor is `aligned`, and held by the caller until all of it is queued.
    """

    def __init__(
        self, p: Plan, q: Tensor, k: Tensor, gamma: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor, s: Tensor, lse: Tensor | None,
        low: Tensor | None, memory: Tensor,
    ) -> None:  # fmt: skip
        at = p.workspace.at(memory)
        a_s, a_q, a_k, a_gamma, a_length = [address(x) for x in (s, q, k, gamma, past_length)]
        a_past_k, a_past_s = (address(past_k), address(past_s)) if p.pack else (a_k, a_s)
        a_lse, a_low = at["lse"] if lse is None else address(lse), a_s if low is None else address(low)
        self._plan, self._keep, self._at = p, int(low is not None), at
        self._inputs = a_q, a_k, a_past_k, a_length, a_gamma, a_lse
        w, w_low, scales = at["w"], at["w" + p.low], at["scales"]
        self._pack = (a_past_s, a_length, w, w_low, scales)
        self._scores, self._combine = self._routing(at)
        names = ("e", "peak", "row_peak", "factor", "inverse", "inverse" + p.low, "near", "near" + p.low, "near_scale")
        self._first = tuple(at[n] for n in names)
        self._last = (a_s, a_low, w, w_low, scales, a_length, at["sync"])

    def _routing(self, at: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What scores and combination take, with the buffers of some rows."""
        q, k, past_k, length, gamma, lse = self._inputs
        e, peak, total, sync, low = at["e"], at["peak"], at["total"], at["sync"], self._plan.low
        names = ("x", "inverse", "inverse" + low, "near", "near" + low, "near_scale")
        combine = (e, peak, total, gamma, length, at["row_peak"], at["factor"], lse, *(at[n] for n in names))
        return (q, k, past_k, length, lse, sync, e, peak, total, sync), combine

    def route(self, panel: int = 0) -> None:
        """Queue what a panel's solve needs beside f; the first panel's before `solve`."""
        p = self._plan
        if p.pack and panel == 0:
            p.run_pack(p.pack[0], *self._pack, *p.pack[1])
        self._score(panel)
        combine_programs, combine_sizes = p.panels[panel][2:4]
        for each, run in p.combination:
            run((*combine_programs, each), *self._combine, *combine_sizes)

    def _score(self, panel: int = 0) -> None:
        p = self._plan
        p.run_scores(p.panels[panel][0], *self._scores, *p.panels[panel][1])

    def whole(self, f: Tensor) -> None:
        """Queue all of it: in parts where a CUDA graph is captured."""
        if self._plan.parts and parts.capturing(f.device):
            self._in_parts(address(f))
        else:
            self.route()
            self.solve(f)

    def _in_parts(self, f: Any) -> None:
        p = self._plan
        if p.scores_whole:
            self._score()
        inverse, near = (partial(self._combine_part, which=which) for which in range(2))
        scores, joint = None if p.scores_whole else self._score_part, p.shape.tokens > parts.JOINT
        parts.queue(p.parts, scores, inverse, near, partial(self._solve_part, f=f), joint=joint, early=p.early)

    def _from(self, row: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """`_routing` of the rows from `row` on."""
        p = self._plan
        each = {"e": p.shape.columns, **dict.fromkeys(("peak", "total", "row_peak", "factor", "x", "near_scale"), 1)}
        each |= dict.fromkeys(("inverse", "inverse" + p.low, "near", "near" + p.low), p.shape.tile)
        return self._routing({**self._at, **{n: p.workspace.beyond(self._at, n, row * count) for n, count in each.items()}})

    def _score_part(self, part: tuple[int, int]) -> None:
        p, (row, end) = self._plan, part
        *sizes, _, syncs, scale = p.panels[0][1]
        grid = score_grid(end - row, row // p.shape.tile, p.shape.batch, p.in_parts["feedback_scores"])
        p.run_parts[row > 0](grid, *self._from(row)[0], *sizes, row, 0 if row else syncs, scale)

    def _combine_part(self, part: tuple[int, int], which: int) -> None:
        p, (row, end) = self._plan, part
        tokens, columns, rows, past_tiles, all_tiles, _, batch, _ = p.panels[0][3]
        blocks = -(-(end - row) // p.shape.tile)
        each, run = p.combination[which]
        run((blocks, batch, each), *self._from(row)[1], tokens, columns, rows, past_tiles, all_tiles, row, batch, blocks)

    def _solve_part(self, part: tuple[int, int], f: Any) -> None:
        p, (row, end) = self._plan, part
        (programs,), sizes = p.panels[0][4:]
        blocks, all_blocks = -(-(end - row) // p.shape.tile), p.panels[0][2][0]
        (p.run_solve if row else p.run_first)((programs // all_blocks * blocks,), *self._first, f, *self._last, *sizes, self._keep)

    def solve(self, f: Tensor) -> None:
        """Queue the rest, for f (B,T,D)."""
        a_f = address(f)
        for panel, (*_, programs, sizes) in enumerate(self._plan.panels):
            if panel:
                self.route(panel)
            self._plan.run_solve(programs, *self._first, a_f, *self._last, *sizes, self._keep)


def forward(
    q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, past_k: Tensor, past_s: Tensor, past_length: Tensor, need_lse: bool = True,
    options: Options | None = None, panel_bytes: int = PANEL_BYTES, made: Plan | None = None, replay: Queue = at_once,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """s (B,T,D) in the storage dtype; lse (B,T) float32 and, with 16-bit storage, what rounding took from s (B,T,D), None unless wanted.

    need_lse: whether a backward will follow, which takes both. Shapes and meaning as in `ops.feedback_attention`.
    options: launch options by kernel name in place of the pinned ones (tuning, small tiles under the interpreter); made: the plan of such a call.
    replay: what queues the launches, see `at_once`.
    """
    q, k, gamma, f, past_k, past_s = (aligned(x) for x in (q, k, gamma, f, past_k, past_s))
    p = made or plan_of(q.device, q.dtype, q.shape, past_k.shape[1], options, panel_bytes)
    if past_length.dtype != torch.int32:
        past_length = past_length.to(torch.int32)
    s = torch.empty_like(f)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if need_lse else None
    memory, low = p.workspace.allocate(q.device), torch.empty_like(f) if need_lse and p.low else None

    def work() -> None:
        Call(p, q, k, gamma, past_k, past_s, past_length, s, lse, low, memory).whole(f)

    replay(("feedback attention", p), q.device, (q, k, gamma, f, past_k, past_s, past_length, s, lse, low, memory), work)
    return s, lse, low
