"""ALiBi: a penalty linear in the distance (Press, Smith & Lewis, ICLR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .bias import Bias, full_precision


class ALiBi(Bias):
    r"""Attention with linear biases: ``-slope[h] * |o|``, or ``slope[h] * o`` when not symmetric.

    The slopes are those of Press, Smith & Lewis, "Train Short, Test Long", ICLR 2022 (arXiv 2108.12409,
    sec. 3), and of the authors' code: ``2^(-8 (h + 1) / H)``, h = 0 .. H - 1, when H is a power of two;
    otherwise the slopes of the next lower power of two, followed by every second slope of the next higher
    one. The two forms agree under a causal mask; without one, the symmetric form punishes the future like the
    past.

    Args:
        num_heads: number of query heads, at least 1.
        learnable: make the slopes a parameter (`slope`, (num_heads,)) that starts at the published numbers.
        symmetric: ``-slope * |o|`` (True) or ``slope * o`` (False).

        >>> ALiBi(8).slopes().tolist()
        [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
        >>> ALiBi(1, symmetric=False).dense(2, 3)[0].tolist()
        [[-0.00390625, 0.0, 0.00390625], [-0.0078125, -0.00390625, 0.0]]
    """

    slope: Tensor
    decays = True

    def __init__(self, num_heads: int, learnable: bool = False, symmetric: bool = True) -> None:
        super().__init__(num_heads)
        self.learnable = learnable
        self.symmetric = symmetric
        if learnable:
            self.slope = nn.Parameter(torch.empty(num_heads))
            self.reset_parameters()
        else:
            self.register_constants(slope=_published_slopes(num_heads))

    def reset_parameters(self) -> None:
        if self.learnable:
            with torch.no_grad():
                self.slope.copy_(_published_slopes(self.num_heads))

    def values(self, offsets: Tensor) -> Tensor:
        slope = full_precision(self.slope)[:, None]
        return -slope * offsets.abs() if self.symmetric else slope * offsets

    def slopes(self) -> Tensor | None:
        """(H,) fp32; None while the slopes are being learned, because only `table` carries their gradient."""
        if self.slope.requires_grad and torch.is_grad_enabled():
            return None
        return self.slope.detach().float()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, learnable={self.learnable}, symmetric={self.symmetric}"


def _published_slopes(num_heads: int) -> Tensor:
    """(H,) fp32 on the CPU."""
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2.0 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")
