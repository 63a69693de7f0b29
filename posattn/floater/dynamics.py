"""The published dynamics of FLOATER's position vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..biases.bias import check_integer
from .checks import check_number


class MLPDynamics(nn.Module):
    r"""dp/dt = h(t, p) = W2 [ReLU(W1 [p; t] + b1); t] + b2, time the last input of both layers.

    Liu et al., "Learning to Encode Position for Transformer with Continuous Dynamical Model", ICML 2020 (arXiv
    2003.09229), equation 8; this network is that of the authors' translation models. Called with the scalar t and p
    (..., dim); returns dp/dt, shaped like p.

    Args:
        dim: width of the position vectors.
        hidden: width of the hidden layer; None: dim, as published.
        gain: of the Xavier-normal initial values of W2. 0: the flow starts at zero, so every position starts with the
            same vector; 1: as published, where vectors grow about e-fold in every 1.4 units of time, so that
            long sequences need a small delta_t.

    Parameters: linear1 (hidden, dim + 1) and linear2 (dim, hidden + 1), nn.Linear. Raises TypeError and ValueError
    for other arguments.
    """

    def __init__(self, dim: int, hidden: int | None = None, gain: float = 0.0) -> None:
        super().__init__()
        self.dim = check_integer("dim", dim, minimum=1)
        self.hidden = self.dim if hidden is None else check_integer("hidden", hidden, minimum=1)
        self.gain = check_number("gain", gain, zero=True)
        self.linear1 = nn.Linear(self.dim + 1, self.hidden)
        self.linear2 = nn.Linear(self.hidden + 1, self.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer, gain in ((self.linear1, 1.0), (self.linear2, self.gain)):
            nn.init.xavier_normal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor | float, p: Tensor) -> Tensor:
        made: Tensor = self.linear2(_with_time(F.relu(self.linear1(_with_time(p, t))), t))
        return made

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}"


def _with_time(x: Tensor, t: Tensor | float) -> Tensor:
    """[x; t]. Copying x costs less than cutting the weights in two, which backward pays for at their size."""
    return torch.cat([x, torch.as_tensor(t).to(x).expand(*x.shape[:-1], 1)], dim=-1)
