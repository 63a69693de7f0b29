"""DAPE: a small network that mixes the scores of all heads, and a bias, at each pair (Zheng et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .alibi import ALiBi
from .bias import Bias, check_integer, full_precision, no_autocast
from .fire import FIRE
from .kerple import KERPLE

SLOPE = 0.01  # of the LeakyReLU between the layers, as published; the kernels have it too
MAX_HEADS, MAX_HIDDEN, KERNEL_SIZES = 64, 128, (1, 3, 5, 7)


class Network(NamedTuple):
    """What the operators take of a DAPE: its layers, and of its base either nothing, a table or FIRE's parts."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    table: Tensor | None = None
    line: Tensor | None = None
    rows: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None
    last_bias: Tensor | None = None
    negative_slope: float = 0.0


class DAPE(nn.Module):
    r"""Data-adaptive positional encoding: an MLP over the heads of every score and its bias.

    With A the scaled scores ``scale * q . k`` of all H heads at a query i and a key j and B those of ``base``::

        S = A + B + W2 lrelu(W1 [A; B] + b1) + b2              W1 (hidden, 2 H), W2 (H, hidden), slope 0.01

    in place of the score of `posattn.attention`; without a base, ``S = A + W2 lrelu(W1 A + b1) + b2``. Zheng et
    al., "DAPE: Data-Adaptive Positional Encoding for Length Extrapolation", NeurIPS 2024 (arXiv 2405.14722). With
    a kernel_size k of 3, 5 or 7 both layers are 1 x k convolutions along the keys, as in Zheng et al., "DAPE V2:
    Process Attention Score as Feature Map for Length Extrapolation", ACL 2025 (arXiv 2410.04798), p = k // 2::

        hid(i, j) = lrelu(b1 + sum_u W1[:, :, u + p] z(i, j + u)),  y(i, j) = b2 + sum_t W2[:, :, t + p] hid(i, j + t)

    with t, u = -p .. p, ``S = A + B + y``, and z = [A; B], but 0 for a key that query i does not see. Two forms:

    - prefix_consistent=True: hid is 0 there, too. What a token gets depends on nothing after it, so that a
      sequence cut short, or decoded token by token, gives the same.
    - prefix_consistent=False, the published form, for causal attention only: keys after the query are 0 in z,
      but hid is 0 only beyond the ends of the sequence. So the last p queries of a sequence get other results than
      they would if more tokens followed. key_padding_mask acts on the softmax alone.

    For kernel_size=1 the two are the same. Nothing of size Lq x Lk exists, forward or backward. With
    enable_gqa, H counts the query heads. softcap is refused. The heads cannot be split over devices: each sees all.

    Args:
        num_heads: H, 1 to 64.
        base: a `posattn.Bias` with as many heads and finite values, whose parameters are learned as well, or
            None. FIRE inside of the published DAPE is ``FIRE(num_heads, negative_slope=0.01)``.
        hidden: width of the network, 1 to 128 (the papers: 32).
        kernel_size: 1 (DAPE), 3, 5 or 7 (V2).
        prefix_consistent: which of the two forms.

    Attributes:
        first_weight, first_bias: (hidden, 2 H, kernel_size), or (hidden, H, kernel_size) without base; (hidden,).
        second_weight, second_bias: (H, hidden, kernel_size); (H,). All start as `torch.nn.Linear` and
            `torch.nn.Conv2d` do. The output's last bias only shows in lse: softmax ignores it.

    Raises TypeError for a base that is no Bias, ValueError for any other argument out of these ranges.

        >>> from posattn import KERPLE, attention
        >>> dape = DAPE(num_heads=12, base=KERPLE(12))
        >>> sum(p.numel() for p in dape.parameters())
        1220
        >>> query, key, value = torch.randn(3, 2, 12, 10, 16).unbind()
        >>> attention(query, key, value, dape, is_causal=True).shape
        torch.Size([2, 12, 10, 16])
    """

    def __init__(
        self,
        num_heads: int,
        base: Bias | None = None,
        hidden: int = 32,
        kernel_size: int = 1,
        prefix_consistent: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = _at_most("num_heads", num_heads, MAX_HEADS)
        self.hidden = _at_most("hidden", hidden, MAX_HIDDEN)
        if type(kernel_size) is not int or kernel_size not in KERNEL_SIZES:
            raise ValueError(f"kernel_size must be 1, 3, 5 or 7, got {kernel_size!r}")
        if base is not None and not isinstance(base, Bias):
            raise TypeError(f"base must be a posattn.Bias or None, got {type(base).__name__}")
        if base is not None and base.num_heads != num_heads:
            came = f"{type(base).__name__} with {base.num_heads}"
            raise ValueError(f"base must have num_heads = {num_heads} heads, got {came}")
        if not isinstance(prefix_consistent, bool):
            raise ValueError(f"prefix_consistent must be a bool, got {prefix_consistent!r}")
        self.kernel_size = kernel_size
        self.prefix_consistent = prefix_consistent
        self.base = base
        channels = num_heads if base is None else 2 * num_heads
        self.first_weight = nn.Parameter(torch.empty(hidden, channels, kernel_size))
        self.first_bias = nn.Parameter(torch.empty(hidden))
        self.second_weight = nn.Parameter(torch.empty(num_heads, hidden, kernel_size))
        self.second_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Those of the two layers, not the base's."""
        for weight, bias in (
            (self.first_weight, self.first_bias),
            (self.second_weight, self.second_bias),
        ):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(weight[0].numel())
            nn.init.uniform_(bias, -bound, bound)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], prefix_consistent: bool | None = None) -> DAPE:
        """A DAPE with the parameters of the authors' code (github.com/chuanyang-Zheng/DAPE), causal attention.

        state_dict is that of one of their layers: mlp2.0.weight, mlp2.0.bias, mlp2.2.weight, mlp2.2.bias, with
        weights (hidden, 2 H) and (H, hidden), or (hidden, 2 H, 1, k) and (H, hidden, 1, k) in V2; and of the
        base: slopes (H,) for ALiBi, bias_p and bias_a (H, 1, 1) for KERPLE, c, init_L, L_multiplier,
        mlp.0.weight, mlp.0.bias, mlp.2.weight and mlp.2.bias for FIRE, nothing for none. prefix_consistent is by
        default False in V2, which is what they trained. Raises ValueError for missing keys, wrong shapes and
        slopes that are not ALiBi's.

            >>> layer = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.LeakyReLU(), torch.nn.Linear(32, 8))
            >>> DAPE.from_official({f"mlp2.{name}": p for name, p in layer.state_dict().items()})
            DAPE(num_heads=8, hidden=32, kernel_size=1, prefix_consistent=True)
        """
        w1, b1, w2, b2 = _layers(state_dict, "mlp2")
        if w1.dim() not in (2, 4) or w1.shape[2:-1] not in ((), (1,)) or w2.shape[2:] != w1.shape[2:]:
            shapes = f"{tuple(w1.shape)} and {tuple(w2.shape)}"
            raise ValueError(f"mlp2 must hold two Linear or two 1 x k Conv2d layers, got weights {shapes}")
        w1, w2 = (w.reshape(*w.shape[:2], -1) for w in (w1, w2))
        num_heads, hidden, kernel_size = w2.shape
        base = _official_base(state_dict, num_heads)
        if prefix_consistent is None:
            prefix_consistent = kernel_size == 1
        dape = cls(num_heads, base, hidden, kernel_size, prefix_consistent)
        for name, weight in zip(
            ("first_weight", "first_bias", "second_weight", "second_bias"), (w1, b1, w2, b2)
        ):
            _put(dape, name, weight)
        return dape

    def network(
        self, query_length: int, key_length: int, query_start: int, key_start: int, double: bool
    ) -> Network:
        """What the operators take, O(N), in fp32 or fp64; differentiable. Arguments as in `Bias.table`."""
        dtype = torch.float64 if double else torch.float32
        base = self.base if query_length > 0 and key_length > 0 else None

        def full(tensor: Tensor) -> Tensor:
            return tensor.to(dtype).contiguous()

        with no_autocast(self.first_weight.device.type):
            w1, b1, w2, b2 = map(
                full, (self.first_weight, self.first_bias, self.second_weight, self.second_bias)
            )
            network = Network(w1, b1, w2, b2)
            if isinstance(base, FIRE):
                network = network._replace(
                    line=full(base.line(query_length, key_length, query_start, key_start)),
                    rows=full(base.rows(query_length, query_start)),
                    first=full(base.first),
                    last=full(base.last),
                    last_bias=full(base.last_bias),
                    negative_slope=base.negative_slope,
                )
            elif base is not None:
                table = base.table(query_length, key_length, query_start, key_start)
                network = network._replace(table=full(table))
        return network

    def mixed(self, scores: Tensor, base: Tensor | None, seen: Tensor) -> Tensor:
        """The formula on dense scores (B, H, Lq, Lk) and base (H, Lq, Lk), with z = 0 where not seen (.., Lq, Lk)."""
        channels, total = scores, scores
        if base is not None:
            base = base.to(scores.dtype).expand(scores.shape)
            channels, total = torch.cat([scores, base], dim=1), scores + base
        w1, w2 = (w.to(scores.dtype)[:, :, None] for w in (self.first_weight, self.second_weight))
        b1, b2 = (b.to(scores.dtype) for b in (self.first_bias, self.second_bias))
        pad = (0, self.kernel_size // 2)
        hidden = F.leaky_relu(F.conv2d(channels.masked_fill(~seen, 0.0), w1, b1, padding=pad), SLOPE)
        if self.prefix_consistent:
            hidden = hidden.masked_fill(~seen, 0.0)
        return total + F.conv2d(hidden, w2, b2, padding=pad)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, hidden={self.hidden}, kernel_size={self.kernel_size}, "
            f"prefix_consistent={self.prefix_consistent}"
        )


def _at_most(name: str, value: int, most: int) -> int:
    if check_integer(name, value, minimum=1) > most:
        raise ValueError(f"{name} must be an integer of at most {most}, got {value!r}")
    return value


def _needed(state_dict: Mapping[str, Tensor], *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ValueError(f"state_dict lacks {', '.join(missing)}; its keys are {list(state_dict)}")
    return [full_precision(state_dict[name].detach()) for name in names]


def _layers(state_dict: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    return _needed(state_dict, *(f"{prefix}.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")))


def _official_base(state_dict: Mapping[str, Tensor], num_heads: int) -> Bias | None:
    if "slopes" in state_dict:
        (slopes,) = _needed(state_dict, "slopes")
        alibi = ALiBi(num_heads)
        published = alibi.slope.to(slopes)
        if slopes.shape != published.shape or not torch.allclose(slopes, published, rtol=1e-2):
            raise ValueError(f"slopes must be ALiBi's of {num_heads} heads, got {slopes.tolist()}")
        return alibi.to(slopes.device)
    if "bias_p" in state_dict:
        kerple = KERPLE(num_heads)
        for name, values in zip(("p", "a"), _needed(state_dict, "bias_p", "bias_a")):
            _put(kerple, name, values.flatten())
        return kerple
    if "c" in state_dict:
        c, start, multiplier = _needed(state_dict, "c", "init_L", "L_multiplier")
        w1, b1, w2, b2 = _layers(state_dict, "mlp")
        length = max(1, round(float(start)))  # what is not a whole number goes into the multiplier
        fire = FIRE(num_heads, b1.numel(), init_length=length, negative_slope=SLOPE)
        _put(fire, "c", c.reshape(1))
        _put(fire, "multiplier", (multiplier * start / length).reshape(1))
        for layer, weight, bias in ((fire.first_layer, w1, b1), (fire.last_layer, w2, b2)):
            _put(layer, "weight", weight)
            _put(layer, "bias", bias)
        return fire
    return None


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    shape = getattr(module, name).shape
    if values.shape != shape:
        kind = f"{type(module).__name__}.{name}"
        raise ValueError(f"state_dict must give {kind} the shape {tuple(shape)}, got {tuple(values.shape)}")
    setattr(module, name, nn.Parameter(values.clone()))
