"""Steps of 1 and 2 processes of this machine, what a step communicates, and what follows for clusters.

    python benchmarks/scaling.py --json scaling.json     # measures, by torchrun, one thread for each process
    python benchmarks/scaling.py --derive                # the table of docs/concepts/scaling.md; seconds

Weak scaling: every process has a batch of its own. The efficiency is the time of a step of one process
over that of two. Gradients are float32 and summed around a ring: each process sends and receives
2 (n - 1) / n of their bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

NETWORK = {"name": "swin_unetr_base", "gradient": 62_187_296 * 4, "forward": 631e9}  # bytes, FLOP at 96³
BUCKET = 25 * 2**20  # bytes; DDP's default
# what is assumed of clusters: bytes a second that an all-reduce moves for each rank, and seconds a message
WAYS = {
    "8 GPUs, NVLink": (8, 200e9, 5e-6),
    "8 GPUs, PCIe": (8, 10e9, 10e-6),
    "64 GPUs, InfiniBand, a 200 Gb/s port for each GPU": (64, 160e9, 8e-6),
    "64 GPUs, InfiniBand, one 200 Gb/s port a machine": (64, 20e9, 8e-6),
    "64 GPUs, Ethernet, 100 Gb/s a machine": (64, 8e9, 30e-6),
    "64 GPUs, Ethernet, 25 Gb/s a machine": (64, 2.5e9, 30e-6),
}


def volume(gradient: float, n: int) -> float:
    """Bytes that each of n ranks sends, and receives, in a step.

    >>> volume(100, 8)
    175.0
    """
    return 2 * (n - 1) / n * gradient


def efficiency(compute: float, n: int, rate: float, latency: float, accumulate: int = 1) -> float:
    """Of a step of `compute` seconds, a third of them forward; gradients travel while the rest is computed.

    What cannot be hidden: the last bucket, and what takes longer than the backward pass of the last batch.
    """
    gradient = NETWORK["gradient"]
    buckets = math.ceil(gradient / BUCKET)
    travel = volume(gradient, n) / rate + buckets * 2 * math.log2(n) * latency
    last = travel / buckets
    shown = max(last, travel - compute * 2 / 3)
    return accumulate * compute / (accumulate * compute + shown)


def derive() -> None:
    print("| cluster | bytes a step | travel | 40 TFLOP/s | and `loop.accumulate=4` | 120 TFLOP/s |")
    print("|---|---|---|---|---|---|")
    for name, (n, rate, latency) in WAYS.items():
        moved = volume(NETWORK["gradient"], n)
        slow, fast = (2 * 3 * NETWORK["forward"] / flops for flops in (40e12, 120e12))
        found = [efficiency(slow, n, rate, latency), efficiency(slow, n, rate, latency, 4)]
        found.append(efficiency(fast, n, rate, latency))
        row = " | ".join(f"{100 * one:.0f} %" for one in found)
        print(f"| {name} | {moved / 1e6:.0f} MB | {1e3 * moved / rate:.0f} ms | {row} |")


def work(arguments: argparse.Namespace) -> None:
    """One process under torchrun; rank 0 prints the seconds of a step and the bytes of the gradient."""
    import torch

    from unetrkit.networks import build
    from unetrkit.ranks import this_rank
    from unetrkit.training.distributed import together
    from unetrkit.training.learner import build_learner, take_step
    from unetrkit.training.loop import LoopSettings
    from unetrkit.training.losses import LossSettings
    from unetrkit.training.optim import OptimSettings
    from unetrkit.training.segmentation import Segmentation

    torch.set_num_threads(1)
    side, settings = (arguments.side,) * 3, LoopSettings(amp="off", device="cpu")
    with together(torch.device("cpu")):
        objective = Segmentation(build(arguments.network, 1, 14, side, {}), LossSettings())
        learner = build_learner(objective, settings, OptimSettings())
        batch = {
            "image": torch.randn(1, 1, *side),
            "label": torch.randint(14, (1, *side)).to(torch.uint8),
        }
        seconds = []
        for step in range(arguments.steps + 1):
            began = time.perf_counter()
            take_step(learner, iter([batch]), step, 1e-4, settings)
            seconds.append(time.perf_counter() - began)
        gradient = sum(p.numel() * 4 for p in objective.parameters() if p.grad is not None)
        if this_rank().first:
            print(json.dumps({"seconds": min(seconds[1:]), "gradient": gradient}))


def measure(arguments: argparse.Namespace) -> None:
    found = {}
    for n in (1, 2):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        words = ["--work", "--network", arguments.network, "--side", str(arguments.side)]
        command = [*start, __file__, *words, "--steps", str(arguments.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[n] = json.loads(done.stdout) | {"processes": n}
        found[n]["sent"] = volume(found[n]["gradient"], n)
        seconds, sent = found[n]["seconds"], found[n]["sent"]
        print(f"{n} processes: {seconds:.3f} s a step, each sends and receives {sent / 1e6:.1f} MB")
    print(f"efficiency of 2: {100 * found[1]['seconds'] / found[2]['seconds']:.0f} %")
    if arguments.json:
        arguments.json.write_text(json.dumps({"network": arguments.network, "runs": list(found.values())}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", default="swin_unetr_tiny")
    parser.add_argument("--side", type=int, default=64, help="voxels of a patch along each axis")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--derive", action="store_true")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments)
    elif arguments.derive:
        derive()
    else:
        measure(arguments)


if __name__ == "__main__":
    main()
