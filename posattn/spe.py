"""Stochastic positional encoding: relative positions for linear attention (Liutkus et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .biases.bias import check_integer, no_autocast
from .spe_conv import ConvSPE
from .spe_encoding import Encoding, needed, official, put_parameters
from .spe_ops import Sine

__all__ = ["ConvSPE", "SineSPE"]


class SineSPE(Encoding):
    r"""Codes whose inner products are, on average over their noise, sums of sines of the relative position.

    For a query at position m and a key at n, the features qhat, khat that `posattn.linear_attention` uses satisfy::

        E[qhat_m . khat_n] = sqrt(R / D) sum_d q[m, d] k[n, d] P_d(m - n)
        P_d(o) = (1 - delta_d) / (2 K) sum_k l_dk^2 cos(2 pi f_dk o + offset_dk) + delta_d

    with f = sigmoid(freqs) / 2, l = softplus(gains) and delta = sigmoid(gate), or 0 if not gated, for each head.
    Liutkus et al., "Relative Positional Encoding for Transformers with Linear Complexity", ICML 2021
    (arXiv 2105.08399). One draw of noise serves all positions, of queries and keys.

    Args:
        num_heads: H.
        head_dim: D, that of query and key.
        num_sines: K.
        num_realizations: R, the width of the features; more of them, less noise. None is the limit of many: no
            noise, the inner product is its expectation, and features are (2 K + gated) D wide.
        gated: whether each dimension learns how much of it has no position.
        resample: whether evaluation draws noise in each call, as published, or keeps that of ``seed``.
        seed: of the noise that evaluation keeps.

    Attributes: freqs, offsets, gains (H, D, K) and gate (H, D), or None; they start as published. Raises TypeError
    and ValueError for arguments out of these ranges.

        >>> spe = SineSPE(num_heads=2, head_dim=16, num_sines=5)
        >>> query, key = torch.randn(2, 1, 2, 10, 16)
        >>> [features.shape for features in spe().features(query, key)]
        [torch.Size([1, 2, 10, 64]), torch.Size([1, 2, 10, 64])]
    """

    freqs: nn.Parameter
    offsets: nn.Parameter
    gains: nn.Parameter

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_sines: int = 1,
        num_realizations: int | None = 64,
        gated: bool = True,
        *,
        resample: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, head_dim, num_realizations, gated, resample, seed)
        self.num_sines = check_integer("num_sines", num_sines, minimum=1)
        shape = (num_heads, head_dim, num_sines)
        for name in ("freqs", "offsets", "gains"):
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()
        self.keep_noise()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in (self.freqs, self.offsets, self.gains, self.gate):
            if parameter is not None:
                nn.init.normal_(parameter)
        self.freqs.sub_(4.0)  # low frequencies: codes that reach far
        self.gains.mul_(2.0 / self.gains.norm(dim=-1, keepdim=True).sqrt())

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        gate_state_dict: Mapping[str, Tensor] | None = None,
        *,
        num_realizations: int | None = 64,
        resample: bool = True,
        seed: int = 0,
    ) -> SineSPE:
        """A SineSPE with the parameters of the authors' code (github.com/aliutkus/spe, PyTorch).

        state_dict is that of their SineSPE; the "gate" of their SPEFilter is in it, too, or in gate_state_dict, or
        the result is not gated. Keys may have a prefix. The other arguments are in no state dict. Raises ValueError
        for missing keys and shapes that do not agree.

            >>> published = {name: torch.randn(8, 64, 10) for name in ("freqs", "offsets", "gains")}
            >>> SineSPE.from_official(published, {"gate": torch.randn(8, 64)})
            SineSPE(num_heads=8, head_dim=64, num_sines=10, num_realizations=64, gated=True)
        """
        found = needed(state_dict, ("freqs", "offsets", "gains"))
        gate = official({**state_dict, **(gate_state_dict or {})}, "gate")
        freqs = found["freqs"]
        if freqs.dim() != 3:
            raise ValueError(f"freqs must be of shape (heads, head_dim, sines), got {tuple(freqs.shape)}")
        heads, head_dim, sines = freqs.shape
        spe = cls(heads, head_dim, sines, num_realizations, gate is not None, resample=resample, seed=seed)
        put_parameters(spe, **found, gate=gate)
        return spe.to(freqs.device)  # the noise that is kept, too

    @property
    def dim(self) -> int:
        if self.num_realizations is None:
            return (2 * self.num_sines + self.gated) * self.head_dim
        return self.num_realizations

    def noise_shape(self) -> tuple[int, ...]:
        return self.num_heads, self.head_dim, 2 * self.num_sines, self.dim

    def check_codes(self, codes: Tensor) -> None:
        wanted = (self.num_heads, self.head_dim, 2 * self.num_sines)
        if codes.dim() != 4 or tuple(codes.shape[:3]) != wanted or not codes.is_floating_point():
            came = f"shape {tuple(codes.shape)} of {codes.dtype}"
            raise ValueError(f"noise.codes must be floating-point of shape (*{wanted}, R), got {came}")

    def _waves(self, realizations: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """turns, phases, gains (H, D, K) and gate_gains (H, D) of the operators: fp64, differentiable."""
        codes, gate = self.strengths(realizations)
        gains = F.softplus(self.gains.double()) * codes[..., None] / math.sqrt(2 * self.num_sines)
        return torch.sigmoid(self.freqs.double()) / 2, self.offsets.double(), gains, gate

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
        with no_autocast(query.device.type):
            if self.exact:
                return self._exact(query, query_start, True), self._exact(key, key_start, False)
            turns, phases, gains, gate_gains = self._waves(codes.shape[-1])
            arguments = (turns, phases, gains, codes, gate_gains, gate, query_start, key_start, backend)
            made: tuple[Tensor, Tensor] = Sine.apply(query, key, *arguments)  # type: ignore[no-untyped-call]
        return made

    def project(
        self, query: Tensor, key: Tensor, projection: Tensor, query_start: int, key_start: int, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Exact features times projection^T: sqrt(R) times the projection stands where the noise does."""
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        noise = (projection.to(dtype).T * self.dim**0.5).reshape(1, self.head_dim, -1, projection.shape[0])
        noise = noise.expand(self.num_heads, -1, -1, -1)
        codes, gate = noise[:, :, : 2 * self.num_sines].contiguous(), noise[:, :, -1].contiguous()
        with no_autocast(query.device.type):
            turns, phases, gains, gate_gains = self._waves(self.dim)
            arguments = (turns, phases, gains, codes, gate_gains, gate if self.gated else None)
            made: tuple[Tensor, Tensor] = Sine.apply(  # type: ignore[no-untyped-call]
                query, key, *arguments, query_start, key_start, backend
            )
        return made

    def powers(self) -> Tensor:
        """What the square of each dimension of a query or key adds to its exact features' squared norm: (H, D)."""
        _, _, gains, gate = self._waves(self.dim)
        power = gains.square().sum(-1)  # cos^2 + sin^2 = 1
        return self.dim * (power if gate is None else power + gate.square())

    def _exact(self, x: Tensor, start: int, shifted: bool) -> Tensor:
        """x (B, H, L, D) -> (B, H, L, R), a dimension's waves and its gate after each other."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        turns, phases, gains, gate = self._waves(self.dim)
        places = (torch.arange(x.shape[2], device=x.device) + start).double()
        angle = (turns[:, None] * places[:, None, None]).remainder(1.0) * (2 * math.pi)
        if shifted:
            angle = angle + phases[:, None]
        angle, sizes = angle.to(dtype), (gains * self.dim**0.5).to(dtype)[:, None]  # (H, L, D, K); by head
        waves = torch.stack([angle.cos() * sizes, angle.sin() * sizes], dim=-1).flatten(-2)
        if gate is not None:
            kept = (gate * self.dim**0.5).to(dtype)[:, None, :, None].expand(-1, x.shape[2], -1, -1)
            waves = torch.cat([waves, kept], dim=-1)
        return (x.to(dtype)[..., None] * waves).flatten(-2).to(x.dtype)

    def position_kernel(self, max_distance: int) -> Tensor:
        """P_d(o) at o = m - n from -max_distance to max_distance: (H, D, 2 max_distance + 1), differentiable.

        With the gate; in fp32, or fp64 when the parameters are. Raises ValueError for a negative distance.
        """
        check_integer("max_distance", max_distance, minimum=0)
        with no_autocast(self.freqs.device.type):
            offsets = torch.arange(-max_distance, max_distance + 1, device=self.freqs.device).double()
            turns = torch.sigmoid(self.freqs.double()) / 2
            waves = torch.cos(2 * math.pi * turns[..., None] * offsets + self.offsets.double()[..., None])
            powers = F.softplus(self.gains.double()).square() / (2 * self.num_sines)
            return self.gated_kernel((powers[..., None] * waves).sum(2))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, num_sines={self.num_sines}, "
            f"num_realizations={self.num_realizations}, gated={self.gated}"
        )
