"""Changes of parameters that their own counts of changes (`Tensor._version`) do not show: steps of fused optimizers.

Whoever keeps what parameters give compares `last_step` as well. It is set by the hook that torch.optim.Optimizer calls
after `step`, whichever optimizer, model or thread it is, and also within a graph of torch.compile: the hook reads
nothing, so that no graph depends on how many steps there have been.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


class Step:
    """One step of one optimizer; equal to itself alone."""


class _Last:
    step = Step()


_last = _Last()


def last_step() -> Step:
    """Another object after each step that any optimizer of this process has made."""
    return _last.step


def _stepped(*_: Any) -> None:
    _last.step = Step()


register_optimizer_step_post_hook(_stepped)
