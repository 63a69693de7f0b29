"""How long a first call takes, in a process of its own: `python -m bench.speed_first`, called by `bench speed`.

Prints JSON. Without options: seconds of attention forward and backward with TISA, after imports and after the device
has been woken. `--compile sm_90`: seconds that compiling alone takes for that call, on this machine's CPU and without
a GPU, kernel by kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def in_fresh_process(cache: str, *options: str, timeout: float = 240) -> dict[str, Any]:
    """What this module prints when it runs by itself, with Triton's cache in the folder `cache`."""
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "bench.speed_first", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def cold_and_warm(*options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same process twice: with an empty cache, then with what the first one has left there."""
    with tempfile.TemporaryDirectory() as cache:
        return in_fresh_process(cache, *options), in_fresh_process(cache, *options)


def first_call(device: str) -> dict[str, Any]:
    start = time.perf_counter()
    import torch

    import posattn

    imported = time.perf_counter()
    length, dtype = (8192, torch.bfloat16) if device == "cuda" else (128, torch.float32)
    bias = posattn.TISA(4).to(device)
    q, k, v = (torch.randn(1, 4, length, 64, device=device, dtype=dtype).requires_grad_() for _ in "qkv")
    (q @ k.mT[..., :64]).sum().item()  # the device, and a library that every model uses
    awake = time.perf_counter()
    backend = "triton" if device == "cuda" else "blockwise"
    out = posattn.attention(q, k, v, bias, is_causal=True, backend=backend)
    assert isinstance(out, torch.Tensor)
    out.float().square().sum().backward()
    assert bias.amplitudes.grad is not None
    bias.amplitudes.grad.sum().item()
    called = time.perf_counter()
    return {"import": imported - start, "wake": awake - imported, "call": called - awake}


def compiled(chip: str, head_dim: int = 128) -> dict[str, Any]:
    """Seconds a kernel of forward and backward with TISA in bf16, one after the other; nothing runs."""
    import torch

    from posattn.kernels import launch

    from . import aot

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, length = aot.HEADS, aot.LENGTH
    q, k, v, out = (empty(aot.BATCH, heads, length, head_dim, dtype=torch.bfloat16) for _ in range(4))
    call: dict[str, Any] = dict(
        table=empty(heads, 2 * length - 1), support=empty(2, heads, dtype=torch.int32), slopes=None, key_mask=None,
        scale=head_dim**-0.5, softcap=0.0, shift=0, left=-1, right=0, symmetric=True,
    )  # fmt: skip
    with aot.written_down(chip) as made:
        launch.forward(q, k, v, **call)
        launch.backward(
            out, None, q, k, v, out, empty(aot.BATCH, heads, length), **call, tails_need_grad=False, need_q=True,
            need_kv=True, need_table=True, deterministic=False,
        )  # fmt: skip
    seconds: dict[str, float] = {}
    for kernel, arguments in made:
        start = time.perf_counter()
        options = {name: arguments.get(name, default) for name, default in (("num_warps", 4), ("num_stages", 3))}
        aot.compiled(chip, kernel, {**arguments, **options})
        seconds[kernel.__name__] = seconds.get(kernel.__name__, 0.0) + time.perf_counter() - start
    return {"kernels": seconds, "compile": sum(seconds.values())}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("bench.speed_first", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", metavar="CHIP", help="compile ahead of time, instead")
    options = parser.parse_args(argv)
    print(json.dumps(compiled(options.compile) if options.compile else first_call(options.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
