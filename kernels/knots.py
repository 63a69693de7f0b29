"""A piecewise linear function's knots inside of a tile, one after the other, for every score of the tile.

Knots are fp32 quadruples in memory whose last two numbers are the jump of the slope there and the place t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import ASM_LOADS


@triton.constexpr_function
def walk(step, pack):
    """PTX: `step` for every knot inside (its jump in g, minus its place in t) and score, and its constraints."""
    n = range(pack)
    steps = "\n".join(
        step.replace("%out", f"${m}").replace("%line", f"${2 * pack + m}").replace("%factor", f"${3 * pack + m}")
        for m in n
    )
    start = "\n".join(f"mov.f32 ${m}, ${pack + m};" for m in n)
    asm = f"""{{
        .reg .pred more; .reg .s32 left; .reg .s64 knot; .reg .f32 g; .reg .f32 t; .reg .f32 d;
        {start}
        mov.s64 knot, ${4 * pack};
        mov.s32 left, ${5 * pack};
        setp.lt.s32 more, left, 1;
        @more bra.uni DONE;
    NEXT:
        ld.global.nc.v2.f32 {{g, t}}, [knot+8];
        neg.f32 t, t;
        {steps}
        add.s64 knot, knot, 16;
        sub.s32 left, left, 1;
        setp.gt.s32 more, left, 0;
        @more bra.uni NEXT;
    DONE:
    }}"""
    return asm, ",".join(["=&f"] * pack + ["f"] * 3 * pack + ["l"] * pack + ["r"] * pack)


@triton.constexpr_function
def per_thread(shape, threads):
    return min(16, shape[0] * shape[1] // threads)


HINGE = tl.constexpr("fma.rn.f32 d, %line, %factor, t; max.f32 d, d, 0f00000000; fma.rn.f32 %out, g, d, %out;")
STEP = tl.constexpr(
    "fma.rn.f32 d, %line, %factor, t; set.gt.f32.f32 d, d, 0f00000000;"
    " mul.f32 d, d, %factor; fma.rn.f32 %out, g, d, %out;"
)


@triton.jit
def over_knots(start, line, factor, knot, inside, KIND: tl.constexpr):
    """With x = line * factor, start + the sum over the knots inside of jump * max(x - t, 0): HINGE.

    STEP: of jump * factor * (x > t), the derivative by line. A loop of Triton's own would keep the loop over keys,
    which it stands in, from being pipelined; branches make the compiler compute the tile twice, in two layouts. So
    the loop is assembly, 16 scores at a time.
    """
    if ASM_LOADS:
        PACK: tl.constexpr = per_thread(line.shape, tl.extra.cuda.num_threads())
        CODE: tl.constexpr = walk(KIND, PACK)
        return tl.inline_asm_elementwise(
            CODE[0], CODE[1], [start, line, factor, knot.to(tl.int64), inside],
            dtype=tl.float32, is_pure=True, pack=PACK,
        )  # fmt: skip
    else:
        total = start + tl.zeros_like(line)
        for n in tl.range(0, inside):
            beyond = line * factor - tl.load(knot + 4 * n + 3)
            if KIND == HINGE:
                total += tl.load(knot + 4 * n + 2) * tl.maximum(beyond, 0.0)
            else:
                total += tl.where(beyond > 0.0, tl.load(knot + 4 * n + 2) * factor, 0.0)
        return total
