"""The contract of a bias: how a published method says what to add to the score of a query and a key."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Scaled(NamedTuple):
    """A bias ``f_h(line[j - i + Lq - 1] * rows[i])`` with f_h piecewise linear, by its O(N) parts.

    line (Lq + Lk - 1,) is at least 0 and grows with the distance, rows (Lq,) is positive and falls with i;
    knots (F,) ascend and carry no gradient; pieces (H, F + 1, 2) hold slope and intercept: of
    s the number of knots below x, ``f_h(x) = pieces[h, s, 0] * x + pieces[h, s, 1]``, continuous.
    """

    line: Tensor
    rows: Tensor
    knots: Tensor
    pieces: Tensor


class Bias(nn.Module):
    r"""A bias that depends on the offset ``o = (position of the key) - (position of the query)`` only.

    ``score[h, i, j] = scale * q_i . k_j + values(o)[h]``; negative offsets are the past. A subclass calls
    ``super().__init__(num_heads)``, makes its parameters and writes `values`. Attention asks for `table`,
    which is O(N), and differentiates through it; nothing of size Lq x Lk exists unless `dense` is called.
    `FIRE`, which depends on the query's position too, has `scaled` in place of `values` and `table`.

    Attributes:
        num_heads: H, the number of query heads.
        symmetric: read only together with `slopes`: the bias is ``-slope * |o|`` when True, ``slope * o``
            when False.
        tails_need_grad: False when the parameters have no influence outside `support`, so that attention may
            skip the gradient of the constant tails.
        decays: True when the bias falls with the distance, without end, so that `posattn.attention` looks for keys
            that are too far away to matter (``skip_negligible``).

    A new bias in full:

        >>> import torch
        >>> class Window(Bias):
        ...     def __init__(self, num_heads):
        ...         super().__init__(num_heads)
        ...         self.strength = torch.nn.Parameter(torch.ones(num_heads))
        ...     def values(self, offsets):
        ...         return self.strength.float()[:, None] * (offsets.abs() < 2)
        >>> Window(1).dense(3, 3)[0].tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    """

    symmetric: bool = True
    tails_need_grad: bool = True
    decays: bool = False

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        check_integer("num_heads", num_heads, minimum=1)
        self.num_heads = num_heads
        self._constants: dict[str, Tensor] = {}

    def values(self, offsets: Tensor) -> Tensor:
        """The bias at each offset: (n,) int64 -> (H, n) in fp32, or in fp64 when the parameters are fp64."""
        raise NotImplementedError(f"{type(self).__name__} must define values(offsets)")

    def support(self) -> Tensor | None:
        """Per head, the first and last offset between which `values` varies: (2, H) int32; None: everywhere.

        Left of the first and right of the last offset the values are constant (up to fp32 rounding), each
        side with its own constant. first > last: constant everywhere. Lives on the parameters' device and
        never waits for it.
        """
        return None

    def slopes(self) -> Tensor | None:
        """Per head, the slope of a bias that is linear in the offset: (H,) fp32; None for all others."""
        return None

    def scaled(
        self, query_length: int, key_length: int, query_start: int | None = None, key_start: int | None = None
    ) -> Scaled | None:
        """What attention takes instead of `table`, arguments as there; None for all but biases of that form."""
        return None

    def table(
        self, query_length: int, key_length: int, query_start: int | None = None, key_start: int | None = None
    ) -> Tensor:
        """The bias of every offset that occurs: (H, Lq + Lk - 1).

        ``table[h, j - i + Lq - 1]`` is the bias of query i, at position ``query_start + i``, and key j, at
        ``key_start + j``. key_start defaults to 0, query_start to ``key_start + key_length - query_length``:
        the last query stands on the last key. fp32, or fp64 when the parameters are; autocast has no say in
        it. Raises ValueError when a length is not an integer of at least 1.
        """
        check_integer("query_length", query_length, minimum=1)
        check_integer("key_length", key_length, minimum=1)
        key_start = 0 if key_start is None else check_integer("key_start", key_start)
        if query_start is None:
            query_start = key_start + key_length - query_length
        check_integer("query_start", query_start)
        device = self._anchor().device
        offsets = torch.arange(query_length + key_length - 1, device=device)
        with no_autocast(device.type):
            return self.values(offsets + (key_start - query_start - query_length + 1)).contiguous()

    def dense(
        self, query_length: int, key_length: int, query_start: int | None = None, key_start: int | None = None
    ) -> Tensor:
        """The bias as a matrix, (H, Lq, Lk), to look at and to test; arguments and dtype as in `table`."""
        table = self.table(query_length, key_length, query_start, key_start)
        # Window s of the table holds the row of query Lq - 1 - s.
        return table.unfold(1, key_length, 1).flip(1)

    @torch.no_grad()
    def plot(self, max_distance: int = 128, ax: Axes | None = None) -> Axes:
        """Draw the bias against the offset, -max_distance to max_distance, one line a head; returns the Axes.

        Needs matplotlib (``pip install posattn[plot]``), raises ImportError without it.
        """
        check_integer("max_distance", max_distance, minimum=1)
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot() needs matplotlib: pip install posattn[plot]") from error
            ax = pyplot.subplots()[1]
        offsets = torch.arange(-max_distance, max_distance + 1, device=self._anchor().device)
        for head, values in enumerate(self._drawn(offsets).cpu()):
            ax.plot(offsets.tolist(), values.tolist(), label=f"head {head}")
        ax.set(xlabel="offset (key - query)", ylabel="bias", title=repr(self))
        ax.legend(fontsize="small", ncols=1 + self.num_heads // 9)
        return ax

    def _drawn(self, offsets: Tensor) -> Tensor:
        """What `plot` draws: (n,) -> (H, n)."""
        return self.values(offsets)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def train(self, mode: bool = True) -> Bias:
        """As of every module; a switch of mode also ends what `posattn.attention` keeps of the bias in evaluation."""
        if mode != self.training:
            from ..kept_table import forget  # which needs this module first

            forget(self)
        return super().train(mode)

    def register_constants(self, **constants: Tensor) -> None:
        """Keep CPU tensors that belong to the formula as buffers, outside checkpoints.

        Unlike an ordinary buffer they are never rounded by ``.bfloat16()`` or ``.half()`` (published slopes
        stay what was published), and ``to_empty`` after building on the meta device gives them their values
        back.
        """
        home = torch.empty(0).device  # the default device, which `with torch.device(...)` sets
        for name, constant in constants.items():
            self._constants[name] = constant
            self.register_buffer(name, constant.to(home), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Bias:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, constant in self._constants.items():
            moved = self._buffers[name]
            assert moved is not None
            double = moved.dtype == torch.float64
            self._buffers[name] = constant.to(moved.device, torch.float64 if double else constant.dtype)
        return self

    def _anchor(self) -> Tensor:
        """Any tensor of this module: it says on which device the table is made."""
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor
        return torch.empty(0)


def full_precision(parameter: Tensor) -> Tensor:
    """fp64 as it is, everything else as fp32: a bf16 table would be off by up to 2^-9 of the bias."""
    return parameter if parameter.dtype == torch.float64 else parameter.float()


def check_integer(name: str, value: int, minimum: int | None = None) -> int:
    """`value`, or a ValueError that says which argument of what kind was expected."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return value


def no_autocast(device_type: str) -> Any:
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # the meta device has none
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
