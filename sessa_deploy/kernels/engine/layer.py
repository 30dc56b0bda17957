"""A layer around its attentions, for an engine whose own fusion would do this work in float32: norm, GELU, gamma and the matrix products.

Activations are rows (B T, width) in the storage type, weights (columns, depth) as in a state dict. Every sum is float32 and is rounded once, at
the store. What surrounds a product is done on its way: the rotary turn of q and k, the gate s * g, the residual.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.device import begin, turn
from sessa_deploy.kernels.engine import layer_many, layer_rows
from sessa_deploy.kernels.engine.pointwise import half_gelu, norm_row, normal
from sessa_deploy.kernels.engine.product import ahead, bias_of, place, product, put, scale_of, scaled, tile_of, wide, with_bias
from sessa_deploy.kernels.engine.product_row import norm_product, row_soon
from sessa_deploy.kernels.engine.projection import angles, gamma_rows
from sessa_deploy.kernels.engine.spec import product_choice
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, launcher, pinned, weights_name
from sessa_deploy.kernels.launch.limits import SINGLE_ROWS

SINGLE = tl.constexpr(SINGLE_ROWS)
HELD = tl.constexpr(1024)  # elements of a tile up to which what is added to it is read ahead of the product: a few registers then, and no wait after it


@triton.jit(do_not_specialize=table.do_not_specialize("layer_norm"))
def layer_norm(x, weight, bias, out, width, eps, BD: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (rows,), BD >= D: LayerNorm of each row."""
    o_row = tl.program_id(0).to(tl.int64) * width
    norm_row(x + o_row, weight, bias, out + o_row, width, eps, BD, PDL)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_rotary"))
def layer_rotary(past_length, limbs, cos, sin, tokens, pairs, BD: tl.constexpr, PDL: tl.constexpr = False):
    """Grid (T, B), BD >= d / 2: cos and sin (B,T,pairs) float32 at position past_length[b] + t; limbs (4,pairs): see rope.py, whose sums these are."""
    begin(PDL)
    i_t, i_b = tl.program_id(0), tl.program_id(1)
    o_d = tl.arange(0, BD)
    m_d = o_d < pairs
    at = (tl.load(past_length + i_b) + i_t).to(tl.float32)
    b_turn = tl.zeros([BD], dtype=tl.float32)
    for i in tl.static_range(3):
        b_part = at * tl.load(limbs + i * pairs + o_d, mask=m_d, other=0.0)
        b_turn += b_part - tl.floor(b_part)
    b_turn = b_turn - tl.floor(b_turn) + at * tl.load(limbs + 3 * pairs + o_d, mask=m_d, other=0.0)
    b_angle = b_turn * 6.283185307179586
    o_out = (i_b * tokens + i_t).to(tl.int64) * pairs + o_d
    tl.store(cos + o_out, tl.cos(b_angle), mask=m_d)
    tl.store(sin + o_out, tl.sin(b_angle), mask=m_d)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_linear"))
def layer_linear(
    x, weight, scale, bias, out, rows, depth, columns,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tiles,): out (rows, columns) = x weight^T + bias."""
    row, column, m_m, m_n = tile_of(rows, columns, BM, BN)
    b_w = ahead(weight + column * depth, m_n, depth, BM, BN, BK, KS, AHEAD)
    b_scale, b_bias = scale_of(scale, weight, column, m_n, BN), bias_of(bias + column, m_n, BM, BN)
    begin(PDL)
    b_y = product(x + row * depth, x, weight + column * depth, b_w, rows - row.to(tl.int32), m_m, m_n, depth, depth, depth, False, BM, BN, BK, KS, AHEAD, FORM)
    b_y = with_bias(scaled(b_y, b_scale, scale, weight, column, m_n, BM, BN), b_bias, bias + column, m_n, BM, BN)
    put(out + row * columns + column, b_y, m_m, m_n, columns, BM, BN)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_norm_enter"))
def layer_norm_enter(
    x, norm_weight, norm_bias, weight, scale, bias, out, depth, eps,
    BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (ceil(2D / BN),), BK >= D: `layer_norm` and `layer_enter` of one row, which every program normalises for itself."""
    column = (tl.program_id(0) * BN).to(tl.int64)
    o_k = tl.arange(0, BK)
    m_n, m_k = tl.arange(0, BN) < 2 * depth - tl.program_id(0) * BN, o_k < depth
    b_w = ahead(weight + column * depth, m_n, depth, 1, BN, BK, KS, 1)
    b_scale, b_bias = scale_of(scale, weight, column, m_n, BN), bias_of(bias + column, m_n, 1, BN)
    b_gain, b_shift = tl.load(norm_weight + o_k, mask=m_k, other=0.0), tl.load(norm_bias + o_k, mask=m_k, other=0.0)
    b_w = row_soon(weight, b_w, x.dtype.element_ty, BN, BK, KS, PDL)
    begin(PDL)
    if KS > 1:
        b_y = norm_product(x, b_w, b_gain, b_shift, depth, eps, BN, BK, KS)
    else:
        b_x = normal(tl.load(x + o_k, mask=m_k, other=0.0), b_gain, b_shift, m_k, depth, eps).to(x.dtype.element_ty)
        b_y = tl.sum(wide(b_w, tl.float32) * b_x.to(tl.float32)[None, :], 1)[None, :]
    b_y = with_bias(scaled(b_y, b_scale, scale, weight, column, m_n, 1, BN), b_bias, bias + column, m_n, 1, BN)
    b_y = half_gelu(b_y, tl.program_id(0) * BN, depth, out.dtype.element_ty, BN)
    put(out + column, b_y, tl.arange(0, 1) < 1, m_n, 2 * depth, 1, BN)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_enter"))
def layer_enter(
    x, weight, scale, bias, out, rows, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tiles,): out (rows, 2D) = x weight^T + bias with GELU on its left half."""
    i_m, i_n = place(tl.program_id(0), rows, tl.cdiv(2 * depth, BN), BM)
    row, column = (i_m * BM).to(tl.int64), (i_n * BN).to(tl.int64)
    m_m, m_n = tl.arange(0, BM) < rows - i_m * BM, tl.arange(0, BN) < 2 * depth - i_n * BN
    b_w = ahead(weight + column * depth, m_n, depth, BM, BN, BK, KS, AHEAD)
    b_scale, b_bias = scale_of(scale, weight, column, m_n, BN), bias_of(bias + column, m_n, BM, BN)
    begin(PDL)
    b_y = product(x + row * depth, x, weight + column * depth, b_w, rows - row.to(tl.int32), m_m, m_n, depth, depth, depth, False, BM, BN, BK, KS, AHEAD, FORM)
    b_y = with_bias(scaled(b_y, b_scale, scale, weight, column, m_n, BM, BN), b_bias, bias + column, m_n, BM, BN)
    b_y = half_gelu(b_y, i_n * BN, depth, out.dtype.element_ty, BN)
    put(out + row * (2 * depth) + column, b_y, m_m, m_n, 2 * depth, BM, BN)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_logits"))
def layer_logits(
    x, weight, scale, out, rows, depth, columns,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tiles,): out (rows, columns) float32 = x weight^T, not rounded."""
    row, column, m_m, m_n = tile_of(rows, columns, BM, BN)
    b_w = ahead(weight + column * depth, m_n, depth, BM, BN, BK, KS, AHEAD)
    b_scale = scale_of(scale, weight, column, m_n, BN)
    if BM == 1:
        b_w = row_soon(weight, b_w, x.dtype.element_ty, BN, BK, KS, PDL)
    begin(PDL)
    b_y = product(x + row * depth, x, weight + column * depth, b_w, rows - row.to(tl.int32), m_m, m_n, depth, depth, depth, False, BM, BN, BK, KS, AHEAD, FORM)
    put(out + row * columns + column, scaled(b_y, b_scale, scale, weight, column, m_n, BM, BN), m_m, m_n, columns, BM, BN)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_widen"))
def layer_widen(weight, out, count, BLOCK: tl.constexpr):
    """Grid (ceil(count / BLOCK),): out (count,) of the storage type = weight, which it holds exactly. Before a product of many rows, which then pays
    for the conversion once, not in each tile of rows."""
    first = (tl.program_id(0) * BLOCK).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < count - first
    tl.store(out + first + o_n, wide(tl.load(weight + first + o_n, mask=m_n, other=0.0), out.dtype.element_ty), mask=m_n)


@triton.jit
def _square(
    x, h, weight, scale, bias, add, rows, depth,
    GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """This program's tile of x weight^T + bias, weight (D,D), D = depth, that of add (rows, D), its first row and column, and masks.

    GATED: of (x * g) weight^T + bias, g the right half of h (rows, 2D).
    """
    row, column, m_m, m_n = tile_of(rows, depth, BM, BN)
    o_y = tl.arange(0, BM)[:, None] * depth + tl.arange(0, BN)[None, :]
    b_w = ahead(weight + column * depth, m_n, depth, BM, BN, BK, KS, AHEAD)
    b_scale, b_bias = scale_of(scale, weight, column, m_n, BN), bias_of(bias + column, m_n, BM, BN)
    if BM == 1:
        b_w = row_soon(weight, b_w, x.dtype.element_ty, BN, BK, KS, PDL)
    begin(PDL)
    if BM * BN <= HELD:
        b_add = tl.load(add + row * depth + column + o_y, mask=m_m[:, None] & m_n[None, :], other=0.0)
    b_y = product(
        x + row * depth, h + row * (2 * depth) + depth, weight + column * depth, b_w, rows - row.to(tl.int32), m_m, m_n,
        depth, depth, 2 * depth, GATED, BM, BN, BK, KS, AHEAD, FORM,
    )  # fmt: skip
    if BM * BN > HELD:
        b_add = tl.load(add + row * depth + column + o_y, mask=m_m[:, None] & m_n[None, :], other=0.0)
    return with_bias(scaled(b_y, b_scale, scale, weight, column, m_n, BM, BN), b_bias, bias + column, m_n, BM, BN), b_add, row, column, m_m, m_n


@triton.jit(do_not_specialize=table.do_not_specialize("layer_out"))
def layer_out(
    x, weight, scale, bias, add, out, rows, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tiles,): out (rows, D) = (x weight^T + bias), rounded, + add (rows, D) float32."""
    b_y, b_add, row, column, m_m, m_n = _square(x, x, weight, scale, bias, add, rows, depth, False, BM, BN, BK, KS, AHEAD, FORM, PDL)
    put(out + row * depth + column, b_y.to(out.dtype.element_ty).to(tl.float32) + b_add, m_m, m_n, depth, BM, BN)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_tail"))
def layer_tail(
    s, h, weight, scale, bias, x, out, rows, depth,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (tiles,): out = x + (s * g) weight^T + bias, g the right half of h (rows, 2D)."""
    b_y, b_x, row, column, m_m, m_n = _square(s, h, weight, scale, bias, x, rows, depth, True, BM, BN, BK, KS, AHEAD, FORM, PDL)
    put(out + row * depth + column, b_y + b_x.to(tl.float32), m_m, m_n, depth, BM, BN)


@triton.jit(do_not_specialize=table.do_not_specialize("layer_project_gain"))
def layer_project_gain(
    h, weight, scale, bias_q, bias_k, bias_v, bias_fb, cos, sin, gamma_weight, gamma_bias, q, k, v, q_b, k_b, gamma, rows, depth, kv_width, units, gamma_max,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Grid (gammas + tiles,): all projections of a, the left half of h (rows, 2D), and gamma (rows,) float32 = gamma_max tanh(gamma_bias + a . gamma_weight).

    The first `gammas` programs take a row each where tiles have at most SINGLE rows, else as many rows as a tile. weight: q (D rows), k, v (kv_width
    each), the feedback branch's q and k (D each), in this order. q and k are turned by cos, sin (rows, d / 2) float32, d = 8 units. Each output gets
    tiles of its own.
    """
    ROWS: tl.constexpr = 1 if BM <= SINGLE else BM
    STEP: tl.constexpr = BK if ROWS > 1 else 1024 if KS == 1 or BM > 1 else BK * AHEAD  # with short tiles the end of this one is the kernel's
    gammas = tl.cdiv(rows, ROWS)
    if tl.program_id(0) < gammas:
        gamma_rows(h, 2 * depth, gamma_weight, gamma_bias, gamma, tl.program_id(0) * ROWS, rows, depth, gamma_max, ROWS, STEP, PDL)
    else:
        _project_tile(
            h, 2 * depth, weight, scale, bias_q, bias_k, bias_v, bias_fb, cos, sin, q, k, v, q_b, k_b, rows, depth, kv_width, units * 4, gammas,
            BM, BN, BK, KS, AHEAD, FORM, PDL,
        )  # fmt: skip


@triton.jit
def _project_tile(
    a, a_row, weight, scale, bias_q, bias_k, bias_v, bias_fb, cos, sin, q, k, v, q_b, k_b, rows, depth, kv_width, pairs, first,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KS: tl.constexpr, AHEAD: tl.constexpr, FORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """This program's tile of the projections of a, whose rows lie a_row elements apart; program `first` has the first."""
    n_q, n_k = tl.cdiv(depth, BN), tl.cdiv(kv_width, BN)
    i_m, i_n = place(tl.program_id(0) - first, rows, 3 * n_q + 2 * n_k, BM)
    out, bias, width, above = q, bias_q, depth, 0
    turns = i_n < n_q + n_k
    if i_n >= 2 * n_q + 2 * n_k:
        out, bias, above, i_n = k_b, bias_fb + depth, 2 * depth + 2 * kv_width, i_n - 2 * n_q - 2 * n_k
    elif i_n >= n_q + 2 * n_k:
        out, bias, above, i_n = q_b, bias_fb, depth + 2 * kv_width, i_n - n_q - 2 * n_k
    elif i_n >= n_q + n_k:
        out, bias, width, above, i_n = v, bias_v, kv_width, depth + kv_width, i_n - n_q - n_k
    elif i_n >= n_q:
        out, bias, width, above, i_n = k, bias_k, kv_width, depth, i_n - n_q
    row, column = (i_m * BM).to(tl.int64), (i_n * BN).to(tl.int64)
    m_m, m_n = tl.arange(0, BM) < rows - i_m * BM, tl.arange(0, BN) < width - i_n * BN
    b_w = ahead(weight + (above + column) * depth, m_n, depth, BM, BN, BK, KS, AHEAD)
    b_scale, b_bias = scale_of(scale, weight, above + column, m_n, BN), bias_of(bias + column, m_n, BM, BN)
    if BM == 1:
        b_w = row_soon(weight, b_w, a.dtype.element_ty, BN, BK, KS, PDL)
    begin(PDL)
    if BM * BN <= HELD:
        b_cos, b_sin = angles(cos + row * pairs, sin + row * pairs, m_m & turns, i_n * BN, pairs, BM, BN)
    b_y = product(
        a + row * a_row, a, weight + (above + column) * depth, b_w, rows - i_m * BM, m_m, m_n, depth, a_row, a_row, False, BM, BN, BK, KS, AHEAD, FORM,
    )  # fmt: skip
    b_y = with_bias(scaled(b_y, b_scale, scale, weight, above + column, m_n, BM, BN), b_bias, bias + column, m_n, BM, BN)
    if turns:
        if BM * BN > HELD:
            b_cos, b_sin = angles(cos + row * pairs, sin + row * pairs, m_m, i_n * BN, pairs, BM, BN)
        b_y = turn(b_y, b_cos, b_sin, BM, BN)
    put(out + row * width + column, b_y, m_m, m_n, width, BM, BN)


# --- the same from PyTorch, for tests and timings; early: see `jit.pinned`. A weight of int8 or float8_e4m3fn has a `scale` (columns,) float32.


def _run(fn: Any, variant: str, grid: tuple[int, ...], like: Tensor, early: int, *arguments: Tensor | int | float, weights: str = "") -> None:
    """Launch a kernel with the tiles of a variant for the device and type of `like`. weights: of `jit.weights_name`."""
    options = pinned((fn.__name__,), like.device, like.dtype, variant, early, weights)[fn.__name__]
    launcher(fn, like.device, like.dtype, options, weights)(grid, *(address(x) if isinstance(x, Tensor) else x for x in arguments))


def _tiles(fn: Any, like: Tensor, variant: str, weights: str = "") -> dict[str, Any]:
    return pinned((fn.__name__,), like.device, like.dtype, variant, 0, weights)[fn.__name__]


def _run_product(
    fn: Any, x: Tensor, columns: int, early: int, before: tuple[Tensor, ...], weight: Tensor, scale: Tensor | None, *after: Tensor | int, least: int = 1
) -> None:
    """A product's kernel over all tiles of (rows of x, columns). least: of rows for which it has a variant."""
    variant, weights, *matrix = _matrix(fn, x, max(x.shape[0], least), weight, scale)
    if many := layer_many.takes(fn.__name__, x.shape[0], columns, weights, x):
        layer_many.run(many, x.shape[0], (columns,), x, *before, *matrix, *after)
        return
    tiles = _tiles(fn, x, variant, weights)
    grid = (triton.cdiv(x.shape[0], tiles["BM"]) * triton.cdiv(columns, tiles["BN"]),)
    _run(fn, variant, grid, x, early, *before, *matrix, *after, weights=weights)


def _matrix(fn: Any, x: Tensor, rows: int, weight: Tensor, scale: Tensor | None) -> tuple[str, str, Tensor, Tensor]:
    """(variant, `jit.weights_name`, the two arguments of a matrix), widened where the kernel of so many rows reads none of 8 bits.

    What stands for a scale where there is none is the weights' address.
    """
    kind = weights_name(weight.dtype)
    variant, weights = product_choice(fn.__name__, rows, kind)
    variant = layer_rows.chosen(fn.__name__, variant, weights, weight.shape[1], x, rows)
    if kind != weights:
        weight = widen(weight, x.dtype)
    return variant, weights, weight, weight if scale is None else scale


def widen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of 8 bits in `dtype`, float16 or bfloat16, which holds them exactly."""
    out, weights = torch.empty(weight.shape, dtype=dtype, device=weight.device), weights_name(weight.dtype)
    grid = (triton.cdiv(weight.numel(), _tiles(layer_widen, out, "any", weights)["BLOCK"]),)
    _run(layer_widen, "any", grid, out, 0, weight, out, weight.numel(), weights=weights)
    return out


def gamma_programs(rows: int, tile: int) -> int:
    """Programs of layer_project_gain that compute the gammas of so many rows, tiles being of `tile` rows."""
    return rows if tile <= SINGLE_ROWS else triton.cdiv(rows, tile)


def rotary(past_length: Tensor, limbs: Tensor, tokens: int, early: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin (B,T,d/2) float32 at positions past_length (B,) + t; limbs (4,d/2) float32 of rope.py."""
    batch, pairs = past_length.shape[0], limbs.shape[1]
    cos, sin = (torch.empty(batch, tokens, pairs, dtype=torch.float32, device=limbs.device) for _ in range(2))
    _run(layer_rotary, "any", (tokens, batch), limbs, early, past_length, limbs, cos, sin, tokens, pairs)
    return cos, sin


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, early: int = 0) -> Tensor:
    """LayerNorm of x (rows, D)."""
    out = torch.empty_like(x)
    variant = table.width_variant("layer_norm", x.shape[1])
    _run(layer_norm, variant, (x.shape[0],), x, early, x, weight, bias, out, x.shape[1], eps)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, early: int = 0, scale: Tensor | None = None) -> Tensor:
    """x (rows, K) weight (N, K)^T + bias (N,) in the storage type; without a bias the logits, float32."""
    (rows, depth), columns = x.shape, weight.shape[0]
    out = torch.empty(rows, columns, dtype=x.dtype if bias is not None else torch.float32, device=x.device)
    between = () if bias is None else (bias,)
    _run_product(layer_logits if bias is None else layer_linear, x, columns, early, (x,), weight, scale, *between, out, rows, depth, columns)
    return out


def out_add(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor, early: int = 0, scale: Tensor | None = None) -> Tensor:
    """x (rows, D) weight (D, D)^T + bias (D,), rounded, plus add (rows, D) float32."""
    rows, depth = x.shape
    out = torch.empty_like(x)
    _run_product(layer_out, x, depth, early, (x,), weight, scale, bias, add, out, rows, depth)
    return out


def tail(s: Tensor, h: Tensor, weight: Tensor, bias: Tensor, x: Tensor, early: int = 0, scale: Tensor | None = None) -> Tensor:
    """x + (s * g) weight^T + bias for s, x (rows, D), g the right half of h (rows, 2D)."""
    rows, depth = s.shape
    out = torch.empty_like(x)
    before = (layer_many.gated(s, h),) if layer_many.takes("layer_tail", rows, depth, "", s) else (s, h)
    _run_product(layer_tail, s, depth, early, before, weight, scale, bias, x, out, rows, depth)
    return out


def enter(x: Tensor, weight: Tensor, bias: Tensor, early: int = 0, scale: Tensor | None = None) -> Tensor:
    """x (rows, D) weight (2D, D)^T + bias (2D,) with GELU on its left half."""
    rows, depth = x.shape
    out = torch.empty(rows, 2 * depth, dtype=x.dtype, device=x.device)
    _run_product(layer_enter, x, 2 * depth, early, (x,), weight, scale, bias, out, rows, depth, least=2)  # one row has no variant: see `norm_enter`
    return out


def norm_enter(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor, early: int = 0, scale: Tensor | None = None
) -> Tensor:
    """`enter` of `norm` of x (rows, D); one row, and a few where there is one for them, go through a kernel of its own."""
    if variant := layer_rows.taken(x, weight):
        return layer_rows.norm_enter(x, norm_weight, norm_bias, eps, weight, bias, variant, early)
    if x.shape[0] > 1:
        return enter(norm(x, norm_weight, norm_bias, eps, early), weight, bias, early, scale)
    depth, variant, weights = x.shape[1], table.width_variant("layer_norm_enter", x.shape[1]), weights_name(weight.dtype)
    out = torch.empty(1, 2 * depth, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(2 * depth, _tiles(layer_norm_enter, x, variant, weights)["BN"]),)
    _run(layer_norm_enter, variant, grid, x, early, x, norm_weight, norm_bias, weight, weight if scale is None else scale, bias, out, depth, eps,
         weights=weights)
    return out


class Projected(NamedTuple):
    """What `project_gain` gives: q (rows, D), k, v (rows, Hkv d), q_b, k_b (rows, D), gamma (rows,) float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_b: Tensor
    k_b: Tensor
    gamma: Tensor


def project_gain(
    h: Tensor, weight: Tensor, biases: tuple[Tensor, Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, gamma_weight: Tensor, gamma_bias: Tensor,
    gamma_max: float, early: int = 0, scale: Tensor | None = None,
) -> Projected:
    """Every projection of a, the left half of h (rows, 2D), and its gamma; cos, sin (rows, d / 2), gamma_weight (D,), gamma_bias (1,) are float32."""
    rows, depth = h.shape[0], h.shape[1] // 2
    kv = biases[1].numel()
    variant, weights, *matrix = _matrix(layer_project_gain, h, rows, weight, scale)
    widths = (depth, kv, kv, depth, depth)
    q, k, v, q_b, k_b = (torch.empty(rows, n, dtype=h.dtype, device=h.device) for n in widths)
    out = Projected(q, k, v, q_b, k_b, torch.empty(rows, dtype=torch.float32, device=h.device))
    arguments: tuple[Any, ...] = h, *matrix, *biases, cos, sin, gamma_weight, gamma_bias, *out, rows, depth, kv, cos.shape[1] // 4, gamma_max
    if many := layer_many.takes("layer_project_gain", rows, depth, weights, h):
        layer_many.run(many, rows, widths, h, *arguments)
        return out
    tiles = _tiles(layer_project_gain, h, variant, weights)
    grid = (gamma_programs(rows, tiles["BM"]) + triton.cdiv(rows, tiles["BM"]) * (3 * triton.cdiv(depth, tiles["BN"]) + 2 * triton.cdiv(kv, tiles["BN"])),)
    _run(layer_project_gain, variant, grid, h, early, *arguments, weights=weights)
    return out
