"""The contract of a rule: how a tile of scores depends on where its queries and keys stand.

A kernel is handed one rule, a flat NamedTuple of jit functions (as field defaults) and of the rule's own pointers and
numbers. The kernels are written once and never ask which rule they got; a rule never meets a softmax or a loop.

    setup(rule, b, h, row, end)         scalars of batch entry b and head h, loaded once a program, handed back as S
    row_term(rule, h, i, m0, origin)    a vector added to every logit of row i; costs nothing per score
    rows(rule, h, i, m0, origin)        what else depends on the query only, shaped like i, handed back as R
    cols(rule, h, j, n0, origin)        what depends on the key only, shaped like j, handed back as C
    score(s, scale, S, R, C, j, first, last, rule)
                                        raw scores -> s * scale + bias, base 2, elementwise
    start(rule, BLOCK_M)                the state with which a program starts its reduction of gradients
    table(ds, dl, T, S, R, m0, n0, first, last, h, rule, PRECISION)
                                        reduce a [BLOCK_M, BLOCK_N] tile of logit gradients, ds in fp32 and dl rounded
                                        to the tensors' dtype, into the state T and into memory; the new state
    finish(T, S, R, rule, head, n, row, length)
                                        write the state: sums of the whole program to place [head, n], its own alone;
                                        sums of its rows, of which `length` exist, to [row :] of all rows [B, H, Lq]
    along(ds, S, R, j, first, last, rule)
                                        what of a tile of logit gradients goes to its diagonals

i and j are positions: with packed sequences (sequences.py) they count from the start of the sequence, and its last
query stands on its last key. Position i is row `row` + i of the tensors' batch entry, for i < `end`, which may lie
inside of a tile. (m0, n0) is the corner of the tile; i and j arrive broadcast-shaped: [BLOCK_M, 1] and [1, BLOCK_N]
where a program owns queries, [1, BLOCK_M] and [BLOCK_N, 1] where it owns keys (its tile of scores is transposed), so
that one function serves every kernel.
`first` and `last` are the smallest and largest j - i of the tile, scalars, for rules that do less on some tiles.
`origin` is where the program's own tile starts: differences are taken from it, so that fp32 holds them exactly.
A rule may have `lift` instead of None, called like `score`, for scales above 0: raw scores -> raw scores and one number
in base 2 for the whole tile, logit = score * scale + lift. Then a constant costs nothing per score.
`start`, `table` and `finish` are called by one kernel only (backward_rows.py), `along` by backward_diagonals.py. Hooks
read tiles of memory through `load_scattered` only. A rule that leaves its scores alone sets `unscaled`: the scale then
joins the exponent for free.

Triton 3.6 shapes this file: the tuple must be flat, and a jit function returns () where it has nothing to return.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def no_setup(rule, b, h, row, end):
    return ()


@triton.jit
def no_row_term(rule, h, i, m0, origin):
    return 0.0


@triton.jit
def nothing(rule, h, x, x0, origin):
    return ()


@triton.jit
def scaled_score(s, scale, S, R, C, j, first, last, rule):
    return s * scale


@triton.jit
def no_start(rule, BLOCK_M: tl.constexpr):
    return ()


@triton.jit
def no_table(ds, dl, T, S, R, m0, n0, first, last, h, rule, PRECISION: tl.constexpr):
    return T


@triton.jit
def no_finish(T, S, R, rule, head, n, row, length):
    pass


@triton.jit
def all_along(ds, S, R, j, first, last, rule):
    return ds


class Plain(NamedTuple):
    """No bias: logits are the scaled scores."""

    unscaled: Any = 1
    lift: Any = None
    setup: Any = no_setup
    row_term: Any = no_row_term
    rows: Any = nothing
    cols: Any = nothing
    score: Any = scaled_score
    start: Any = no_start
    table: Any = no_table
    finish: Any = no_finish
    along: Any = all_along
