"""Backward of feedback attention: routing tiles again, the transposed solve as a dataflow kernel, then the gradients. See README.md.

Row panels go from the last to the first; what a panel adds to rows of earlier panels is carried in float32, each tile by one program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.feedback.forward import APART, Queue, at_once, combination, kept_blocks, plan, planner, score_grid, score_launches
from sessa_deploy.kernels.feedback.gradients import (
    feedback_grad_k,
    feedback_grad_pack,
    feedback_grad_products,
    feedback_grad_q,
    feedback_grad_qk,
    feedback_grad_scores,
)
from sessa_deploy.kernels.feedback.halves import feedback_solve_halves_transposed
from sessa_deploy.kernels.feedback.spec import MANY, all_pinned, scores_many, solve_variant, solver, together_variant
from sessa_deploy.kernels.feedback.tiles import apart, apply_inverse, feedback_combine, feedback_scores, near_product, store_split
from sessa_deploy.kernels.feedback.waits import take_ticket, wait_for
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import Options, Workspace, address, aligned, arch_of, dtype_name, launcher, pinned
from sessa_deploy.kernels.launch.limits import PANEL_BYTES


@triton.jit(do_not_specialize=table.do_not_specialize("feedback_solve_transposed"))
def feedback_solve_transposed(
    e, factor, inverse, inverse_low, near, near_low, near_scale, ds, u, u_low, w, w_low, scales, carry, dpast_s, past_length, bad, sync,
    T, P, D, C, R, NP, row0, blocks, B, panel, panels, add,
    BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, FULL: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """u_i = inverse_i^T (ds_i + sum_far e_li^T w_l) + near[1]_i^T w_{i+2} + near[0]_i^T w_{i+1} with w = factor u, one program per tile.

    Tickets hand out the panel's row blocks from the last on, then the columns before the panel and the past's: there the sum of e_li^T w_l goes
    to carry (B,C,D) float32, or to dpast_s once the first panel is done. add: carry holds what later panels left. See `feedback_solve`.
    """
    tiles_n = tl.cdiv(D, BN)
    i_n, i_b, rank = take_ticket(sync + panel, tiles_n, B)
    inside = rank < blocks
    i_r = blocks - 1 - rank
    # column tile: the panel's own blocks downwards, then everything before them downwards
    i_t = NP + row0 // BT + i_r
    p_done = sync + panels + (panel * B + i_b) * tiles_n + i_n
    live = (i_t >= NP) | (i_t < tl.cdiv(tl.load(past_length + i_b), BT))
    far = tl.where(inside, tl.maximum(rank - 2, 0), tl.where(live, blocks, 0))

    o_r, o_k, o_n = tl.arange(0, BT), tl.arange(0, BT), i_n * BN + tl.arange(0, BN)
    m_n = (o_n < D)[None, :]
    o_e = o_k[:, None] * C + o_r[None, :]
    o_w = o_k[:, None] * D + o_n[None, :]
    p_e = e + i_b * R * C + i_t * BT
    p_w, p_l = w + i_b * R * D, w_low + i_b * R * D
    p_scale = scales + i_b * (R // BT) * tiles_n + i_n

    acc = tl.zeros([BT, BN], dtype=tl.float32)
    i = 0
    while i < far:
        stop = tl.minimum(wait_for(p_done, i + 1), far)
        for j in tl.range(i, stop, num_stages=STAGES):
            i_l = (blocks - 1 - j).to(tl.int64)
            b_e = tl.load(p_e + i_l * BT * C + o_e)
            b_w = tl.load(p_w + i_l * BT * D + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
            b_y = tl.dot(tl.trans(b_e), b_w, input_precision="ieee")
            if FULL:
                b_l = tl.load(p_l + i_l * BT * D + o_w, mask=m_n, other=0.0, cache_modifier=".cg")
                b_y = tl.dot(tl.trans(b_e), b_l, b_y)
            acc += b_y * tl.load(p_scale + i_l * tiles_n) if SPLIT else apart(b_y, D)
        i = stop

    p_carry = carry + (i_b * C + i_t * BT) * D
    if add != 0:
        acc += tl.load(p_carry + o_w, mask=m_n, other=0.0)
    if inside:
        start = row0 + i_r * BT
        m_f = (start + o_r < T)[:, None] & m_n
        p_f = (i_b * T + start) * D
        m_ok = (start + o_r < T - tl.load(bad + i_b))[:, None] & m_n
        b_x = acc + tl.load(ds + p_f + o_w, mask=m_ok, other=0.0).to(tl.float32)
        p_row = i_b * R + i_r * BT + o_r
        o_i = o_k[:, None] * BT + o_r[None, :]
        p_i = (i_b * R + i_r * BT) * BT
        b_factor = tl.load(factor + p_row)
        b_u = apply_inverse(tl.trans(tl.load(inverse + p_i + o_i)), tl.trans(tl.load(inverse_low + p_i + o_i)), b_x, SPLIT)
        nearest = tl.minimum(rank, 2)
        for d in tl.range(0, nearest, num_stages=1):
            back = nearest - d  # 2, then 1
            i_l = i_r + back
            p_near = p_i + (back - 1).to(tl.int64) * B * R * BT
            b_near = tl.load(near + p_near + o_i)
            b_low = tl.load(near_low + p_near + o_i)
            b_r = tl.load(near_scale + p_row + (back - 1) * B * R)
            wait_for(p_done, rank - back + 1)
            if SPLIT:
                b_r = b_r * tl.load(p_scale + i_l * tiles_n)
            p_tile = i_l.to(tl.int64) * BT * D
            b_u += near_product(tl.trans(b_near), tl.trans(b_low), p_w + p_tile, p_l + p_tile, o_w, m_n, FULL, LOW, SPLIT) * b_r[:, None]
        b_w = b_u * b_factor[:, None]
        amax = tl.max(tl.max(tl.abs(b_w), axis=1), axis=0)
        p_tile = i_r.to(tl.int64) * BT * D
        store_split(b_w, amax, p_w + p_tile, p_l + p_tile, scales, o_w, (i_b * (R // BT) + i_r) * tiles_n + i_n, m_n, SPLIT, LOW)
        tl.debug_barrier()
        tl.atomic_xchg(p_done, rank + 1, sem="release", scope="gpu")
        b_out = b_u.to(u.dtype.element_ty)
        tl.store(u + p_f + o_w, b_out, mask=m_f)
        if SPLIT:
            tl.store(u_low + p_f + o_w, (b_u - b_out.to(tl.float32)).to(u.dtype.element_ty), mask=m_f)
    elif (i_t < NP) & (row0 == 0):
        row = i_t * BT
        tl.store(dpast_s + (i_b * P + row) * D + o_w, acc.to(dpast_s.dtype.element_ty), mask=(row + o_r < P)[:, None] & m_n)
    else:
        tl.store(p_carry + o_w, acc, mask=m_n)


BACKWARD = (
    "feedback_scores", "feedback_combine", "feedback_solve_transposed", "feedback_grad_pack", "feedback_grad_products",
    "feedback_grad_scores", "feedback_grad_q", "feedback_grad_k",
)  # fmt: skip

TOGETHER = "feedback_grad_qk"  # in place of feedback_grad_q and feedback_grad_k, where options hold it: for one panel without a past

KERNELS = (
    feedback_scores, feedback_combine, feedback_solve_transposed, feedback_grad_pack, feedback_grad_products,
    feedback_grad_scores, feedback_grad_q, feedback_grad_k,
)  # fmt: skip


SOLVES = (feedback_solve_halves_transposed, feedback_solve_transposed)  # the first that options hold


def tiles(device: torch.device, dtype: torch.dtype, width: int, rows: int = 0, batch: int = 1) -> Options:
    """The pinned launch options of the backward of `batch` sequences at D = width, for B T = rows (0: as many as may be)."""
    arch, kind = arch_of(device.index or 0), dtype_name(dtype)
    solve = solve_variant(arch, kind, width, "bwd", rows, batch)
    found = pinned(BACKWARD[:2] + BACKWARD[3:], device, dtype, "bwd") | pinned((solver(arch, kind, "bwd", width),), device, dtype, solve)
    found |= pinned(APART, device, dtype, "bwd") if all_pinned(APART, arch, kind, "bwd") else {}
    found |= pinned((MANY,), device, dtype, "bwd") if rows and scores_many(arch, kind, "bwd", batch, rows // batch) else {}
    variant = together_variant(arch, kind, rows * width)
    return found if variant is None else found | pinned((TOGETHER,), device, dtype, variant)


def tiles_each(rows: int, columns: int) -> int:
    """Column tiles that a program of feedback_grad_scores takes, of a routing matrix of so many tiles, batch and all.

    Each program adds up the sums of its rows over all of them: many tiles a program save that, and leave few programs.
    """
    return 8 if rows * columns >= 1536 else 2  # measured on an H200


class Plan:
    """What calls of one shape on one device share: buffers, compiled kernels, and each launch's grid and integers, panels from the last on."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, batch: int, tokens: int, past: int, width: int, options: Options | None, panel_bytes: int
    ) -> None:
        opt = options or tiles(device, dtype, width, batch * tokens, batch)
        split, full = dtype != torch.float32, dtype == torch.float16
        solving = next(k for k in SOLVES if k.__name__ in opt)
        scores, solve, pack, products, _, by_q, by_k = (opt[n] for n in (BACKWARD[0], solving.__name__, *BACKWARD[3:]))
        tile = solve["BT"]
        work, pair, single = (torch.float16, torch.bfloat16, torch.float32) if split else (torch.float32,) * 3
        product = torch.float16 if split and not full else single  # of u . s
        itemsize = work.itemsize + product.itemsize + (dtype.itemsize if full else 0)
        shape = plan(batch, tokens, past, width, scores, itemsize, panel_bytes)
        together = TOGETHER in opt and shape.panels == 1 and past == 0
        past_tiles, all_tiles, columns, rows, panels = shape.past_tiles, shape.tiles, shape.columns, shape.rows, shape.panels
        tiles_n = -(-width // solve["BN"])
        every = batch * rows
        sizes = {
            "e": (every * columns, work),
            "r": (every * columns, product),  # then, in place where it is as wide, the scores' gradient
            "grad": (every * columns if full else 0, dtype),
            "sums": (every * all_tiles, single),
            "r_sums": (3 * every * all_tiles, single),
            "inverse_sum": (every, single),
            "factor": (every, single),
            "x": (every * tile, single),
            "inverse": (every * tile, pair),
            "near": (kept_blocks(opt) * every * tile, work),
            "near_scale": (kept_blocks(opt) * every, single),
            "w": (every * width, work),
            "scales": (every // tile * tiles_n, single),
            "r_scales": (every // tile * all_tiles, single),
            "grad_scales": (every // tile * all_tiles, single),
            "u": (every * width, work),
            "u_scale": (every, single),
            "s": (batch * columns * width, work),
            "s_scale": (batch * columns, single),
            "carry": (batch * columns * width if panels > 1 else 0, single),
            "carry_k": (batch * columns * width if panels > 1 else 0, single),
        }
        if split:
            sizes |= {"inverselow": sizes["inverse"], "nearlow": (2 * every * tile, work), "wlow": sizes["w"]}
            sizes["rest"] = (batch * tokens * width, dtype)  # what rounding took from u
        if full:
            sizes |= {"ulow": sizes["u"], "slow": sizes["s"]}
        self.workspace = Workspace(sizes)
        self.low, self.full = "low" if split else "", "low" if full else ""
        self.past_tiles = past_tiles
        self.sync = batch + panels + panels * batch * tiles_n
        kernels = KERNELS[3:6] + (() if together else KERNELS[6:])
        self.run_scores, many = score_launches(device, dtype, opt, shape)
        self.run_solve = launcher(solving, device, dtype, solve)
        self.run = {k.__name__: launcher(k, device, dtype, opt[k.__name__]) for k in kernels}
        self.combination = combination(device, dtype, opt)
        self.run_together = launcher(feedback_grad_qk, device, dtype, opt[TOGETHER]) if together else None
        self.panels: list[tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]] = []
        self.pack_s = ((columns // pack["BT"], batch), (tokens, past, width, columns, past_tiles * tile, 0, 1))
        scale = 1 / math.sqrt(width)
        for panel in range(panels):
            row0 = (panels - 1 - panel) * rows
            blocks = -(-min(rows, tokens - row0) // tile)
            before = past_tiles + row0 // tile
            each = tiles_each(batch * blocks, before + blocks)
            add = int(panel > 0)
            sides = (tokens, past, width, columns, rows, past_tiles)
            self.panels.append((
                ((blocks * tile, batch) if many else score_grid(blocks * tile, before, batch, scores), (*sides, all_tiles, row0, 0, scale)),
                ((blocks, batch), (tokens, columns, rows, past_tiles, all_tiles, row0, batch, blocks)),
                (((blocks + before) * batch * tiles_n,), (*sides, row0, blocks, batch, panel, panels, add)),
                ((rows // pack["BT"], batch), (tokens, past, width, rows, 0, row0, 0)),
                (score_grid(blocks * tile, before, batch, products), (tokens, width, columns, rows, past_tiles, all_tiles, row0)),
                ((blocks, -(-(before + blocks) // each), batch), (tokens, columns, rows, past_tiles, all_tiles, row0, each)),
                ((-(-width // opt[TOGETHER]["BN"]), 2 * blocks, batch), (tokens, width, columns, rows, all_tiles, blocks, scale)) if together
                else ((-(-width // by_q["BN"]), blocks, batch), (*sides, all_tiles, row0, scale)),
                ((-(-width // by_k["BN"]), before + blocks, batch), (*sides, all_tiles, row0, blocks, add, scale)),
            ))  # fmt: skip


plan_of = planner(Plan)


def queue(
    p: Plan, ds: Tensor, q: Tensor, k: Tensor, gamma: Tensor, s: Tensor, lse: Tensor, s_low: Tensor | None, past_k: Tensor, past_s: Tensor,
    past_length: Tensor, to: Sequence[Tensor], memory: Tensor, sync: Tensor, after_f: AbstractContextManager[Any] | None = None,
) -> None:  # fmt: skip
    """Queue all of it. to: what is written, gradients of q, k, gamma, f, past_k and past_s; memory: of the plan's workspace; sync: p.sync zeros, int32.

    Every tensor is `aligned`, and held by the caller until all is queued.
    after_f: a context such as another stream, in which what follows the gradient of f is queued if there is one panel; nothing else reads `memory` before it
    is joined.
    """
    at = p.workspace.at(memory)
    bad, ticket = address(sync), address(sync[q.shape[0] :])
    a_ds, a_q, a_k, a_gamma, a_s, a_lse, a_length = [address(x) for x in (ds, q, k, gamma, s, lse, past_length)]
    a_dq, a_dk, a_dgamma, a_df, a_dpast_k, a_dpast_s = [address(x) for x in to]
    a_past_k, a_past_s = (address(past_k), address(past_s)) if p.past_tiles else (a_k, a_s)
    e, r, sums, inverse_sum, factor, r_scales, grad_scales = [at[n] for n in ("e", "r", "sums", "inverse_sum", "factor", "r_scales", "grad_scales")]
    inverse, near, near_scale, w = [at[n] for n in ("inverse", "near", "near_scale", "w")]
    inverse_low, near_low, w_low = at["inverse" + p.low], at["near" + p.low], at["w" + p.low]
    u, u_low, u_scale, s_all, s_all_low, s_scale = [at[n] for n in ("u", "u" + p.full, "u_scale", "s", "s" + p.full, "s_scale")]
    grad = at["grad"] if p.full else r if isinstance(r, int) else r.view(q.dtype)
    rest = at["rest"] if p.low else a_df
    pack, products, grad_of_scores = [p.run[name] for name in BACKWARD[3:6]]
    pack(p.pack_s[0], a_s, a_s if s_low is None else address(s_low), a_past_s, a_length, a_q, a_k, a_lse, bad, s_all, s_all_low, s_scale, *p.pack_s[1])
    apart = after_f if after_f is not None and len(p.panels) == 1 else nullcontext()
    for by_scores, by_combine, by_solve, by_pack, by_products, by_grad, by_q, by_k in p.panels:
        p.run_scores(by_scores[0], a_q, a_k, a_past_k, a_length, a_lse, bad, e, sums, sums, ticket, *by_scores[1])
        for each, run in p.combination:
            run(
                (*by_combine[0], each), e, sums, sums, a_gamma, a_length, inverse_sum, factor, a_lse, at["x"], inverse, inverse_low, near, near_low,
                near_scale, *by_combine[1],
            )  # fmt: skip
        p.run_solve(
            by_solve[0], e, factor, inverse, inverse_low, near, near_low, near_scale, a_ds, a_df, rest, w, w_low, at["scales"], at["carry"], a_dpast_s,
            a_length, bad, ticket, *by_solve[1],
        )  # fmt: skip
        with apart:
            pack(by_pack[0], a_df, rest, a_past_s, a_length, a_q, a_k, a_lse, bad, u, u_low, u_scale, *by_pack[1])
            products(by_products[0], u, u_low, u_scale, s_all, s_all_low, s_scale, a_length, bad, e, r, r_scales, at["r_sums"], *by_products[1])
            grad_of_scores(by_grad[0], e, r, r_scales, at["r_sums"], factor, inverse_sum, grad, grad_scales, a_dgamma, a_length, bad, *by_grad[1])
            if p.run_together is not None:
                p.run_together(by_q[0], grad, grad_scales, a_q, a_k, a_length, bad, a_dq, a_dk, *by_q[1])
                continue
            p.run["feedback_grad_q"](by_q[0], grad, grad_scales, a_k, a_past_k, a_length, bad, a_dq, *by_q[1])
            p.run["feedback_grad_k"](by_k[0], grad, grad_scales, a_q, a_length, bad, at["carry_k"], a_dk, a_dpast_k, *by_k[1])


def backward(
    ds: Tensor, q: Tensor, k: Tensor, gamma: Tensor, f: Tensor, s: Tensor, lse: Tensor, s_low: Tensor | None,
    past_k: Tensor, past_s: Tensor, past_length: Tensor,
    options: Options | None = None, panel_bytes: int = PANEL_BYTES, made: Plan | None = None, replay: Queue = at_once,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dgamma, df, dpast_k, dpast_s) of the forward that gave s (B,T,D), lse (B,T) and s_low (B,T,D). Shapes and dtypes as the inputs'.

    Rows from a sequence's first one with NaN or Inf in q, k or s on get gradient 0 and contribute none. A past without rows is its own gradient.
    options, made, replay: as in the forward.
    """
    ds, q, k, gamma, s, past_k, past_s, lse = (aligned(x) for x in (ds, q, k, gamma, s, past_k, past_s, lse))
    s_low = None if s_low is None else aligned(s_low)
    p = made or plan_of(q.device, q.dtype, q.shape, past_k.shape[1], options, panel_bytes)
    if past_length.dtype != torch.int32:
        past_length = past_length.to(torch.int32)
    dq, dk, dgamma, df = (torch.empty_like(x) for x in (q, k, gamma, q))
    dpast_k, dpast_s = (torch.empty_like(x) for x in (past_k, past_s)) if past_k.shape[1] else (past_k, past_s)
    memory = torch.empty(p.workspace.bytes + 4 * p.sync, dtype=torch.uint8, device=q.device)
    to = dq, dk, dgamma, df, dpast_k, dpast_s

    def work() -> None:
        sync = memory[p.workspace.bytes :].view(torch.int32).zero_()
        queue(p, ds, q, k, gamma, s, lse, s_low, past_k, past_s, past_length, to, memory[: p.workspace.bytes], sync)

    replay(("feedback attention backward", p), q.device, (ds, q, k, gamma, s, lse, s_low, past_k, past_s, past_length, *to, memory), work)
    return dq, dk, dgamma, df, dpast_k, dpast_s
