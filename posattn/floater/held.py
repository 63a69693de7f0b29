"""One solve for several forward passes of training, with the gradients of one solve a pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Held:
    """Vectors handed out as leaves: autograd adds up their gradients, and `settle` sends the sum through the solve."""

    def __init__(self) -> None:
        self.solved: list[tuple[Tensor, Tensor]] = []  # with a graph, and the leaf in its place; the longest is last

    def vectors(self, length: int, solve: Callable[[], Tensor]) -> Tensor:
        """(streams, layers, length, dim) of the solve that is held, or of a new one for more positions."""
        if not self.solved or self.solved[-1][0].shape[2] < length:
            made = solve()
            self.solved.append((made, made.detach().requires_grad_()))
        return self.solved[-1][1][:, :, :length]

    def settle(self) -> None:
        pairs = [(made, leaf.grad) for made, leaf in self.solved if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs])
