"""Causal attention of T new rows with a cache: tiles of queries against tiles of keys, first the valid past, then the new rows.

o_t = sum_j softmax_j(q_t . k_j * d^-1/2) v_j over past rows j < past_length[b] and new rows j <= t. One program holds BM query rows of one head;
maximum, sum and values run along in float32, the weights of a tile are rounded to the storage type and summed as rounded. Past rows from
past_length[b] on are never read; a new row's NaN or Inf reaches itself and later rows only. Every program sums in the same order whatever the batch.

In 16 bits the sum of a row's weights is a product with ones: tensor cores add what else took a conversion and an addition for every weight, a fifth of all
instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sessa_deploy.kernels.causal.spec import head_variant
from sessa_deploy.kernels.causal.step import in_place, strides
from sessa_deploy.kernels.launch import table
from sessa_deploy.kernels.launch.jit import address, aligned, launcher, pinned
from sessa_deploy.kernels.launch.limits import HEAD_MULTIPLE, LOG2E

SUMS = tl.constexpr(8)  # columns of the ones, the fewest that a product has
PLACES = tl.constexpr(1024)  # programs of a set of heads at least: some more than a GPU holds at once (measured on an H200 at 8192 rows)
SETS = tl.constexpr(1024)  # at most, so that their products with heads fit 32 bits


@triton.jit
def _good(b_x):
    """Elementwise: neither NaN nor Inf; by the bits where 16 hold them, which takes half the registers of their float32."""
    if b_x.dtype.primitive_bitwidth == 16:
        ALL: tl.constexpr = 0x7C00 if b_x.dtype == tl.float16 else 0x7F80  # the exponent of Inf and NaN
        good = (b_x.to(tl.int16, bitcast=True) & 0x7FFF) < ALL
    else:
        good = tl.abs(b_x) < float("inf")
    return good


@triton.jit
def _total(b_sum, b_p, BN: tl.constexpr):
    """b_sum (BM, SUMS or 1) plus the sum of each row of b_p (BM,BN), in every column."""
    if b_p.dtype.primitive_bitwidth == 16:
        b_sum = tl.dot(b_p, tl.full([BN, SUMS], 1.0, dtype=tl.float32).to(b_p.dtype), b_sum)
    else:
        b_sum += tl.sum(b_p, 1)[:, None]
    return b_sum


@triton.jit
def _attend(
    b_acc, b_max, b_sum, b_q, k, v, stride_k, stride_v, begin, end, o_t, width, scale,
    BN: tl.constexpr, BD: tl.constexpr, EDGE: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Adds keys begin..end of k, v (rows, d) to the running softmax; strides in units of 8 elements.

    EDGE: the last tile goes beyond `end`, where nothing is read and nothing counts. DIAGONAL: and key j counts for o_t >= j only.
    """
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_d = o_d < width
    SHIFT: tl.constexpr = 12.0 if k.dtype.element_ty == tl.float16 else 0.0  # of all weights alike: small ones stay normal numbers
    o_row = (begin + o_n).to(tl.int64) * 8
    p_k = k + o_row[None, :] * stride_k + o_d[:, None]
    p_v = v + o_row[:, None] * stride_v + o_d[None, :]
    for start in range(begin, end, BN):
        o_j = start + o_n
        m_j = o_j < end
        m_k, m_v = m_d[:, None], m_d[None, :]
        if EDGE:
            m_k, m_v = m_k & m_j[None, :], m_v & m_j[:, None]
        b_k = tl.load(p_k, mask=m_k, other=0.0)
        b_x = tl.dot(b_q, b_k, input_precision="ieee")
        b_v = tl.load(p_v, mask=m_v, other=0.0)
        if DIAGONAL:
            # A weight of zero does not stop a NaN: the row's bad values go, and those who may see it get a NaN weight.
            good = _good(b_v)
            b_bad = tl.max(tl.where(good, 0, 1), 1) + tl.max(tl.where(_good(b_k), 0, 1), 0)
            b_v = tl.where(good, b_v, 0.0).to(b_v.dtype)
            b_x = tl.where(b_bad[None, :] > 0, float("nan"), b_x)
            b_x = tl.where(o_j[None, :] <= o_t[:, None], b_x, float("-inf"))
        elif EDGE:
            b_x = tl.where(m_j[None, :], b_x, float("-inf"))
        b_top = tl.maximum(b_max, tl.max(b_x, 1) * scale)
        b_fade = tl.exp2(b_max - b_top)
        b_p = tl.exp2(b_x * scale - (b_top - SHIFT)[:, None]).to(b_v.dtype)
        b_sum = _total(b_sum * b_fade[:, None], b_p, BN)
        b_acc = tl.dot(b_p, b_v, b_acc * b_fade[:, None], input_precision="ieee")
        b_max = b_top
        p_k += stride_k.to(tl.int64) * (8 * BN)
        p_v += stride_v.to(tl.int64) * (8 * BN)
    return b_acc, b_max, b_sum


@triton.jit
def _place():
    """(row tile, head) of a program: the longest rows first, of a set of heads at a time.

    Head by head, the last one's longest rows would begin when most others are done. All heads at once are within 2% of it, and read keys and values of all.
    """
    tiles, heads = tl.num_programs(0), tl.num_programs(1)
    sets = tl.maximum(tl.minimum(tl.minimum(tiles * heads // PLACES, heads), SETS), 1)
    i_s = ((tl.program_id(1) + 1) * sets - 1) // heads
    first = i_s * heads // sets
    count = (i_s + 1) * heads // sets - first
    i = (tl.program_id(1) - first) * tiles + tl.program_id(0)
    return tiles - 1 - i // count, first + i % count


@triton.jit(do_not_specialize=table.do_not_specialize("causal_prefill"))
def causal_prefill(
    q, k, v, past_k, past_v, past_length, out,
    stride_kb: tl.int64, stride_kr, stride_vb: tl.int64, stride_vr, tokens, capacity, group, units, scale,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(T / BM), Hq, B): o (B,T,Hq,d). group = Hq / Hkv, units = d / 8 and strides in units of 8 elements, scale = d^-1/2 * log2(e).

    BN keys a tile, and BE where not all of them count: those are few, and their masks would else set the registers of all. Both divide BM.
    """
    i_m, i_h = _place()
    i_b = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    width = units * 8
    length = tl.minimum(tl.load(past_length + i_b), capacity)
    i_kv = i_h // group
    o_t = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_q = (o_t < tokens)[:, None] & (o_d < width)[None, :]
    o_q = ((i_b * tokens + o_t.to(tl.int64)) * heads + i_h)[:, None] * width + o_d[None, :]
    b_q = tl.load(q + o_q, mask=m_q, other=0.0)
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM, SUMS if q.dtype.element_ty.primitive_bitwidth == 16 else 1], dtype=tl.float32)
    b_acc = tl.zeros([BM, BD], dtype=tl.float32)
    k_past, v_past = past_k + i_b * stride_kb * 8 + i_kv * width, past_v + i_b * stride_vb * 8 + i_kv * width
    whole = tl.maximum(length, 0) // BN * BN
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, k_past, v_past, stride_kr, stride_vr, 0, whole, o_t, width, scale, BN, BD, EDGE=False, DIAGONAL=False
    )
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, k_past, v_past, stride_kr, stride_vr, whole, length, o_t, width, scale, BE, BD, EDGE=True, DIAGONAL=False
    )
    stride = (heads // group) * units
    o_new = i_b * tokens * stride * 8 + i_kv * width
    last = tl.minimum((i_m + 1) * BM, tokens)
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, k + o_new, v + o_new, stride, stride, 0, i_m * BM, o_t, width, scale, BN, BD, EDGE=False, DIAGONAL=False
    )
    b_acc, b_max, b_sum = _attend(
        b_acc, b_max, b_sum, b_q, k + o_new, v + o_new, stride, stride, i_m * BM, last, o_t, width, scale, BE, BD, EDGE=True, DIAGONAL=True
    )
    tl.store(out + o_q, (b_acc / tl.max(b_sum, 1)[:, None]).to(out.dtype.element_ty), mask=m_q)


def prefill(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past_length: Tensor) -> Tensor:
    """Causal attention of T >= 1 new rows on a GPU: o (B,T,Hq,d) over past rows j < past_length[b] and new rows j <= t.

    q: (B,T,Hq,d), k, v: (B,T,Hkv,d), rotated, float32, float16 or bfloat16, d a multiple of 8 up to 256, Hq a multiple of Hkv. past_k, past_v:
    (B,P,Hkv,d) in the storage dtype, P >= 0; views with any batch and row stride that is a multiple of 8 are read in place. past_length: (B,) int32.
    Raises ValueError on heads wider than 256.
    """
    batch, tokens, q_heads, width = q.shape
    device, dtype = q.device, q.dtype
    tile = pinned(("causal_prefill",), device, dtype, head_variant(width))["causal_prefill"]
    q, k, v, past_length = aligned(q), aligned(k), aligned(v), past_length.to(torch.int32).contiguous()
    past_k, past_v, out = in_place(past_k), in_place(past_v), torch.empty_like(q)
    launcher(causal_prefill, device, dtype, tile)(
        (triton.cdiv(tokens, tile["BM"]), q_heads, batch), address(q), address(k), address(v), address(past_k), address(past_v), address(past_length),
        address(out), *strides(past_k), *strides(past_v), tokens, past_k.shape[1], q_heads // k.shape[2], width // HEAD_MULTIPLE, width**-0.5 * LOG2E,
    )  # fmt: skip
    return out
