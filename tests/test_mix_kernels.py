"""DAPE's Triton kernels where a call takes many cells of the scratch, in 16 bits, and how much scratch they take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from calls import triton
from dape_cases import CASES, Case
from test_dape import check
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.triton
# Of the interpreter's time, not of the kernels: a case takes seconds there.
CELLS = {
    "causal": Case(heads=2, queries=75, keys=75, batch=1),
    "window, padding": Case("tisa", heads=2, queries=75, keys=90, window=(20, 3), causal=False, mask="gaps", batch=2),
    "FIRE": Case("fire", heads=2, queries=70, keys=70, batch=1),
    "V2": Case(heads=2, queries=50, keys=50, kernel_size=7, batch=1),
    "V2, FIRE, window": Case("fire", heads=2, queries=50, keys=70, kernel_size=3, window=(30, 0), batch=1),
    "published": Case("none", heads=2, queries=50, keys=50, kernel_size=5, published=True, batch=1),
}


@pytest.fixture
def small_cells(monkeypatch):
    from posattn.kernels import mix_cells

    monkeypatch.setattr(mix_cells, "SCRATCH", 1)
    monkeypatch.setattr(mix_cells, "GRAIN", 32)


@pytest.mark.parametrize("name", CELLS)
def test_cells_make_up_the_matrix(name, small_cells, monkeypatch):
    monkeypatch.setitem(CASES, name, CELLS[name])
    check(name, triton, torch.float32, 3e-5 if torch.cuda.is_available() else 1e-5)


def test_the_same_bits_again_with_many_cells(small_cells):
    tensors, module, keywords = CELLS["FIRE"].make(torch.float32)
    runs = []
    for _ in range(2):
        out = triton(*tensors, module, **keywords)
        runs.append([out, *torch.autograd.grad(out.sin().sum(), [*tensors, *module.parameters()])])
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def eager(query, key, value, module, is_causal, **_):
    """As the authors' code: products, the network and its input in the tensors' dtype; the softmax in fp32."""
    length, taps = query.shape[2], module.kernel_size
    dtype, middle = query.dtype, module.kernel_size // 2
    past = torch.ones(length, length, dtype=torch.bool).tril()
    score = query @ key.mT * query.shape[3] ** -0.5
    bias = module.base.dense(length, length).expand(score.shape)
    image = torch.cat([score, bias.to(dtype)], 1).masked_fill(~past, 0)
    def convolved(image, weight, bias):
        wide = F.pad(image, (middle, middle))
        columns = torch.cat([wide[..., t : t + length] for t in range(taps)], 1)
        weight = weight.permute(0, 2, 1).flatten(1).to(dtype)
        return torch.einsum("oc,bcij->boij", weight, columns) + bias.to(dtype)[:, None, None]

    image = F.leaky_relu(convolved(image, module.first_weight, module.first_bias), 0.01)
    image = image.masked_fill(~past, 0) if taps > 1 else image
    image = convolved(image, module.second_weight, module.second_bias)
    weight = (score.float() + bias + image.float()).masked_fill(~past, -torch.inf).softmax(-1)
    return weight.to(dtype) @ value


@pytest.mark.parametrize(("kernel_size", "length", "seeds"), [(1, 48, 4), (3, 32, 2)])
def test_16_bits_at_most_twice_the_error_of_eager(kernel_size, length, seeds):
    """fp16: the interpreter has no products of bf16. Root mean squares over seeds, for KERPLE's parameters are few."""
    case = Case(heads=4, queries=length, keys=length, dim=16, value_dim=16, hidden=32, kernel_size=kernel_size)

    def run(call, tensors, module, grad, keywords):
        out = call(*tensors, module, **keywords)
        inputs = [*tensors, *(p for name, p in module.named_parameters() if name != "second_bias")]  # whose is 0
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    sums = torch.zeros(3, 9, dtype=torch.float64)
    for seed in range(seeds):
        torch.manual_seed(seed)
        tensors, module, keywords = case.make(torch.float32)
        halves = [t.detach().half().requires_grad_() for t in tensors]
        exact = case.module(torch.float64)
        exact.load_state_dict(module.state_dict())
        doubles = [t.detach().double().requires_grad_() for t in halves]
        grad = torch.randn_like(halves[0])
        oracle = lambda q, k, v, module, **more: case.oracle([q, k, v], module, more)[0]
        truth = run(oracle, doubles, exact, grad, keywords)
        plain = run(eager, halves, module, grad, keywords)
        ours = run(triton, halves, module, grad, keywords)
        for number, (a, b, t) in enumerate(zip(ours, plain, truth)):
            sums[:, number] += torch.stack([(a - t).square().sum(), (b - t).square().sum(), t.square().sum()])
    error, allowed, size = sums.sqrt().detach()
    assert (error <= 2 * allowed + 2**-11 * size).all(), (error / size, allowed / size)


class Allocations(TorchDispatchMode):
    """Bytes of what factory functions make on the meta device."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name in ("empty", "zeros", "new_empty", "new_zeros", "empty_strided", "empty.memory_format"):
            self.made.append(out.nbytes)
        return out


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("fire", [False, True], ids=["table", "FIRE"])
def test_scratch_stays_below_64_megabytes(fire, kernel_size, monkeypatch):
    """At H = 16, whatever the length; what has the size of the arguments or their gradients is not scratch."""
    import triton as compiler

    from posattn.kernels import configs, mix_launch

    monkeypatch.setattr(configs, "arch", lambda device: "sm_90")
    for name in dir(mix_launch):
        if isinstance(getattr(mix_launch, name), compiler.runtime.interpreter.InterpretedFunction):
            monkeypatch.setattr(mix_launch, name, NoLaunch())
    heads, dim, units = 16, 128, 32
    totals = []
    for length in (8192, 32768, 131072):
        q = meta(1, heads, length, dim).to(torch.bfloat16)
        weights = meta(units, 2 * heads, kernel_size), meta(units), meta(heads, units, kernel_size), meta(heads)
        base = dict.fromkeys(("table", "line", "rows", "first", "last", "last_bias"))
        if fire:
            base.update(line=meta(2 * length - 1), rows=meta(length), first=meta(2, 32), last=meta(heads, 32))
            base.update(last_bias=meta(heads))
        else:
            base.update(table=meta(heads, 2 * length - 1))
        call = dict(key_mask=None, scale=0.1, shift=0, left=-1, right=0, negative_slope=0.01, published=False, **base)
        need = dict.fromkeys(("need_q", "need_kv", "need_weights", "need_base"), True)
        with Allocations() as forward:
            mix_launch.forward(q, q, q, *weights, **call, keep_rest=True)
        with Allocations() as backward:
            mix_launch.backward(q, None, q, q, q, q, meta(1, heads, length), q, *weights, **call, **need)
        # Tensors like the arguments, their fp32 sums, rows and tables aside: these are results.
        results = {n * heads * length * dim for n in (2, 4)}, {4 * heads * length}, {4 * heads * (2 * length - 1)}
        results = set().union(*results)
        totals += [sum(size for size in seen.made if size not in results) for seen in (forward, backward)]
    assert max(totals) <= 64 << 20, totals


def meta(*shape):
    return torch.empty(shape, device="meta")


class NoLaunch:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def test_too_many_channels_are_refused():
    from posattn import DAPE, FIRE, attention

    query, module = torch.randn(1, 64, 4, 8), DAPE(64, FIRE(64), hidden=128)
    with pytest.raises(ValueError, match=r"sum to at most [0-9]+, got 224"):
        triton(query, query, query, module)
    attention(query, query, query, module)
