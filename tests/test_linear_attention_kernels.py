"""The functions behind linear attention's operators, each backend's called directly, against the oracle."""

from __future__ import annotations

from typing import NamedTuple

import oracle_spe as oracle
import pytest
import torch
from spe_calls import BACKENDS, DEVICE, at_most_twice, compare, functions


class Linear(NamedTuple):
    feature_map: str = "elu"
    causal: bool = True
    queries: int = 70
    keys: int = 70
    width: int = 16
    value_dim: int = 16
    state: bool = False
    mask: str = "none"
    heads: int = 1
    batch: int = 1
    eps: float = 1e-3

    def tensors(self, dtype):
        """q, k, v and with a state its two."""
        lead = self.batch, self.heads
        made = [torch.randn(*lead, n, self.width) for n in (self.queries, self.keys)]
        if self.feature_map == "identity":
            made = [t.exp() / 2 for t in made]
        made += [torch.randn(*lead, self.keys, self.value_dim)]
        made = [t.to(dtype) for t in made]
        if self.state:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            made += [torch.randn(*lead, self.width, self.value_dim).to(wide), torch.rand(*lead, self.width).to(wide)]
        return made

    def key_mask(self):
        number = torch.arange(self.keys)
        masks = {"gaps": number % 3 != 1, "left": number > 40, "all": number < 0}
        if self.mask == "none":
            return None
        mask = masks[self.mask].repeat(self.batch, 1)
        mask[1:] = True
        return mask

    def oracle(self, q, k, v, state=None, sums=None):
        phi = {"elu": oracle.elu, "relu": oracle.relu, "identity": lambda x: x}[self.feature_map]
        more = dict(eps=self.eps, causal=self.causal, mask=self.key_mask(), state=state, sums=sums)
        return oracle.linear_oracle(phi(q.double()), phi(k.double()), v, **more)

    def rule(self, device):
        mask = self.key_mask()
        return dict(
            key_mask=None if mask is None else mask.to(device), feature_map=self.feature_map, causal=self.causal
        )

    def run(self, module, tensors, grads, need=(True, True, True)):
        """out, kv, ksum; den; the five gradients."""
        rule = self.rule(tensors[0].device)
        rule |= dict(zip(("state", "sums"), tensors[3:] if self.state else (None, None)))
        out, den, kv, ksum = module.forward(*tensors[:3], **rule, eps=self.eps, want_state=True)
        grads = [g if g is None else g.to(like) for g, like in zip(grads, (out, kv, ksum))]
        needs = dict(zip(("need_q", "need_kv", "need_state"), need))
        return (out, kv, ksum), den, module.backward(*grads, *tensors[:3], out, den, **rule, **needs)


LINEAR = {
    "causal": Linear(),
    "relu, state, gaps, two of each": Linear("relu", True, 34, 34, 16, 24, True, "gaps", heads=2, batch=2),
    "identity, full": Linear("identity", False, queries=20),
    "elu, full, state, all masked": Linear("elu", False, 33, 65, state=True, mask="all", batch=2),
    "one token after a state": Linear(queries=1, keys=1, state=True),
    "left padding": Linear("relu", mask="left"),
    "40 and 72 wide": Linear(width=40, value_dim=72, queries=34, keys=34),
    "64 wide, 127 long": Linear("relu", width=64, value_dim=8, queries=127, keys=127),
    "one wide": Linear("identity", width=1, value_dim=1, queries=17, keys=17),
    "63 long, full": Linear("elu", False, 63, 63, heads=2),
}


@BACKENDS
@pytest.mark.parametrize("name", LINEAR)
def test_linear_attention(name, backend, device, dtype, tolerance):
    case, module = LINEAR[name], functions(backend, "linear")
    tensors = case.tensors(dtype)
    exact = [t.double().requires_grad_() for t in tensors]
    want = case.oracle(*exact)
    grads = [torch.randn_like(w) for w in want]
    expected = torch.autograd.grad(want, exact, grads)
    got, den, gradients = case.run(module, [t.to(device) for t in tensors], grads)
    assert got[0].dtype == dtype and got[0].is_contiguous() and den.shape == got[0].shape[:3]
    compare(got, want, tolerance)
    compare(gradients[: len(expected)], expected, 3 * tolerance)


@BACKENDS
@pytest.mark.parametrize("given", [(True, False, False), (False, True, True)])
def test_gradients_of_some_results(given, backend, device, dtype, tolerance):
    case, module = Linear("relu", queries=40, keys=40, state=True, mask="gaps"), functions(backend, "linear")
    tensors = case.tensors(dtype)
    exact = [t.double().requires_grad_() for t in tensors]
    want = case.oracle(*exact)
    grads = [torch.randn_like(w) if here else None for w, here in zip(want, given)]
    pairs = [(w, g) for w, g in zip(want, grads) if g is not None]
    expected = torch.autograd.grad([w for w, _ in pairs], exact, [g for _, g in pairs], materialize_grads=True)
    _, _, gradients = case.run(module, [t.to(device) for t in tensors], grads)
    compare(gradients, expected, 3 * tolerance)
    _, _, some = case.run(module, [t.to(device) for t in tensors], grads, need=(False, True, False))
    assert torch.equal(some[1], gradients[1]) and torch.equal(some[2], gradients[2])


@BACKENDS
def test_large_numbers_later_do_not_touch_what_came_before(backend, device, dtype, tolerance):
    """Nor do those of queries that came before touch the gradients of later keys: sums are not differences."""
    case, module = Linear("identity"), functions(backend, "linear")
    tensors, cut = case.tensors(dtype), 41
    short = case._replace(queries=cut, keys=cut)
    grads = [torch.randn(1, 1, 70, 16).double()]
    cutting = lambda some: [t[:, :, :cut].to(device) for t in some]
    want = short.run(module, cutting(tensors), [*cutting(grads), None, None])
    for number in (1, 2):
        changed = [t.clone() for t in tensors]
        changed[number][:, :, cut:] *= 1e6
        got = case.run(module, [t.to(device) for t in changed], [grads[0], None, None])
        compare([got[0][0][:, :, :cut], got[1][:, :, :cut]], [want[0][0], want[1]], tolerance)
    exact = [t.double().requires_grad_() for t in tensors]
    grads[0][:, :, :cut] *= 1e6
    expected = torch.autograd.grad(case.oracle(*exact)[0], exact, grads[0])
    gradients = case.run(module, [t.to(device) for t in tensors], [grads[0], None, None])[2]
    compare([g[:, :, cut:] for g in gradients[1:3]], [g[:, :, cut:] for g in expected[1:3]], 3 * tolerance)


@BACKENDS
@pytest.mark.parametrize("half", [False, True])
def test_left_padding_leaves_the_other_rows_alone(half, backend, device, dtype, tolerance):
    """A query that sees nothing divides by eps: what it gives to gradients, times 0, must not drown the others'."""
    if half and backend == "blockwise":
        dtype = torch.bfloat16
    elif half:
        dtype = torch.float16
    case, module = LINEAR["left padding"]._replace(eps=1e-6), functions(backend, "linear")
    tensors = case.tensors(dtype)
    exact = [t.double().requires_grad_() for t in tensors]
    want = case.oracle(*exact)[0]
    grad = torch.randn_like(want).to(dtype).double()
    expected = torch.autograd.grad(want, exact, grad)
    got, _, gradients = case.run(module, [t.to(device) for t in tensors], [grad, None, None])
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 3 * tolerance)
    compare([got[0], *gradients[:3]], [want, *expected], tolerance)


# ------------------------------------------------------------------------------------- 16 bits, determinism


def plain_linear(case, q, k, v):
    phi = {"elu": oracle.elu, "relu": oracle.relu}[case.feature_map]
    matrix = phi(q) @ phi(k).mT
    matrix = matrix.tril() if case.causal else matrix
    return matrix @ v / (matrix.sum(-1, keepdim=True) + case.eps)


@pytest.mark.triton
@pytest.mark.parametrize("causal", [True, False])
def test_16_bit_attention_at_most_twice_the_error_of_plain(causal):
    runs, case = [], Linear("elu" if causal else "relu", causal, 65, 65)
    for seed in range(3):
        torch.manual_seed(seed)
        tensors = case.tensors(torch.float16)
        grad = torch.randn(1, 1, 65, 16).half()
        exact, eager = ([t.detach().to(w).requires_grad_() for t in tensors] for w in (torch.float64, None))
        truth, rough = case.oracle(*exact)[0], plain_linear(case, *eager)
        got, _, gradients = case.run(functions("triton", "linear"), [t.to(DEVICE) for t in tensors], [grad, None, None])
        run = [[got[0], *gradients[:3]]]
        run += [[r, *torch.autograd.grad(r, i, grad.to(r))] for r, i in ((rough, eager), (truth, exact))]
        runs.append(run)
    at_most_twice(runs)


@pytest.mark.triton
def test_the_same_bits_again():
    case, runs = LINEAR["relu, state, gaps, two of each"], []
    for _ in range(2):
        torch.manual_seed(0)
        tensors = [t.to(DEVICE) for t in case.tensors(torch.float32)]
        grads = [torch.randn(s) for s in ((2, 2, 34, 24), (2, 2, 16, 24), (2, 2, 16))]
        got, den, gradients = case.run(functions("triton", "linear"), tensors, grads)
        runs.append([*got, den, *gradients])
    assert all(map(torch.equal, *runs))
