"""What stands between a layer's matrix products, each a pass over its data: norm, GELU and gamma, rotary positions, gate, bias gradients.

float32 inside, one rounding at the store. Rows are those of (B,T,*) tensors flattened to (N,*); widths, distances and offsets come in
units of 8 elements (`d8`, `row8`, `at8`), so that the compiler knows rows to begin on 16-byte boundaries. What a backward sums over rows it
writes as one row of `partial` (chunks, 8 w8) float32 for every ROWS rows, and `fused_total` adds those in their order: no atomics, the same
inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sessa_deploy.kernels.device import tanh, turn


@triton.jit
def gelu_parts(x):
    """cdf and pdf of the normal distribution at x: GELU is x cdf, its derivative cdf + x pdf.

    The smaller of the two tails is t Q(t) exp(-x^2 / 2), t = 1 / (1 + 0.3 |x| / sqrt 2), Q of degree 8 fitted to 2e-8 of it for |x| < 17: relative, so
    that the far tail keeps its digits, and with the exponential that the pdf needs anyway.
    """
    b_e = tl.exp(-0.5 * x * x)
    b_t = 1.0 / (1.0 + 0.21213203435596426 * tl.abs(x))
    b_q = -0.12925244867801666 * b_t + 0.4842982590198517
    b_q = b_q * b_t - 0.5097657442092896
    b_q = b_q * b_t + 0.5449599623680115
    b_q = b_q * b_t - 0.09282159805297852
    b_q = b_q * b_t + 0.21417967975139618
    b_q = b_q * b_t + 0.14852166175842285
    b_q = b_q * b_t + 0.1706908792257309
    b_q = b_q * b_t + 0.16918936371803284
    b_tail = 0.5 * b_t * b_q * b_e
    return tl.where(x < 0, b_tail, 1.0 - b_tail), 0.3989422804014327 * b_e


@triton.jit(do_not_specialize=["N", "d8", "eps"])
def fused_norm(x, weight, bias, y, stats, N, d8, eps, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (row tiles,), BD >= D: y = LayerNorm(x) weight + bias; stats (2,N) float32, mean and 1 / deviation, for the backward."""
    D = d8 * 8
    o_r, o_d = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64), tl.arange(0, BD)
    m_r, m_d = o_r < N, o_d < D
    m_x = m_r[:, None] & m_d[None, :]
    o_x = o_r[:, None] * D + o_d[None, :]
    b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_x, axis=1) / D
    b_c = tl.where(m_x, b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_c * b_c, axis=1) / D + eps)
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_b = tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_c * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
    tl.store(y + o_x, b_y.to(y.dtype.element_ty), mask=m_x)
    tl.store(stats + o_r, b_mean, mask=m_r)
    tl.store(stats + N + o_r, b_rstd, mask=m_r)


@triton.jit(do_not_specialize=["N", "d8", "w8", "at8"])
def fused_norm_grad(x, weight, stats, dy, residual, dx, partial, N, d8, w8, at8, BT: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Grid (chunks,), BD >= D: dx of the norm plus residual; partial[:, 8 at8 :] gets the gradients of weight and bias and the residual's sums (D each)."""
    D = d8 * 8
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    acc_w = tl.zeros([BT, BD], dtype=tl.float32)
    acc_b = tl.zeros([BT, BD], dtype=tl.float32)
    acc_r = tl.zeros([BT, BD], dtype=tl.float32)
    for i in range(0, ROWS, BT):
        o_r = (tl.program_id(0) * ROWS + i + tl.arange(0, BT)).to(tl.int64)
        m_r = o_r < N
        m_x = m_r[:, None] & m_d[None, :]
        o_x = o_r[:, None] * D + o_d[None, :]
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_res = tl.load(residual + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_rstd = tl.load(stats + N + o_r, mask=m_r, other=0.0)
        b_n = (b_x - tl.load(stats + o_r, mask=m_r, other=0.0)[:, None]) * b_rstd[:, None]
        b_g = b_dy * b_w[None, :]
        b_dx = (b_g - (tl.sum(b_g, axis=1) / D)[:, None] - b_n * (tl.sum(b_g * b_n, axis=1) / D)[:, None]) * b_rstd[:, None]
        tl.store(dx + o_x, (b_dx + b_res).to(dx.dtype.element_ty), mask=m_x)
        acc_w += b_dy * b_n
        acc_b += b_dy
        acc_r += b_res
    p_out = partial + tl.program_id(0).to(tl.int64) * w8 * 8 + at8 * 8 + o_d
    tl.store(p_out, tl.sum(acc_w, axis=0), mask=m_d)
    tl.store(p_out + D, tl.sum(acc_b, axis=0), mask=m_d)
    tl.store(p_out + 2 * D, tl.sum(acc_r, axis=0), mask=m_d)


@triton.jit(do_not_specialize=["N", "d8", "gamma_max"])
def fused_gelu_gain(h, weight, bias, a, gamma, N, d8, gamma_max, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (row tiles,): a = GELU of the left half of h (N,2D), gamma (N,) float32 = gamma_max tanh(bias + a . weight) of the rounded a."""
    D = d8 * 8
    o_r = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    m_r = o_r < N
    acc = tl.zeros([BT, BD], dtype=tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        m_x = m_r[:, None] & (o_d < D)[None, :]
        b_x = tl.load(h + o_r[:, None] * (2 * D) + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_cdf, _ = gelu_parts(b_x)
        b_a = (b_x * b_cdf).to(a.dtype.element_ty)
        tl.store(a + o_r[:, None] * D + o_d[None, :], b_a, mask=m_x)
        acc += b_a.to(tl.float32) * tl.load(weight + o_d, mask=o_d < D, other=0.0)[None, :]
    b_gamma = gamma_max * tanh(tl.load(bias) + tl.sum(acc, axis=1))
    tl.store(gamma + o_r, b_gamma, mask=m_r)


@triton.jit(do_not_specialize=["N", "d8", "w8", "at8", "gamma_max"])
def fused_gelu_gain_grad(
    h, da, gamma, dgamma, weight, dh, partial, N, d8, w8, at8, gamma_max, BT: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Grid (chunks, D tiles): the left half of dh (N,2D) = GELU'(h) (da + dz weight) with dz = dgamma gamma_max (1 - tanh^2).

    partial[:, 8 at8 :] gets its sums (D); then, after D columns that `fused_gate_grad` fills, the gradient of weight (D) and that of gamma's bias (1,
    then 7 zeros).
    """
    D = d8 * 8
    i_c, i_d = tl.program_id(0), tl.program_id(1)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0)
    acc_h = tl.zeros([BT, BD], dtype=tl.float32)
    acc_w = tl.zeros([BT, BD], dtype=tl.float32)
    acc_z = tl.zeros([BT], dtype=tl.float32)
    for i in tl.static_range(0, ROWS, BT):
        o_r = (i_c * ROWS + i + tl.arange(0, BT)).to(tl.int64)
        m_r = o_r < N
        m_x = m_r[:, None] & m_d[None, :]
        o_x, o_h = o_r[:, None] * D + o_d[None, :], o_r[:, None] * (2 * D) + o_d[None, :]
        b_x = tl.load(h + o_h, mask=m_x, other=0.0).to(tl.float32)
        b_da = tl.load(da + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_gamma = tl.load(gamma + o_r, mask=m_r, other=0.0)
        b_z = tl.load(dgamma + o_r, mask=m_r, other=0.0) * (gamma_max - b_gamma * b_gamma / gamma_max)
        b_cdf, b_pdf = gelu_parts(b_x)
        b_dx = (b_da + b_z[:, None] * b_w[None, :]) * (b_cdf + b_x * b_pdf)
        tl.store(dh + o_h, b_dx.to(dh.dtype.element_ty), mask=m_x)
        acc_h += b_dx
        acc_w += b_z[:, None] * (b_x * b_cdf).to(h.dtype.element_ty).to(tl.float32)
        acc_z += b_z
    p_out = partial + i_c.to(tl.int64) * w8 * 8 + at8 * 8
    tl.store(p_out + o_d, tl.sum(acc_h, axis=0), mask=m_d)
    tl.store(p_out + 2 * D + o_d, tl.sum(acc_w, axis=0), mask=m_d)
    if i_d == 0:
        o_8 = tl.arange(0, 8)
        tl.store(p_out + 3 * D + o_8, tl.where(o_8 == 0, tl.sum(acc_z, axis=0), 0.0))


@triton.jit(do_not_specialize=["N", "period", "half4", "w8", "row8"])
def fused_rotate(x, cos, sin, N, period, half4, w8, row8, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (row tiles, column tiles): rotate the heads in the first 8 w8 columns of each row of x in place, rows 8 row8 elements apart.

    cos, sin: (period, d / 2) float32, d / 2 = 4 half4; row n takes the tables' row n % period.
    """
    half = half4 * 4
    o_n = tl.program_id(0) * BT + tl.arange(0, BT)
    o_d, o_p = tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(1) * (BD // 2) + tl.arange(0, BD // 2)
    o_r, m_r = o_n.to(tl.int64), o_n < N
    o_t = (o_n % period)[:, None] * half + (o_p % half)[None, :]
    m_t = m_r[:, None] & (o_p < w8 * 4)[None, :]
    m_x = m_r[:, None] & (o_d < w8 * 8)[None, :]
    p_x = x + o_r[:, None] * (row8 * 8) + o_d[None, :]
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    b_x = turn(b_x, tl.load(cos + o_t, mask=m_t, other=0.0), tl.load(sin + o_t, mask=m_t, other=0.0), BT, BD)
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_x)


@triton.jit
def gather_columns(
    x, p_out, p_sum, cos, sin, i_c, i_d, N, D, row_out, period, half, TURN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    o_d, o_p = i_d * BD + tl.arange(0, BD), i_d * (BD // 2) + tl.arange(0, BD // 2)
    m_d, m_p = o_d < D, o_p < D // 2
    acc = tl.zeros([BT, BD], dtype=tl.float32)
    for i in tl.static_range(0, ROWS, BT):
        o_n = i_c * ROWS + i + tl.arange(0, BT)
        o_r = o_n.to(tl.int64)
        m_x = (o_r < N)[:, None] & m_d[None, :]
        b_x = tl.load(x + o_r[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
        if TURN:
            o_t = (o_n % period)[:, None] * half + (o_p % half)[None, :]
            m_t = (o_r < N)[:, None] & m_p[None, :]
            b_y = turn(b_x.to(tl.float32), tl.load(cos + o_t, mask=m_t, other=0.0), -tl.load(sin + o_t, mask=m_t, other=0.0), BT, BD)
            acc += b_y
            tl.store(p_out + o_r[:, None] * row_out + o_d[None, :], b_y.to(p_out.dtype.element_ty), mask=m_x)
        else:
            acc += b_x.to(tl.float32)
            tl.store(p_out + o_r[:, None] * row_out + o_d[None, :], b_x, mask=m_x)
    tl.store(p_sum + o_d, tl.sum(acc, axis=0), mask=m_d)


@triton.jit(do_not_specialize=["N", "period", "half4", "d8", "kv8", "w8"])
def fused_gather(
    dq, dk, dv, dq_b, dk_b, out, cos, sin, partial, N, period, half4, d8, kv8, w8, TURN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Grid (chunks, 3 D tiles and 2 of dk's width): dq (N,D), dk, dv (N, 8 kv8), dq_b, dk_b (N,D) side by side as the rows of `out`.

    TURN: dq and dk are rotated back; cos, sin: (period, d / 2) float32, d / 2 = 4 half4, row n takes the tables' row n % period. partial gets the column sums.
    """
    i_c, i_x = tl.program_id(0), tl.program_id(1)
    D, kv, half = d8 * 8, kv8 * 8, half4 * 4
    wide, narrow, row = tl.cdiv(D, BD), tl.cdiv(kv, BD), 3 * D + 2 * kv
    p_sum = partial + i_c.to(tl.int64) * w8 * 8
    if i_x < wide:
        gather_columns(dq, out, p_sum, cos, sin, i_c, i_x, N, D, row, period, half, TURN, BT, BD, ROWS)
    elif i_x < wide + narrow:
        gather_columns(dk, out + D, p_sum + D, cos, sin, i_c, i_x - wide, N, kv, row, period, half, TURN, BT, BD, ROWS)
    elif i_x < wide + 2 * narrow:
        at = D + kv
        gather_columns(dv, out + at, p_sum + at, cos, sin, i_c, i_x - wide - narrow, N, kv, row, period, half, False, BT, BD, ROWS)
    elif i_x < 2 * (wide + narrow):
        at = D + 2 * kv
        gather_columns(dq_b, out + at, p_sum + at, cos, sin, i_c, i_x - wide - 2 * narrow, N, D, row, period, half, False, BT, BD, ROWS)
    else:
        at = 2 * (D + kv)
        gather_columns(dk_b, out + at, p_sum + at, cos, sin, i_c, i_x - 2 * (wide + narrow), N, D, row, period, half, False, BT, BD, ROWS)


@triton.jit(do_not_specialize=["chunks", "w8"])
def fused_total(partial, out, rounded, chunks, w8, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (W tiles,): the sum of partial (chunks, W) over its chunks, as float32 and in the type of `rounded`."""
    o_w = tl.program_id(0) * BD + tl.arange(0, BD)
    m_w = o_w < w8 * 8
    acc = tl.zeros([BT, BD], dtype=tl.float32)
    for i in range(0, chunks, BT):
        o_c = (i + tl.arange(0, BT)).to(tl.int64)
        acc += tl.load(partial + o_c[:, None] * (w8 * 8) + o_w[None, :], mask=(o_c < chunks)[:, None] & m_w[None, :], other=0.0)
    b_sum = tl.sum(acc, axis=0)
    tl.store(out + o_w, b_sum, mask=m_w)
    tl.store(rounded + o_w, b_sum.to(rounded.dtype.element_ty), mask=m_w)


@triton.jit(do_not_specialize=["n8"])
def fused_residual(x, y, out, n8, BT: tl.constexpr):
    """Grid (tiles,): out = x + y, 8 n8 elements each, of different types."""
    o_n = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_n = o_n < n8.to(tl.int64) * 8
    b_y = tl.load(x + o_n, mask=m_n, other=0.0).to(tl.float32) + tl.load(y + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(out + o_n, b_y.to(out.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["N", "d8", "g8"])
def fused_gate(s, g, y, N, d8, g8, BT: tl.constexpr, BD: tl.constexpr):
    """Grid (row tiles, D tiles): y = s g for s, y (N,D) and g, whose rows lie 8 g8 elements apart."""
    o_r, o_d = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    m_x = (o_r < N)[:, None] & (o_d < d8 * 8)[None, :]
    o_x = o_r[:, None] * (d8 * 8) + o_d[None, :]
    b_s = tl.load(s + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_g = tl.load(g + o_r[:, None] * (g8 * 8) + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    tl.store(y + o_x, (b_s * b_g).to(y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["N", "d8", "g8", "w8", "at8"])
def fused_gate_grad(dy, s, g, ds, dh, partial, N, d8, g8, w8, at8, BT: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Grid (chunks, D tiles): ds (N,D) = dy g, and the right half of dh (N,2D) = dy s, whose sums partial[:, 8 at8 :] gets."""
    i_c, o_d = tl.program_id(0), tl.program_id(1) * BD + tl.arange(0, BD)
    D = d8 * 8
    m_d = o_d < D
    acc = tl.zeros([BT, BD], dtype=tl.float32)
    for i in tl.static_range(0, ROWS, BT):
        o_r = (i_c * ROWS + i + tl.arange(0, BT)).to(tl.int64)
        m_x = (o_r < N)[:, None] & m_d[None, :]
        o_x = o_r[:, None] * D + o_d[None, :]
        b_dy = tl.load(dy + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_s = tl.load(s + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_g = tl.load(g + o_r[:, None] * (g8 * 8) + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
        tl.store(ds + o_x, (b_dy * b_g).to(ds.dtype.element_ty), mask=m_x)
        b_dg = (b_dy * b_s).to(dh.dtype.element_ty)
        tl.store(dh + o_r[:, None] * (2 * D) + D + o_d[None, :], b_dg, mask=m_x)
        acc += b_dg.to(tl.float32)
    tl.store(partial + i_c.to(tl.int64) * w8 * 8 + at8 * 8 + o_d, tl.sum(acc, axis=0), mask=m_d)


@triton.jit
def append_row(new, store, i_b, i_t, at, tokens, capacity, row, D, BD: tl.constexpr):
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        b_x = tl.load(new + (i_b * tokens + i_t) * row + o_d, mask=o_d < D)
        tl.store(store + (i_b * capacity + at) * D + o_d, b_x, mask=o_d < D)


@triton.jit(do_not_specialize=["tokens", "capacity", "f8", "d8", "k8", "v8", "b8", "s8"])
def fused_append(
    k, v, b, s, k_store, v_store, b_store, s_store, length, new_length, tokens, capacity, f8, d8, k8, v8, b8, s8, ALL: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Grid (T, B, 4): row t < new_length[b] (every row where ALL) of k, v (rows of 8 f8 elements), b and s (8 d8) goes to row length[b] + t of its store.

    New rows lie 8 k8, 8 v8, 8 b8 and 8 s8 elements apart, those of the stores (B,capacity,*) back to back; nothing goes beyond the capacity.
    """
    i_t, i_b, i_x = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    at = tl.load(length + i_b) + i_t
    live = at < capacity
    if not ALL:
        live = live & (i_t < tl.load(new_length + i_b))
    if live:
        if i_x == 0:
            append_row(k, k_store, i_b, i_t, at, tokens, capacity, k8 * 8, f8 * 8, BD)
        elif i_x == 1:
            append_row(v, v_store, i_b, i_t, at, tokens, capacity, v8 * 8, f8 * 8, BD)
        elif i_x == 2:
            append_row(b, b_store, i_b, i_t, at, tokens, capacity, b8 * 8, d8 * 8, BD)
        else:
            append_row(s, s_store, i_b, i_t, at, tokens, capacity, s8 * 8, d8 * 8, BD)


@triton.jit(do_not_specialize=["v8"])
def fused_nats(logits, targets, lse, nats, v8, BD: tl.constexpr):
    """Grid (N,): lse (N,) of the rows of logits (N, 8 v8), and nats = lse - logits[target], both float32."""
    row = tl.program_id(0).to(tl.int64)
    V = v8 * 8
    o_v = tl.arange(0, BD)
    p_x = logits + row * V
    b_peak = tl.full([BD], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BD], dtype=tl.float32)
    for i in range(0, V, BD):  # every lane its own maximum, so that nothing crosses lanes before the end
        b_x = tl.load(p_x + i + o_v, mask=i + o_v < V, other=float("-inf")).to(tl.float32)
        b_new = tl.maximum(b_peak, b_x)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_peak - b_base) + tl.exp(b_x - b_base)
        b_peak = b_new
    top = tl.max(b_peak, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = top + tl.log(tl.sum(b_sum * tl.exp(b_peak - base), axis=0))
    tl.store(lse + row, total)
    tl.store(nats + row, total - tl.load(p_x + tl.load(targets + row)).to(tl.float32))


@triton.jit(do_not_specialize=["v8"])
def fused_nats_grad(logits, targets, lse, each, out, v8, BD: tl.constexpr):
    """Grid (N,): out (N, 8 v8) = each (softmax(logits) - one at the target)."""
    row = tl.program_id(0).to(tl.int64)
    V = v8 * 8
    o_v = tl.arange(0, BD)
    scale, total, target = tl.load(each), tl.load(lse + row), tl.load(targets + row)
    for i in range(0, V, BD):
        m_v = i + o_v < V
        b_x = tl.load(logits + row * V + i + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        b_g = scale * (tl.exp(b_x - total) - tl.where(i + o_v == target, 1.0, 0.0))
        tl.store(out + row * V + i + o_v, b_g.to(out.dtype.element_ty), mask=m_v)
