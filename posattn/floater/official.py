"""Parameters of the authors' translation models (github.com/xuanqing94/FLOATER), by the names of their state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

DELTA_T = 0.01  # where a state dict has no time_dt; the paper has 0.1
# part -> (name of p(0), name of the flow, streams)
PARTS = {
    "self": (
        ("proj_bias", "proj_flow", ("query", "key", "value")),
        ("proj_bias_selfattn", "proj_flow_selfattn", ("cross_query", "query", "key", "value")),
    ),
    "cross": (("proj_bias_encattn_kv", "proj_flow_encattn_kv", ("cross_key", "cross_value")),),
}


class Official(NamedTuple):
    initial: Tensor
    dynamics: dict[str, Tensor]  # as MLPDynamics names them
    streams: tuple[str, ...]
    delta_t: float


def official_parts(state_dict: Mapping[str, Tensor], prefix: str, part: str) -> Official:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    found = [names for names in PARTS[part] if prefix + names[0] in state_dict]
    if not found:
        wanted = " or ".join(prefix + bias for bias, _, _ in PARTS[part])
        near = [key for key in state_dict if "proj_bias" in key] or list(state_dict)[:20]
        raise ValueError(f"state_dict has no {wanted}; prefix and part must fit its keys, such as {near}")
    bias, flow, streams = found[0]
    initial = state_dict[prefix + bias]
    if initial.dim() != 3 or initial.shape[0] != len(streams):
        raise ValueError(f"{prefix + bias} must be ({len(streams)}, layers, dim), got {tuple(initial.shape)}")
    below = f"{prefix}{flow}.layers."
    if any(key.startswith(below) and ".conv" in key for key in state_dict):
        raise ValueError(
            f"{prefix + flow} is one of the authors' convolutional flows; only their linear flow is made here. Give a "
            "module of your own as dynamics to FLOATER, and copy both"
        )
    dim, dynamics = initial.shape[2], {}
    for ours, theirs in (("linear1", "0.linear"), ("linear2", "2.linear")):
        for name, shape in (("weight", (dim, dim + 1)), ("bias", (dim,))):
            key = f"{below}{theirs}.{name}"
            if key not in state_dict:
                raise ValueError(f"state_dict lacks {key}")
            if state_dict[key].shape != shape:
                raise ValueError(f"{key} must be {shape}, got {tuple(state_dict[key].shape)}")
            dynamics[f"{ours}.{name}"] = state_dict[key]
    time = state_dict.get(f"{prefix}time_dt", torch.tensor(DELTA_T))
    if time.numel() != 1:
        raise ValueError(f"{prefix}time_dt must be one number, got {tuple(time.shape)}")
    delta_t = float(f"{time.item():.7g}")  # kept in float32: the number that was meant
    return Official(initial, dynamics, streams, delta_t)
