"""A synthetic abdomen with BTCV's 13 organs: portal-venous HU, per-subject anatomy, noise, partial volume.

No public set with these organs may be redistributed, so `unetrkit demo` and the tests make their own. Organs
are closed shapes in millimetres (RAS+: x to the patient's right, y to the front, z to the head), bent by one
smooth random deformation per subject and painted in order, so that neighbours touch. HU are those of
contrast-enhanced CT in the portal-venous phase; a voxel is the mean of 2x2x2 finer samples (partial volume)
plus correlated noise.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import ndimage

from unetrkit.data.files import atomic_write
from unetrkit.data.processes import for_each
from unetrkit.data.volume import Volume

ORGANS = (
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
    "aorta", "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland",
    "left adrenal gland",
)  # fmt: skip
# Portal-venous phase, mean HU by organ id; 0 is filled by the body's own tissues.
ORGAN_HU = (0, 125, 185, 185, 8, 45, 112, 30, 160, 145, 172, 92, 66, 66)
AIR, LUNG, FAT, MUSCLE, BONE, BOWEL, GAS = -1000.0, -840.0, -105.0, 55.0, 420.0, 32.0, -600.0
# probability that a subject lacks the organ (splenectomy, nephrectomy, cholecystectomy, …)
ABSENT = {1: 0.06, 2: 0.05, 3: 0.05, 4: 0.2, 12: 0.05}

Points = np.ndarray  # (3, x, y, z) in mm


@dataclass(frozen=True)
class Shape:
    """A closed surface: `level(points)` is below 1 inside, and all of it lies in the box low..high (mm)."""

    level: Callable[[Points], np.ndarray]  # (3, x, y, z) -> (x, y, z)
    low: np.ndarray
    high: np.ndarray


def _along(direction: np.ndarray, points: Points) -> np.ndarray:
    """The dot product with every point; no BLAS, whose threads get in the way of the other processes."""
    return direction[0] * points[0] + direction[1] * points[1] + direction[2] * points[2]


def _ellipsoid(centre: np.ndarray, radii: np.ndarray, angles: np.ndarray) -> Shape:
    """An ellipsoid; `angles` (radians) turn it about z, then about y."""
    (cz, sz), (cy, sy) = ((np.cos(a), np.sin(a)) for a in angles)
    turn = np.array([[cy * cz, cy * sz, -sy], [-sz, cz, 0], [sy * cz, sy * sz, cy]])

    def level(points: Points) -> np.ndarray:
        rows = (turn / radii[:, None]).astype(np.float32)
        return sum((_along(row, points) - np.float32(row @ centre)) ** 2 for row in rows)  # type: ignore[return-value]

    reach = radii if not np.any(angles) else np.full(3, radii.max())
    return Shape(level, centre - reach, centre + reach)


def _tube(nodes: np.ndarray, radius: float) -> Shape:
    """A tube round a polyline; nodes (n, 3) in mm."""

    def level(points: Points) -> np.ndarray:
        nearest = np.full(points.shape[1:], np.inf, np.float32)
        for a, b in pairwise(nodes):
            axis = (b - a).astype(np.float32)
            unit = axis / (axis @ axis)
            t = (_along(unit, points) - np.float32(unit @ a)).clip(0, 1)
            steps = zip(points, a.astype(np.float32), axis, strict=True)
            np.minimum(nearest, sum((x - start - step * t) ** 2 for x, start, step in steps), out=nearest)
        return nearest / radius**2

    return Shape(level, nodes.min(0) - radius, nodes.max(0) + radius)


@dataclass(frozen=True)
class Anatomy:
    """One subject: shapes by organ id in painting order, the tissue round them, and the deformation."""

    size: np.ndarray  # half-axes of the body, mm (x, y) and height (z)
    tissue: tuple[tuple[float, Shape], ...]  # HU and shape, painted before the organs
    organs: tuple[tuple[int, Shape], ...]
    waves: np.ndarray  # (n, 3 direction + 3 wave vector + 1 phase)
    hu_shift: np.ndarray  # per organ: this subject's contrast

    def bend(self, axes: list[np.ndarray]) -> Points:
        """The points of the grid with these axes (mm), moved by the deformation: a sum of plane waves."""
        moved = np.stack(np.meshgrid(*(axis.astype(np.float32) for axis in axes), indexing="ij"))
        for wave in self.waves:
            turns = (np.exp(1j * k * axis) for k, axis in zip(wave[3:6], axes, strict=True))
            x, y, z = (turn.astype(np.complex64) for turn in turns)
            plane = (x[:, None, None] * (y[:, None] * z * np.complex64(np.exp(1j * wave[6])))).imag
            for coordinate, amplitude in zip(moved, wave[:3].astype(np.float32), strict=True):
                coordinate += amplitude * plane
        return moved


# centre (mm from the body's axis and floor), radii, rotation about z and y: the mean subject
_BLOBS = {
    1: ((-92, -38, 150), (22, 34, 36), (0.5, 0.2)),
    2: ((58, -52, 92), (23, 21, 42), (-0.3, 0.12)),
    3: ((-58, -54, 100), (23, 21, 42), (0.3, -0.12)),
    4: ((48, 44, 104), (14, 22, 17), (0.3, 0.5)),
    6: ((70, 6, 142), (62, 68, 44), (0.25, 0.3)),
    7: ((-48, 34, 150), (34, 36, 34), (-0.4, 0.5)),
}
_TUBES = {
    5: (((4, -24, 230), (-2, -22, 190), (-14, -4, 172), (-30, 18, 164)), 8.0),
    8: (((-12, -34, 230), (-10, -32, 120), (-8, -36, 0)), 11.0),
    9: (((24, -14, 230), (22, -20, 150), (16, -28, 60), (14, -34, 0)), 12.0),
    10: (((38, 10, 136), (14, 2, 126), (-20, -6, 130), (-66, -28, 146)), 7.0),
    11: (((38, 18, 100), (22, 20, 112), (-8, 14, 118), (-42, -2, 128), (-64, -18, 136)), 11.5),
    12: (((28, -36, 156), (34, -50, 140), (30, -34, 134)), 6.0),
    13: (((-32, -36, 154), (-42, -46, 140), (-26, -42, 132)), 6.0),
}
_PAINT_ORDER = (6, 7, 11, 1, 2, 3, 4, 5, 9, 10, 8, 12, 13)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw one subject: size, position, shape and contrast of every organ, and which organs are absent."""
    scale = rng.normal(1, 0.06, 3).clip(0.85, 1.15)
    drift = rng.normal(0, 4, 3)

    def place(point: tuple[float, ...], spread: float) -> np.ndarray:
        return np.array(point) * scale + drift + rng.normal(0, spread, 3)

    shapes: dict[int, Shape] = {}
    for organ, (centre, radii, angles) in _BLOBS.items():
        size = np.array(radii) * scale * rng.normal(1, 0.1, 3).clip(0.75, 1.3)
        shapes[organ] = _ellipsoid(place(centre, 4), size, np.array(angles) + rng.normal(0, 0.15, 2))
    for organ, (nodes, radius) in _TUBES.items():
        offset = rng.normal(0, 3, 3)
        path = np.stack([place(node, 1.5) + offset for node in nodes])
        shapes[organ] = _tube(path, radius * np.clip(rng.normal(1, 0.1), 0.8, 1.25))
    absent = {organ for organ, probability in ABSENT.items() if rng.random() < probability}

    half = np.array([150.0, 106.0]) * scale[:2]
    body = np.array([half[0], half[1], 1e4])
    inner = drift + np.array([0, 6, 0])
    tissue = [
        (FAT, _ellipsoid(np.zeros(3), body, np.zeros(2))),
        (MUSCLE, _ellipsoid(drift, np.array([0.92, 0.9, 1]) * body, np.zeros(2))),
        (FAT, _ellipsoid(inner, np.array([0.82, 0.78, 1]) * body, np.zeros(2))),
    ]
    for side in (1, -1):  # lungs reach down from the top, psoas and back muscles run along the spine
        tissue.append((LUNG, _ellipsoid(place((side * 70, 0, 250), 4), np.array([52, 72, 62]), np.zeros(2))))
        tissue.append((MUSCLE, _tube(np.array([[side * 34, -58, -20], [side * 40, -84, 240]]) * scale, 18.0)))
    spine = np.array([[0, -62, -20], [0, -66, 240]]) * scale + drift
    tissue.append((BONE, _tube(spine, 21.0)))
    for _ in range(24):  # bowel: unlabelled, soft as the organs, with gas here and there
        middle = place((rng.uniform(-80, 80), rng.uniform(0, 62), rng.uniform(5, 88)), 0)
        loop = _ellipsoid(middle, rng.uniform(11, 21, 3), rng.uniform(0, 3, 2))
        tissue.append((GAS if rng.random() < 0.25 else BOWEL + rng.normal(0, 12), loop))
    wave_vectors = rng.normal(0, 1, (5, 3))
    wave_vectors /= np.linalg.norm(wave_vectors, axis=1, keepdims=True) * rng.uniform(9, 22, (5, 1))
    waves = np.concatenate([rng.normal(0, 1.6, (5, 3)), wave_vectors, rng.uniform(0, 6.28, (5, 1))], axis=1)
    return Anatomy(
        size=np.array([half[0], half[1], 220 * scale[2]]),
        tissue=tuple(tissue),
        organs=tuple((organ, shapes[organ]) for organ in _PAINT_ORDER if organ not in absent),
        waves=waves,
        hu_shift=rng.normal(0, 6, len(ORGANS)) + rng.normal(0, 6),
    )


def scan(anatomy: Anatomy, spacing: np.ndarray, rng: np.random.Generator) -> tuple[Volume, np.ndarray]:
    """Image a subject: (Volume with one channel in HU, labels (x, y, z) uint8), RAS+, `spacing` in mm."""
    margin = np.array([8.0, 8.0, 0.0])
    extent = np.array([2, 2, 1]) * (anatomy.size + margin)
    shape = np.ceil(extent / spacing).astype(int)
    first = np.array([-1, -1, 0]) * (anatomy.size + margin) + spacing / 4  # centre of the first fine sample
    axes = [f + s / 2 * np.arange(2 * n) for f, s, n in zip(first, spacing, shape, strict=True)]
    points = anatomy.bend(axes)

    hu = np.full(points.shape[1:], AIR, np.float32)
    fine = np.zeros(hu.shape, np.uint8)
    reach = np.abs(anatomy.waves[:, :3]).sum(0)  # the deformation moves no point farther

    def box(shape_of: Shape) -> tuple[slice, ...]:
        low, high = shape_of.low - reach, shape_of.high + reach
        return tuple(slice(*np.searchsorted(a, (lo, hi))) for a, lo, hi in zip(axes, low, high, strict=True))

    for value, shape_of in anatomy.tissue:
        part = box(shape_of)
        inside = shape_of.level(points[:, *part]) < 1
        hu[part][inside if value == FAT else inside & (hu[part] != AIR)] = value
    for organ, shape_of in anatomy.organs:
        part = box(shape_of)
        level, values = shape_of.level(points[:, *part]), hu[part]
        inside = (level < 1) & (values != AIR) & (values != LUNG)
        fine[part][inside] = organ
        values[inside] = ORGAN_HU[organ] + anatomy.hu_shift[organ]
        if organ in (2, 3):  # medulla darker than cortex
            values[inside & (level < 0.35)] -= 45
        if organ == 7:  # wall brighter than the contents, gas in front
            values[inside & (level > 0.7)] += 55
            values[inside & (level < 0.35) & (points[1][part] > 36)] = GAS

    def coarse(values: np.ndarray) -> np.ndarray:
        x, y, z = (n // 2 for n in values.shape)
        return values.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5), dtype=np.float32)

    image = coarse(hu)
    label, most = np.zeros(tuple(shape), np.uint8), np.full(tuple(shape), 0.5, np.float32)
    for organ, found in enumerate(ndimage.find_objects(fine), 1):
        if found is not None:  # a voxel belongs to the organ that fills most of it, if that is more than half
            part = tuple(slice(side.start // 2, -(-side.stop // 2)) for side in found)
            share = coarse(fine[tuple(slice(2 * side.start, 2 * side.stop) for side in part)] == organ)
            label[part][share > most[part]] = organ
            most[part] = np.maximum(most[part], share)
    noise = ndimage.gaussian_filter(rng.standard_normal(image.shape, np.float32), (0.7, 0.7, 0.3))
    image += noise / noise.std() * rng.uniform(10, 18)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = first + spacing / 4
    return Volume(image.clip(-1024, 3071)[None].round(), affine), label


def make_subject(seed: int, index: int, coarseness: float = 1.0) -> tuple[Volume, np.ndarray]:
    """The `index`-th subject of the data set `seed`: its image and label, on its own anisotropic grid."""
    rng = np.random.default_rng([seed, index])
    in_plane = rng.uniform(2.3, 3.0)
    spacing = np.array([in_plane, in_plane, rng.uniform(3.2, 4.6)]) * coarseness
    return scan(draw_anatomy(rng), spacing, rng)


def _write_subject(out: Path, names: list[str], seed: int, coarseness: float, index: int) -> None:
    import nibabel as nib

    volume, label = make_subject(seed, index, coarseness)
    # scanners store what they like: every subject in another orientation
    stored = nib.orientations.axcodes2ornt(("RAS", "LPS", "LAS", "ASR")[index % 4])
    for folder, array in (("imagesTr", volume.array[0].astype(np.int16)), ("labelsTr", label)):
        image = nib.Nifti1Image(array, volume.affine)
        image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), stored))
        image.header.set_xyzt_units("mm")
        content = gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)
        atomic_write(out / folder / f"{names[index]}.nii.gz", content)


def write_phantom(
    out: Path,
    *,
    training: int = 12,
    validation: int = 4,
    seed: int = 2026,
    coarseness: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a phantom data set; returns its datalist (Decathlon form). The same seed gives the same bytes."""
    total = training + validation
    for folder in ("imagesTr", "labelsTr"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    names = [f"phantom_{index + 1:03d}" for index in range(total)]
    write = partial(_write_subject, out, names, seed, coarseness)
    for done, _ in enumerate(for_each(write, range(total))):
        progress(done + 1, total)
    entries = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in names]
    datalist = {
        "name": "phantom abdomen",
        "description": "synthetic portal-venous CT with the 13 organs of BTCV",
        "modality": {"0": "CT"},
        "labels": {str(i): organ for i, organ in enumerate(ORGANS)},
        "training": entries[:training],
        "validation": entries[training:],
    }
    atomic_write(out / "dataset.json", json.dumps(datalist, indent=1).encode())
    return out / "dataset.json"
