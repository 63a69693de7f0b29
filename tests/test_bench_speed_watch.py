"""Peers that end the process, and budgets, of the table of goals; all of it invented."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("triton")

from bench import speed, speed_parts, speed_watch
from bench.resume import Finished
from bench.speed_timing import DeviceBroken
from bench.speed_watch import Clocks, Watch


def run(tmp_path, *options):
    status = speed.main(["--device", "cpu", "--output", str(tmp_path), *options])
    return status, json.loads((tmp_path / "quick-speed-cpu.json").read_text("utf-8"))


def finished_of(tmp_path):
    return Finished(tmp_path / "speed.json", {"code": 1})


def test_what_broke_the_gpu_is_left_out_of_its_whole_part(tmp_path, monkeypatch):
    asked = []

    def piece(part, name):
        def work(timer, left_out):
            asked.append((f"{part} {name}", sorted(left_out)))
            if "bad" not in left_out:
                raise DeviceBroken("bad: an illegal memory access")
            return [{"peer": "bad", "not_run": left_out["bad"]}]

        return speed_parts.Cell(part, f"{part} {name}", work)

    pieces = [piece("memory", "D 128"), piece("memory", "D 64"), piece("error", "D 64")]
    monkeypatch.setattr(speed, "cells", lambda *_: pieces)
    assert [run(tmp_path)[0] for _ in range(3)] == [3, 3, 0]
    assert asked == [
        ("memory D 128", []),
        ("memory D 128", ["bad"]),
        ("memory D 64", ["bad"]),
        ("error D 64", []),
        ("error D 64", ["bad"]),
    ]


def test_a_peer_that_never_ends(tmp_path):
    left = []
    watch = Watch(finished_of(tmp_path), seconds=0.1, leave=left.append)
    watch.begin("forward", "forward D 64")
    watch.started("quick")
    watch.started("hangs")
    for _ in range(100):
        time.sleep(0.02)
        if left:
            break
    assert left == [speed_watch.STATUS]
    later = Watch(finished_of(tmp_path))
    assert later.left_out("forward", "forward D 128") == {"hangs": "not done after 0.1 s (forward D 64)"}
    assert later.left_out("training", "training D 64") == {}
    later.close()


def test_a_peer_in_time_is_not_blamed(tmp_path):
    left = []
    watch = Watch(finished_of(tmp_path), seconds=0.2, leave=left.append)
    watch.begin("forward", "forward D 64")
    for _ in range(4):
        watch.started("posattn")
        time.sleep(0.1)
    watch.ended()
    time.sleep(0.4)
    watch.close()
    assert not left
    assert not watch.note.exists()


@pytest.mark.parametrize("peer", ["Flex none", "all"])
def test_a_note_left_behind_twice_leaves_its_peer_out(tmp_path, peer):
    for _ in range(2):
        watch = Watch(finished_of(tmp_path))
        assert watch.left_out("forward", "forward D 64") == {}
        watch.begin("forward", "forward D 64")
        watch.started(peer)
        watch.stop.set()  # and nothing more: the process is gone
    watch = Watch(finished_of(tmp_path))
    assert list(watch.left_out("forward", "forward D 64")) == [peer]
    # A whole piece says nothing of the next one.
    assert list(watch.left_out("forward", "forward D 128")) == ([] if peer == "all" else [peer])
    watch.close()


JOB = """
import sys, time
from pathlib import Path
from bench.resume import Finished
from bench.speed_watch import Watch, ending_in_order
watch = Watch(Finished(Path(sys.argv[1]) / "speed.json", {"code": 1}))
watch.begin("forward", "forward D 64")
with ending_in_order():
    try:
        watch.started("posattn")
        print("at work", flush=True)
        time.sleep(60)
    finally:
        watch.ended()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("sent", "blamed"), [("SIGTERM", False), ("SIGKILL", True)])
def test_a_polite_kill_blames_nobody(tmp_path, sent, blamed):
    with subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path)], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "at work\n"
        job.send_signal(getattr(signal, sent))
        job.wait(20)
    assert bool(list(tmp_path.glob("*.started"))) == blamed


HANGS = """
import sys, ctypes, time
from pathlib import Path
from bench import speed_watch
from bench.resume import Finished
speed_watch.GRACE = 0.5
watch = speed_watch.Watch(Finished(Path(sys.argv[1]) / "speed.json", {"code": 1}), seconds=0.3, hard=True)
watch.begin("forward", "forward D 64")
watch.started("bad")
(ctypes.PyDLL if sys.argv[2] == "interpreter" else ctypes.CDLL)(None).sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="sleep of the C library")
@pytest.mark.parametrize(("what", "status", "times"), [("call", speed_watch.STATUS, 2), ("interpreter", 1, 1)])
def test_a_process_that_hangs_ends_itself(tmp_path, what, status, times):
    """In a call that lets other threads run, as waiting for a GPU does, and in one that does not."""
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path), what], capture_output=True, timeout=50)
    assert done.returncode == status
    watch = Watch(finished_of(tmp_path))
    watch.close()
    (note,) = watch.finished.parts.values()
    assert (note["peer"], note["times"]) == ("bad", times)


def test_the_budget_stops_before_a_piece_that_does_not_fit(tmp_path, monkeypatch, capsys):
    done = []

    def piece(part, name, seconds):
        def work(timer, left_out):
            done.append(name)
            clock[0] += seconds
            return []

        return speed_parts.Cell(part, name, work)

    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    pieces = [piece("error", "a", 30), piece("error", "b", 50), piece("memory", "c", 10), piece("error", "d", 1)]
    monkeypatch.setattr(speed, "cells", lambda *_: pieces)
    assert run(tmp_path, "--budget", "130")[1]["not_reached"] == ["d"], "90 of 130 s have gone, b took 50"
    assert "stopped before d, which may take 50 s: 40 s of the budget are left" in capsys.readouterr().out
    assert run(tmp_path, "--budget", "49")[1]["not_reached"] == ["d"], "what earlier calls took counts too"
    assert not run(tmp_path, "--budget", "51")[1]["not_reached"]
    assert done == ["a", "b", "c", "d"]


def test_two_processes_on_one_file_keep_all_pieces(tmp_path):
    first, second = finished_of(tmp_path), finished_of(tmp_path)
    first.add("a", {})
    second.add("b", {})
    first.finish({})  # it has not seen b
    assert set(finished_of(tmp_path).parts) == {"a", "b"}
    second.add("c", {})
    second.finish({})
    assert set(finished_of(tmp_path).parts) == {"a", "b", "c"}
    third, fourth = finished_of(tmp_path), finished_of(tmp_path)
    third.add("d", {})
    third.finish({})
    fourth.finish({})
    assert set(finished_of(tmp_path).parts) == {"a", "b", "c", "d"}


def test_clocks_are_read_at_work():
    readings = iter([["1980", "650.5", "0x0"], ["1410", "699.0", "0x4"], ["1500", "690", "0x4"]])
    with Clocks("cuda", 0.01, lambda: next(readings, None)) as clocks:
        time.sleep(0.5)
    assert clocks.summary() == {"sm": [1410.0, 1500.0, 1980.0], "power": 699.0, "reasons": ["0x0", "0x4"]}
    assert Clocks("cpu").summary() is None
    assert speed_watch.summary([["[N/A]", "1", "0x0"]]) is None
