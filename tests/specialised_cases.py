"""Calls of attention by tensor descriptors, for the tests of their algebra and of when they are used."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from oracle import attention_oracle
from torch import Tensor

pytest.importorskip("triton")
from test_kernels import Case, problem

from posattn.kernels import configs
from posattn.kernels.descriptors import Forward
from posattn.kernels.problem import Problem

INTERPRETED = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tiles of the interpreter")
HALF = Case("table", right=0, head_dim=64, queries=40, keys=40, dtype=torch.float16)
NAN = float("nan")


def called(case: Case, sinks: Tensor | None = None, near: Tensor | None = None, **swapped: Any):
    """The call of a case, by whichever schedule, with outputs that nobody wrote; and its tensors."""
    p = problem(case)
    p.update(swapped)
    t = p["told"]
    made = Problem(
        p["q"], p["k"], p["v"], t["table"], t["support"], t["slopes"], None, None, t["key_mask"], t["scale"],
        t["softcap"], t["shift"], t["left"], t["right"], t["symmetric"], None, None,
    )  # fmt: skip
    out = torch.full_like(p["q"], NAN)
    return Forward(made, out, torch.full(out.shape[:3], NAN, device=out.device), sinks, near, t["slopes"]), p


def expected(case: Case, p: dict[str, Any]) -> tuple[Tensor, Tensor]:
    out, lse = attention_oracle(
        p["q"], p["k"], p["v"], p["bias"], scale=p["told"]["scale"], left=case.left, right=case.right, shift=p["shift"]
    )
    return out.detach(), lse.detach()


def row(schedule: str, block_m: int = 32, block_n: int = 16) -> configs.Config:
    return configs.Config(block_m, block_n, 4, 1, schedule=schedule)
