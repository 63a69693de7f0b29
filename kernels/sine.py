"""SineSPE's features, made from q, k and the noise without position codes in memory (Liutkus et al., ICML 2021).

    xhat[m, r] = sum_d x[m, d] T_d[m, r]
    T_d[m, r]  = sum_k gain_dk (cos(theta) zc_dk[r] + sin(theta) zs_dk[r]),    theta = 2 pi turns_dk m + phase_dk

In a block of rows m = m0 + i the angle is that of m0 plus a local one, so T_d = LOCAL_d @ turned noise: LOCAL_d holds
the cosines and sines of the local angles and is the same for every block; the noise of 2 K rows is turned by m0's
angle, once a block. No sine is taken a position. The gate is one more slot, of frequency 0, whose cosine is 1.

Angles are kept in turns as 64-bit integers, modulo 2^64: m0's is exact at any position, and wraps for free.
Slots are padded to KP, a power of two; cosines of all slots first, then sines.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import ASM_LOADS, load_rows, load_scattered

TURN = tl.constexpr(6.283185307179586 / 4294967296.0)


@triton.jit
def angle(turns):
    """Radians in [-pi, pi) of an angle in 2^-64 turns."""
    return (turns >> 32).to(tl.int32).to(tl.float32) * TURN


@triton.jit
def cosine(x, FAST: tl.constexpr):
    """cos x; of |x| <= pi to 5e-7 by one instruction where FAST."""
    if FAST and ASM_LOADS:
        return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.cos(x)


@triton.jit
def sine(x, FAST: tl.constexpr):
    if FAST and ASM_LOADS:
        return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.sin(x)


@triton.jit
def load_column(pointers):
    """One entry a row, as fp32, loaded straight into the layout in which rows are multiplied."""
    DTYPE: tl.constexpr = pointers.dtype.element_ty
    if not ASM_LOADS:
        return tl.load(pointers).to(tl.float32)
    elif tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 t, z; mov.b16 z, 0; ld.global.nc.b16 t, [$1]; mov.b32 $0, {z, t}; }", "=f,l", [pointers],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 t; ld.global.nc.b16 t, [$1]; cvt.f32.f16 $0, t; }", "=f,l", [pointers],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return load_scattered(pointers)


@triton.jit
def fixed(turns):
    """fp64 turns in 2^-64 of a turn, modulo 1."""
    return ((turns - tl.floor(turns)) * 4611686018427387904.0 + 0.5).to(tl.int64) * 4


@triton.jit
def prepare_sines(
    TURNS_IN, PHASES_IN, GAINS_IN, NOISE_IN, GATE_IN, GATE_NOISE, TURNS, PHASES, GAINS, NOISE, LOCAL,
    SINES: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, KP: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What the kernels read, of one dimension of one head: slots, noise [2 KP, R] with cosines first, local angles.

    TURNS_IN, PHASES_IN (in turns, too) and GAINS_IN [H, D, SINES], fp64; NOISE_IN [H, D, 2 SINES, R] by turns a cosine
    and a sine; LOCAL [H, D, ROWS, 2 KP] becomes the cosines, then the sines, of i turns, i < ROWS.
    """
    hd = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    real = k < SINES
    turns = tl.load(TURNS_IN + hd * SINES + k, mask=real, other=0.0)
    phases = tl.load(PHASES_IN + hd * SINES + k, mask=real, other=0.0)
    # Integers know no NaN: it goes on in the gains.
    gains = tl.load(GAINS_IN + hd * SINES + k, mask=real, other=0.0) + (turns + phases) * 0.0
    turns, phases = fixed(turns), fixed(phases)
    if GATE_IN is not None:
        gains = tl.where(k == SINES, tl.load(GATE_IN + hd), gains)
    tl.store(TURNS + hd * KP + k, turns)
    tl.store(PHASES + hd * KP + k, phases)
    tl.store(GAINS + hd * KP + k, gains.to(tl.float32))
    c = tl.arange(0, 2 * KP)
    for r0 in tl.range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        source = NOISE_IN + (hd * (2 * SINES) + (c % KP) * 2 + c // KP)[:, None] * R + r[None, :]
        z = tl.load(source, mask=(c % KP < SINES)[:, None] & (r < R)[None, :], other=0.0)
        if GATE_IN is not None:
            e = tl.load(GATE_NOISE + hd * R + r, mask=r < R, other=0.0)
            z = tl.where((c == SINES)[:, None], e[None, :], z)
        to = NOISE + (hd * (2 * KP) + c)[:, None] * R + r[None, :]
        tl.store(to, z.to(NOISE.dtype.element_ty), mask=(r < R)[None, :])
    i = tl.arange(0, ROWS)[:, None]
    x = angle(turns[None, :] * i.to(tl.int64))
    pointers = LOCAL + hd * (ROWS * 2 * KP) + i * (2 * KP) + k[None, :]
    tl.store(pointers, tl.cos(x).to(LOCAL.dtype.element_ty))
    tl.store(pointers + KP, tl.sin(x).to(LOCAL.dtype.element_ty))


@triton.jit
def turned(z, partner, turns, phase, gain, base, KP: tl.constexpr, FAST: tl.constexpr):
    """Rows [2 KP, R] of noise by the angle of position `base`, times gain; partner holds each slot's other half."""
    x = angle(turns * base + phase)
    first = tl.arange(0, 2 * KP) < KP
    c, s = cosine(x, FAST) * gain, sine(x, FAST) * tl.where(first, gain, -gain)
    return z.to(tl.float32) * c[:, None] + partner.to(tl.float32) * s[:, None]


@triton.jit(do_not_specialize=["q_start", "k_start", "Lq", "Lk"])
def sine_forward(
    Q, K, QHAT, KHAT, LOCAL, NOISE, GAINS, TURNS, PHASES, q_b, q_h, q_l, k_b, k_h, k_l, q_start, k_start, Lq, Lk, B, H,
    D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, KP: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Features [B, H, L, R] of BLOCK_M queries and of as many keys, which share LOCAL and the noise."""
    r_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    blocks = tl.cdiv(tl.maximum(Lq, Lk), BLOCK_M)
    pid = tl.program_id(0)
    r = pid % r_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    m0 = pid // r_blocks % blocks * BLOCK_M
    hb = pid // r_blocks // blocks  # a head's programs are neighbours: its LOCAL and noise stay in L2
    h, b = (hb // B).to(tl.int64), (hb % B).to(tl.int64)
    DTYPE: tl.constexpr = LOCAL.dtype.element_ty
    FAST: tl.constexpr = tl.float32 != DTYPE
    i, c = tl.arange(0, BLOCK_M), tl.arange(0, 2 * KP)
    # Rows beyond the end read the last one, and are not stored.
    q_rows = Q + b * q_b + h * q_h + tl.minimum(m0 + i, Lq - 1).to(tl.int64) * q_l
    k_rows = K + b * k_b + h * k_h + tl.minimum(m0 + i, Lk - 1).to(tl.int64) * k_l
    q_base, k_base = tl.cast(q_start, tl.int64) + m0, tl.cast(k_start, tl.int64) + m0
    LOCAL += h * (D * BLOCK_M * 2 * KP)
    NOISE += h * (D * 2 * KP * R)
    q_sum = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    k_sum = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for d in tl.range(0, D):
        at = (h * D + d) * KP + c % KP
        turns, phase, gain = tl.load(TURNS + at), tl.load(PHASES + at), tl.load(GAINS + at)
        local = tl.load(LOCAL + d * (BLOCK_M * 2 * KP) + (i[:, None] * (2 * KP) + c[None, :]))
        noise = NOISE + d * (2 * KP * R)
        z = tl.load(noise + (c[:, None] * R + r[None, :]), mask=(r < R)[None, :], other=0.0)
        partner = tl.load(noise + ((c + KP) % (2 * KP))[:, None] * R + r[None, :], mask=(r < R)[None, :], other=0.0)
        x, y = load_column(q_rows + d), load_column(k_rows + d)
        zq = turned(z, partner, turns, phase, gain, q_base, KP, FAST).to(DTYPE)
        q_sum += x[:, None] * tl.dot(local, zq, input_precision=PRECISION)
        zk = turned(z, partner, turns, phase * 0, gain, k_base, KP, FAST).to(DTYPE)
        k_sum += y[:, None] * tl.dot(local, zk, input_precision=PRECISION)
    at = (b * H + h) * tl.cast(Lq, tl.int64) * R
    pointers = QHAT + at + ((m0 + i).to(tl.int64)[:, None] * R + r[None, :])
    tl.store(pointers, q_sum.to(QHAT.dtype.element_ty), mask=(m0 + i < Lq)[:, None] & (r < R)[None, :])
    at = (b * H + h) * tl.cast(Lk, tl.int64) * R
    pointers = KHAT + at + ((m0 + i).to(tl.int64)[:, None] * R + r[None, :])
    tl.store(pointers, k_sum.to(KHAT.dtype.element_ty), mask=(m0 + i < Lk)[:, None] & (r < R)[None, :])


@triton.jit
def add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit(do_not_specialize=["start", "L", "runs"])
def sine_backward(
    X, G, DX, PART, LOCAL, NOISE, GAINS, TURNS, PHASES, x_b, x_h, x_l, g_b, g_h, g_l, d_b, d_h, d_l,
    start, L, runs, B, H,
    RUN: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, KP: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX from G [B, H, L, R], and PART [B * runs, H, D, 3, KP]: of each slot the sums over a run of blocks of

        x (Uc Wc + Us Ws),   t = x (Us Wc - Uc Ws),   (m - first row of the run) t

    with U = G @ noise^T turned by the block's angle, W = LOCAL: they are the gradients of gain, and, times gain, of
    phase, and what turns are made from. The noise has no gradient, so none is made. DX and PART may be None.
    """
    pid = tl.program_id(0)
    run = pid % runs
    hb = pid // runs
    h, b = (hb // B).to(tl.int64), (hb % B).to(tl.int64)
    DTYPE: tl.constexpr = LOCAL.dtype.element_ty
    FAST: tl.constexpr = tl.float32 != DTYPE
    X += b * x_b + h * x_h
    G += b * g_b + h * g_h
    i, slot, r = tl.arange(0, BLOCK_M), tl.arange(0, DIMS * KP), tl.arange(0, WIDTH)
    for block in tl.range(0, RUN):
        m0 = (run * RUN + block) * BLOCK_M
        g = load_rows(G, m0, g_l, L, BLOCK_M, WIDTH, R)
        base = tl.cast(start, tl.int64) + m0
        for d0 in tl.range(0, D, DIMS):
            d, k = d0 + slot // KP, slot % KP
            row = h * D + d
            inside = d < D
            turns = tl.load(TURNS + row * KP + k, mask=inside, other=0)
            if PHASES is not None:
                a = angle(turns * base + tl.load(PHASES + row * KP + k, mask=inside, other=0))
            else:
                a = angle(turns * base)
            co, si = cosine(a, FAST), sine(a, FAST)
            noise = NOISE + (row * (2 * KP) + k)[None, :] * R + r[:, None]
            wanted = inside[None, :] & (r < R)[:, None]
            zc = tl.load(noise, mask=wanted, other=0.0).to(tl.float32)
            zs = tl.load(noise + KP * R, mask=wanted, other=0.0).to(tl.float32)
            uc = tl.dot(g, (zc * co[None, :] + zs * si[None, :]).to(DTYPE), input_precision=PRECISION)
            us = tl.dot(g, (zs * co[None, :] - zc * si[None, :]).to(DTYPE), input_precision=PRECISION)
            local = LOCAL + (row * (BLOCK_M * 2 * KP) + k)[None, :] + i[:, None] * (2 * KP)
            wc = tl.load(local, mask=inside[None, :], other=0.0).to(tl.float32)
            ws = tl.load(local + KP, mask=inside[None, :], other=0.0).to(tl.float32)
            along = uc * wc + us * ws
            dims = d0 + tl.arange(0, DIMS)
            live = (m0 + i < L)[:, None] & (dims < D)[None, :]
            if DX is not None:
                gain = tl.load(GAINS + row * KP + k, mask=inside, other=0.0)
                dx = tl.sum((along * gain[None, :]).reshape(BLOCK_M, DIMS, KP), 2)
                to = DX + b * d_b + h * d_h + ((m0 + i).to(tl.int64)[:, None] * d_l + dims[None, :])
                tl.store(to, dx.to(DX.dtype.element_ty), mask=live)
            if PART is not None:
                x = tl.load(X + ((m0 + i).to(tl.int64)[:, None] * x_l + dims[None, :]), mask=live, other=0.0)
                x = tl.broadcast_to(x.to(tl.float32)[:, :, None], [BLOCK_M, DIMS, KP]).reshape(BLOCK_M, DIMS * KP)
                t = x * (us * wc - uc * ws)
                place = (i + block * BLOCK_M).to(tl.float32)[:, None]
                gained, turn, moment = tl.reduce((x * along, t, t * place), 0, add_three)
                part = PART + (((b * runs + run) * H + h) * D + d) * (3 * KP) + k
                tl.debug_barrier()  # the run's sums so far were stored by other threads
                if block > 0:
                    gained += tl.load(part, mask=inside, other=0.0)
                    turn += tl.load(part + KP, mask=inside, other=0.0)
                    moment += tl.load(part + 2 * KP, mask=inside, other=0.0)
                tl.store(part, gained, mask=inside)
                tl.store(part + KP, turn, mask=inside)
                tl.store(part + 2 * KP, moment, mask=inside)
