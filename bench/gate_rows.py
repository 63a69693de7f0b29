"""Rows of the config tables in `python -m bench gate`: which cases they serve, which of them the cases have proved."""

from __future__ import annotations

from typing import Any

import torch


def bits_and_width(case: Any) -> tuple[int, int]:
    """Where the config table looks for a case: bits of the dtype, head dim of the padded tile."""
    return torch.finfo(case.dtype).bits, max(64, 1 << (case.head_dim - 1).bit_length())


def served(cases: list[Any], device: torch.device) -> list[Any]:
    """The cases that the config tables of this GPU have rows for; the rest is not Triton's (fp32 beyond 128, say)."""
    from posattn.kernels import configs, mix_configs

    def fits(case: Any) -> bool:
        sizes = getattr(case, "mixed", ())
        return not sizes or mix_configs.channels(sizes) <= mix_configs.largest(device, torch.finfo(case.dtype).bits)

    rows = {(bits, width) for chip, _, bits, width in configs.CONFIGS if chip == configs.arch(device)}
    return [case for case in cases if bits_and_width(case) in rows and fits(case)]


def configs_covered(done: list[Any], device: torch.device) -> dict[str, list[str]]:
    """Which rows of the config table the cases ran; "diagonals" runs in deterministic cases only.

    Rows of other schedules are named with it and their tile; covered are those that the plain kernel agreed with.
    """
    from posattn.kernels import configs, schedules

    ran = {bits_and_width(case) for case in done}
    sums = {bits_and_width(case) for case in done if case.deterministic}
    made: dict[str, list[str]] = {"covered": [], "not_covered": []}
    for chip, direction, bits, width in configs.CONFIGS:
        if chip == configs.arch(device):
            yes = (bits, width) in (sums if direction == "diagonals" else ran)
            made["covered" if yes else "not_covered"].append(f"{chip} {direction} {bits} bits {width}")
    judged: dict[str, list[str]] = {}
    for v in schedules.verdicts():
        bits, config = torch.finfo(v["dtype"]).bits, v["config"]
        if (bits, v["head_dim"]) in ran:
            row = schedules.name(configs.arch(device), v["direction"], bits, v["head_dim"], config)
            judged.setdefault(row, []).append(v["why"])
    for name, reasons in judged.items():
        made["not_covered" if any(reasons) else "covered"].append(name)
    return made


def verdicts(device: torch.device) -> list[dict[str, str]]:
    """What the plain kernel was compared with, row by row and by the call's options, and `why` not ("": agreed)."""
    from posattn.kernels import configs, schedules

    made = []
    for v in schedules.verdicts():
        place = v["direction"], torch.finfo(v["dtype"]).bits, v["head_dim"], v["config"]
        row = f"{schedules.name(configs.arch(device), *place)}, {v['dtype']}, {v['options'] or 'no options'}"
        print(f"  {row}: {v['why'] or 'agrees with the plain kernel'}")
        made.append({"row": row, "why": v["why"]})
    return made
