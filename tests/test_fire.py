"""FIRE, which depends on the query's position too: both backends against the MLP written out in float64."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from calls import TRITON, blockwise, gradients, qkv, same
from oracle import attention_oracle

import posattn
from posattn import FIRE, attention, attention_reference, ops

SLOPES = pytest.mark.parametrize("negative_slope", [0.0, 0.01])


def make(heads=3, init_length=6, knots=True, **options) -> FIRE:
    """With knots inside the unit interval, where x is, for more than the usual quarter of the units."""
    torch.manual_seed(heads)
    bias = FIRE(heads, init_length=init_length, **options)
    with torch.no_grad():
        bias.multiplier.fill_(1.1)  # no position stands on the maximum's kink
        if knots:
            bias.first_layer.bias.copy_(-bias.first_layer.weight[:, 0] * torch.rand(bias.hidden) * 1.5)
    return bias


def expected_dense(bias, queries, keys, query_start=None, key_start=0):
    query_start = key_start + keys - queries if query_start is None else query_start
    positions = torch.arange(queries) + query_start, torch.arange(keys) + key_start
    first = bias.first_layer.weight[:, 0], bias.first_layer.bias
    last = bias.last_layer.weight, bias.last_layer.bias
    options = dict(init_length=bias.init_length, negative_slope=bias.negative_slope)
    return oracle.fire(bias.c, bias.multiplier, first, last, positions, **options)


# ------------------------------------------------------------------------------------------ the module


@SLOPES
@pytest.mark.parametrize("place", [(9, 9), (5, 14), (14, 5), (4, 30, 40), (6, 8, -5), (6, 8, -3, -9)])
def test_dense_is_the_formula(place, negative_slope):
    bias = make(negative_slope=negative_slope).double()
    got, expected = bias.dense(*place), expected_dense(bias, *place)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(got)
    parameters = list(bias.parameters())
    got, expected = (torch.autograd.grad((d * weight).sum(), parameters) for d in (got, expected))
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(
        bias.float().dense(*place), bias.double().dense(*place).float(), atol=1e-5, rtol=1e-5
    )


@SLOPES
def test_pieces_are_the_network(negative_slope):
    bias = make(negative_slope=negative_slope, knots=False).double()
    with torch.no_grad():
        bias.first_layer.weight[3:7] = 0.0  # constants, on, off and at the kink
        bias.first_layer.bias[3:7] = torch.tensor([0.4, -0.4, 0.0, 1e-3])
        bias.first_layer.weight[7], bias.first_layer.weight[8] = 1e-310, -1e-310
        bias.first_layer.weight[9], bias.first_layer.bias[9] = 1.0, 0.0
        bias.first_layer.weight[10:12], bias.first_layer.bias[10:12] = 0.5, -0.25  # two knots at one place
    knots, pieces = bias.pieces()
    assert (knots.diff() >= 0).all()
    assert knots.isfinite().all()
    assert not knots.requires_grad
    x = torch.cat([torch.linspace(0, 1.7, 500, dtype=torch.float64), knots[(knots > 0) & (knots < 9)]])
    segment = (knots < x[:, None]).sum(1)
    got = pieces[:, segment, 0] * x + pieces[:, segment, 1]
    hidden = torch.nn.functional.leaky_relu(bias.first_layer(x[:, None]), negative_slope)
    expected = bias.last_layer(hidden).T
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn(3, 500, dtype=torch.float64)
    weight[:, 0] = 0  # x = 0 is the kink of unit 9
    got, expected = (
        torch.autograd.grad((b[:, :500] * weight).sum(), [*bias.first_layer.parameters(), bias.last_layer.weight])
        for b in (got, expected)
    )
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_starts_as_published():
    bias = FIRE(12)
    assert bias.c.item() == pytest.approx(0.1)
    assert bias.multiplier.item() == 1.0
    assert (bias.init_length, bias.hidden, bias.negative_slope) == (512, 32, 0.0)
    assert sum(p.numel() for p in bias.parameters()) == 462
    assert bias.first.shape == (2, 32)
    assert bias.last.shape == (12, 32)
    assert bias.last_bias.shape == (12,)


def test_is_not_of_the_offset_alone():
    bias = FIRE(2)
    for call in (lambda: bias.table(4, 4), lambda: bias.values(torch.arange(3))):
        with pytest.raises(NotImplementedError, match="depends on the query's position"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(hidden=0), "hidden"), (dict(init_length=0.5), "init_length"), (dict(negative_slope=-1), "negative_slope")],
)
def test_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        FIRE(2, **options)


def test_plot_draws_the_queries_up_to_the_threshold():
    pytest.importorskip("matplotlib").use("Agg")
    bias = make(init_length=20)
    lines = bias.plot(max_distance=5).get_lines()
    dense = bias.dense(1, 11, 7, 2)[:, 0]
    for line, values in zip(lines, dense):
        torch.testing.assert_close(torch.tensor(line.get_ydata(), dtype=torch.float32), values, atol=1e-6, rtol=1e-6)


def test_bfloat16_modules_and_autocast_keep_precision():
    bias = make()
    scaled = bias.scaled(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        for got, expected in zip((*bias.scaled(5, 7), bias.dense(5, 7)), (*scaled, bias.dense(5, 7))):
            assert got.dtype == torch.float32
            assert torch.equal(got, expected)
    assert all(part.dtype == torch.float32 for part in bias.bfloat16().scaled(5, 7))


# -------------------------------------------------------------------------------------------- attention

PLACES = {
    "square": dict(),
    "causal": dict(is_causal=True),
    "late queries": dict(queries=20, keys=45, is_causal=True),
    "early keys": dict(queries=45, keys=20),
    "far away": dict(queries=20, keys=33, query_start=60, key_start=40),
    "before zero": dict(queries=18, keys=17, query_start=-9, key_start=-20),
    "window": dict(queries=40, keys=37, window=(9, 4)),
    "padding": dict(queries=21, keys=35, padding=True, is_causal=True),
    "softcap": dict(queries=33, keys=40, softcap=2.0),
    "grouped": dict(queries=17, keys=35, heads=4, key_heads=2, enable_gqa=True, is_causal=True),
    "one query": dict(queries=1, keys=40, is_causal=True),
    "wide": dict(queries=19, keys=40, dim=12, value_dim=20, hidden=5),
    "late threshold": dict(batch=1, queries=40, keys=45, init_length=100, is_causal=True),
}


def places(call, mark=()):
    """Every place with both slopes, or, where a case takes seconds, with one of them in turn."""
    for n, place in enumerate(PLACES):
        for slope in (0.0, 0.01)[n % 2 : n % 2 + 1] if mark else (0.0, 0.01):
            yield pytest.param(call, place, slope, marks=mark, id=f"{call.__name__}-{place}-{slope}")


@pytest.mark.parametrize(
    ("call", "place", "negative_slope"),
    [*places(blockwise), *places(attention_reference), *places(TRITON.values[0], pytest.mark.triton)],
)
def test_attention_and_every_gradient(call, place, negative_slope):
    settings = {"batch": 2, "queries": 37, "keys": 37, "heads": 3, **PLACES[place]}

    def taken(*names):
        return {name: settings.pop(name) for name in names if name in settings}

    sizes = taken("batch", "queries", "keys", "heads", "key_heads", "dim", "value_dim")
    options = taken("hidden", "init_length")
    bias = make(sizes["heads"], negative_slope=negative_slope, **options)
    tensors = qkv(**sizes)
    if settings.pop("padding", False):
        mask = torch.rand(2, sizes["keys"]) > 0.3
        mask[0, : sizes["keys"] // 2] = False
        settings["key_padding_mask"] = mask
    got = call(*tensors, bias, return_lse=True, **settings)

    key_start = settings.get("key_start", 0)
    query_start = settings.get("query_start", key_start + sizes["keys"] - sizes["queries"])
    dense = expected_dense(bias, sizes["queries"], sizes["keys"], query_start, key_start)
    left, right = settings.get("window", (-1, 0 if settings.get("is_causal") else -1))
    expected = attention_oracle(
        *tensors, dense, left=left, right=right, shift=key_start - query_start,
        softcap=settings.get("softcap"), key_padding_mask=settings.get("key_padding_mask"),
    )  # fmt: skip
    same(got, expected, [*tensors, *bias.parameters()], atol=1e-5, rtol=1e-5)


@SLOPES
def test_gradcheck(negative_slope):
    bias = make(2, hidden=5, negative_slope=negative_slope).double()
    names, parameters = zip(*((n, p.detach().clone().requires_grad_()) for n, p in bias.named_parameters()))
    tensors = qkv(1, 2, queries=5, keys=9, dim=3, dtype=torch.float64)

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = bias

        def forward(self, *tensors):
            return attention(*tensors, self.bias, is_causal=True, query_start=5, key_start=1, return_lse=True)

    def call(query, key, value, *parameters):
        named = {f"bias.{n}": p for n, p in zip(names, parameters)}
        return torch.func.functional_call(Call(), named, (query, key, value))

    assert torch.autograd.gradcheck(call, (*tensors, *parameters))


@pytest.mark.parametrize("call", [blockwise, TRITON])
@pytest.mark.parametrize("wanted", ["c", "multiplier", "first_layer.weight", "last_layer.bias"])
def test_one_parameter_alone(call, wanted):
    bias = make()
    for name, parameter in bias.named_parameters():
        parameter.requires_grad_(name == wanted)
    tensors = [t.detach() for t in qkv(queries=20, keys=25)]
    parameter = bias.get_parameter(wanted)
    (got,) = gradients(call(*tensors, bias, is_causal=True), [parameter])
    (expected,) = gradients(attention_reference(*tensors, bias, is_causal=True), [parameter])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("call", [blockwise, TRITON])
def test_fixed_order_repeats_bit_by_bit(call):
    bias, tensors = make(), qkv(batch=1, queries=35, keys=45)
    inputs = [*tensors, *bias.parameters()]
    expected = gradients(attention_reference(*tensors, bias, is_causal=True), inputs)
    try:
        torch.use_deterministic_algorithms(True)
        first, second = (gradients(call(*tensors, bias, is_causal=True), inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    torch.testing.assert_close(first, expected, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("case", ["default", "no knots", "many knots", "constant", "c = 0"])
@pytest.mark.parametrize("call", [blockwise, TRITON])
def test_networks_of_any_shape(call, case):
    bias = make(hidden={"many knots": 48}.get(case, 32), knots=case not in ("default", "no knots"))
    with torch.no_grad():
        if case == "no knots":
            bias.first_layer.bias.fill_(-5.0)
        elif case == "constant":
            bias.first_layer.weight.zero_()
        elif case == "c = 0":
            bias.c.zero_()
        if case == "many knots":  # all of them in one tile
            bias.first_layer.bias.copy_(-bias.first_layer.weight[:, 0] * torch.linspace(0.1, 0.9, 48))
    tensors = qkv(queries=20, keys=40)
    got = call(*tensors, bias, return_lse=True)
    expected = attention_oracle(*tensors, expected_dense(bias, 20, 40), shift=-20)
    inputs = [*tensors, *(p for p in bias.parameters() if case != "constant" or p is not bias.first_layer.weight)]
    same(got, expected, inputs if case != "c = 0" else tensors, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "dtype"),  # the interpreter does not know bfloat16
    [
        (blockwise, torch.bfloat16),
        (blockwise, torch.float16),
        pytest.param(*TRITON.values, torch.float16, marks=pytest.mark.triton),
    ],
)
def test_half_precision(call, dtype):
    bias, tensors = make(), [t.detach().to(dtype).requires_grad_() for t in qkv(1, queries=25, keys=35)]
    got = call(*tensors, bias, is_causal=True, return_lse=True)
    expected = attention_oracle(*tensors, expected_dense(bias, 25, 35), shift=-10, right=0)
    same(got, expected, [*tensors, *bias.parameters()], atol=3e-2, rtol=3e-2)


# -------------------------------------------------------------------------------------------- operators


def operator_arguments(backend, **like):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    query, key, value = (torch.randn(2, h, n, 8, device=device) for h, n in ((4, 5), (2, 7), (2, 7)))
    parts = (part.detach().to(device) for part in make(4, hidden=5).scaled(5, 7))
    return (query, key, value, None, None, None, *parts, None, 0.3, 0.0, -2, 4, 0, True, backend)


@pytest.mark.parametrize("backend", ["blockwise", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, False, True)])
def test_opcheck(backend, need):
    arguments = operator_arguments(backend)
    torch.library.opcheck(ops.attend_forward, arguments)
    query, key, value, *bias = arguments[:10]
    out, lse = ops.attend_forward(*arguments)
    grads = torch.randn_like(out), torch.randn_like(lse)
    arguments = (*grads, query, key, value, out, lse, *bias, *arguments[10:17], False, *need, True, backend)
    torch.library.opcheck(ops.attend_backward, arguments)
    shapes = [t.shape if t is not None else (0,) for t in (query, key, value, bias[0], bias[3], bias[4], bias[6])]
    needed = (need[0], need[1], need[1], *(need[2],) * 4)
    for grad, shape, wanted in zip(ops.attend_backward(*arguments), shapes, needed):
        assert grad.shape == (shape if wanted else (0,))


def test_compiles_without_a_break():
    bias, tensors = make(), qkv(queries=12)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(*tensors):
        return attention(*tensors, bias, is_causal=True)

    inputs = [*tensors, *bias.parameters()]
    got, expected = call(*tensors), attention(*tensors, bias, is_causal=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got, inputs), gradients(expected, inputs))


def test_a_second_derivative_is_refused():
    bias, tensors = make(), qkv()
    (first,) = torch.autograd.grad(attention(*tensors, bias).sin().sum(), [bias.c], create_graph=True)
    with pytest.raises(RuntimeError, match=r"posattn\.attention has no second derivative"):
        first.sum().backward()


def test_is_copied_with_its_parameters():
    bias = make()
    again = FIRE(3, init_length=6)
    again.load_state_dict(bias.state_dict())
    expected = bias.dense(4, 9)
    assert torch.equal(again.dense(4, 9), expected)
    assert torch.equal(copy.deepcopy(bias).dense(4, 9), expected)
    with torch.device("meta"):
        empty = FIRE(3)
    assert empty.to_empty(device="cpu").reset_parameters() is None
    assert torch.isfinite(empty.dense(3, 3)).all()


def test_nothing_to_attend_to():
    for queries, keys in ((0, 5), (5, 0)):
        query, key = torch.randn(1, 3, queries, 8), torch.randn(1, 3, keys, 8)
        assert not attention(query, key, key, make()).any()


def test_memory_grows_with_the_length():
    """A matrix of biases would be 256 MiB here, and its hidden layer 32 times that."""
    tensors = qkv(1, 1, queries=8192)
    bias, largest = make(1), 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    with Largest():
        posattn.attention(*tensors, bias, is_causal=True).sum().backward()
    assert largest < 20 * 2**20
