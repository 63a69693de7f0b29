"""Stochastic positional encoding by convolution (Liutkus et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .biases.bias import check_integer, no_autocast
from .spe_encoding import Encoding, needed, official, put_parameters
from .spe_ops import Conv


class ConvSPE(Encoding):
    r"""Codes that are noise along the positions, filtered: inner products know distances below kernel_size.

    As `SineSPE`, of the same paper, but with P_d the correlation of two filters::

        P_d(o) = (1 - delta_d) sum_a filter_q[d, a] filter_k[d, a + o] + delta_d

    where filters are 0 outside of 0 .. kernel_size - 1. The noise is a function of a seed and of the position, and
    is made where it is used, so that it goes on however long the sequence grows.

    Args:
        num_heads, head_dim, gated, resample, seed: as in `SineSPE`.
        kernel_size: P, the taps of the filters.
        num_realizations: R, the width of the features.

    Attributes: filter_q, of queries, and filter_k, of keys: (H * D, 1, P); gate (H, D) or None. The authors' code
    calls them conv_k.weight and conv_q.weight, in that order; `load_state_dict` knows these names, too.

        >>> spe = ConvSPE(num_heads=2, head_dim=16, kernel_size=20)
        >>> query, key = torch.randn(2, 1, 2, 10, 16)
        >>> [features.shape for features in spe().features(query, key)]
        [torch.Size([1, 2, 10, 64]), torch.Size([1, 2, 10, 64])]
    """

    num_realizations: int
    filter_q: nn.Parameter
    filter_k: nn.Parameter

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        kernel_size: int = 200,
        num_realizations: int = 64,
        gated: bool = True,
        *,
        resample: bool = True,
        seed: int = 0,
    ) -> None:
        if num_realizations is None:
            raise ValueError(
                "num_realizations must be an integer, got None: only a SineSPE has an exact limit"
            )
        super().__init__(num_heads, head_dim, num_realizations, gated, resample, seed)
        self.kernel_size = check_integer("kernel_size", kernel_size, minimum=1)
        shape = (num_heads * head_dim, 1, kernel_size)
        self.filter_q, self.filter_k = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.reset_parameters()
        self.keep_noise()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight in (self.filter_q, self.filter_k):
            nn.init.uniform_(weight, 0.0, math.sqrt(2 / self.kernel_size))
        if self.gate is not None:
            nn.init.normal_(self.gate)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        gate_state_dict: Mapping[str, Tensor] | None = None,
        *,
        num_heads: int | None = None,
        num_realizations: int = 64,
        resample: bool = True,
        seed: int = 0,
    ) -> ConvSPE:
        """A ConvSPE with the parameters of the authors' code, as `SineSPE.from_official` has it.

        Keys are conv_q.weight and conv_k.weight, of one dimension. Without a gate num_heads must be given: filters
        do not tell it. Raises ValueError for missing keys and shapes that do not agree.

            >>> published = {f"conv_{name}.weight": torch.rand(8 * 64, 1, 128) for name in "qk"}
            >>> ConvSPE.from_official(published, num_heads=8)
            ConvSPE(num_heads=8, head_dim=64, kernel_size=128, num_realizations=64, gated=False)
        """
        found = needed(state_dict, ("conv_k.weight", "conv_q.weight"))
        filter_q, filter_k = found.values()  # their convolution of queries is conv_k
        gate = official({**state_dict, **(gate_state_dict or {})}, "gate")
        if filter_q.dim() != 3:
            came = tuple(filter_q.shape)
            raise ValueError(f"conv_k.weight must be of shape (heads * head_dim, 1, kernel_size), got {came}")
        if num_heads is None:
            if gate is None:
                raise ValueError(
                    "num_heads must be given where state_dict has no gate: filters do not tell it"
                )
            num_heads = gate.shape[0]
        heads = check_integer("num_heads", num_heads, minimum=1)
        rows, _, kernel_size = filter_q.shape
        if rows % heads:
            raise ValueError(f"num_heads must divide the {rows} filters, got {heads}")
        dims, gated = rows // heads, gate is not None
        spe = cls(heads, dims, kernel_size, num_realizations, gated, resample=resample, seed=seed)
        put_parameters(spe, filter_q=filter_q, filter_k=filter_k, gate=gate)
        return spe.to(filter_q.device)  # the noise that is kept, too

    @property
    def dim(self) -> int:
        return self.num_realizations

    def noise_shape(self) -> tuple[int, ...]:
        return ()

    def check_codes(self, codes: Tensor) -> None:
        if codes.is_floating_point():
            if codes.dim() == 4 and tuple(codes.shape[:2]) == (self.num_heads, self.head_dim):
                return
        elif codes.dtype == torch.int64 and codes.shape == (1,):
            return
        wanted = f"a seed, int64 of shape (1,), or floating-point of shape {(self.num_heads, self.head_dim)} + (T, R)"
        raise ValueError(f"noise.codes must be {wanted}, got shape {tuple(codes.shape)} of {codes.dtype}")

    def check_length(self, codes: Tensor, name: str, end: int) -> None:
        length = end + self.kernel_size - 1
        if codes.is_floating_point() and codes.shape[2] < length:
            raise ValueError(
                f"noise.codes must have T >= {length} = {name} + length + kernel_size - 1, got T = {codes.shape[2]}"
            )

    def encode(
        self,
        query: Tensor,
        key: Tensor,
        codes: Tensor,
        gate: Tensor | None,
        query_start: int,
        key_start: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        realizations = codes.shape[-1] if codes.is_floating_point() else self.num_realizations
        with no_autocast(query.device.type):
            strength, gate_gains = self.strengths(realizations)
            shape = (self.num_heads, self.head_dim, self.kernel_size)
            filters = [
                (weight.double().view(shape) * strength[..., None]).to(dtype)
                for weight in (self.filter_q, self.filter_k)
            ]
            gate_gains = None if gate_gains is None else gate_gains.to(dtype)
            made: tuple[Tensor, Tensor] = Conv.apply(  # type: ignore[no-untyped-call]
                query, key, *filters, codes, realizations, gate_gains, gate, query_start, key_start, backend
            )
        return made

    def position_kernel(self, max_distance: int) -> Tensor:
        """P_d(o), as `SineSPE.position_kernel` gives it."""
        check_integer("max_distance", max_distance, minimum=0)
        with no_autocast(self.filter_q.device.type):
            around = F.pad(self.filter_k.double(), (max_distance, max_distance)).transpose(0, 1)
            filters = self.filter_q.double()
            kernel = F.conv1d(around, filters, groups=filters.shape[0])
            return self.gated_kernel(kernel.view(self.num_heads, self.head_dim, -1))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, kernel_size={self.kernel_size}, "
            f"num_realizations={self.num_realizations}, gated={self.gated}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for theirs, ours in (("conv_k.weight", "filter_q"), ("conv_q.weight", "filter_k")):
            if prefix + theirs in state_dict and prefix + ours not in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)
