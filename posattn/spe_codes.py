"""Positional codes at work: queries and keys in, the features of linear attention out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .biases.bias import check_integer
from .dispatch import readable
from .noise import Noise

if TYPE_CHECKING:
    from .spe_encoding import Encoding


class Codes(NamedTuple):
    """A `SineSPE` or `ConvSPE` with the noise of one call, which several layers may share.

    Positions count from 0: query i stands at query_start + i, key j at key_start + j. All results are
    differentiable once, by query, key and the module's parameters (those of exact features any number of times).
    """

    spe: Encoding
    noise: Noise

    @property
    def exact(self) -> bool:
        """Whether these are the expectation of the codes."""
        return self.spe.exact

    @property
    def dim(self) -> int:
        """R, the width of the features."""
        if not self.exact and self.noise.codes.is_floating_point():
            return self.noise.codes.shape[-1]
        return self.spe.dim

    def features(
        self, query: Tensor, key: Tensor, query_start: int = 0, key_start: int = 0, backend: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """qhat (B, H, Lq, R), khat (B, H, Lk, R) of query (B, H, Lq, D), key (B, H, Lk, D), in their dtype.

        Exact features take memory for R = dim numbers a position, forward and backward. Raises ValueError for
        tensors, noise and positions that do not fit.
        """
        self._check(query, key, query_start, key_start)
        codes, gate = self.noise
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        if codes.is_floating_point():
            codes = codes.to(dtype)
        gate = None if gate is None else gate.to(dtype)
        backend = self._backend(backend, query, self.dim)
        query, key = readable(query), readable(key)
        return self.spe.encode(query, key, codes, gate, query_start, key_start, backend)

    def projected(
        self,
        query: Tensor,
        key: Tensor,
        projection: Tensor,
        query_start: int = 0,
        key_start: int = 0,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Exact features times projection^T, (B, H, L, M) each, which need no memory for R numbers a position.

        projection (M, R) is not differentiated. Raises ValueError where the codes are not exact.
        """
        self._check(query, key, query_start, key_start)
        self._check_exact("projected")
        if projection.dim() != 2 or projection.shape[1] != self.dim or projection.requires_grad:
            came = f"shape {tuple(projection.shape)}, requires_grad={projection.requires_grad}"
            raise ValueError(f"projection must be (M, {self.dim}) and require no gradient, got {came}")
        backend = self._backend(backend, query, len(projection))
        query, key = readable(query), readable(key)
        return self.spe.project(query, key, projection, query_start, key_start, backend)

    def squared_norms(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """|qhat|^2 (B, H, Lq), |khat|^2 (B, H, Lk) of exact features, the same at every position; fp32 or fp64."""
        self._check(query, key, 0, 0)
        self._check_exact("squared_norms")
        weights = self.spe.powers()
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        made = [torch.einsum("bhld,hd->bhl", x.to(dtype).square(), weights.to(dtype)) for x in (query, key)]
        return made[0], made[1]

    def _backend(self, backend: str | None, query: Tensor, width: int) -> str:
        """As `posattn.linear_attention` chooses it; exact features are plain PyTorch, whatever it says."""
        from .linear_checks import choose_backend  # which knows this class

        return choose_backend(backend, query, query, width, self)

    def _check_exact(self, name: str) -> None:
        if not self.exact:
            raise ValueError(f"{name} is for codes of a SineSPE with num_realizations=None")

    def _check(self, query: Tensor, key: Tensor, query_start: int, key_start: int) -> None:
        spe = self.spe
        check_noise(spe, self.noise)
        for name, x in (("query", query), ("key", key)):
            if x.dim() != 4 or x.shape[1] != spe.num_heads or x.shape[3] != spe.head_dim:
                wanted = f"(batch, {spe.num_heads}, length, {spe.head_dim}), as spe has it"
                raise ValueError(f"{name} must have the shape {wanted}, got {tuple(x.shape)}")
            if x.dtype != query.dtype or not x.is_floating_point():
                raise ValueError(
                    f"query and key must have one floating dtype, got {query.dtype} and {x.dtype}"
                )
        device = query.device
        parts = {"key": key, "spe": next(spe.parameters()), "noise": self.noise.codes}
        if self.noise.gate is not None:
            parts["noise.gate"] = self.noise.gate
        for name, tensor in parts.items():
            if tensor.device != device:
                raise ValueError(f"{name} must be on query's device {device}, got {tensor.device}")
        for name, start, x in (("query_start", query_start, query), ("key_start", key_start, key)):
            check_integer(name, start, minimum=0)
            spe.check_length(self.noise.codes, name, start + x.shape[2])


def check_noise(spe: Encoding, noise: Noise) -> None:
    """Raises TypeError or ValueError for noise that is not of this module."""
    if not isinstance(noise, Noise):
        raise TypeError(f"noise must be a posattn.noise.Noise or None, got {type(noise).__name__}")
    codes, gate = noise
    if not isinstance(codes, Tensor) or not (gate is None or isinstance(gate, Tensor)):
        raise TypeError(f"noise must hold Tensors, got {type(codes).__name__} and {type(gate).__name__}")
    if codes.requires_grad or (gate is not None and gate.requires_grad):
        raise ValueError("noise must not require a gradient: it is not differentiated")
    if spe.exact:
        if codes.numel() or gate is not None:
            raise ValueError("noise must be empty where num_realizations is None; draw() gives that")
        return
    spe.check_codes(codes)
    if (gate is None) == spe.gated:
        wanted = "a Tensor" if spe.gated else "None"
        raise ValueError(f"noise.gate must be {wanted} with gated={spe.gated}, got {type(gate).__name__}")
    realizations = codes.shape[-1] if codes.is_floating_point() else spe.num_realizations
    shape = (spe.num_heads, spe.head_dim, realizations)
    if gate is not None and (tuple(gate.shape) != shape or not gate.is_floating_point()):
        came = f"{tuple(gate.shape)} of {gate.dtype}"
        raise ValueError(f"noise.gate must be floating-point of shape (H, D, R) = {shape}, got {came}")
