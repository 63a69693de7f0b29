"""ConvSPE's features, made from q, k, the filters and noise generated where it is read (Liutkus et al., ICML 2021).

    xhat[m, r] = sum_d x[m, d] T_d[m, r],    T_d[m, r] = sum_a w_d[a] z_d[m + a, r] + gate_d[r]

T_d of a block of rows is a product of w_d as a Toeplitz matrix [rows, rows + taps] and the block's noise. The noise is
N(0, 1) by Box and Muller's transform of Philox4x32-10 (Salmon et al., SC 2011), whose counter is the place of the
number (position + tap, realization // 4, head * D + d), so that any block makes its own part of it, at any time,
anywhere; or it is read from a tensor [H, D, T, R].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .diagonals import block_diagonals
from .sine import cosine, load_column, sine
from .tile import ASM_LOADS, load_rows, load_scattered


@triton.jit
def uniform(word):
    """(0, 1), in steps of 2^-24."""
    return ((word >> 8).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 16777216.0)


@triton.jit
def normal_pair(first, second, FAST: tl.constexpr):
    u = uniform(first)
    if FAST and ASM_LOADS:
        log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, is_pure=True, pack=1)
    else:
        log2 = tl.math.log2(u)
    radius = tl.sqrt(tl.maximum(log2 * (-2.0 * 0.6931471805599453), 0.0))
    # Half a turn less, which turns both signs: the angle stays in [-pi, pi].
    x = (uniform(second) - 0.5) * 6.283185307179586
    return -radius * cosine(x, FAST), -radius * sine(x, FAST)


@triton.jit
def noise_tile(
    NOISE, hd, first, T, r0, POSITIONS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr
):
    """z_hd [POSITIONS, WIDTH], fp32: positions first .., realizations r0 ..; from a seed, or of T positions stored."""
    t = first + tl.arange(0, POSITIONS).to(tl.int64)
    if NOISE.dtype.element_ty == tl.int64:
        zero = tl.zeros([POSITIONS, WIDTH // 4], tl.uint32)
        position = t.to(tl.uint32)[:, None] + zero
        quarter = (r0 // 4 + tl.arange(0, WIDTH // 4)).to(tl.uint32)[None, :] + zero
        a, b, c, d = tl.philox(tl.load(NOISE), position, quarter, zero + hd.to(tl.uint32), zero)
        x, y = normal_pair(a, b, FAST)
        z, w = normal_pair(c, d, FAST)
        return tl.join(tl.join(x, z), tl.join(y, w)).reshape(POSITIONS, WIDTH)
    else:
        r = r0 + tl.arange(0, WIDTH)
        pointers = NOISE + hd * T * R + (t[:, None] * R + r[None, :])
        return tl.load(pointers, mask=(t < T)[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)


@triton.jit
def filtered(
    FILTER, NOISE, GATE, hd, first, T, r0, taps, PITCH, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    R: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T_d [ROWS, WIDTH] of rows at positions first .. FILTER [H * D, PITCH] has BLOCK_N + ROWS zeros on either side."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    if GATE is not None:
        r = r0 + tl.arange(0, WIDTH)
        total += tl.load(GATE + hd * R + r, mask=r < R, other=0.0)[None, :]
    for j0 in tl.range(0, ROWS + taps - 1, BLOCK_N):
        weights = load_scattered(FILTER + hd * PITCH + (BLOCK_N + ROWS) + j0 + (j - i)).to(DTYPE)
        z = noise_tile(NOISE, hd, first + j0, T, r0, BLOCK_N, R, WIDTH, tl.float32 != DTYPE)
        total += tl.dot(weights, z.to(DTYPE), input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["start", "L", "T"])
def filter_forward(
    X, XHAT, FILTER, NOISE, GATE, x_b, x_h, x_l, start, L, T, taps, PITCH, B, H, D: tl.constexpr, R: tl.constexpr,
    BLOCK_R: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features [B, H, L, R] of ROWS rows."""
    r_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    blocks = tl.cdiv(L, ROWS)
    pid = tl.program_id(0)
    r0 = pid % r_blocks * BLOCK_R
    m0 = pid // r_blocks % blocks * ROWS
    hb = pid // r_blocks // blocks
    h, b = (hb // B).to(tl.int64), (hb % B).to(tl.int64)
    i = m0 + tl.arange(0, ROWS)
    rows = X + b * x_b + h * x_h + tl.minimum(i, L - 1).to(tl.int64) * x_l
    total = tl.zeros([ROWS, BLOCK_R], tl.float32)
    for d in tl.range(0, D):
        code = filtered(
            FILTER, NOISE, GATE, h * D + d, tl.cast(start, tl.int64) + m0, T, r0, taps, PITCH, ROWS, BLOCK_N, R,
            BLOCK_R, X.dtype.element_ty, PRECISION,
        )  # fmt: skip
        total += load_column(rows + d)[:, None] * code
    r = r0 + tl.arange(0, BLOCK_R)
    pointers = XHAT + (b * H + h) * tl.cast(L, tl.int64) * R + (i.to(tl.int64)[:, None] * R + r[None, :])
    tl.store(pointers, total.to(XHAT.dtype.element_ty), mask=(i < L)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["start", "L", "T"])
def filter_backward(
    G, DX, FILTER, NOISE, GATE, g_b, g_h, g_l, d_b, d_h, d_l, start, L, T, taps, PITCH, B, H, D: tl.constexpr,
    R: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX[m, d] = sum_r G[m, r] T_d[m, r], of ROWS rows."""
    blocks = tl.cdiv(L, ROWS)
    pid = tl.program_id(0)
    m0 = pid % blocks * ROWS
    hb = pid // blocks
    h, b = (hb // B).to(tl.int64), (hb % B).to(tl.int64)
    g = load_rows(G + b * g_b + h * g_h, m0, g_l, L, ROWS, WIDTH, R)
    i = m0 + tl.arange(0, ROWS)
    rows = DX + b * d_b + h * d_h + i.to(tl.int64) * d_l
    for d in tl.range(0, D):
        code = filtered(
            FILTER, NOISE, GATE, h * D + d, tl.cast(start, tl.int64) + m0, T, 0, taps, PITCH, ROWS, BLOCK_N, R,
            WIDTH, G.dtype.element_ty, PRECISION,
        )  # fmt: skip
        tl.store(rows + d, tl.sum(g.to(tl.float32) * code, 1).to(DX.dtype.element_ty), mask=i < L)


@triton.jit(do_not_specialize=["start", "L", "T"])
def filter_gradient(
    X, G, NOISE, BLOCKS, x_b, x_h, x_l, g_b, g_h, g_l, start, L, T, B, H, D: tl.constexpr, R: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, SHIFTS: tl.constexpr, PRECISION: tl.constexpr, SUM_PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCKS [H * D, SHIFTS, 64, SLOTS]: the block diagonals (diagonals.py) of sum_m x[m, d] G[m] . z_d[m + lag].

    A program takes the lags shift * ROWS + j - i of a d, and all positions: it makes each of their noises once.
    """
    pid = tl.program_id(0)
    shift = pid % SHIFTS
    hd = (pid // SHIFTS).to(tl.int64)
    h, d = hd // D, hd % D
    DTYPE: tl.constexpr = G.dtype.element_ty
    i = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for m0 in tl.range(0, L, ROWS):
        first = tl.cast(start, tl.int64) + m0 + shift * ROWS
        z = noise_tile(NOISE, hd, first, T, 0, ROWS, R, WIDTH, tl.float32 != DTYPE).to(DTYPE)
        for b in tl.range(0, B):
            at = tl.cast(b, tl.int64)
            x = tl.load(X + at * x_b + h * x_h + (m0 + i).to(tl.int64) * x_l + d, mask=m0 + i < L, other=0.0)
            g = load_rows(G + at * g_b + h * g_h, m0, g_l, L, ROWS, WIDTH, R)
            weighed = (g.to(tl.float32) * x.to(tl.float32)[:, None]).to(DTYPE)
            total += tl.dot(weighed, tl.trans(z), input_precision=PRECISION)
    sums = block_diagonals(total, SUM_PRECISION)
    SLOTS: tl.constexpr = sums.shape[1]
    pointers = BLOCKS + (hd * SHIFTS + shift) * (64 * SLOTS) + tl.arange(0, 64)[:, None] * SLOTS
    tl.store(pointers + tl.arange(0, SLOTS)[None, :], sums)
