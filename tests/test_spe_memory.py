"""The memory of linear attention with SPE: neither codes nor scores are ever whole."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from test_blockwise import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from posattn import ConvSPE, Favor, SineSPE, linear_attention, linear_blockwise, spe_blockwise


class Largest(TorchDispatchMode):
    """Numbers in the largest storage that an operation returns.

    While an operator runs its mode is off: `see` turns it on again within the functions of these modules.
    """

    numbers = seen = 0

    def see(self, monkeypatch, *modules):
        for module in modules:
            for name in ("forward", "backward", "sine_forward", "sine_backward", "conv_forward", "conv_backward"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, functools.partial(self.within, getattr(module, name)))

    def within(self, function, *args, **kwargs):
        self.seen += 1
        with self:
            return function(*args, **kwargs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


MEMORY = {
    "none": (lambda: None, "elu"),
    "sine": (lambda: SineSPE(2, 16, 5, 32), "elu"),
    "sine, favor": (lambda: SineSPE(2, 16, 5, 32), Favor(32, 32)),
    "conv": (lambda: ConvSPE(2, 16, 33, 32), "relu"),
    "exact, favor": (lambda: SineSPE(2, 16, 5, None), Favor(11 * 16, 32)),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", MEMORY)
def test_no_tensor_is_of_the_size_of_codes_or_scores(name, causal, monkeypatch):
    """Forward and backward; the codes of queries would be N * H * D * R = 4.2e6 numbers, the scores N * N = 1.7e7."""
    made, feature_map = MEMORY[name]
    module, length = made(), 4096
    tensors = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
    mode = Largest()
    mode.see(monkeypatch, linear_blockwise, spe_blockwise)
    with mode:
        out = linear_attention(*tensors, spe=module, feature_map=feature_map, is_causal=causal)
        out.sum().backward()
    assert mode.seen == (2 if name == "none" else 4)
    assert tensors[0].numel() <= mode.numbers < length * 2 * 16 * 32 // 2
    assert all(t.grad is not None for t in tensors)


@pytest.mark.slow
@pytest.mark.parametrize(("spe", "limit"), [("SineSPE(2, 32, 5, 64)", 80), ("ConvSPE(1, 8, 16, 64)", 40)])
def test_peak_memory_of_a_process_at_8192_and_16384(spe, limit):
    """Forward and backward. Codes would be 256 MB at first with sines, 32 MB with filters; scores 256 MB a head."""
    code = f"""
import resource, torch, posattn
torch.set_num_threads(1)
module = posattn.{spe}
def peak(n):
    tensors = [torch.randn(1, module.num_heads, n, module.head_dim, requires_grad=True) for _ in range(3)]
    posattn.linear_attention(*tensors, spe=module, is_causal=True).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = peak(1024)
print(peak(8192) - start, peak(16384) - start)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    once, twice = map(float, done.stdout.split())
    assert once < limit
    assert twice < 2.4 * once + 10
