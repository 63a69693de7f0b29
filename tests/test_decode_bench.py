"""The benchmark of decoding, its part of the gate and its predictions, where there is no GPU."""

from __future__ import annotations

import json

import pytest
import torch

import posattn

pytest.importorskip("triton")

from bench import aot_decode, gate_decode
from bench.decode import BANDWIDTH, COLD, ENOUGH, MOST_CALLS, Place, main, places, rounds_of

SMALLEST = gate_decode.Case(torch.float32, 16, "TISA", "one query, pages of 16")


def test_it_runs(tmp_path, capsys):
    assert main(["--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("quick-decode-*.json")
    report = json.loads(path.read_text("utf-8"))
    peers = [row["peer"] for row in report["rows"] if "error" not in row]
    assert peers == [
        "posattn none",
        "posattn ALiBi",
        "posattn TISA",
        "posattn pages",
        "SDPA none",
        "SDPA TISA",
    ]
    assert all(row["median"] > 0 for row in report["rows"])
    assert not report["not_reached"]
    assert "us" in capsys.readouterr().out


def test_the_budget_stops_it(tmp_path, capsys):
    assert main(["--device", "cpu", "--budget", "0", "--output", str(tmp_path)]) == 0
    assert "not reached in the budget: 5" in capsys.readouterr().out


def test_places_and_their_floor():
    assert len(set(places("cuda", False))) == 32
    assert Place(1, 16, 16, 128, 8192).cache_bytes(2) == 67_108_864


def test_a_graph_holds_enough_work():
    for size in (p.cache_bytes(2) for p in places("cuda", False)):
        copies = max(1, min(64, COLD // size))
        rounds = rounds_of(size, copies)
        assert rounds * copies <= max(MOST_CALLS, copies)
        assert rounds * copies * size / BANDWIDTH >= ENOUGH or (rounds + 1) * copies > MOST_CALLS


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")
def test_the_gate_finds_what_is_wrong(monkeypatch):
    assert gate_decode.check(SMALLEST, torch.device("cpu"), rehearse=True)["failed"] == []
    right = posattn.attention_with_kvcache

    def wrong(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out * (1 + 1e-3), lse

    monkeypatch.setattr(posattn, "attention_with_kvcache", wrong)
    assert gate_decode.check(SMALLEST, torch.device("cpu"), rehearse=True)["failed"] == ["out"]


def test_cases_of_the_gate():
    cases = list(gate_decode.cases())
    assert {case.form for case in cases} == set(gate_decode.FORMS)
    assert {case.bias for case in cases} == set(gate_decode.BIASES)
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16, torch.float32}
    assert not [case for case in cases if case.dtype == torch.float32 and case.head_dim > 128]


def test_jobs_and_bytes():
    from bench import aot_mixing, aot_spe
    from posattn.kernels.decode_configs import DECODE

    assert not set(aot_decode.KERNELS) & {*aot_mixing.KERNELS, *aot_spe.KERNELS}
    jobs = aot_decode.jobs(None, False)
    assert len(set(jobs)) == len(jobs)
    assert {(chip, bits, width) for chip, _, bits, width, _ in jobs} == set(DECODE)
    assert aot_decode.bytes_per_key(aot_decode.Form(), 128) == 16 * 512
    assert aot_decode.bytes_per_key(aot_decode.FORMS["Table, GQA 8"], 128) == 2 * 512 + 16 * 4
