"""The peers of the table of goals, and how they are timed."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

pytest.importorskip("triton")

from bench import speed_first, speed_once, speed_parts, speed_peers
from bench.speed_timing import SLOW, DeviceBroken, Peer, Place, Timer


def test_peers_take_turns_and_slow_ones_run_once():
    order = []

    def peer(name, ms):
        def make():
            return Peer(lambda q, k, v: order.append((name, float(q[0, 0, 0, 0]))) or clock.append(ms), [])

        return make

    clock = []
    timer = Timer("cpu", do_bench=lambda call: (call(), clock[-1])[1])
    place = Place(4, 4, 1, 1)
    peers = {"a": peer("a", 1.0), "slow": peer("slow", SLOW + 1), "bad": lambda: 1 / 0, "b": peer("b", 3.0)}
    rows = {r["peer"]: r for r in timer.turns(place, peers, ("forward",), {"b": "it broke"})}
    assert rows["a"]["forward_ms"] == 1.0
    assert rows["a"]["forward_all"] == [1.0, 1.0, 1.0]
    assert rows["slow"]["forward_all"] == [SLOW + 1]
    assert rows["bad"]["not_run"] == "division by zero"
    assert rows["b"]["not_run"] == "left out: it broke"
    names = [name for name, _ in order]
    assert names.index("slow") < len(names) - 1 - names[::-1].index("a"), "one input set after the other"
    assert len({value for _, value in order}) == 3, "three input sets"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_compute_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    timer = Timer("cpu")
    for causal in (True, False):
        place = Place(16, 130, 1, 2, causal)
        inputs = timer.inputs(place, 0)
        names = speed_peers.forward_peers(place, "cuda", True)
        pairs = [
            (speed_peers.radial(place, "cpu"), speed_peers.flex_radial(place, "cpu", False)),
            (speed_peers.radial(place, "cpu"), speed_peers.flex_radial(place, "cpu", True)),
            (speed_peers.with_bias(place, "cpu", "KERPLE"), speed_peers.flex_table(place, "cpu", "KERPLE")),
            (speed_peers.with_bias(place, "cpu", "ALiBi"), speed_peers.flex_slopes(place, "cpu")),
            (speed_peers.with_bias(place, "cpu", "TISA"), speed_peers.with_bias(place, "cpu", "TISA", "kernel")),
            (speed_peers.ours(place, "cpu"), speed_peers.flex_plain(place, "cpu")),
            (speed_peers.ours(place, "cpu"), speed_peers.sdpa(place, "FLASH")),
        ]
        with torch.no_grad():
            for mine, other in pairs:
                torch.testing.assert_close(mine.attend(*inputs[:3]), other.attend(*inputs[:3]), rtol=1e-4, atol=1e-5)
    assert {"posattn TISA", "posattn KERPLE kernel", "SDPA cudnn", "Flex KERPLE", "Flex ALiBi"} <= set(names)


def test_one_direction_fails_and_the_others_are_kept():
    place = Place(8, 16, 1, 2)
    plain = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.ran = 0
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            ctx.ran += 1
            if ctx.ran > 1:
                raise RuntimeError("a second time")
            return grad

    once = lambda q, k, v: plain(Once.apply(q), k, v)
    peers = {"twice": lambda: Peer(plain, []), "once": lambda: Peer(once, []), "said": lambda: Peer(once, [], False)}
    peers["never"] = lambda: Peer(lambda q, k, v: 1 / 0, [])
    rows = {r["peer"]: r for r in Timer("cpu").turns(place, peers, ("forward", "both", "backward"))}
    assert {"forward_ms", "both_ms", "backward_ms"} <= rows["twice"].keys()
    assert rows["once"]["failed"] == {"backward": "a second time"}
    assert {"forward_ms", "both_ms"} <= rows["once"].keys()
    assert not {"backward_ms", "not_run"} & rows["once"].keys()
    assert "failed" not in rows["said"], "a peer that says so is not asked"
    assert {"forward_ms", "both_ms"} <= rows["said"].keys()
    assert rows["never"]["not_run"] == "division by zero"
    assert not {"forward_ms", "failed"} & rows["never"].keys()


def test_flex_in_training_needs_no_second_backward(monkeypatch):
    made = {"Flex KERPLE": lambda: Peer(lambda q, k, v: q * 1.0 + 0 * (k + v), [], again=False)}
    monkeypatch.setattr(speed_parts, "training_peers", lambda *_: made)
    place = Place(8, 16, 1, 2)
    ms = cycle([2.0, 7.0])
    (row,) = speed_parts.training_cell(place, True, Timer("cpu", do_bench=lambda call: (call(), next(ms))[1]), {})
    assert (row["forward_ms"], row["both_ms"], row["difference_ms"]) == (2.0, 7.0, 5.0)
    assert row["both_tflops"] == pytest.approx(3.5 * place.flop() / 7.0 / 1e9)
    assert row["difference_tflops"] == pytest.approx(2.5 * place.flop() / 5.0 / 1e9)
    assert "backward_tflops" not in row
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    assert not speed_peers.flex_plain(place, "cpu").again


def test_why_a_schedule_was_refused():
    from posattn.kernels.configs import Config

    plain = Config(64, 64, 4, 2)
    rows = [(128, "specialised", "slow"), (64, "specialised", "narrow"), (128, "persistent", "other"),
            (128, "descriptors", "")]  # fmt: skip
    verdicts = [
        {"direction": "forward", "head_dim": dim, "config": plain._replace(schedule=name), "why": why}
        for dim, name, why in rows
    ]
    assert speed_peers.refusal(verdicts, "specialised", 128) == "slow"
    assert speed_peers.refusal(verdicts, "persistent", 128) == "other"
    assert "no row" in speed_peers.refusal(verdicts, "descriptors", 128)
    assert "no row" in speed_peers.refusal(verdicts, "persistent", 64)


def test_errors_are_those_of_float64(monkeypatch):
    monkeypatch.setattr(speed_parts, "flex_leaf", speed_parts.our_table)
    place, timer = Place(16, 96, 1, 2), Timer("cpu")
    mine, other = speed_parts.error_cell(place, timer, {})
    assert set(mine["errors"]) == {"out", "dq", "dk", "dv", "dtable"}
    assert max(mine["errors"].values()) < 1e-5
    assert other["errors"] == mine["errors"]
    right = speed_parts.posattn.attention
    monkeypatch.setattr(speed_parts.posattn, "attention", lambda *x, **y: right(*x, **y) * (1 + 1e-3))
    assert min(speed_parts.error_cell(place, timer, {})[0]["errors"].values()) > 5e-4


def test_what_breaks_the_gpu_is_named():
    class Broken(Timer):
        def wait(self):
            raise RuntimeError("CUDA error")

    with pytest.raises(DeviceBroken, match="bad: division by zero"):
        Broken("cpu").turns(Place(4, 4, 1, 1), {"bad": lambda: 1 / 0}, ("forward",))


def test_the_first_call_here():
    found = speed_first.first_call("cpu")
    assert found["call"] > 0


def test_one_case_for_a_profiler():
    assert speed_once.main(["--device", "cpu", "--dim", "64", "--length", "64", "--times", "1"]) == 0
    place = Place(128, 8192, 4, 16)
    # 4 * D flop for each of the causal half of the pairs.
    assert speed_once.floor_ms("attend_forward", place) == pytest.approx(2 * 8192**2 * 128 * 64 / 790e12 * 1e3)
    assert speed_once.floor_ms("attend_backward_cols", place) == 2 * speed_once.floor_ms("attend_forward", place)
    assert speed_once.floor_ms("fold_diagonals", place) is None
