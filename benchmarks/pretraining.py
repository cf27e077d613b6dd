"""Steps of pre-training, ours and the same steps built from MONAI's parts, side by side in one run.

One step: two views of each crop of a batch are corrupted, restored and contrasted, then the gradient and
AdamW. Published form, same batch, same sizes, float32. The other side has the transforms of MONAI's tutorial,
which run on each crop in NumPy, and MONAI's networks and `ContrastiveLoss`; of `swin_heads`, whose
corruptions MONAI has not, a plain loop over blocks as the publication describes them. Each is timed in turn,
best of `--times`; a ratio above 1 is ours. What corrupting alone takes is a row of its own, and so is its
share of the step. Memory is a process's peak above what it had before its first step, each in a process of
its own.

    python benchmarks/pretraining.py --json pretraining.json    # about 5 minutes on two cores
    python benchmarks/pretraining.py --quick                    # small networks, crops of 64 voxels a side
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.memory import keep_freed_memory
from unetrkit.pretraining import OBJECTIVES
from unetrkit.pretraining.corruptions import generator_of_step

# by name: options of ours, and the same as MONAI's networks call them
FULL: dict[str, tuple[dict, dict]] = {
    "vit_autoencoder": ({}, {}),
    "swin_heads": ({"feature_size": 48}, {"embed_dim": 48}),
}
QUICK: dict[str, tuple[dict, dict]] = {
    "vit_autoencoder": (
        {"depth": 8, "width": 384, "heads": 6},
        {"num_layers": 8, "hidden_size": 384, "num_heads": 6, "mlp_dim": 1536},
    ),
    "swin_heads": ({"feature_size": 12}, {"embed_dim": 12}),
}
Step = Callable[[], None]


class MonaiViT:
    """Corruptions, network and losses of MONAI's tutorial `vit_unetr_ssl`."""

    def __init__(self, size: tuple[int, int, int], options: dict) -> None:
        from monai.losses import ContrastiveLoss
        from monai.networks.nets import ViTAutoEnc
        from monai.transforms import Compose, OneOf, RandCoarseDropout, RandCoarseShuffle

        self.network: nn.Module = ViTAutoEnc(1, size, (16, 16, 16), proj_type="conv", **options)
        third, fifth, two_thirds = (max(size[0] * part // 96, 1) for part in (32, 5, 64))
        inside = RandCoarseDropout(
            prob=1.0, holes=6, spatial_size=fifth, max_spatial_size=third, dropout_holes=True
        )
        outside = RandCoarseDropout(
            prob=1.0,
            holes=6,
            spatial_size=max(size[0] * 20 // 96, 1),
            max_spatial_size=two_thirds,
            dropout_holes=False,
        )
        shuffled = RandCoarseShuffle(prob=0.8, holes=10, spatial_size=max(size[0] * 8 // 96, 1))
        self.corrupt_one = Compose([OneOf([inside, outside]), shuffled])
        self.contrast = ContrastiveLoss(temperature=0.05)

    def corrupt(self, image: Tensor) -> tuple[Tensor, Tensor]:
        one, other = (
            torch.stack([torch.as_tensor(self.corrupt_one(x.clone())) for x in image]) for _ in range(2)
        )
        return one, other

    def loss(self, image: Tensor) -> Tensor:
        one, other = self.corrupt(image)
        first, second = self.network(one)[0], self.network(other)[0]
        r = F.l1_loss(first, image)
        contrast: Tensor = self.contrast(first.flatten(1), second.flatten(1))
        return r + contrast * r


class SwinWithHeads(nn.Module):
    """MONAI's Swin transformer with the published heads."""

    def __init__(self, embed_dim: int) -> None:
        from monai.networks.nets.swin_unetr import SwinTransformer

        super().__init__()
        dim = 16 * embed_dim
        self.encoder = SwinTransformer(
            1, embed_dim, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24), spatial_dims=3
        )
        self.rotation, self.contrast = nn.Linear(dim, 4), nn.Linear(dim, 512)
        widths = [dim // part for part in (1, 2, 4, 8, 16, 16)]
        layers: list[nn.Module] = []
        for coarse, fine in pairwise(widths):
            layers += [nn.Conv3d(coarse, fine, 3, padding=1), nn.InstanceNorm3d(fine), nn.LeakyReLU()]
            layers += [nn.Upsample(scale_factor=2, mode="trilinear")]
        self.reconstruction = nn.Sequential(*layers, nn.Conv3d(widths[-1], 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = self.encoder(image)[4]
        tokens = last.flatten(2)
        return self.rotation(tokens[..., 0]), self.contrast(tokens[..., 1]), self.reconstruction(last)


class MonaiSwin:
    """Swin UNETR's pre-training from MONAI's network and loss and a plain loop of corruptions."""

    def __init__(self, size: tuple[int, int, int], options: dict) -> None:
        from monai.losses import ContrastiveLoss

        self.network: nn.Module = SwinWithHeads(**options)
        self.contrast = ContrastiveLoss(temperature=0.5)
        self.random = np.random.RandomState(0)

    def corrupt(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        turns = [self.random.randint(4, size=len(image)) for _ in range(2)]
        clean = [torch.stack([x.rot90(int(k), (2, 3)) for x, k in zip(image, t, strict=True)]) for t in turns]
        views = [self.blocks(x) for x in clean]
        return torch.cat(clean), torch.cat(views), torch.as_tensor(np.concatenate(turns)), image

    def blocks(self, clean: Tensor) -> Tensor:
        result = clean.clone()
        for i in range(len(result)):
            partner = self.random.randint(len(result))
            self.drop(result[i], None)
            if partner != i:
                self.drop(result[i], result[partner])
        return result

    def drop(self, crop: Tensor, source: Tensor | None) -> None:
        _, *size = crop.shape
        wanted, covered = self.random.uniform(0, 0.3) * np.prod(size), 0
        while covered < wanted:
            least = [int(0.05 * extent) for extent in size]
            start = [self.random.randint(0, extent - low) for extent, low in zip(size, least, strict=True)]
            sides = [self.random.randint(low, extent // 4) for extent, low in zip(size, least, strict=True)]
            stop = [min(a + b, extent) for a, b, extent in zip(start, sides, size, strict=True)]
            box = (slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))
            if source is None:
                noise = torch.randn(crop[box].shape, device=crop.device)
                crop[box] = (noise - noise.min()) / (noise.max() - noise.min())
            else:
                crop[box] = source[box]
            covered += crop[box].numel()

    def loss(self, image: Tensor) -> Tensor:
        clean, views, turns, _ = self.corrupt(image)
        turns = turns.to(image.device)
        outputs = [self.network(view) for view in views.chunk(2)]
        rotation, _, restored = (torch.cat([output[k] for output in outputs]) for k in range(3))
        contrast: Tensor = self.contrast(outputs[0][1], outputs[1][1])
        return F.cross_entropy(rotation, turns) + contrast + F.l1_loss(restored, clean)


def ours(name: str, size: tuple[int, int, int], options: dict, image: Tensor) -> tuple[Step, Step]:
    """A step, and its corruptions alone."""
    entry = OBJECTIVES[name]
    objective = entry.build(1, size, options, entry.settings(**entry.published)).to(image.device)
    given = {"image": image, "case": torch.arange(len(image), device=image.device)}
    view = objective.corrupt if name == "vit_autoencoder" else objective.view

    def corrupt() -> None:
        for _ in range(2):
            view(image, generator_of_step())

    return stepping(objective, lambda: objective(given)["loss"]), corrupt


def monai(name: str, size: tuple[int, int, int], options: dict, image: Tensor) -> tuple[Step, Step]:
    """A step, and its corruptions alone."""
    other = {"vit_autoencoder": MonaiViT, "swin_heads": MonaiSwin}[name](size, options)
    other.network.to(image.device)
    return stepping(other.network, lambda: other.loss(image)), lambda: void(other.corrupt(image))


def void(_: object) -> None:
    """A statement of an expression."""


def stepping(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.AdamW(module.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def seconds(run: Step, times: int, device: str) -> float:
    """The best of `times` runs, after one that is not counted, each from another seed."""
    best = float("inf")
    for number in range(times + 1):
        torch.manual_seed(number)
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def sides(name: str, whose: str, batch: int, quick: bool, device: str) -> tuple[Step, Step]:
    extent = 64 if quick else 96
    size = (extent, extent, extent)
    image = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(0)).to(device)
    options = (QUICK if quick else FULL)[name]
    if whose == "ours":
        return ours(name, size, options[0], image)
    return monai(name, size, options[1], image)


def memory(name: str, whose: str, batch: int, quick: bool, device: str) -> float:
    """Peak gigabytes of a step, measured in a process of its own."""
    words = json.dumps([name, whose, batch, quick, device])
    done = subprocess.run(
        [sys.executable, __file__, "--measure-memory", words], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def measure_memory(words: str) -> None:
    name, whose, batch, quick, device = json.loads(words)
    step, _ = sides(name, whose, batch, quick, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        print(torch.cuda.max_memory_allocated() / 2**30)
        return
    keep_freed_memory(whose == "ours")
    before = resident("VmRSS")
    step()
    print(resident("VmHWM") - before)


def resident(which: str) -> float:
    """Gigabytes that this process holds (VmRSS) or has held at most (VmHWM)."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(which))
    return int(line.split()[1]) / 2**20


def compare(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    found: dict[str, tuple[float, float, float]] = {}
    for whose in ("ours", "monai"):
        keep_freed_memory(whose == "ours")
        step, corrupt = sides(name, whose, options.batch, options.quick, options.device)
        corrupting = seconds(corrupt, max(options.times, 5), options.device)
        took = seconds(step, options.times, options.device)
        peak = memory(name, whose, options.batch, options.quick, options.device)
        found[whose] = took, corrupting, peak
        share = f"{corrupting / took:.1%} of it corrupting"
        print(f"  {whose:5} {took:7.3f} s, {share}, {peak:5.2f} GB", flush=True)
    network = "small" if options.quick else "published size"
    case = f"{name}, {network}, batch {options.batch}"
    rows = []
    for place, (what, unit) in enumerate((("step", "s"), ("corrupting", "s"), ("memory", "GB"))):
        mine, theirs = found["ours"][place], found["monai"][place]
        rows.append(row(f"{case}, {what}", mine, theirs, unit))
    shares = [found[whose][1] / found[whose][0] for whose in ("ours", "monai")]
    return [*rows, row(f"{case}, corrupting in a step", *shares, "share")]


def row(case: str, mine: float, theirs: float, unit: str) -> dict[str, object]:
    return {
        "case": case,
        "against": "MONAI's parts",
        "ours": round(mine, 4),
        "other": round(theirs, 4),
        "unit": unit,
        "ratio": round(theirs / max(mine, 1e-6), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="small networks and crops")
    parser.add_argument("--objectives", nargs="+", choices=FULL, default=list(FULL))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.measure_memory:
        measure_memory(options.measure_memory)
        return
    rows = []
    for name in options.objectives:
        print(name, flush=True)
        rows += compare(name, options)
    for line in rows:
        print(f"{line['case']:60} {line['ours']:8} {line['other']:8} {line['unit']:5} {line['ratio']:6}x")
    if options.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
        versions = {
            "torch": torch.__version__,
            "monai": version("monai"),
            "python": platform.python_version(),
        }
        options.json.write_text(
            json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
