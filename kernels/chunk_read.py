"""Linear attention in chunks: what a block of rows reads, by its features or by its values.

`read_by_feature`: sum_j (f(x_i) . f(z_j)) w_j y_j, the output (x queries, z keys, y values) and the gradient of the
values (x keys, z queries, y grad_out). `read_by_value`: sum_j (x_i . y_j + a number) w_j f(z_j), the gradient of the
features (x grad_out, y values, z keys for the queries; x values, y grad_out, z queries for the keys). In both, j runs
over what stands before (or behind) row i: chunks other than its own through their summed state, its own pair by pair.

fp16 products need numbers that fit (sums over a million positions do not, nor do reciprocals of them): tiles are
divided by their largest entry, the features of a row by theirs, and what was divided comes back in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_states import counted_rows, feature_slope, load_features, load_features_transposed, narrow
from .tile import load_columns, load_rows


@triton.jit
def visible(m0, n0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FUTURE: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: whether column n0 + n stands at or before row m0 + m (at or behind it, if FUTURE)."""
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    if FUTURE:
        return n[None, :] >= m[:, None]
    else:
        return n[None, :] <= m[:, None]


@triton.jit(do_not_specialize=["L", "chunks"])
def read_by_feature(
    X, Z, Y, W, XMASK, ZMASK, STATES, SUMS, OUT, DEN, x_b, x_h, x_l, z_b, z_h, z_l, y_b, y_h, y_l, o_b, o_h, o_l,
    p_b, L, chunks, H, eps,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, MAP: tl.constexpr, CAUSAL: tl.constexpr, FUTURE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """-> OUT; with DEN, divided by den = sum + eps (sum - eps where it is negative), which is written, too."""
    v_blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0)
    v0 = pid % v_blocks * BLOCK_V
    blocks = tl.cdiv(L, BLOCK_M)
    m0 = pid // v_blocks % blocks * BLOCK_M
    bh = (pid // v_blocks // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    X += b * x_b + h * x_h
    Z += b * z_b + h * z_h
    Y += b * y_b + h * y_h + v0
    if XMASK is not None:
        XMASK += b * p_b
    if ZMASK is not None:
        ZMASK += b * p_b
    if W is not None:
        W += bh * L
    DTYPE: tl.constexpr = Y.dtype.element_ty
    chunk = m0 // CHUNK
    place = bh * chunks
    if CAUSAL:
        place += chunk
    f = load_features(X, XMASK, m0, x_l, L, 0, BLOCK_M, WIDTH, R, MAP)
    scale = 1.0
    if tl.float16 == DTYPE:
        scale = tl.max(tl.abs(f), 1)
        scale = tl.where(scale > 0.0, scale, 1.0)
        f = f / scale[:, None]
    r = tl.arange(0, WIDTH)
    v = v0 + tl.arange(0, BLOCK_V)
    state = tl.load(
        STATES + (place * R + r[:, None]) * DV + v[None, :], mask=(r < R)[:, None] & (v < DV)[None, :], other=0.0
    )
    state, largest = narrow(state, DTYPE)
    half = f.to(DTYPE)
    acc = tl.dot(half, state, input_precision=PRECISION) * largest
    if DEN is not None:
        total = tl.sum(half.to(tl.float32) * tl.load(SUMS + place * R + r, mask=r < R, other=0.0)[None, :], 1)
    if CAUSAL:
        low, high = chunk * CHUNK, m0 + BLOCK_M
        if FUTURE:
            low, high = m0 // BLOCK_N * BLOCK_N, tl.minimum(chunk * CHUNK + CHUNK, L)
        for n0 in tl.range(low, high, BLOCK_N):
            z = load_features_transposed(Z, ZMASK, n0, z_l, L, 0, BLOCK_N, WIDTH, R, MAP).to(DTYPE)
            p = tl.dot(half, z, input_precision=PRECISION)
            p = tl.where(visible(m0, n0, BLOCK_M, BLOCK_N, FUTURE), p, 0.0)
            n = tl.arange(0, BLOCK_N)[:, None]
            c = tl.arange(0, BLOCK_V)[None, :]
            y = tl.load(
                Y + tl.cast(n0, tl.int64) * y_l + (n.to(tl.int64) * y_l + c),
                mask=counted_rows(ZMASK, n0, L, BLOCK_N)[:, None] & (v0 + c < DV), other=0.0,
            )  # fmt: skip
            if DEN is not None:
                total += tl.sum(p, 1)
            if W is not None:
                p = p * tl.load(W + n0 + tl.arange(0, BLOCK_N), mask=tl.arange(0, BLOCK_N) < L - n0, other=0.0)[None, :]
            p, most = narrow(p, DTYPE)
            if tl.float16 == DTYPE:
                acc += tl.dot(p, y, input_precision=PRECISION) * most
            else:
                acc = tl.dot(p, y, acc, input_precision=PRECISION)
    if tl.float16 == DTYPE:
        acc = acc * scale[:, None]
    if DEN is not None:
        if tl.float16 == DTYPE:
            total = total * scale
        den = tl.where(total >= 0.0, total + eps, total - eps)
        acc = acc / den[:, None]
        i = m0 + tl.arange(0, BLOCK_M)
        tl.store(DEN + bh * L + i, den, mask=(i < L) & (v0 == 0))
    i = m0 + tl.arange(0, BLOCK_M)
    pointers = OUT + b * o_b + h * o_h + (i.to(tl.int64)[:, None] * o_l + v[None, :])
    tl.store(pointers, acc.to(OUT.dtype.element_ty), mask=(i < L)[:, None] & (v < DV)[None, :])


@triton.jit(do_not_specialize=["L", "chunks"])
def read_by_value(
    X, Y, Z, RAW, WX, X0, WY, Y0, XMASK, ZMASK, STATES, SUMS, OUT,
    x_b, x_h, x_l, y_b, y_h, y_l, z_b, z_h, z_l, r_b, r_h, r_l, o_b, o_h, o_l, p_b, L, chunks, H,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    DV: tl.constexpr, VALUE_DIM: tl.constexpr, MAP: tl.constexpr, CAUSAL: tl.constexpr, FUTURE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """-> OUT = phi'(raw_i) w_i (x_i . state^T + x0_i sums + sum_j (x_i . y_j + x0_i or y0_j) w_j f(z_j)).

    Rows have w and x0 (WX, X0), or columns w and y0 (WY, Y0); the side without counts 1.
    """
    r_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid = tl.program_id(0)
    r0 = pid % r_blocks * BLOCK_R
    blocks = tl.cdiv(L, BLOCK_M)
    m0 = pid // r_blocks % blocks * BLOCK_M
    bh = (pid // r_blocks // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    X += b * x_b + h * x_h
    Y += b * y_b + h * y_h
    Z += b * z_b + h * z_h
    if XMASK is not None:
        XMASK += b * p_b
    if ZMASK is not None:
        ZMASK += b * p_b
    if WY is not None:
        WY += bh * L
        Y0 += bh * L
    DTYPE: tl.constexpr = X.dtype.element_ty
    chunk = m0 // CHUNK
    place = bh * chunks
    if CAUSAL:
        place += chunk
    i = m0 + tl.arange(0, BLOCK_M)
    r = r0 + tl.arange(0, BLOCK_R)
    v = tl.arange(0, VALUE_DIM)
    x = load_rows(X, m0, x_l, L, BLOCK_M, VALUE_DIM, DV)
    state = tl.load(
        STATES + (place * R + r[None, :]) * DV + v[:, None], mask=(r < R)[None, :] & (v < DV)[:, None], other=0.0
    )
    state, largest = narrow(state, DTYPE)
    sums = tl.load(SUMS + place * R + r, mask=r < R, other=0.0)
    if X0 is not None:
        x0 = tl.load(X0 + bh * L + i, mask=i < L, other=0.0)
        acc = tl.dot(x, state, input_precision=PRECISION) * largest + x0[:, None] * sums[None, :]
    else:
        acc = tl.dot(x, state, input_precision=PRECISION) * largest + sums[None, :]
    if XMASK is not None:
        counted = tl.load(XMASK + i, mask=i < L, other=0) != 0
    if CAUSAL:
        low, high = chunk * CHUNK, m0 + BLOCK_M
        if FUTURE:
            low, high = m0 // BLOCK_N * BLOCK_N, tl.minimum(chunk * CHUNK + CHUNK, L)
        for n0 in tl.range(low, high, BLOCK_N):
            y = load_columns(Y, n0, y_l, L, BLOCK_N, VALUE_DIM, DV)
            g = tl.dot(x, y, input_precision=PRECISION)
            z = load_features(Z, ZMASK, n0, z_l, L, r0, BLOCK_N, BLOCK_R, R, MAP).to(DTYPE)
            if X0 is not None:
                g += x0[:, None]
            else:
                n = tl.arange(0, BLOCK_N)
                w = tl.load(WY + n0 + n, mask=n < L - n0, other=0.0)
                g = (g + tl.load(Y0 + n0 + n, mask=n < L - n0, other=0.0)[None, :]) * w[None, :]
            seen = visible(m0, n0, BLOCK_M, BLOCK_N, FUTURE)
            if XMASK is not None:
                seen = seen & counted[:, None]
            if ZMASK is not None:
                # Whatever stands in the values of a masked key does not count.
                seen = seen & counted_rows(ZMASK, n0, L, BLOCK_N)[None, :]
            g, most = narrow(tl.where(seen, g, 0.0), DTYPE)
            if tl.float16 == DTYPE:
                acc += tl.dot(g, z, input_precision=PRECISION) * most
            else:
                acc = tl.dot(g, z, acc, input_precision=PRECISION)
    if WX is not None:
        acc = acc * tl.load(WX + bh * L + i, mask=i < L, other=0.0)[:, None]
    inside = (i < L)[:, None] & (r < R)[None, :]
    raw = tl.load(RAW + b * r_b + h * r_h + (i.to(tl.int64)[:, None] * r_l + r[None, :]), mask=inside, other=0.0)
    acc = acc * feature_slope(raw.to(tl.float32), MAP)
    if XMASK is not None:
        acc = tl.where(counted[:, None], acc, 0.0)
    pointers = OUT + b * o_b + h * o_h + (i.to(tl.int64)[:, None] * o_l + r[None, :])
    tl.store(pointers, acc.to(OUT.dtype.element_ty), mask=inside)
