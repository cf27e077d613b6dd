"""Small cases: in memory, and in a real store."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unetrkit.data.datalist import Case
from unetrkit.data.geometry import Grid
from unetrkit.data.plan import Intensity, LabelClass, Plan, write_plan
from unetrkit.data.store import case_folder, preprocessing_hash, write_case, write_index

SHAPE = (30, 26, 22)


@dataclass(frozen=True)
class MemoryCase:
    """What `sampling` needs of a `StoredCase`; `reads` is where its image was read."""

    voxels: np.ndarray  # (c, x, y, z)
    classes: np.ndarray  # (x, y, z)
    reads: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.classes.shape

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(np.bincount(self.classes.ravel(), minlength=5).tolist())

    def centres(self, k: int) -> np.ndarray:
        return np.argwhere(self.classes == k)

    def image(self, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
        self.reads.append((start, size))
        return self.voxels[:, *(slice(a, a + n) for a, n in zip(start, size, strict=True))].copy()

    def label(self, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
        return self.classes[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))].copy()


def small_plan(**changes: object) -> Plan:
    """One CT channel, four organs of which 30 and 50 are a pair, patches of 16 x 16 x 16."""
    ids = {0: "background", 10: "liver", 30: "right kidney", 50: "left kidney", 70: "spleen"}
    values = {
        "dataset": "small",
        "channels": ("CT",),
        "classes": tuple(LabelClass(id=i, name=name) for i, name in ids.items()),
        "spacing": (1.5, 1.5, 2.0),
        "intensity": (Intensity(kind="window", lower=-175, upper=250),),
        "patch_size": (16, 16, 16),
        "mirror_pairs": ((30, 50),),
    }
    return Plan.model_validate(values | changes)


def small_store(path: Path, cases: int = 5, plan: Plan | None = None) -> Path:
    """A store of `cases` cases: four boxes of organs; the image is the class index / 8 plus noise."""
    plan = plan or small_plan()
    write_plan(path / "plan.json", plan)
    grid = Grid(SHAPE, Grid.nested(np.eye(4)), (0, 1, 2), (False,) * 3, tuple((0, n) for n in SHAPE), SHAPE)
    names = [f"case{n}" for n in range(cases)]
    for n, name in enumerate(names):
        random = np.random.default_rng(n)
        label = np.zeros(SHAPE, np.uint8)
        for k in range(1, 5):
            x, y, z = (int(random.integers(0, s - 6)) for s in SHAPE)
            label[x : x + 6, y : y + 5, z : z + 4] = k
        image = label[None] / 8 + random.random((1, *SHAPE)) / 17
        write_case(
            case_folder(path, name),
            image.astype(np.float32),
            label,
            grid,
            classes=5,
            source=name,
            preprocessing=preprocessing_hash(plan),
        )
    write_index(path, "small", [Case(name, (), None, name, "training", None) for name in names])
    return path
