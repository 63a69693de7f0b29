"""Every check of what a caller passes to linear_attention; messages and errors are those of checks.py in kind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .checks import MAX_FLOAT32_HEAD_DIM, MAX_HEAD_DIM
from .feature_maps import Favor
from .noise import Noise
from .spe_codes import Codes
from .spe_encoding import Encoding

# On Triton: sines of a dimension, and one more for the gate (kernels/linear_configs.py has no wider rows).
MAX_SLOTS, MAX_FLOAT32_SLOTS = 64, 32
NAMES = ("elu", "relu", "favor")
EPS, FAVOR_EPS = 1e-6, 1e-30


class LinearState(NamedTuple):
    """What `posattn.linear_attention` carries from one call to the next: the sums over the keys so far.

    kv (B, H, R, Dv) = ``sum_j phi(khat_j)^T v_j`` and k (B, H, R) = ``sum_j phi(khat_j)``, R the number of features,
    in float32 (float64 for float64 tensors), differentiable; position: that of the next key; noise: that of spe,
    None without spe.
    """

    kv: Tensor
    k: Tensor
    position: int
    noise: Noise | None


def check_together(query: Tensor, key: Tensor, value: Tensor) -> None:
    """query, key, value beside each other."""
    checks.check_alike(query, key, value)
    came = f"{_shape(key)}, query {_shape(query)}"
    for index, name in enumerate(("batch size", "heads", None, "head_dim")):
        if name is not None and key.shape[index] != query.shape[index]:
            raise ValueError(f"key must have query's {name}, got {came}")
    if value.shape[0] != key.shape[0] or value.shape[1] != key.shape[1] or value.shape[2] != key.shape[2]:
        raise ValueError(
            f"value must have key's batch size, heads and length, got {_shape(value)}, key {_shape(key)}"
        )
    for name, tensor in (("query and key", query), ("value", value)):
        if tensor.shape[1] < 1 or tensor.shape[3] < 1:
            raise ValueError(f"{name} must have at least one head and a head_dim of 1, got {_shape(tensor)}")


def check_rule(query: Tensor, key: Tensor, is_causal: bool, return_state: bool) -> None:
    checks._check_flag("is_causal", is_causal)
    checks._check_flag("return_state", return_state)
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"is_causal needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}; "
            "keys of earlier calls come with initial_state"
        )


def check_eps(eps: float | None, feature_map: Any) -> float:
    """eps, with its default filled in."""
    if eps is None:
        favor = isinstance(feature_map, Favor) or (isinstance(feature_map, str) and feature_map == "favor")
        return FAVOR_EPS if favor else EPS
    checks._check_number("eps", eps)
    if eps <= 0:
        raise ValueError(f"eps must be a positive number or None, got {eps!r}")
    return float(eps)


def check_feature_map(feature_map: Any) -> None:
    wanted = 'feature_map must be "elu", "relu", "favor", a posattn.Favor or a function of a Tensor'
    if isinstance(feature_map, str):
        if feature_map not in NAMES:
            raise ValueError(f"{wanted}, got {feature_map!r}")
    elif isinstance(feature_map, type) or not callable(feature_map):
        raise TypeError(f"{wanted}, got {checks._kind(feature_map)}")


def check_favor(favor: Favor, dim: int, query: Tensor, spe: bool) -> None:
    if favor.dim != dim:
        origin = "the number of spe's realizations" if spe else "query's head_dim"
        raise ValueError(f"feature_map must be a Favor of dim = {dim}, {origin}, got dim = {favor.dim}")
    if favor.projection.device != query.device:
        raise ValueError(
            f"feature_map must be on query's device {query.device}, got a Favor on {favor.projection.device}"
        )


def check_features(features: Any, inputs: Tensor, other: Tensor | None = None) -> None:
    """What a feature_map of a user's own returned for `inputs`, beside what it returned before."""
    if not isinstance(features, Tensor):
        raise TypeError(f"feature_map must return a Tensor, got {checks._kind(features)}")
    shape = (*inputs.shape[:-1], "M")
    if features.dim() != 4 or features.shape[:3] != inputs.shape[:3] or features.shape[3] < 1:
        raise ValueError(f"feature_map must return {shape} for {_shape(inputs)}, got {_shape(features)}")
    if features.dtype not in checks.DTYPES or features.device != inputs.device:
        came = f"{features.dtype} on {features.device}"
        raise ValueError(f"feature_map must return floating dtypes on {inputs.device}, got {came}")
    if other is not None and (features.shape[3] != other.shape[3] or features.dtype != other.dtype):
        came = f"{_shape(other)} of {other.dtype} and {_shape(features)} of {features.dtype}"
        raise ValueError(f"feature_map must return queries and keys of one width and dtype, got {came}")


def check_spe(spe: Any, query: Tensor) -> None:
    if spe is None:
        return
    if not isinstance(spe, (Encoding, Codes)):
        wanted = "a posattn.SineSPE, a posattn.ConvSPE, what calling one of them gives, or None"
        raise TypeError(f"spe must be {wanted}, got {checks._kind(spe)}")
    module = spe.spe if isinstance(spe, Codes) else spe
    for name, size, index in (("num_heads", module.num_heads, 1), ("head_dim", module.head_dim, 3)):
        if size != query.shape[index]:
            what = f"query's {query.shape[1]} heads" if index == 1 else f"query's head_dim {query.shape[3]}"
            raise ValueError(f"spe must have {what}, got {type(module).__name__} with {name}={size}")
    for parameter in module.parameters():
        if parameter.device != query.device:
            raise ValueError(
                f"spe must be on query's device {query.device}, got {type(module).__name__} on {parameter.device}; "
                "move it there with spe.to(query.device)"
            )


def check_state(state: Any, spe: Encoding | Codes | None) -> None:
    """An initial state before the features are made."""
    if state is None:
        return
    if not isinstance(state, LinearState):
        raise TypeError(f"initial_state must be a posattn.LinearState or None, got {checks._kind(state)}")
    for name in ("kv", "k"):
        part = getattr(state, name)
        if not isinstance(part, Tensor):
            raise TypeError(f"initial_state.{name} must be a Tensor, got {checks._kind(part)}")
    if not checks._is_int(state.position):
        raise TypeError(f"initial_state.position must be an int, got {checks._kind(state.position)}")
    if state.position < 0:
        raise ValueError(f"initial_state.position must be at least 0, got {state.position}")
    if state.noise is None and spe is not None:
        raise ValueError("initial_state was made without spe and must be used without it")
    if state.noise is not None and spe is None:
        raise ValueError("initial_state was made with spe and must be used with the same spe")
    if isinstance(spe, Codes) and not spe.exact and not _same(spe.noise, state.noise):
        raise ValueError(
            "spe must have the noise of initial_state, got codes of another; "
            "pass the module itself, or spe(initial_state.noise)"
        )


def check_sums(state: LinearState, query: Tensor, value: Tensor) -> None:
    """An initial state beside the features that the queries have."""
    kv = (*query.shape[:2], query.shape[3], value.shape[3])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    for name, part, shape in (("kv", state.kv, kv), ("k", state.k, kv[:3])):
        if tuple(part.shape) != shape:
            letters = "(batch, heads, features, value_dim)" if name == "kv" else "(batch, heads, features)"
            raise ValueError(
                f"initial_state.{name} must have the shape {letters} = {shape}, got {_shape(part)}"
            )
        if part.dtype != dtype or part.device != query.device:
            came = f"{part.dtype} on {part.device}"
            raise ValueError(f"initial_state.{name} must be {dtype} on {query.device}, got {came}")


def choose_backend(
    backend: str | None, query: Tensor, value: Tensor, features: int, spe: Encoding | Codes | None
) -> str:
    """ "triton" or "blockwise", as `checks.choose_backend` does; features: the widest that are known so far."""
    return checks.resolve_backend(
        backend, query, lambda: checks.why_not_here(query) or _why_not_triton(query, value, features, spe)
    )


def _why_not_triton(query: Tensor, value: Tensor, features: int, spe: Encoding | Codes | None) -> str | None:
    single = query.dtype == torch.float32
    limit = MAX_FLOAT32_HEAD_DIM if single else MAX_HEAD_DIM
    sizes = {"head dims": query.shape[3], "value dims": value.shape[3], "features": features}
    for name, size in sizes.items():
        if size > limit:
            return f"takes {name} to {limit} in {query.dtype}, got {size}"
    module = spe.spe if isinstance(spe, Codes) else spe
    slots = getattr(module, "num_sines", 0) + (getattr(module, "gate", None) is not None)
    most = MAX_FLOAT32_SLOTS if single else MAX_SLOTS
    if slots > most:
        return f"takes num_sines to {most} in {query.dtype}, a gate counted as one, got {slots}"
    return None


def _shape(tensor: Tensor) -> str:
    return checks._shape(tensor)


def _same(noise: Noise, other: Noise | None) -> bool:
    return other is not None and noise.codes is other.codes and noise.gate is other.gate
