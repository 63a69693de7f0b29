"""Linear attention in chunks: the feature maps, the state of each chunk, and the running sum of states.

With features f = phi(x) a query needs of all keys behind it only sum_j f(k_j) v_j^T [R, DV] and sum_j f(k_j) [R]. A
chunk's own state is a product over its positions; the exclusive running sum over chunks is what its queries start from.
Backward is the same with queries, grad_out / den and the order turned round, so every kernel here serves both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import LOG2E


@triton.jit
def feature(x, MAP: tl.constexpr):
    """phi of fp32 entries."""
    if MAP == "elu":
        return tl.where(x > 0, x + 1.0, tl.math.exp2(x * LOG2E))
    elif MAP == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 1e-3
    else:
        return x


@triton.jit
def feature_slope(x, MAP: tl.constexpr):
    """phi'(x)."""
    if MAP == "elu":
        return tl.where(x > 0, 1.0, tl.math.exp2(x * LOG2E))
    elif MAP == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    else:
        return x * 0.0 + 1.0


@triton.jit
def counted_rows(mask, first, length, ROWS: tl.constexpr):
    """[ROWS]: whether rows first .. exist and are not masked out."""
    row = tl.arange(0, ROWS)
    seen = row < length - first
    if mask is not None:
        seen = seen & (tl.load(mask + first + row, mask=seen, other=0) != 0)
    return seen


@triton.jit
def load_features(
    base, mask, first, stride, length, r0,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Features r0 .. of rows first .. -> fp32 [ROWS, WIDTH]; zero beyond the edges and where mask is 0."""
    row, r = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    wanted = counted_rows(mask, first, length, ROWS)[:, None] & (r < R - r0)
    base += tl.cast(first, tl.int64) * stride
    x = tl.load(base + (row.to(tl.int64) * stride + (r + r0)), mask=wanted, other=0.0)
    return tl.where(wanted, feature(x.to(tl.float32), MAP), 0.0)


@triton.jit
def load_features_transposed(
    base, mask, first, stride, length, r0,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """The same -> fp32 [WIDTH, ROWS]."""
    row, r = tl.arange(0, ROWS)[None, :], tl.arange(0, WIDTH)[:, None]
    wanted = counted_rows(mask, first, length, ROWS)[None, :] & (r < R - r0)
    base += tl.cast(first, tl.int64) * stride
    x = tl.load(base + (row.to(tl.int64) * stride + (r + r0)), mask=wanted, other=0.0)
    return tl.where(wanted, feature(x.to(tl.float32), MAP), 0.0)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """An fp32 tile in DTYPE, and what to multiply its products by: fp16 holds it divided by its largest entry."""
    if tl.float16 == DTYPE:
        largest = tl.max(tl.max(tl.abs(x), 1), 0)
        largest = tl.where(largest > 0.0, largest, 1.0)
        return (x / largest).to(DTYPE), largest
    else:
        return x.to(DTYPE), 1.0


@triton.jit(do_not_specialize=["L", "chunks"])
def chunk_states(
    X, Y, W, Y0, MASK, STATES, SUMS, x_b, x_h, x_l, y_b, y_h, y_l, p_b, L, chunks, H,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states[bh, chunk] = sum_j w_j f(x_j) y_j^T [R, DV]; sums[bh, chunk] = sum_j w_j y0_j f(x_j) [R]; w, y0 1 if None.

    A program makes BLOCK_R x BLOCK_V of one chunk.
    """
    r_blocks: tl.constexpr = WIDTH // BLOCK_R
    v_blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0)
    v0 = pid % v_blocks * BLOCK_V
    r0 = pid // v_blocks % r_blocks * BLOCK_R
    place = pid // (v_blocks * r_blocks)
    chunk = place % chunks
    bh = (place // chunks).to(tl.int64)
    b, h = bh // H, bh % H
    X += b * x_b + h * x_h
    Y += b * y_b + h * y_h + v0
    if MASK is not None:
        MASK += b * p_b
    if W is not None:
        W += bh * L
        Y0 += bh * L
    r, v = r0 + tl.arange(0, BLOCK_R), v0 + tl.arange(0, BLOCK_V)
    state = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for n in tl.range(0, CHUNK, BLOCK_N):
        first = chunk * CHUNK + n
        f = load_features_transposed(X, MASK, first, x_l, L, r0, BLOCK_N, BLOCK_R, R, MAP)
        row = tl.arange(0, BLOCK_N)
        y = tl.load(
            Y + tl.cast(first, tl.int64) * y_l + (row[:, None].to(tl.int64) * y_l + tl.arange(0, BLOCK_V)[None, :]),
            mask=counted_rows(MASK, first, L, BLOCK_N)[:, None] & (v < DV)[None, :], other=0.0,
        )  # fmt: skip
        if W is None:
            state = tl.dot(f.to(y.dtype), y, state, input_precision=PRECISION)
            total += tl.sum(f.to(y.dtype).to(tl.float32), 1)
        else:
            w = tl.load(W + first + row, mask=row < L - first, other=0.0)
            y0 = tl.load(Y0 + first + row, mask=row < L - first, other=0.0)
            weighed, largest = narrow(y.to(tl.float32) * w[:, None], y.dtype)
            state += tl.dot(f.to(y.dtype), weighed, input_precision=PRECISION) * largest
            total += tl.sum(f * (y0 * w)[None, :], 1)
    place = bh * chunks + chunk
    inside = (r < R)[:, None] & (v < DV)[None, :]
    tl.store(STATES + (place * R + r[:, None]) * DV + v[None, :], state, mask=inside)
    tl.store(SUMS + place * R + r, total, mask=(r < R) & (v0 == 0))


@triton.jit(do_not_specialize=["chunks"])
def scan_chunks(
    STATES, START, TOTAL, chunks, size, REVERSE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr
):
    """In place, of [BH, chunks, size]: what stands before each chunk (behind it, if REVERSE), START included."""
    blocks = tl.cdiv(size, BLOCK_E)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    e = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    STATES += bh * chunks * size
    carry = tl.zeros([BLOCK_E], tl.float32)
    if START is not None:
        carry += tl.load(START + bh * size + e, mask=e < size, other=0.0)
    # A running sum less its own term would lose small ones beside a large one, so each row sums those before it.
    for c0 in tl.range(0, chunks, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        index = c
        if REVERSE:
            index = chunks - 1 - c
        pointers = STATES + (index[:, None].to(tl.int64) * size + e[None, :])
        inside = (c < chunks)[:, None] & (e < size)[None, :]
        own = tl.load(pointers, mask=inside, other=0.0)
        previous = pointers + (size if REVERSE else -size)
        earlier = tl.load(previous, mask=inside & (c > c0)[:, None], other=0.0)
        tl.debug_barrier()  # what is stored now was read by other threads
        tl.store(pointers, carry[None, :] + tl.cumsum(earlier, 0), mask=inside)
        carry += tl.sum(own, 0)
    if TOTAL is not None:
        tl.store(TOTAL + bh * size + e, carry, mask=e < size)


@triton.jit(do_not_specialize=["L", "rows"])
def row_products(
    OUT, DO, DEN, W, Y0, o_b, o_h, o_l, do_b, do_h, do_l, L, rows, H,
    BLOCK: tl.constexpr, DV: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """w = 1 / den and y0 = -rowsum(grad_out * out), a number a query."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bh, i = row // L, row % L
    b, h = bh // H, bh % H
    d = tl.arange(0, VALUE_DIM)[None, :]
    inside = (row < rows)[:, None] & (d < DV)
    out = tl.load(OUT + (b * o_b + h * o_h + i * o_l)[:, None] + d, mask=inside, other=0.0).to(tl.float32)
    do = tl.load(DO + (b * do_b + h * do_h + i * do_l)[:, None] + d, mask=inside, other=0.0).to(tl.float32)
    den = tl.load(DEN + row, mask=row < rows, other=1.0)
    tl.store(W + row, 1.0 / den, mask=row < rows)
    tl.store(Y0 + row, -tl.sum(out * do, 1), mask=row < rows)
