"""Feature maps of linear attention: what stands for the exponential of softmax, one row of features at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .biases.bias import check_integer

RELU_FLOOR = 1e-3
MAPS = ("elu", "relu")  # what the operators apply inside; besides them they know "identity"
FAVOR_FEATURES = 128


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 above 0, exp(x) below (Katharopoulos et al., 2020). Any shape and floating dtype."""
    return x.clamp(max=0).exp() + x.relu()


def relu(x: Tensor) -> Tensor:
    """relu(x) + 1e-3, as in the Long Range Arena runs of Liutkus et al. (2021). Any shape and floating dtype."""
    return x.relu() + RELU_FLOOR


def mapped_(x: Tensor, feature_map: str) -> Tensor:
    """One of MAPS or "identity", in place."""
    if feature_map == "elu":
        low = x.clamp(max=0).exp_()
        x.relu_().add_(low)
    elif feature_map == "relu":
        x.relu_().add_(RELU_FLOOR)
    return x


def times_slope_(gradient: Tensor, features: Tensor, feature_map: str) -> Tensor:
    """The gradient by features -> that by what `mapped_` made them of. Both arguments are overwritten."""
    if feature_map == "elu":
        gradient.mul_(features.clamp_(max=1))
    elif feature_map == "relu":
        gradient.masked_fill_(features <= RELU_FLOOR, 0)
    return gradient


class Favor(nn.Module):
    r"""Positive random features of the softmax kernel: ``E[phi(x) . phi(y)] = exp(x . y / sqrt(dim))``.

    Choromanski et al., "Rethinking Attention with Performers", ICLR 2021 (arXiv 2009.14794), FAVOR+::

        phi(x) = exp(W y - |y|^2 / 2) / sqrt(num_features)        y = x * dim^(-1/4)

    The rows of W are N(0, 1) vectors, drawn once from the seed; with orthogonal=True each block of dim of them is
    made orthogonal, with lengths that are drawn apart, which lowers the variance. Calling the module gives phi(x);
    as a feature_map of `posattn.linear_attention`, queries subtract the largest exponent of their row as well.

    Args:
        dim: of x: the head_dim of queries and keys, or with spe the number of its realizations (`Codes.dim`).
        num_features: M, the number of features.
        seed: equal seeds give equal projections, on every device.
        orthogonal: of the rows of W.

    Attributes:
        projection: W (num_features, dim), a buffer, float32.

    Raises ValueError for a dim or num_features below 1 and an orthogonal that is no bool.

        >>> favor = Favor(dim=16, num_features=4096)
        >>> x, y = torch.full((16,), 0.5), torch.full((16,), 0.3)
        >>> abs(favor(x) @ favor(y) / torch.exp(x @ y / 4) - 1) < 0.05
        tensor(True)
    """

    projection: Tensor

    def __init__(
        self, dim: int, num_features: int = FAVOR_FEATURES, seed: int = 0, orthogonal: bool = True
    ) -> None:
        super().__init__()
        self.dim = check_integer("dim", dim, minimum=1)
        self.num_features = check_integer("num_features", num_features, minimum=1)
        self.seed = check_integer("seed", seed)
        if not isinstance(orthogonal, bool):
            raise ValueError(f"orthogonal must be a bool, got {orthogonal!r}")
        self.orthogonal = orthogonal
        self.register_buffer("projection", self._draw().to(torch.empty(0).device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., num_features), at least float32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        exponents = favor_exponents(x @ self.projection.to(x.dtype).mT, x.square().sum(-1), self.dim)
        return exponents.exp() / math.sqrt(self.num_features)

    def _draw(self) -> Tensor:
        return draw_projection(self.dim, self.num_features, self.seed, self.orthogonal)

    def _apply(self, fn: Any, recurse: bool = True) -> Favor:
        kept = self.projection
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = self.projection
        if kept.is_meta and not moved.is_meta:  # to_empty
            self.projection = self._draw().to(moved.device)
        elif moved.dtype.itemsize < kept.dtype.itemsize:  # never rounded
            self.projection = kept.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_features={self.num_features}, seed={self.seed}, orthogonal={self.orthogonal}"


def favor_exponents(projected: Tensor, squared_norms: Tensor, dim: int) -> Tensor:
    """W y - |y|^2 / 2 of W x (..., M) and |x|^2 (...)."""
    root = math.sqrt(dim)
    return projected / math.sqrt(root) - squared_norms[..., None] / (2 * root)


def favor_features(exponents: Tensor, queries: bool) -> Tensor:
    """phi of `favor_exponents`; a query's row is divided by its largest entry, which cancels in attention."""
    if queries:
        exponents = exponents - exponents.detach().amax(-1, keepdim=True)
    return exponents.exp() / math.sqrt(exponents.shape[-1])


def draw_projection(dim: int, num_features: int, seed: int = 0, orthogonal: bool = True) -> Tensor:
    """(num_features, dim) float32 on the CPU: rows N(0, 1), orthogonal in blocks of dim if asked."""
    options: dict[str, Any] = dict(
        generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    rows = torch.randn(num_features, dim, **options)
    if orthogonal:
        blocks = torch.randn(-(-num_features // dim), dim, dim, **options)
        q, r = torch.linalg.qr(blocks)
        directions = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # unique, whatever the library
        rows = directions.flatten(0, 1)[:num_features] * rows.norm(dim=1, keepdim=True)
    return rows.float()
