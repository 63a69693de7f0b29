"""Decoding's kernels ahead of time: what each compiles to, instructions and bytes a key, and a prediction.

As in aot.py the launches are written down on meta tensors instead of made. A row's "rule" says what is read beside K
and V: a bias, pages, packed heads; the tile is as many rows (16 at least) by BLOCK_N keys.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .aot import DTYPES, counted, source, written_down

KERNELS = ("decode_split", "decode_scores", "decode_mix")


class Form(NamedTuple):
    """One call of a kernel: heads, key heads, queries, and which tensors beside the cache there are."""

    heads: int = 16
    key_heads: int = 16
    queries: int = 1
    bias: str = ""  # table, slopes, strip, relative
    page: int = 0
    softcap: float = 0.0
    sinks: bool = False
    taps: int = 0  # of a DAPE


FORMS = {
    "Plain": Form(),
    "Table": Form(bias="table"),
    "Table, GQA 8": Form(key_heads=2, bias="table"),
    "Table, GQA 8, 16 queries": Form(key_heads=2, queries=16, bias="table"),
    "Table, pages of 16": Form(bias="table", page=16),
    "Slopes": Form(bias="slopes"),
    "Strip": Form(bias="strip"),
    "Relative": Form(bias="relative"),
    "Plain, GQA 8, sinks, softcap": Form(key_heads=2, softcap=30.0, sinks=True),
    "DAPE": Form(bias="table", taps=1),
    "DAPE V2": Form(bias="table", taps=3),
}
OTHERS = ("Plain", "Table, GQA 8, 16 queries", "Table, pages of 16")  # chips that are not sm_90, and fp32
LENGTH, HIDDEN, BAND = 8192, 32, 128


def launches(
    chip: str, bits: int, width: int, form: Form, batch: int = 1, length: int = LENGTH
) -> list[tuple[Any, dict[str, Any]]]:
    """(kernel, its arguments by name) of each launch of one call; nothing runs."""
    from posattn.kernels import decode_configs, decode_launch

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, queries, dtype = form.heads, form.queries, DTYPES[bits]
    q = empty(batch, heads, queries, width, dtype=dtype)
    pages = length // form.page if form.page else 0
    shape = (batch * pages, form.page, form.key_heads) if form.page else (batch, form.key_heads, length)
    k, v = (empty(*shape, width, dtype=dtype) for _ in range(2))
    call: dict[str, Any] = dict(
        block_table=empty(batch, pages, dtype=torch.int32) if form.page else None,
        seqlens=empty(batch, dtype=torch.int32), sinks=empty(heads) if form.sinks else None, key_mask=None,
        scale=width**-0.5, zero=length - 1, start=0, left=-1, right=0,
        table=empty(heads, length + queries - 1) if form.bias == "table" else None,
        strip=empty(batch, heads, queries, length) if form.bias == "strip" else None,
    )  # fmt: skip
    kept = decode_configs.multiprocessors
    decode_configs.multiprocessors = lambda device: 132  # type: ignore[assignment]
    try:
        with written_down(chip) as made:
            kept_arch, decode_launch.arch = decode_launch.arch, lambda device: chip
            try:
                if form.taps:
                    w1, w2 = empty(HIDDEN, 2 * heads, form.taps), empty(heads, HIDDEN, form.taps)
                    weights = w1, empty(HIDDEN), w2, empty(heads)
                    decode_launch.mix_forward(q, k, v, *weights, **call, published=False)
                else:
                    more = dict(slopes=empty(heads) if form.bias == "slopes" else None, softcap=form.softcap)
                    band = empty(batch, heads, queries, BAND, dtype=dtype)
                    more["relative"] = band if form.bias == "relative" else None
                    decode_launch.forward(q, k, v, **call, **more, symmetric=True)
            finally:
                decode_launch.arch = kept_arch
    finally:
        decode_configs.multiprocessors = kept
    return made


def compile_and_count(chip: str, name: str, bits: int, width: int, rule: str) -> dict[str, Any]:
    """One row of the report; a compiler's failure is in its "error", not raised."""
    form = FORMS[rule]
    kernel, arguments = next((k, a) for k, a in launches(chip, bits, width, form) if k.__name__ == name)
    block_m, block_n = arguments.get("BLOCK_M", 1), arguments["BLOCK_N"]
    row = dict(chip=chip, direction=name, bits=bits, width=width, rule=rule, block_m=block_m, block_n=block_n)
    row.update(num_warps=arguments["num_warps"], num_stages=arguments["num_stages"])
    row.update(precision=arguments["PRECISION"])
    return counted(row, kernel, arguments, block_m * block_n)


def jobs(chips: list[str] | None, everything: bool) -> list[tuple[Any, ...]]:
    """(chip, kernel, bits, width, form): all forms of sm_90 in 16 bits, else those that take most."""
    from posattn.kernels.decode_configs import DECODE

    made: list[tuple[Any, ...]] = []
    for chip, bits, width in DECODE:
        if chips is not None and chip not in chips:
            continue
        full = everything or (chip, bits) == ("sm_90", 16)
        for rule in FORMS if full else OTHERS:
            if not FORMS[rule].taps:
                made.append((chip, "decode_split", bits, width, rule))
            elif width == 128 or (bits, width) == (16, 64):
                made += [(chip, name, bits, width, rule) for name in ("decode_scores", "decode_mix")]
        if not full and (bits, width) == (16, 128):
            made += [(chip, name, bits, width, "DAPE V2") for name in ("decode_scores", "decode_mix")]
    return made


def variants(lengths: list[int], page: int = 0) -> set[tuple[str, str]]:
    """What Triton would compile for caches of these lengths, by its own key: types, divisibility, constants."""
    made = set()
    for length in lengths:
        for form in (FORMS["Table"], FORMS["DAPE"], FORMS["Strip"]):
            for kernel, arguments in launches("sm_90", 16, 64, form._replace(page=page), 2, length):
                src = source(kernel, arguments, hip=False)
                made.add((kernel.__name__, repr((src.signature, src.constants, src.attrs))))
    return made


# ----------------------------------------------------------------------------------------------- the prediction

CLOCK, MULTIPROCESSORS, BANDWIDTH = 1.755e9, 132, 4.3e12
LAUNCH, COMBINE = 2.5e-6, 3.0e-6  # of a kernel in a graph: start and end; of the combination


def bytes_per_key(form: Form, width: int) -> float:
    """Of the cache and of what is read beside it, for one key of one entry, 16 bits."""
    made = 4.0 * form.key_heads * width
    made += {"": 0, "slopes": 0, "relative": 0}.get(form.bias, 4 * form.heads)
    if form.bias == "strip":
        made += 4 * form.heads * (form.queries - 1)
    if form.page:
        made += 4 * form.key_heads * 2
    return made + 16 * form.heads * form.queries * bool(form.taps)  # scores and logits, written and read


def predict(
    form: Form, width: int, batch: int, length: int, row: dict[str, Any], splits: int
) -> dict[str, float]:
    """Seconds of decode_split with its combination, by bytes and by instructions; the longer of both counts."""
    moved = batch * length * bytes_per_key(form, width)
    programs = batch * form.key_heads * splits
    # Few programs do not fill the memory: each has two tiles under way, which take a microsecond.
    under_way = programs * 2 * row["block_n"] * 4 * width
    rate = min(BANDWIDTH, under_way / 1.0e-6)
    tiles = math.ceil(math.ceil(length / row["block_n"]) / splits) * math.ceil(programs / MULTIPROCESSORS)
    issue = tiles * row["path"] * row["num_warps"] / 4 / CLOCK
    floor = batch * length * 4.0 * form.key_heads * width / BANDWIDTH
    total = LAUNCH + max(moved / rate, issue) + (COMBINE if splits > 1 else 0)
    return dict(floor=floor, memory=moved / rate, issue=issue, total=total)


def prediction() -> str:
    """A table for a reader: one call inside of a CUDA graph."""
    lines = [
        "Decoding, predicted for an H200, not measured: one query, bf16, D 128, inside of a CUDA graph. The floor is",
        "the bytes of K and V at 4.3 TB/s; a call takes the longer of its bytes and its instructions, the start and",
        "end of its kernels (2.5 us), and 3 us more where splits are combined.",
        " B  Hq  Hk        N  bias    splits  instr/key  bytes/key  floor us  total us  floor/total",
    ]
    rows = {rule: compile_and_count("sm_90", "decode_split", 16, 128, rule) for rule in ("Plain", "Table")}
    rows |= {rule: compile_and_count("sm_90", "decode_split", 16, 128, rule) for rule in ("Table, GQA 8",)}
    for batch in (1, 8):
        for key_heads in (16, 2):
            for length in (1024, 8192, 32768, 131072):
                for rule in ("Plain", "Table"):
                    form = FORMS[rule]._replace(key_heads=key_heads)
                    row = rows[rule if key_heads == 16 or rule == "Plain" else "Table, GQA 8"]
                    call = launches("sm_90", 16, 128, form, batch, length)
                    splits = next(a["splits"] for k, a in call if k.__name__ == "decode_split")
                    made = predict(form, 128, batch, length, row, splits)
                    each = row["path"] * row["num_warps"] / row["block_n"]
                    lines.append(
                        f"{batch:2} {form.heads:3} {key_heads:3} {length:8}  {rule:6} {splits:7} {each:10.1f} "
                        f"{bytes_per_key(form, 128) / key_heads:10.0f} {made['floor'] * 1e6:9.1f} "
                        f"{made['total'] * 1e6:9.1f} {made['floor'] / made['total']:12.2f}"
                    )
    return "\n".join(lines)
