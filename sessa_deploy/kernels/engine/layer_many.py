"""The matrix products of layer.py for many rows, by tensor descriptors: the programs that a device holds walk over the tiles.

A program's steps are those of all its tiles in one loop, so that the first columns of the next tile are on their way while this one's sums are finished and
stored. Descriptors clip at the ends of a matrix; every program makes its own, in memory of its launch (spec.py, `Kernel.scratch`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.device import turn
from sessa_deploy.kernels.engine.pointwise import half_gelu
from sessa_deploy.kernels.engine.product import place
from sessa_deploy.kernels.engine.projection import angles, gamma_rows
from sessa_deploy.kernels.engine.spec import many_kernel, many_variant
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, available, launcher, pinned
from sessa_deploy.kernels.launch.limits import MANY_PROGRAMS

LINEAR, ENTER, TAIL, PROJECT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _columns(i_n, depth, kv_width, BN: tl.constexpr):
    """Of the i_n-th tile of columns of all projections: (which of q, k, v, q_b and k_b, its width, its first row of the weight, the tile's first column)."""
    n_q, n_k = tl.cdiv(depth, BN), tl.cdiv(kv_width, BN)
    k, v, q_b, k_b = i_n >= n_q, i_n >= n_q + n_k, i_n >= n_q + 2 * n_k, i_n >= 2 * n_q + 2 * n_k
    which = k.to(tl.int32) + v.to(tl.int32) + q_b.to(tl.int32) + k_b.to(tl.int32)
    width = tl.where((which == 1) | (which == 2), kv_width, depth)
    above = tl.where(k, depth, 0) + tl.where(v, kv_width, 0) + tl.where(q_b, kv_width, 0) + tl.where(k_b, depth, 0)
    before = tl.where(k, n_q, 0) + tl.where(v, n_k, 0) + tl.where(q_b, n_k, 0) + tl.where(k_b, n_q, 0)
    return which, width, above, (i_n - before) * BN


@triton.jit
def _tile(i, rows, depth, columns, kv_width, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(first row, which output, its width, its first row of the weight, first column) of the i-th tile."""
    if KIND == PROJECT:
        i_m, i_n = place(i, rows, 3 * tl.cdiv(depth, BN) + 2 * tl.cdiv(kv_width, BN), BM)
        which, width, above, column = _columns(i_n, depth, kv_width, BN)
    else:
        i_m, i_n = place(i, rows, tl.cdiv(columns, BN), BM)
        which, width, above, column = i_n * 0, columns, i_n * 0, i_n * BN
    return i_m * BM, which, width, above, column


@triton.jit
def _parts(b_y, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr):
    """The columns of b_y (BM,BN) in 1, 2 or 4 parts, from left to right, without a move between threads."""
    parts = (b_y,)
    if PARTS > 1:
        b_0, b_1 = tl.split(tl.permute(tl.reshape(b_y, [BM, 2, BN // 2]), [0, 2, 1]))
        parts = (b_0, b_1)  # type: ignore[assignment]
    if PARTS > 2:
        b_00, b_01 = tl.split(tl.permute(tl.reshape(b_0, [BM, 2, BN // 4]), [0, 2, 1]))
        b_10, b_11 = tl.split(tl.permute(tl.reshape(b_1, [BM, 2, BN // 4]), [0, 2, 1]))
        parts = (b_00, b_01, b_10, b_11)  # type: ignore[assignment]
    return parts


@triton.jit
def _rows_of(x, rows, row, first, width, BM: tl.constexpr, BC: tl.constexpr):
    """A tile (BM,BC) of x (rows, width)."""
    o_m, o_n = tl.arange(0, BM), first + tl.arange(0, BC)
    return tl.load(x + row.to(tl.int64) * width + o_m[:, None] * width + o_n[None, :], mask=(o_m < rows - row)[:, None] & (o_n < width)[None, :], other=0.0)


@triton.jit
def _adds(x, rows, row, first, width, BM: tl.constexpr, BC: tl.constexpr, PARTS: tl.constexpr):
    """What is added to each part of a tile: all on their way together."""
    b_0 = _rows_of(x, rows, row, first, width, BM, BC)
    parts = (b_0,)
    if PARTS > 1:
        b_1 = _rows_of(x, rows, row, first + BC, width, BM, BC)
        parts = (b_0, b_1)  # type: ignore[assignment]
    if PARTS > 2:
        b_2 = _rows_of(x, rows, row, first + 2 * BC, width, BM, BC)
        b_3 = _rows_of(x, rows, row, first + 3 * BC, width, BM, BC)
        parts = (b_0, b_1, b_2, b_3)  # type: ignore[assignment]
    return parts


@triton.jit
def _finish(
    b_acc, outs, biases, more, weight, scale, rows, depth, row, which, width, above, column,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Scale, bias and what belongs to the kind, then the store, of a part of the columns at a time: fewer registers, and less shared memory."""
    BC: tl.constexpr = BN // PARTS
    kind: tl.constexpr = weight.dtype.element_ty
    width = tl.multiple_of(width, 16)
    bias = biases[0]
    if KIND == PROJECT:
        bias = tl.where(which == 4, biases[3] + depth, tl.where(which == 3, biases[3], tl.where(which == 2, biases[2], tl.where(which == 1, biases[1], bias))))
    b_parts = _parts(b_acc, BM, BN, PARTS)
    o_n = tl.arange(0, BC)
    if KIND == TAIL:
        b_adds = _adds(more[0], rows, row, column, width, BM, BC, PARTS)
    if KIND == PROJECT:
        cos, sin, pairs = more
        cos, sin, m_m = cos + row.to(tl.int64) * pairs, sin + row.to(tl.int64) * pairs, tl.arange(0, BM) < rows - row
        b_cos, b_sin = angles(cos, sin, m_m & (which < 2), column, pairs, BM, BC)
    for i in tl.static_range(PARTS):
        first = column + i * BC
        b_y = b_parts[i]
        if scale.to(tl.int64) != weight.to(tl.int64):  # what `layer_widen` made of 8 bits
            b_y = b_y * tl.load(scale + above + first + o_n, mask=o_n < width - first, other=1.0)[None, :]
        b_y += tl.load(bias + first + o_n, mask=o_n < width - first, other=0.0).to(tl.float32)[None, :]
        if KIND == ENTER:
            b_y = half_gelu(b_y, first, depth, kind, BC)
        if KIND == TAIL:
            b_y += b_adds[i].to(tl.float32)
        if KIND != PROJECT:
            outs[0].store([row, first], b_y.to(kind))
        elif which < 2:  # a store of its own: the turn has its own places of values in threads, to which they would move in the other outputs too
            if (i > 0) & ((BC // 2) % pairs != 0):  # a part is not whole heads
                b_cos, b_sin = angles(cos, sin, m_m, first, pairs, BM, BC)
            b_turned = turn(b_y, b_cos, b_sin, BM, BC).to(kind)
            if which == 0:
                outs[0].store([row, first], b_turned)
            else:
                outs[1].store([row, first], b_turned)
        else:
            for j in tl.static_range(2, 5):
                if which == j:
                    outs[j].store([row, first], b_y.to(kind))


@triton.jit
def _walk(
    left, right, outs, biases, more, weight, scale, rows, depth, columns, kv_width, tiles,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of x weight^T from this program's on. left, right: descriptors of x and of the weight."""
    program, programs, steps = tl.program_id(0), tl.num_programs(0), tl.cdiv(depth, BK)
    i, done, i_k = program - programs, program - programs, steps - 1
    at, below = program * 0, program * 0
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for _ in tl.range(0, tl.cdiv(tiles - program, programs) * steps):
        i_k = tl.where(i_k == steps - 1, 0, i_k + 1)
        if i_k == 0:
            i += programs
            at, which, width, above, column = _tile(i, rows, depth, columns, kv_width, KIND, BM, BN)
            below = above + column
        b_acc = tl.dot(left.load([at, i_k * BK]), right.load([below, i_k * BK]).T, b_acc)
        if i_k == steps - 1:
            done += programs
            row, which, width, above, column = _tile(done, rows, depth, columns, kv_width, KIND, BM, BN)
            _finish(b_acc, outs, biases, more, weight, scale, rows, depth, row, which, width, above, column, KIND, BM, BN, PARTS)
            b_acc = tl.zeros([BM, BN], dtype=tl.float32)


@triton.jit
def _matrix(pointer, rows, columns, row, BM: tl.constexpr, BK: tl.constexpr):
    """A descriptor of tiles (BM,BK) of a matrix (rows, columns) whose rows lie `row` elements apart."""
    return tl.make_tensor_descriptor(pointer, [rows, columns], [row, 1], [BM, BK])


@triton.jit(do_not_specialize=table.do_not_specialize("layer_linear_many"))
def layer_linear_many(
    x, weight, scale, bias, out, rows, depth, columns, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): `layer_linear`."""
    d_x, d_w = _matrix(x, rows, depth, depth, BM, BK), _matrix(weight, columns, depth, depth, BN, BK)
    d_out = _matrix(out, rows, columns, columns, BM, BN // PARTS)
    tiles = tl.cdiv(rows, BM) * tl.cdiv(columns, BN)
    _walk(d_x, d_w, (d_out,), (bias,), (), weight, scale, rows, depth, columns, 0, tiles, LINEAR, BM, BN, BK, PARTS)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_enter_many"))
def layer_enter_many(x, weight, scale, bias, out, rows, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr):
    """Grid (programs,): `layer_enter`."""
    d_x, d_w = _matrix(x, rows, depth, depth, BM, BK), _matrix(weight, 2 * depth, depth, depth, BN, BK)
    d_out = _matrix(out, rows, 2 * depth, 2 * depth, BM, BN // PARTS)
    tiles = tl.cdiv(rows, BM) * tl.cdiv(2 * depth, BN)
    _walk(d_x, d_w, (d_out,), (bias,), (), weight, scale, rows, depth, 2 * depth, 0, tiles, ENTER, BM, BN, BK, PARTS)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_gate"))
def layer_gate(s, h, out, rows, depth, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (ceil(rows / BT), ceil(D / BD)): out (rows, D) = s * g, g the right half of h (rows, 2D). What the matrix instructions take from shared memory is
    no product of two reads: those of registers end before the next one's reads begin, which costs more than this does."""
    o_m, o_n = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    m_y, o_m = (o_m < rows)[:, None] & (o_n < depth)[None, :], o_m.to(tl.int64)[:, None]
    b_s = tl.load(s + o_m * depth + o_n[None, :], mask=m_y, other=0.0).to(tl.float32)
    b_g = tl.load(h + o_m * (2 * depth) + depth + o_n[None, :], mask=m_y, other=0.0).to(tl.float32)
    tl.store(out + o_m * depth + o_n[None, :], (b_s * b_g).to(out.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_tail_many"))
def layer_tail_many(x, weight, scale, bias, add, out, rows, depth, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr):
    """Grid (programs,): `layer_tail` of x, what `layer_gate` gives; add (rows, D): its x."""
    d_x, d_w = _matrix(x, rows, depth, depth, BM, BK), _matrix(weight, depth, depth, depth, BN, BK)
    d_out = _matrix(out, rows, depth, depth, BM, BN // PARTS)
    tiles = tl.cdiv(rows, BM) * tl.cdiv(depth, BN)
    _walk(d_x, d_w, (d_out,), (bias,), (add,), weight, scale, rows, depth, depth, 0, tiles, TAIL, BM, BN, BK, PARTS)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_project_gain_many"))
def layer_project_gain_many(
    h, weight, scale, bias_q, bias_k, bias_v, bias_fb, cos, sin, gamma_weight, gamma_bias, q, k, v, q_b, k_b, gamma, rows, depth, kv_width, units, gamma_max,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): `layer_project_gain`. The gammas, of ROWS rows at a time, are what the programs do that have a tile fewer, SPARE times each; what is
    left goes to all."""
    SPARE: tl.constexpr = 8
    BC: tl.constexpr = BN // PARTS
    program, programs = tl.program_id(0), tl.num_programs(0)
    tiles = tl.cdiv(rows, BM) * (3 * tl.cdiv(depth, BN) + 2 * tl.cdiv(kv_width, BN))
    d_a, d_w = _matrix(h, rows, depth, 2 * depth, BM, BK), _matrix(weight, 3 * depth + 2 * kv_width, depth, depth, BN, BK)
    d_q, d_k, d_v = _matrix(q, rows, depth, depth, BM, BC), _matrix(k, rows, kv_width, kv_width, BM, BC), _matrix(v, rows, kv_width, kv_width, BM, BC)
    outs = (d_q, d_k, d_v, _matrix(q_b, rows, depth, depth, BM, BC), _matrix(k_b, rows, depth, depth, BM, BC))
    biases, more = (bias_q, bias_k, bias_v, bias_fb), (cos, sin, units * 4)
    _walk(d_a, d_w, outs, biases, more, weight, scale, rows, depth, depth, kv_width, tiles, PROJECT, BM, BN, BK, PARTS)
    groups, place = tl.cdiv(rows, ROWS), (program + programs - tiles % programs) % programs
    idle = (programs - tiles % programs) % programs
    first = tl.minimum(idle * SPARE, groups)
    if place < idle:
        for i in tl.range(place, first, idle):
            gamma_rows(h, 2 * depth, gamma_weight, gamma_bias, gamma, i * ROWS, rows, depth, gamma_max, ROWS, 1024, False)
    for i in tl.range(first + programs - 1 - place, groups, programs):
        gamma_rows(h, 2 * depth, gamma_weight, gamma_bias, gamma, i * ROWS, rows, depth, gamma_max, ROWS, 1024, False)


_KERNELS = {k.__name__: k for k in (layer_linear_many, layer_enter_many, layer_tail_many, layer_project_gain_many)}


def takes(kernel: str, rows: int, columns: int, weights: str, like: Tensor) -> str:
    """The kernel in place of one of layer.py, where there is one and the device and type of `like` have it; else "". weights: of `jit.weights_name`."""
    many = many_kernel(kernel, rows, columns, weights)
    return many if many and available(many, like.device, like.dtype, "any") else ""


def run(name: str, rows: int, widths: tuple[int, ...], like: Tensor, *arguments: Any) -> None:
    """Launch one that `takes` gave. widths: of each output."""
    options = pinned((name,), like.device, like.dtype, many_variant(name, rows, sum(widths)))[name]
    call = launcher(_KERNELS[name], like.device, like.dtype, options)
    tiles = triton.cdiv(rows, options["BM"]) * sum(triton.cdiv(width, options["BN"]) for width in widths)
    call((min(tiles, call.resident, MANY_PROGRAMS),), *(address(x) if isinstance(x, Tensor) else x for x in arguments))


def gated(s: Tensor, h: Tensor) -> Tensor:
    """s * g for s (rows, D), g the right half of h (rows, 2D): what layer_tail_many takes."""
    (rows, depth), out = s.shape, torch.empty_like(s)
    options = pinned(("layer_gate",), s.device, s.dtype, "any")["layer_gate"]
    grid = (triton.cdiv(rows, options["BT"]), triton.cdiv(depth, options["BD"]))
    launcher(layer_gate, s.device, s.dtype, options)(grid, *map(address, (s, h, out)), rows, depth)
    return out
