"""One solve for several forward passes of training, with the gradients of one solve a pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .table import Key


class Held:
    """Vectors handed out as leaves: autograd adds up their gradients, and `settle` sends the sum through the solve.

    `key` tells what the vectors depend on.
    """

    def __init__(self, key: Callable[[], Key]) -> None:
        self.key, self.open = key, True
        self.solved: list[tuple[Tensor, Tensor, Key]] = []  # with a graph, the leaf in its place; the longest is last

    def vectors(self, length: int, solve: Callable[[], Tensor]) -> Tensor:
        """(streams, layers, length, dim) of the solve that is held, or of a new one for more positions."""
        if not self.solved or self.solved[-1][0].shape[2] < length:
            key, made = self.key(), solve()
            leaf = made.detach().requires_grad_()
            leaf.register_hook(self._arrives)
            self.solved.append((made, leaf, key))
        return self.solved[-1][1][:, :, :length]

    def settle(self) -> None:
        """The gradients of the parameters. RuntimeError if these have changed since the solve."""
        pairs = [(made, leaf.grad) for made, leaf, _ in self.solved if leaf.grad is not None]
        now = self.key().facts
        if pairs and any(key.facts != now for *_, key in self.solved):
            raise RuntimeError(
                "parameters of FLOATER have changed within a block of hold, so that its gradients belong to others: "
                "step their optimizer after the block (within it they have no gradients, and are left alone)"
            )
        if pairs:
            torch.autograd.backward([made for made, _ in pairs], [grad for _, grad in pairs])

    def _arrives(self, grad: Tensor) -> None:
        if not self.open:
            raise RuntimeError(
                "a backward pass has come after the block of hold that its forward pass was in: its gradient of "
                "FLOATER's vectors would be lost; call backward within the block"
            )
