"""Forward passes and training steps, ours and MONAI's with the same weights, side by side in one run.

Input n x 1 x 96 x 96 x 96, 14 classes. A row is the ratio of MONAI's time to ours: against MONAI as it comes
(float32), and against the best of what its own switches give (`use_flash_attention`, channels_last_3d, bf16
autocast, alone and together; with `--compile` torch.compile too). Memory is a process's peak above what it
had before the network ran, each in a process of its own. On a CPU ours runs as `unetrkit train` does, with
`keep_freed_memory`; `--keep-for-both` gives MONAI the same.

    python benchmarks/networks.py --json networks.json          # everything, about 20 minutes on two cores
    python benchmarks/networks.py --quick                       # the tiny network's forward pass

The JSON is written anew after each way: a run that is stopped leaves what it had measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from unetrkit.memory import keep_freed_memory
from unetrkit.networks import build
from unetrkit.networks.published import translate

SIZE, CLASSES = (96, 96, 96), 14
FEATURES = {"swin_unetr_tiny": 12, "swin_unetr_base": 48}
NETWORKS = ("swin_unetr_tiny", "swin_unetr_base", "unetr")


@dataclass(frozen=True)
class Way:
    """How a network is run."""

    name: str
    whose: str  # "ours" or "monai"
    bf16: bool = False
    flash: bool = False
    last: bool = False  # channels_last_3d
    compiled: bool = False


OURS = (Way("float32", "ours"), Way("bf16", "ours", bf16=True))
DEFAULT = Way("as it comes", "monai")
SWITCHES = (
    Way("bf16", "monai", bf16=True),
    Way("flash", "monai", flash=True),
    Way("flash, channels last", "monai", flash=True, last=True),
    Way("flash, channels last, bf16", "monai", bf16=True, flash=True, last=True),
)
COMPILED = Way("compiled, bf16", "monai", bf16=True, compiled=True)


def networks(name: str, flash: bool) -> tuple[nn.Module, nn.Module]:
    """MONAI's and ours, with equal weights."""
    from monai.networks.nets import UNETR, SwinUNETR

    torch.manual_seed(0)
    if name == "unetr":
        theirs: nn.Module = UNETR(1, CLASSES, SIZE)
        ours = build(name, 1, CLASSES, SIZE, {})
    else:
        theirs = SwinUNETR(1, CLASSES, feature_size=FEATURES[name], use_flash_attention=flash)
        ours = build(name, 1, CLASSES, SIZE, {"relative_positions": "sliced"})
    ours.load_state_dict(translate(theirs.state_dict()))
    return theirs, ours


class Runner:
    """A network made ready to be run one way."""

    def __init__(self, network: nn.Module, way: Way, image: Tensor, training: bool) -> None:
        layout = torch.channels_last_3d if way.last else torch.contiguous_format
        self.network = network.to(image.device, memory_format=layout).train(training)
        self.image = image.contiguous(memory_format=layout)
        self.run = torch.compile(self.network) if way.compiled else self.network
        self.training, self.bf16 = training, way.bf16

    def __call__(self) -> Tensor:
        with nullcontext() if self.training else torch.no_grad():
            with torch.autocast(self.image.device.type, torch.bfloat16, enabled=self.bf16):
                logits: Tensor = self.run(self.image)
            if self.training:
                self.network.zero_grad(set_to_none=True)
                logits.float().square().mean().backward()
        if self.image.is_cuda:
            torch.cuda.synchronize()
        return logits.detach()


def seconds(run: Runner, times: int) -> float:
    """The best of `times` runs, after one that is not counted."""
    run()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def image_of(batch: int, device: str) -> Tensor:
    return torch.randn(batch, 1, *SIZE, generator=torch.Generator().manual_seed(0)).to(device)


def memory(name: str, way: Way, batch: int, training: bool, device: str) -> float:
    """Peak gigabytes of one way, measured in a process of its own."""
    words = json.dumps(
        {"name": name, "way": way.__dict__, "batch": batch, "training": training, "device": device}
    )
    done = subprocess.run(
        [sys.executable, __file__, "--measure-memory", words], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def measure_memory(words: str) -> None:
    given = json.loads(words)
    way = Way(**given["way"])
    pair = networks(given["name"], way.flash)
    run = Runner(pair[way.whose == "ours"], way, image_of(given["batch"], given["device"]), given["training"])
    if given["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        print(torch.cuda.max_memory_allocated() / 2**30)
        return
    if way.whose == "ours":
        keep_freed_memory()
    before = resident("VmRSS")
    run()
    print(resident("VmHWM") - before)


def resident(which: str) -> float:
    """Gigabytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(which))
    return int(line.split()[1]) / 2**20


def compare(
    name: str, batch: int, phase: str, options: argparse.Namespace, measured: list[dict[str, object]]
) -> list[dict[str, object]]:
    """Rows of one network, batch and phase; each way's time is taken in turn within this one process.

    Each way is added to `measured` as soon as it is.
    """
    training = phase == "step"
    ways = [*OURS, DEFAULT, *SWITCHES, *([COMPILED] if options.compile else [])]
    if name == "unetr":  # has no such switch
        ways = [way for way in ways if way.name != "flash"]
    image = image_of(batch, options.device)
    found: dict[Way, tuple[float, float]] = {}
    for way in ways:
        keep_freed_memory(way.whose == "ours" or options.keep_for_both)
        pair = networks(name, way.flash and name != "unetr")
        took = seconds(Runner(pair[way.whose == "ours"], way, image, training), options.times)
        found[way] = took, memory(name, way, batch, training, options.device)
        print(f"  {way.whose:5} {way.name:28} {took:7.3f} s {found[way][1]:6.2f} GB", flush=True)
        entry = {"network": name, "batch": batch, "phase": phase, "whose": way.whose, "way": way.name}
        measured.append(entry | {"s": round(took, 3), "GB": round(found[way][1], 3)})
        write(options, measured=measured)
    best = min((way for way in found if way.whose == "monai"), key=lambda way: found[way][0])
    case = f"{name}, {batch}x1x96^3, {'training step' if training else 'forward'}"
    rows = []
    for own, other in product(OURS, dict.fromkeys((DEFAULT, best))):
        for place, unit in ((0, "s"), (1, "GB")):
            mine, theirs = found[own][place], found[other][place]
            rows.append(
                {
                    "case": f"{case}, {own.name}, {'time' if unit == 's' else 'memory'}",
                    "against": f"MONAI {other.name}",
                    "ours": round(mine, 3),
                    "other": round(theirs, 3),
                    "unit": unit,
                    "ratio": round(theirs / max(mine, 1e-3), 2),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="the tiny network's forward pass only")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--phases", nargs="+", choices=("forward", "step"), default=("forward", "step"))
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="MONAI compiled too: minutes a network")
    parser.add_argument("--keep-for-both", action="store_true", help="freed memory stays for MONAI too")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.measure_memory:
        measure_memory(options.measure_memory)
        return
    cases = list(product(options.networks, options.batches, options.phases))
    if options.quick:
        cases = [("swin_unetr_tiny", 1, "forward")]
    rows: list[dict[str, object]] = []
    measured: list[dict[str, object]] = []
    for name, batch, phase in cases:
        print(f"{name}, batch {batch}, {phase}", flush=True)
        rows += compare(name, batch, phase, options, measured)
    for row in rows:
        print(f"{row['case']:68} {row['against']:34} {row['ours']:8} {row['other']:8} {row['ratio']:6}x")
    write(options, measured=measured, rows=rows)


def write(options: argparse.Namespace, **found: list[dict[str, object]]) -> None:
    """What was found, with the machine it was found on, to `--json`."""
    if not options.json:
        return
    versions = {"torch": torch.__version__, "monai": version("monai"), "python": platform.python_version()}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    options.json.write_text(json.dumps({"machine": machine, "versions": versions, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
