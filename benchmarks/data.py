"""Training patches a second on one core: ours from the compressed store, MONAI's from a volume in memory.

One volume of 230 x 200 x 160 voxels, 13 organs; patches of 96 x 96 x 96, four in a batch, half of them
centred on an organ; the published augmentations (three flips, quarter turns, intensity scale and shift) with
their published probabilities. One thread, and its processor time: other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from unetrkit.data import loader, store
from unetrkit.data.augment import AugmentSettings
from unetrkit.data.datalist import Case
from unetrkit.data.geometry import Grid
from unetrkit.data.plan import Intensity, LabelClass, Plan, write_plan
from unetrkit.data.sampling import SamplingSettings

SHAPE, PATCH, CLASSES = (230, 200, 160), (96, 96, 96), 14
PLAN = Plan(
    dataset="benchmark",
    channels=("CT",),
    classes=tuple(LabelClass(id=k, name=f"class {k}") for k in range(CLASSES)),
    spacing=(1.5, 1.5, 2.0),
    intensity=(Intensity(kind="window", lower=-175, upper=250),),
    patch_size=PATCH,
)


def volume() -> tuple[np.ndarray, np.ndarray]:
    """Image (1, x, y, z) in [0, 1] of a noisy body in air, and label (x, y, z) of 13 ellipsoids."""
    random = np.random.default_rng(0)
    at = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    body = (at[0] / 0.9) ** 2 + (at[1] / 0.8) ** 2 < 1
    label = np.zeros(SHAPE, np.uint8)
    image = 0.45 + 0.1 * ndimage.gaussian_filter(random.standard_normal(SHAPE), 5) * 20
    for k in range(1, CLASSES):
        centre, radii = random.uniform(-0.5, 0.5, 3), random.uniform(0.06, 0.3, 3)
        organ = (((at.T - centre) / radii) ** 2).sum(-1).T < 1
        label[organ], image[organ] = k, random.uniform(0.4, 0.8)
    image = np.where(body, image + 0.04 * random.standard_normal(SHAPE), 0).clip(0, 1)
    return image[None].astype(np.float32), np.where(body, label, 0).astype(np.uint8)


def patches_per_second(batch: Callable[[int], object], seconds: float, patches: int = 4) -> float:
    """The best of three rates, each for a third of `seconds`."""
    for step in range(3):
        batch(step)
    rates, step = [], 3
    for _ in range(3):
        begin, first = time.process_time(), step
        while (now := time.process_time()) - begin < seconds / 3:
            batch(step)
            step += 1
        rates.append((step - first) * patches / (now - begin))
    return max(rates)


def write_store(path: Path, image: np.ndarray, label: np.ndarray) -> Path:
    """A store of one case."""
    write_plan(path / "plan.json", PLAN)
    grid = Grid(SHAPE, Grid.nested(np.eye(4)), (0, 1, 2), (False,) * 3, tuple((0, n) for n in SHAPE), SHAPE)
    about = {"classes": CLASSES, "source": "", "preprocessing": store.preprocessing_hash(PLAN)}
    store.write_case(store.case_folder(path, "case"), image, label, grid, **about)
    store.write_index(path, "benchmark", [Case("case", (), None, "case", "training")])
    return path


@dataclass(frozen=True)
class InMemory:
    """An array of the store, decompressed."""

    array: np.ndarray

    def read(self, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
        return self.array[:, *(slice(a, a + n) for a, n in zip(start, size, strict=True))]


def ours(path: Path, *, in_memory: bool = False, set_: str = "default") -> Callable[[int], object]:
    """The batch of a step, as a worker process makes it."""
    sampling = SamplingSettings(batch_size=4, patches_per_case=4)
    steps = loader.Steps(path, ("case",), sampling, AugmentSettings(set=set_), seed=0)
    if in_memory:
        _, (case,) = steps.opened
        case.__dict__["arrays"] = {name: InMemory(array.whole()) for name, array in case.arrays.items()}
    return steps.__getitem__


def monai(
    image: np.ndarray, label: np.ndarray, *, cache: bool, indices: bool = False
) -> Callable[[int], object]:
    """The published recipe's random transforms on a volume in memory; `cache`: through CacheDataset."""
    from monai import transforms as t
    from monai.data import CacheDataset, list_data_collate

    both, where = ["image", "label"], {"image_key": "image", "image_threshold": 0}
    found = {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"} if indices else {}
    deterministic = [t.EnsureTyped(both)]
    if indices:
        deterministic.append(t.FgBgToIndicesd("label", **where))
    random = [
        t.RandCropByPosNegLabeld(both, "label", PATCH, pos=1, neg=1, num_samples=4, **where, **found),
        *(t.RandFlipd(both, prob=0.2, spatial_axis=axis) for axis in range(3)),
        t.RandRotate90d(both, prob=0.2, max_k=3),
        t.RandScaleIntensityd("image", factors=0.1, prob=0.1),
        t.RandShiftIntensityd("image", offsets=0.1, prob=0.1),
    ]
    case = {"image": image, "label": label[None].astype(np.float32)}  # LoadImaged gives labels as float32
    if cache:
        data = CacheDataset([case], t.Compose([*deterministic, *random]), num_workers=0, progress=False)
        return lambda step: list_data_collate([data[0]])
    ready = t.Compose(deterministic)(case)
    chain = t.Compose(random)
    return lambda step: list_data_collate([chain(dict(ready))])


@contextmanager
def tracking(on: bool) -> Iterator[None]:
    """MONAI's metadata tracking."""
    from monai.data import get_track_meta, set_track_meta

    before = get_track_meta()
    set_track_meta(on)
    try:
        yield
    finally:
        set_track_meta(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = 3.0 if options.quick else 15.0
    image, label = volume()
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder), image, label)
        rates = {
            "from the store": patches_per_second(ours(path), seconds),
            "from memory": patches_per_second(ours(path, in_memory=True), seconds),
        }
    others = {}
    for name, on, how in [
        ("MONAI, published recipe (CacheDataset)", True, {"cache": True}),
        ("MONAI, transforms only", True, {"cache": False}),
        ("MONAI, transforms only, no metadata", False, {"cache": False}),
        ("MONAI, transforms only, no metadata, indices cached", False, {"cache": False, "indices": True}),
    ]:
        with tracking(on):
            others[name] = patches_per_second(monai(image, label, **how), seconds)
    rows = [
        {
            "case": case,
            "against": against,
            "ours": rate,
            "other": other,
            "unit": "patches/s",
            "ratio": rate / other,
        }
        for case, rate in rates.items()
        for against, other in others.items()
    ]
    print(f"{'ours':16}{'against':54}{'ours':>9}{'other':>9}  patches/s {'ratio':>6}")
    for row in rows:
        print(
            f"{row['case']:16}{row['against']:54}{row['ours']:9.1f}{row['other']:9.1f}{row['ratio']:17.1f}x"
        )
    if options.json:
        versions = {name: version(name) for name in ("unetrkit", "torch", "monai", "numpy", "blosc2")}
        result = {
            "machine": f"{platform.machine()}, {platform.platform()}, 1 thread",
            "versions": versions,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
