"""Every script in examples/ runs in its quick form, and the numbers it prints say what its text says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
SCRIPTS = ["generate_8192", "gpt2_tisa", "llama_dape", "t5_posattn"]


def output(name: str) -> str:
    """What `python examples/name.py --quick` prints; threads would only be in the way of the other tests'."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [
        sys.executable,
        ROOT / "examples" / f"{name}.py",
        "--quick",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests", timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern + r"\s*([-+.\de]+)", text)
    assert found, f"{pattern!r} is not in\n{text}"
    return float(found[1])


def row(start: str, text: str) -> list[float]:
    """The numbers of the line that starts so."""
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return [float(cell) for cell in line[len(start) :].split()]


def test_every_script_is_tested():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"text"}
    assert scripts == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_its_text_says_how_it_is_called_and_what_it_printed(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    documentation = text.split('"""')[1]
    assert f"python examples/{name}.py --quick" in documentation
    assert "It printed, with one thread of a busy CPU" in documentation
    assert "{" not in documentation


def test_gpt2_tisa():
    printed = output("gpt2_tisa")
    assert row("loss at length", printed) == [64, 256]
    absolute, before, after, twin = (
        row(name, printed)
        for name in (
            "GPT-2, absolute positions",
            "TISA attached, before fine-tuning",
            "TISA, fine-tuned",
            "absolute, trained as long",
        )
    )
    uniform = 5.55  # ln 256
    for losses in (absolute, before, after, twin):
        assert len(losses) == 2
        assert all(1 < loss < uniform for loss in losses)
    assert max(after) < min(before) - 0.2
    assert abs(after[0] - after[1]) < 0.2  # four times as far, the same loss
    assert number("largest difference of logits", printed) < 1e-5


def test_llama_dape():
    printed = output("llama_dape")
    assert row("loss at length", printed) == [32, 128]
    before, after = (
        row(name, printed) for name in ("DAPE attached, before fine-tuning", "DAPE-KERPLE, fine-tuned")
    )
    assert max(after) < min(before) - 0.2
    assert abs(after[0] - after[1]) < 0.2
    assert all(loss < 5.55 for loss in row("RoPE, trained as long", printed))


def test_t5_posattn():
    printed = output("t5_posattn")
    eager, ours = (number(f"{name} ", printed) for name in ("loss: eager", "posattn"))
    assert abs(eager - ours) < 1e-5
    assert number("largest difference of logits:", printed) < 1e-4
    assert number("relative to its largest entry:", printed) < 1e-4
    assert len(re.findall(r"^ +\d+( +[\d.]+ s, \d+ MB){2}$", printed, re.MULTILINE)) == 2


def test_generate_8192():
    printed = output("generate_8192")
    assert number("the whole text of", printed) == 192
    assert number("largest difference of logits, of all steps:", printed) < 1e-3
    assert number("tokens that the whole text gives as well:", printed) > 97
    assert len(re.findall(r"tokens generated, the last 44 at \d+ a second", printed)) == 4


def test_text_of_files(tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("examples_text", ROOT / "examples" / "text.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    (tmp_path / "a.txt").write_bytes(b"a" * 150_000)
    (tmp_path / "b.txt").write_bytes(b"b" * 50_000)
    monkeypatch.setattr(
        sys, "argv", ["example", "--text", *map(str, sorted(tmp_path.iterdir())), "--more", "5"]
    )
    options = module.options_of("What it is for.", more=(3, "a number"))
    assert options.more == 5
    training, held_out = module.read_text(options.text)
    assert (len(training), len(held_out)) == (180_000, 20_001)
    assert set(held_out.tolist()) == {ord("b")}
    with pytest.raises(SystemExit, match="50000 bytes are too few"):
        module.read_text([tmp_path / "b.txt"])
    for files in (None, options.text):
        training, held_out = module.read_text(files)
        assert training.dtype == held_out.dtype == torch.uint8
