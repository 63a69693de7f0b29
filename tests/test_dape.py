"""DAPE and DAPE V2 against the dense oracle: results, gradients, and what tokens later in the sequence change."""

from __future__ import annotations

import pytest
import torch
from calls import blockwise
from dape_cases import BASES, CALLS, CASES, GPU, INTERPRETED, TRITON, Case

import posattn
from posattn import DAPE, attention, attention_reference, mix_blockwise


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks at the lengths of a test."""
    for name, size in (("SCRATCH", 150), ("MIN_ROWS", 2), ("MAX_ROWS", 8)):
        monkeypatch.setattr(mix_blockwise, name, size)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    size = 1 + (want.abs().max().item() if want.numel() else 0)
    got, want = (t.detach().cpu().double() / size for t in (got, want))
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("call", "dtype", "tolerance"), [*CALLS, GPU])
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name, call, dtype, tolerance):
    check(name, call, dtype, tolerance)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs them all")
@pytest.mark.parametrize(("call", "dtype", "tolerance"), [TRITON])
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_against_the_oracle(name, call, dtype, tolerance):
    check(name, call, dtype, tolerance)


def check(name, call, dtype, tolerance) -> None:
    """out, lse, and the gradients of both by everything; that of lse is NaN where a query sees nothing."""
    tensors, module, keywords = CASES[name].make(dtype)
    exact = module if dtype == torch.float64 else CASES[name].module(torch.float64)
    exact.load_state_dict(module.state_dict())
    exact_tensors = [t.detach().double().requires_grad_() for t in tensors]
    want, want_lse = CASES[name].oracle(exact_tensors, exact, keywords)
    out, lse = call(*tensors, module, return_lse=True, **keywords)
    assert out.dtype == lse.dtype == dtype
    seen = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert (out[~seen] == 0).all()
    close(out, want, tolerance)
    close(lse.masked_fill(~seen, 0), want_lse.masked_fill(~seen, 0), tolerance)

    grad, grad_lse = torch.randn_like(want), torch.randn_like(want_lse)
    inputs = [*exact_tensors, *exact.parameters()]
    results = want, want_lse.masked_fill(~seen, 0)
    expected = torch.autograd.grad(results, inputs, (grad, grad_lse), materialize_grads=True)
    grad, grad_lse = grad.to(dtype), grad_lse.to(dtype)
    grad = grad, grad_lse.masked_fill(~seen, torch.nan)
    inputs = [*tensors, *module.parameters()]
    for got, wanted in zip(torch.autograd.grad((out, lse), inputs, grad, materialize_grads=True), expected):
        close(got, wanted, 10 * tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_oracle(name):
    tensors, module, keywords = CASES[name].make(torch.float64)
    want, want_lse = CASES[name].oracle(tensors, module, keywords)
    out, lse = attention_reference(*tensors, module, return_lse=True, **keywords)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "case",
    [
        Case("none", 2, queries=5, keys=5, dim=2, value_dim=2, hidden=3),
        Case("kerple", 2, queries=4, keys=6, dim=2, value_dim=2, hidden=3, causal=False, mask="gaps"),
        Case("fire", 2, key_heads=1, queries=5, keys=5, dim=2, value_dim=3, hidden=3),
        Case("tisa", 2, queries=5, keys=5, dim=2, value_dim=2, hidden=3, kernel_size=3),
        Case("fire", 2, queries=5, keys=5, dim=2, value_dim=2, hidden=3, kernel_size=3, published=True),
        Case("alibi-learnable", 2, queries=4, keys=4, dim=2, value_dim=2, hidden=3, kernel_size=5),
    ],
)
def test_gradcheck(case):
    case = case._replace(batch=1)
    tensors, module, keywords = case.make(torch.float64)
    names = [name for name, _ in module.named_parameters()]
    seen = attention(*tensors, module, return_lse=True, **keywords)[1].isfinite()

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *tensors):
            out, lse = attention(*tensors, self.module, return_lse=True, **keywords)
            return out, torch.where(seen, lse, 0)

    def call(*inputs):
        parameters = {f"module.{name}": p for name, p in zip(names, inputs[3:])}
        return torch.func.functional_call(Call(), parameters, inputs[:3])

    assert torch.autograd.gradcheck(call, (*tensors, *module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_16_bit_at_most_twice_the_error_of_eager(dtype, kernel_size):
    case = Case("kerple", 4, queries=48, keys=48, dim=16, value_dim=16, hidden=16, kernel_size=kernel_size)
    tensors, module, keywords = case.make(torch.float32)
    tensors = [t.detach().to(dtype).requires_grad_() for t in tensors]
    want, _ = case.oracle(tensors, module, keywords)
    out = blockwise(*tensors, module, **keywords)
    assert out.dtype == dtype
    eager = attention_reference(*tensors, module, **keywords)
    grad = torch.randn_like(out)
    inputs = [*tensors, *module.parameters()]
    trios = [(out, eager, want)]
    trios += zip(
        *(
            torch.autograd.grad(o, inputs, grad.to(o.dtype), materialize_grads=True)
            for o in (out, eager, want)
        )
    )
    for got, plain, exact in trios:
        assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * (1 + exact.norm())


# --------------------------------------------------------------------------------- shorter sequences, decoding


def prefix(case: Case, call, length: int, dtype: torch.dtype):
    """(outputs of the first tokens of a run, those of a run that has no others)."""
    tensors, module, keywords = case.make(dtype)
    whole = call(*tensors, module, return_lse=True, **keywords)
    part = call(*(t[:, :, :length] for t in tensors), module, return_lse=True, **keywords)
    return torch.cat([whole[0], whole[1][..., None]], -1)[:, :, :length], torch.cat(
        [part[0], part[1][..., None]], -1
    )


@pytest.mark.parametrize(("call", "dtype", "tolerance"), [*CALLS, GPU])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("base", BASES)
def test_a_prefix_does_not_know_what_follows(base, kernel_size, call, dtype, tolerance):
    for length in (1, 2, 8, 19):
        whole, part = prefix(Case(base, kernel_size=kernel_size), call, length, dtype)
        close(whole, part, tolerance)


@pytest.mark.parametrize(("call", "dtype", "tolerance"), [*CALLS, GPU])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("base", ["none", "kerple", "fire"])
def test_the_published_form_differs_in_the_last_rows_only(base, kernel_size, call, dtype, tolerance):
    edge = kernel_size // 2
    case = Case(base, kernel_size=kernel_size, published=True, batch=1)
    whole, part = prefix(case, call, 14, dtype)
    close(whole[:, :, :-edge], part[:, :, :-edge], tolerance)
    different = (whole - part).abs().amax((0, 1, 3))[-edge:]
    assert (different > 1e-4).all()


@pytest.mark.parametrize(("call", "dtype", "tolerance"), [*CALLS, GPU])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("base", ["none", "tisa", "fire"])
def test_decoding_the_last_token(base, kernel_size, published, call, dtype, tolerance):
    """One query against all keys, in both ways of saying where it stands."""
    tensors, module, _ = Case(base, kernel_size=kernel_size, published=published).make(dtype)
    query, key, value = tensors
    whole = call(query, key, value, module, is_causal=True)
    for start in (None, key.shape[2] - 1):
        last = call(query[:, :, -1:], key, value, module, is_causal=True, query_start=start)
        close(last, whole[:, :, -1:], tolerance)


def test_key_start_and_query_start_move_together():
    case = Case("kerple", kernel_size=3)
    tensors, module, keywords = case.make(torch.float64)
    expected = attention(*tensors, module, **keywords)
    moved = attention(*tensors, module, key_start=100, **keywords)
    torch.testing.assert_close(moved, expected)


# ----------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "num_heads must be an integer of at least 1", dict(num_heads=0)),
        (ValueError, "num_heads must be an integer of at most 64, got 65", dict(num_heads=65)),
        (ValueError, "hidden must be an integer of at least 1", dict(hidden=0)),
        (ValueError, "hidden must be an integer of at most 128", dict(hidden=129)),
        (ValueError, "kernel_size must be 1, 3, 5 or 7, got 2", dict(kernel_size=2)),
        (ValueError, "kernel_size must be 1, 3, 5 or 7, got 9", dict(kernel_size=9)),
        (ValueError, "kernel_size must be 1, 3, 5 or 7, got True", dict(kernel_size=True)),
        (ValueError, "prefix_consistent must be a bool", dict(prefix_consistent=1)),
        (TypeError, "base must be a posattn.Bias or None, got Tensor", dict(base=torch.zeros(3, 5))),
        (TypeError, "base must be a posattn.Bias or None, got DAPE", dict(base=DAPE(3))),
        (ValueError, "base must have num_heads = 3 heads, got TISA with 4", dict(base=posattn.TISA(4))),
    ],
)
def test_bad_modules(error, match, options):
    with pytest.raises(error, match=match):
        DAPE(**{"num_heads": 3, **options})


@pytest.mark.parametrize("call", [attention, attention_reference])
@pytest.mark.parametrize(
    ("match", "module", "options"),
    [
        ("bias must have query's 3 heads, got DAPE with 4", DAPE(4), {}),
        ("softcap must be None with a DAPE", DAPE(3), dict(softcap=5.0)),
        ("is_causal=True and window=None", DAPE(3, prefix_consistent=False), {}),
        (
            "is_causal=True and window=None",
            DAPE(3, prefix_consistent=False),
            dict(is_causal=True, window=(3, 0)),
        ),
        ("query's device cpu, got a DAPE with a part on meta", DAPE(3).to("meta"), {}),
        ("query's device cpu, got a DAPE", DAPE(3, posattn.KERPLE(3).to("meta")), {}),
    ],
)
def test_bad_calls(call, match, module, options):
    with pytest.raises(ValueError, match=match):
        call(*Case().make(torch.float32)[0], module, **options)


def test_base_that_makes_a_wrong_table():
    class Wrong(posattn.Bias):
        def values(self, offsets):
            return torch.zeros(self.num_heads, 3)

    with pytest.raises(ValueError, match="bias must make a table of shape"):
        attention(*Case().make(torch.float32)[0], DAPE(3, Wrong(3)))


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_nothing_there(empty):
    case = Case("fire", kernel_size=3)._replace(**{empty: 0})
    tensors, module, keywords = case.make(torch.float32)
    out, lse = attention(*tensors, module, return_lse=True, **keywords)
    assert out.shape == (case.batch, 3, case.queries, 6)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    inputs = [*tensors, *module.parameters()]
    for grad in torch.autograd.grad(out.sum(), inputs, materialize_grads=True):
        assert (grad == 0).all()


def test_any_strides():
    tensors, module, keywords = Case("kerple", 4, key_heads=2, kernel_size=3).make(torch.float64)
    expected = attention(*tensors, module, **keywords)
    grads = torch.autograd.grad(expected.sin().sum(), tensors)
    for layout in (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: t.mT.contiguous().mT):
        strided = [layout(t.detach()).requires_grad_() for t in tensors]
        out = attention(*strided, module, **keywords)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), strided), grads)


def test_the_same_bits_again():
    tensors, module, keywords = Case("fire", kernel_size=3, mask="gaps").make(torch.float32)
    inputs = [*tensors, *module.parameters()]

    def run():
        out = attention(*tensors, module, **keywords)
        return out, *torch.autograd.grad(out.sin().sum(), inputs, materialize_grads=True)

    assert all(map(torch.equal, run(), run()))


def test_autocast_keeps_the_network_in_full_precision():
    tensors, module, keywords = Case("fire").make(torch.float32)
    half = [t.detach().bfloat16() for t in tensors]
    expected = attention(*half, module, **keywords)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*tensors, module, **keywords), expected)
