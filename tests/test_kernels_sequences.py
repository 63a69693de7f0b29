"""Packed sequences in the kernels, against a loop over the sequences in float64: every bias, gradients of all."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from kernel_cases import DEVICE, Case, call, check, make

pytestmark = pytest.mark.triton

# Two batch entries; sequences without keys, without queries and without both; more of one or of the other.
QUERIES = ((37, 0, 9), (5, 41))
KEYS = ((30, 6, 0), (20, 16))
SELF = ((37, 0, 9), (5, 41))

CASES = {
    "plain": Case(queries=QUERIES, keys=KEYS),
    "plain causal, one tensor": Case(queries=SELF, right=0),
    "plain window, GQA": Case(queries=((70, 3),), keys=((65, 40),), left=20, right=3, heads=4, key_heads=2),
    "table": Case("table", queries=QUERIES, keys=KEYS),
    "table causal, one tensor": Case("table", queries=SELF, right=0),
    "table causal": Case("table", queries=QUERIES, keys=KEYS, right=0, softcap=3.0),
    "table padding": Case("table", queries=((3, 30),), keys=((37, 14),), left=11, padding=True),
    "table, one sequence": Case("table", queries=((33,),), keys=((65,),), right=0),
    "table, half precision": Case("table", queries=SELF, right=0, dtype=torch.float16),
    "support": Case("table", queries=QUERIES, keys=KEYS, support=(-12, 5)),
    "support causal": Case("table", queries=SELF, right=0, support=(-12, 5)),
    "slopes": Case("slopes", queries=QUERIES, keys=KEYS, heads=3, key_heads=1),
    "one-sided slopes": Case("one-sided slopes", queries=QUERIES, keys=KEYS, right=0, sinks=True),
    "fire": Case("fire", queries=((20, 7),), keys=((13, 20),), heads=1, key_heads=1),
    "fire causal": Case("fire", queries=((33, 5),), right=0, heads=1, key_heads=1),
    "relative": Case("relative", queries=QUERIES, keys=KEYS, right=0),
    "relative, dropout, sinks": Case("relative", queries=QUERIES, keys=KEYS, dropout=0.4, sinks=True),
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "in order"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_every_gradient(name: str, deterministic: bool) -> None:
    if deterministic and CASES[name].bias not in ("table", "fire"):
        pytest.skip("only a table's gradient has an order")
    check(CASES[name], deterministic=deterministic)


def test_many_short_sequences() -> None:
    lengths = tuple(n % 7 for n in range(17))
    check(Case("table", queries=(lengths,), keys=(tuple(reversed(lengths)),), heads=1, key_heads=1))


def test_no_rows_at_all() -> None:
    for queries, keys in ((((0, 0),), ((3, 0),)), (((3, 0),), ((0, 0),))):
        case = Case("table", queries=queries, keys=keys)
        actual = call(case, make(case))
        assert not any(actual[n].any() for n in ("out", "dq", "dk", "dv", "dtable"))
        assert torch.all(actual["lse"] == float("-inf"))


@pytest.mark.gpu
def test_a_graph_holds_other_lengths() -> None:
    """Captured once, replayed with other boundaries in the same tensors: nothing was read on the host."""
    case = Case("table", queries=((100, 156),), head_dim=64, right=0, dtype=torch.bfloat16)
    made = make(case)
    made["sequences"] = made["sequences"]._replace(max_q=256, max_k=256)
    made["table"] = torch.randn(2, 511, device=DEVICE)
    call(case, made)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call(case, made)
    made["sequences"].cu_q[1] = 31
    graph.replay()
    for key, value in call(case, made).items():
        torch.testing.assert_close(held[key], value, atol=1e-3, rtol=1e-3)
