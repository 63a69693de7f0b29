"""A bias computed for each query: l = s + R[b, h, i, i - j], in the kernels, forward and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernel_cases import DEVICE, Case, call, check, error, expected, make

from posattn.kernels import configs

pytestmark = pytest.mark.triton

CASES = {
    "causal": Case("relative", right=0, packed=False),
    "both directions": Case("relative", packed=False),
    "width 1": Case("relative", width=1, packed=False),
    "wider than the matrix": Case("relative", width=90, right=0, queries=((33,), (33,)), packed=False),
    "narrower than a tile": Case("relative", width=5, queries=((70,),), right=0, packed=False),
    "window, softcap, GQA": Case(
        "relative", width=33, queries=((50,),), keys=((65,),), left=20, right=3, softcap=2.0, heads=4, key_heads=2,
        packed=False,
    ),
    "more queries than keys": Case("relative", queries=((50,),), keys=((17,),), right=0, packed=False),
    "padding, sinks": Case("relative", padding=True, sinks=True, right=0, packed=False),
    "half": Case("relative", right=0, dtype=torch.float16, relative_dtype=torch.float16, packed=False),
    "half, R in fp32": Case("relative", right=0, dtype=torch.float16, packed=False),
    "R in bfloat16": Case("relative", right=0, relative_dtype=torch.bfloat16, packed=False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward_and_every_gradient(name: str) -> None:
    # The gradient of R is rounded to its dtype.
    check(CASES[name], tolerance=5e-3 if "bfloat16" in name else None)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "strided features"])
def test_any_strides(layout: str) -> None:
    case = Case("relative", right=0, packed=False)
    made = make(case)
    x = made["relative"]
    if layout == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "sliced":
        x = torch.cat([x, x], 3)[..., : case.width]
    elif layout == "strided features":
        x = torch.stack([x, x], 4)[..., 0]
    elif layout == "expanded":
        x = x[:, :, :1].expand(-1, -1, 40, -1)
    made["relative"] = x
    correct, actual = expected(case, made), call(case, made)
    for key, value in correct.items():
        assert error(actual[key], value) < 6e-6, key


def test_what_nobody_sees_has_no_gradient() -> None:
    case = Case("relative", right=0, left=9, packed=False)
    gradient = call(case, make(case))["drelative"]
    assert gradient[..., 10:].abs().max() == 0
    i, w = torch.arange(40, device=DEVICE)[:, None], torch.arange(case.width, device=DEVICE)
    assert gradient[..., (w > i)].abs().max() == 0


def test_is_the_same_bit_by_bit_and_in_order() -> None:
    case = Case("relative", right=0, packed=False)
    made = make(case)
    first, second = (call(case, made, deterministic=d) for d in (False, True))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_only_the_gradient_of_the_bias() -> None:
    case = Case("relative", packed=False)
    made = make(case)
    actual = call(case, made, need_q=False, need_kv=False)
    assert error(actual["drelative"], expected(case, made)["drelative"]) < 6e-6
    assert actual["dq"].numel() == actual["dk"].numel() == actual["dtable"].numel() == 0
    assert call(case, made, need_table=False)["drelative"].numel() == 0


@pytest.mark.parametrize("row", [(64, 32), (16, 64)])
def test_tiles_of_other_sizes(monkeypatch: pytest.MonkeyPatch, row: tuple[int, int]) -> None:
    monkeypatch.setattr(configs, "pick", lambda *_: configs.Config(*row, 4, 1))
    check(Case("relative", queries=((70,),), right=0, width=40, packed=False))
