"""What the stochastic positional encodings share: sizes, gate, noise, and the way to the authors' parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .biases.bias import check_integer, full_precision
from .noise import Noise
from .spe_codes import Codes, check_noise


class Encoding(nn.Module):
    """The contract of `SineSPE` and `ConvSPE`; num_realizations None: no noise, but what is expected of it."""

    num_realizations: int | None
    gate: nn.Parameter | None
    kept_codes: Tensor | None
    kept_gate: Tensor | None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_realizations: int | None,
        gated: bool,
        resample: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.num_heads = check_integer("num_heads", num_heads, minimum=1)
        self.head_dim = check_integer("head_dim", head_dim, minimum=1)
        if num_realizations is not None:
            check_integer("num_realizations", num_realizations, minimum=1)
        for name, flag in (("gated", gated), ("resample", resample)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {type(flag).__name__} {flag!r}")
        self.num_realizations = num_realizations
        self.gated = gated
        self.resample = resample
        self.seed = check_integer("seed", seed, minimum=0)
        self.register_parameter("gate", nn.Parameter(torch.empty(num_heads, head_dim)) if gated else None)

    @property
    def exact(self) -> bool:
        return self.num_realizations is None

    @property
    def dim(self) -> int:
        """Width of the features, where noise does not say another."""
        raise NotImplementedError

    def noise_shape(self) -> tuple[int, ...]:
        """Of the codes that are drawn; () for a seed."""
        raise NotImplementedError

    def project(
        self, query: Tensor, key: Tensor, projection: Tensor, query_start: int, key_start: int, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Exact features times projection^T."""
        raise NotImplementedError

    def powers(self) -> Tensor:
        """What the square of each dimension of a query or key adds to its exact features' squared norm: (H, D)."""
        raise NotImplementedError

    def check_length(self, codes: Tensor, name: str, end: int) -> None:
        """Raises ValueError for Noise.codes that do not reach to the position before ``end``."""

    def check_codes(self, codes: Tensor) -> None:
        """Raises ValueError for Noise.codes that do not fit; only called where not exact."""
        raise NotImplementedError

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
        """qhat and khat."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator | None = None, device: Any = None) -> Noise:
        """New noise on ``device``, by default that of the parameters; empty without realizations.

        It is drawn where the generator is and then moved: one CPU generator gives equal noise on every device.
        Raises TypeError for a generator that is none.
        """
        device = next(self.parameters()).device if device is None else torch.device(device)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        if self.num_realizations is None:
            return Noise(torch.empty(0, device=device), None)
        source = device if generator is None else generator.device
        shape = self.noise_shape()
        options: dict[str, Any] = dict(generator=generator, device=source)
        if shape:
            codes = torch.randn(shape, dtype=torch.float32, **options)
        else:
            codes = torch.randint(2**63 - 1, (1,), dtype=torch.int64, **options)
        gate = None
        if self.gated:
            sizes = (self.num_heads, self.head_dim, self.num_realizations)
            gate = torch.randn(sizes, dtype=torch.float32, **options).to(device)
        return Noise(codes.to(device), gate)

    def forward(
        self, noise: Noise | None = None, generator: torch.Generator | None = None, device: Any = None
    ) -> Codes:
        """`Codes` of this noise, or of noise that `draw` makes.

        In training, and with resample=True in evaluation too, each call draws anew; with resample=False evaluation
        keeps the noise of ``torch.Generator().manual_seed(seed)``, unless a generator is passed. Raises TypeError
        and ValueError for noise that does not fit, ValueError for noise together with a generator.
        """
        if noise is not None:
            if generator is not None:
                raise ValueError("generator must be None where noise is given")
            check_noise(self, noise)
        elif self.kept_codes is None or self.training or generator is not None:
            noise = self.draw(generator, device)
        else:
            codes, gate = self.kept_codes, self.kept_gate
            if device is not None:
                codes, gate = codes.to(device), None if gate is None else gate.to(device)
            noise = Noise(codes, gate)
        return Codes(self, noise)

    def keep_noise(self) -> None:
        """To be called last in __init__: what evaluation uses without resample, outside checkpoints."""
        kept = None
        if not self.resample and not self.exact:
            kept = self.draw(torch.Generator().manual_seed(self.seed), "cpu")
        self._kept: Noise | None = kept
        home = torch.empty(0).device  # the default device, which `with torch.device(...)` sets
        for name, tensor in zip(("kept_codes", "kept_gate"), kept or (None, None)):
            self.register_buffer(name, None if tensor is None else tensor.to(home), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Encoding:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, constant in zip(("kept_codes", "kept_gate"), self._kept or ()):
            moved = self._buffers[name]
            if moved is not None and constant is not None:  # never rounded, and back after to_empty
                self._buffers[name] = constant.to(moved.device)
        return self

    def strengths(self, realizations: int) -> tuple[Tensor, Tensor | None]:
        """What multiplies codes, sqrt(1 - delta), and gate, sqrt(delta), both over (R D)^(1/4); fp64.

        (H, D) each; without a gate () and None.
        """
        scale = (realizations * self.head_dim) ** -0.25
        if self.gate is None:
            return torch.full((), scale, dtype=torch.float64, device=next(self.parameters()).device), None
        gate = self.gate.double()
        # sqrt(sigmoid(x)), with a derivative where sigmoid(x) is 0.
        codes, kept = (torch.exp(-0.5 * F.softplus(x)) * scale for x in (gate, -gate))
        return codes, kept

    def gated_kernel(self, kernel: Tensor) -> Tensor:
        """P_d with the gate, of P_d (H, D, n) without; fp32, or fp64 when the parameters are."""
        if self.gate is not None:
            delta = torch.sigmoid(self.gate.double())[..., None]
            kernel = (1 - delta) * kernel + delta
        return kernel.to(full_precision(next(self.parameters())).dtype)


def official(state_dict: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The entry of this name, whatever stands before it in the key; None if there is none, ValueError for several."""
    keys = [key for key in state_dict if key == name or key.endswith(f".{name}")]
    if len(keys) > 1:
        raise ValueError(f"state_dict must hold one {name}, got {keys}: pass the entries of one module")
    return full_precision(state_dict[keys[0]].detach()) if keys else None


def put_parameters(spe: Encoding, **values: Tensor | None) -> None:
    for name, value in values.items():
        if value is None:
            continue
        shape = getattr(spe, name).shape
        if value.shape != shape:
            kind = f"{type(spe).__name__}.{name}"
            raise ValueError(
                f"state_dict must give {kind} the shape {tuple(shape)}, got {tuple(value.shape)}"
            )
        setattr(spe, name, nn.Parameter(value.clone()))


def needed(state_dict: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    found = {name: official(state_dict, name) for name in names}
    made = {name: value for name, value in found.items() if value is not None}
    if len(made) < len(names):
        missing = ", ".join(name for name in names if name not in made)
        raise ValueError(f"state_dict lacks {missing}; its keys are {list(state_dict)}")
    return made
