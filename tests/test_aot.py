"""The kernels' budget: every shipped config is compiled for its chip, without one, and what was made is counted.

`python -m bench kernels` counts; here is what it must not exceed. It runs once, in a process of its own, because in
this one Triton may be interpreting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("triton")
fcntl = pytest.importorskip("fcntl")

ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).with_name("aot_budget.json")
SHARED = {  # KB that one program may have
    "sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64,
}
UPDATE = "python -m bench kernels --update-budget"
# All chips take ten minutes of two cores: the tests compile for two, `python -m bench kernels` for every one.
CHIPS = tuple(SHARED) if os.environ.get("POSATTN_ALL_CHIPS") == "1" else ("sm_80", "sm_90")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """What `python -m bench kernels --json` wrote; made once, also where several workers run the tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "kernels.json"
    with open(folder / "kernels.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            command = [sys.executable, "-m", "bench", "kernels", "--arch", ",".join(CHIPS), "--json", str(path)]
            done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
            assert path.exists(), done.stdout[-4000:] + done.stderr[-4000:]
            print(done.stdout)
    return json.loads(path.read_text("utf-8"))


def name(row):
    return f"{row['chip']} {row['direction']} {row['bits']} bits, head dim {row['width']}, {row['rule']}"


def refuse(faults):
    assert not faults, "\n".join(faults)


def paths(report, direction, rule, kind="path"):
    """{head dim: path} on sm_90 in 16 bits."""
    return {
        row["width"]: row[kind]
        for row in report["rows"]
        if (row["chip"], row["bits"], row["direction"], row["rule"]) == ("sm_90", 16, direction, rule)
    }


def test_every_config_compiles(report):
    refuse([f"{name(row)}: {row['error']}" for row in report["rows"] if "error" in row])


def test_every_config_is_in_the_report(report):
    from posattn.kernels.configs import CONFIGS

    wanted = {config for config in CONFIGS if config[0] in CHIPS}
    missing = wanted - {(row["chip"], row["direction"], row["bits"], row["width"]) for row in report["rows"]}
    assert not missing


def test_no_spills(report):
    refuse([f"{name(row)}: {row['stack']} bytes of stack" for row in report["rows"] if row.get("stack", 0) > 64])


def test_shared_memory_fits_the_chip(report):
    limit = {chip: kilobytes * 1024 for chip, kilobytes in SHARED.items()}
    over = [row for row in report["rows"] if row.get("shared", 0) > limit[row["chip"]]]
    refuse([f"{name(row)}: {row['shared']} bytes of shared memory" for row in over])


def test_tensor_cores_are_used(report):
    wanted = [row for row in report["rows"] if "error" not in row and (row["bits"] == 16 or row["precision"] != "ieee")]
    refuse([f"{name(row)}: no product by tensor cores in its loop" for row in wanted if not row["products"]])


@pytest.mark.parametrize("rule", ["Toeplitz", "Toeplitz+span"])
def test_forward_with_a_table_stays_near_plain(report, rule):
    plain, table = paths(report, "forward", "Plain"), paths(report, "forward", rule)
    for width in (64, 128):
        assert table[width] <= 1.35 * plain[width], f"head dim {width}: {table[width]} against {plain[width]}"


@pytest.mark.parametrize(
    ("rule", "without", "kind", "limit"),
    [
        ("Gradient", "Toeplitz", "path", 1.3),
        # Most tiles are far from the diagonal and touch no table; those near it pay for the branch.
        ("Gradient+span", "Toeplitz+span", "far_path", 1.3),
        ("Gradient+span+tails", "Toeplitz+span", "far_path", 1.3),
        ("Gradient+span", "Toeplitz+span", "path", 1.45),
        ("Gradient+span+tails", "Toeplitz+span", "path", 1.45),
    ],
)
def test_gradient_of_a_table_stays_cheap(report, rule, without, kind, limit):
    base, gradient = paths(report, "rows", without, kind), paths(report, "rows", rule, kind)
    for width in (64, 128):
        assert gradient[width] <= limit * base[width], f"head dim {width}: {gradient[width]} against {base[width]}"


def schedules(report):
    """(row, schedule) of the rows beside the plain ones."""
    named = ("specialised", "persistent", "descriptors")
    return [(row, row["schedule"]) for row in report["rows"] if row.get("schedule") in named and "error" not in row]


def test_every_schedule_is_in_the_report(report):
    made = {(row["direction"], schedule, row["width"]) for row, schedule in schedules(report)}
    wanted = {("forward", "specialised", width) for width in (64, 128, 256)}
    wanted |= {("cols", "specialised", width) for width in (64, 128)}
    assert made >= wanted | {("forward", "persistent", 128), ("forward", "descriptors", 64)}


def test_warps_are_specialised(report):
    """One group of them copies, two multiply, and nothing of the bias goes through shared memory."""
    faults = []
    for row, schedule in schedules(report):
        wanted = (True, 12, 8) if schedule != "descriptors" else (False, row["num_warps"], row["num_warps"])
        if (row["specialised"], row["warps"], row["computing"]) != wanted:
            faults.append(f"{name(row)}: {row['warps']} warps, {row['computing']} of them compute")
        if not row["products"].get("HGMMA") or row["staged"]:
            faults.append(f"{name(row)}: {row['products']}, {row['staged']} copies past the descriptors")
    refuse(faults)


def test_other_schedules_cost_fewer_instructions(report):
    """Than the plain kernel with a table at the same head dim; that tiles are skipped is not in the loop."""
    costs = {
        (row["direction"], row["width"], row["rule"]): row["per_score"]
        for row in report["rows"]
        if (row["chip"], row["bits"]) == ("sm_90", 16) and "error" not in row
    }
    for row, schedule in schedules(report):
        direction, width, rule = row["direction"], row["width"], row["rule"]
        if rule.startswith("Toeplitz"):
            assert row["per_score"] < costs[direction, width, "Toeplitz"], name(row)
        if "+skip" in rule:
            assert row["per_score"] <= 1.03 * costs[direction, width, f"Toeplitz+{schedule}"], name(row)


def test_paths_do_not_grow(report):
    """Against tests/aot_budget.json, which knows each Triton by major.minor; one it does not know only warns."""
    from bench.kernels import budget_entry, budget_key

    version = ".".join(report["triton"].split(".")[:2])
    known = json.loads(BUDGET.read_text("utf-8"))
    if version not in known:
        warnings.warn(f"no budget for Triton {version}, only for {', '.join(known)}: {UPDATE}", stacklevel=1)
        return
    rows = [row for row in report["rows"] if (row["chip"], row["bits"]) == ("sm_90", 16) and "error" not in row]
    now = {budget_key(row): budget_entry(row) for row in rows}
    faults = [f"{key} is in only one of report and budget" for key in sorted(now.keys() ^ known[version].keys())]
    for key in now.keys() & known[version].keys():
        was, made = known[version][key], now[key]
        if was["config"] != made["config"]:
            faults.append(f"{key}: the budget is for config {was['config']}, the table has {made['config']}")
        elif made["path"] > 1.03 * was["path"]:
            registers = f"registers {was['registers']} -> {made['registers']}"
            faults.append(f"{key}: {was['path']} -> {made['path']} instructions a tile ({registers})")
    refuse([*faults, f"if this is meant: {UPDATE}"] if faults else [])


def test_the_report_reads_control_flow():
    """The path is the shortest with all the work: not over the mask at 3-4, not past the table's load at 6."""
    from bench.machine_code import Code, read_sass

    rows = [
        "S2R R0",  # 0
        "HGMMA.64x64x16.F32.BF16 R24, R24",  # 1: the loop
        "@!P0 BRA 0x0005",  # 2
        "FSEL R1, R1",  # 3: a masked tile
        "FSEL R2, R2",  # 4
        "@P1 BRA 0x0008",  # 5
        "LDG.E R3, desc[UR4][R2.64]",  # 6: a tile near the diagonal
        "FADD R3, R3, R4",  # 7
        "MUFU.EX2 R5, R5",  # 8
        "@P2 BRA 0x0001",  # 9
        "EXIT",  # 10
    ]
    text = "".join(f"        /*{n:04x}*/                   {row} ;\n" for n, row in enumerate(rows))
    instructions = read_sass(text)
    assert len(instructions) == len(rows)
    code = Code(instructions)
    assert code.loop == (1, set(range(1, 10)))
    assert code.shortest(near=True) == [instructions[n].op for n in (1, 2, 5, 6, 7, 8, 9)]
    assert code.shortest(near=False) == [instructions[n].op for n in (1, 2, 5, 8, 9)]
