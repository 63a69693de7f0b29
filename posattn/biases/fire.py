"""FIRE: a small network of the distance, relative to the query's position (Li et al., ICLR 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bias import Bias, Scaled, check_integer, full_precision, no_autocast


class FIRE(Bias):
    r"""Functional interpolation for relative positions: an MLP of a distance that stays between 0 and 1.

    For the offset ``o = (position of the key) - i`` from a query at position i::

        x    = log(|c| |o| + 1) / (log(|c| max(i, L) + 1) + 1e-6)          L = |multiplier * init_length|
        b[h] = sum_f last[h, f] * act(weight[f] * x + bias[f]) + last_bias[h]

    with act a ReLU, or a leaky one. Li et al., "Functional Interpolation for Relative Positions Improves Long
    Context Transformers", ICLR 2024 (arXiv 2310.04418, eq. 7 to 9); 1e-6 is that of published code. c and
    multiplier are learned, (1,) each, init_length is not; the layers start as `torch.nn.Linear` does.

    The future counts like the past, by its distance; published code gives every future key the distance 0, which
    is the same under a causal mask. The bias depends on i as well as on o: there is no `table`, and attention
    takes `scaled`, which is O(N). Before position L, negative positions included, all queries are alike.

    Args:
        num_heads: number of query heads, at least 1.
        hidden: F, width of the MLP, at least 1 (the paper takes 32).
        init_c: where c starts.
        init_length: L where it starts, at least 1.
        negative_slope: of the activation: 0 is ReLU, as published; 0.01 that of FIRE inside of DAPE.

    Raises ValueError for an argument out of these ranges.

        >>> bias = FIRE(num_heads=12)
        >>> sum(p.numel() for p in bias.parameters())
        462
        >>> bias.dense(4, 6).shape
        torch.Size([12, 4, 6])
    """

    def __init__(
        self,
        num_heads: int,
        hidden: int = 32,
        init_c: float = 0.1,
        init_length: int = 512,
        negative_slope: float = 0.0,
    ) -> None:
        super().__init__(num_heads)
        self.hidden = check_integer("hidden", hidden, minimum=1)
        self.init_c = float(init_c)
        self.init_length = check_integer("init_length", init_length, minimum=1)
        if not 0.0 <= negative_slope <= 1.0:
            raise ValueError(f"negative_slope must be between 0 and 1, got {negative_slope!r}")
        self.negative_slope = float(negative_slope)
        self.c = nn.Parameter(torch.empty(1))
        self.multiplier = nn.Parameter(torch.empty(1))
        self.first_layer = nn.Linear(1, hidden)
        self.last_layer = nn.Linear(hidden, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.c, self.init_c)
        nn.init.constant_(self.multiplier, 1.0)
        self.first_layer.reset_parameters()
        self.last_layer.reset_parameters()

    @property
    def first(self) -> Tensor:
        """(2, F): weight and bias of the first layer."""
        return torch.stack([full_precision(self.first_layer.weight)[:, 0], full_precision(self.first_layer.bias)])

    @property
    def last(self) -> Tensor:
        """(H, F): weight of the last layer."""
        return full_precision(self.last_layer.weight)

    @property
    def last_bias(self) -> Tensor:
        """(H,)."""
        return full_precision(self.last_layer.bias)

    def line(
        self, query_length: int, key_length: int, query_start: int | None = None, key_start: int | None = None
    ) -> Tensor:
        """x's numerator, ``log(|c| |o| + 1)`` at j - i + Lq - 1: (Lq + Lk - 1,); arguments as in `table`."""
        query_start, key_start = _starts(query_length, key_length, query_start, key_start)
        first = key_start - query_start - query_length + 1
        distance = (torch.arange(query_length + key_length - 1, device=self.c.device) + first).abs()
        c = full_precision(self.c).abs()
        return torch.log1p(c * distance.to(c.dtype))

    def rows(self, query_length: int, query_start: int = 0) -> Tensor:
        """One over x's denominator, for the queries at query_start and after: (Lq,)."""
        position = torch.arange(query_length, device=self.c.device) + query_start
        c, multiplier = full_precision(self.c).abs(), full_precision(self.multiplier)
        length = (multiplier * self.init_length).abs()
        return 1.0 / (torch.log1p(c * torch.maximum(position.to(c.dtype), length)) + 1e-6)

    def pieces(self) -> tuple[Tensor, Tensor]:
        """The MLP as the piecewise linear function that it is: knots (F,), coefficients (H, F + 1, 2).

        knots ascend and carry no gradient (the function is continuous, so its pieces' ends need none). With s the
        number of knots below x, ``b[h] = coefficients[h, s, 0] * x + coefficients[h, s, 1]``.
        """
        weight, bias = self.first
        with torch.no_grad():
            far = torch.finfo(weight.dtype).max
            # A unit of weight 0 is a constant: its knot is out of reach, and both of its sides are alike.
            knots = torch.where(weight == 0, far, -bias / weight).clamp(-far, far)
            knots, order = knots.sort()
            segment = torch.arange(self.hidden + 1, device=weight.device)[:, None]
            right = segment > torch.arange(self.hidden, device=weight.device)  # (F + 1, F): of this unit's knot
            w, b = weight[order], bias[order]
            active = torch.where(w == 0, b > 0, right == (w > 0))
            factor = active.to(weight.dtype).clamp(min=self.negative_slope)
        # Sums of products rather than matrix products, which are rounded to TF32 where the user allows it.
        terms = self.last[:, None, order] * factor  # (H, F + 1, F)
        slope = (terms * weight[order]).sum(-1)
        intercept = (terms * bias[order]).sum(-1) + self.last_bias[:, None]
        return knots, torch.stack([slope, intercept], dim=-1)

    def scaled(
        self, query_length: int, key_length: int, query_start: int | None = None, key_start: int | None = None
    ) -> Scaled:
        query_start, key_start = _starts(query_length, key_length, query_start, key_start)
        with no_autocast(self.c.device.type):
            line = self.line(query_length, key_length, query_start, key_start)
            return Scaled(line, self.rows(query_length, query_start), *self.pieces())

    def dense(
        self, query_length: int, key_length: int, query_start: int | None = None, key_start: int | None = None
    ) -> Tensor:
        query_start, key_start = _starts(query_length, key_length, query_start, key_start)
        with no_autocast(self.c.device.type):
            line = self.line(query_length, key_length, query_start, key_start)
            x = line.unfold(0, key_length, 1).flip(0) * self.rows(query_length, query_start)[:, None]
            return self._network(x)

    def values(self, offsets: Tensor) -> Tensor:
        raise NotImplementedError(_NOT_OF_THE_OFFSET)

    def table(
        self, query_length: int, key_length: int, query_start: int | None = None, key_start: int | None = None
    ) -> Tensor:
        raise NotImplementedError(_NOT_OF_THE_OFFSET)

    def _drawn(self, offsets: Tensor) -> Tensor:
        """As the queries up to position L see it."""
        c = full_precision(self.c).abs()
        return self._network(torch.log1p(c * offsets.abs().to(c.dtype)) * self.rows(1))

    def _network(self, x: Tensor) -> Tensor:
        """(...) -> (H, ...)."""
        weight, bias = self.first
        hidden = F.leaky_relu(x[..., None] * weight + bias, self.negative_slope)
        return F.linear(hidden, self.last, self.last_bias).movedim(-1, 0)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, hidden={self.hidden}, init_length={self.init_length}, "
            f"negative_slope={self.negative_slope}"
        )


_NOT_OF_THE_OFFSET = (
    "FIRE depends on the query's position as well as on the offset, so it has no values of the offset alone and "
    "no table; dense() gives the matrix, line(), rows() and pieces() its parts"
)


def _starts(
    query_length: int, key_length: int, query_start: int | None, key_start: int | None
) -> tuple[int, int]:
    """The positions with their defaults, checked as in `Bias.table`."""
    check_integer("query_length", query_length, minimum=1)
    check_integer("key_length", key_length, minimum=1)
    key_start = 0 if key_start is None else check_integer("key_start", key_start)
    if query_start is None:
        query_start = key_start + key_length - query_length
    return check_integer("query_start", query_start), key_start
