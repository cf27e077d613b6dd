"""What can be said of one case by reading it once: facts, and what is wrong with it by itself."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unetrkit.data.datalist import Case
from unetrkit.data.geometry import Triple, orientation, reorient, same_grid, spacing_of, to_ras
from unetrkit.data.source import Header
from unetrkit.data.volume import Volume, read_header, read_image, read_label
from unetrkit.errors import UserError

SAMPLED = 1_000_000  # voxels for percentiles; their error is then below 0.01 percentage points
CHUNK = 2**20  # values hashed at a time


@dataclass(frozen=True)
class Finding:
    """An error makes training fail or its result wrong; a warning may be as it should be.

    `case` is empty where it concerns the whole data set.
    """

    case: str
    severity: Literal["error", "warning"]
    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class ChannelFacts:
    """Intensities of one channel; low and high are the percentiles 0.5 and 99.5."""

    minimum: float
    low: float
    median: float
    high: float
    maximum: float


@dataclass(frozen=True)
class CaseFacts:
    """One case as read; what could not be read is empty or None.

    shape, spacing (mm): along the array axes nearest to R, A, S. axes: how the image is stored. counts:
    voxels per label value. digest: of the voxels, the same for every re-saved or re-oriented copy.
    """

    case: Case
    shape: Triple | None = None
    spacing: tuple[float, float, float] | None = None
    axes: str = ""
    dtype: str = ""
    channels: tuple[ChannelFacts, ...] = ()
    counts: dict[int, int] | None = None
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        case = self.case
        return {
            **vars(case),
            "images": [str(path) for path in case.images],
            "label": str(case.label) if case.label else None,
            "shape": self.shape,
            "spacing": self.spacing,
            "axes": self.axes,
            "dtype": self.dtype,
            "intensities": [vars(channel) for channel in self.channels],
            "label_voxels": self.counts,
            "digest": self.digest,
        }


def inspect_case(case: Case) -> tuple[CaseFacts, list[Finding]]:
    """Reads one case, its image and then its label. A fault of the data is a finding and never raised."""
    findings: list[Finding] = []

    def found(severity: Literal["error", "warning"], code: str, message: str, hint: str = "") -> None:
        findings.append(Finding(case.name, severity, code, message, hint))

    def noted(path: Path) -> Header:
        header = read_header(path)
        for note in header.notes:
            found("warning", "header", f"`{path}`: {note}")
        return header

    facts, grid = CaseFacts(case), None
    try:
        headers = [noted(path) for path in case.images]
        volume = read_image(case.images)
        facts = _image_facts(case, volume, str(headers[0].dtype))
        grid = (volume.affine, volume.array.shape[1:])
        del volume
    except UserError as error:
        found("error", "image", error.message, error.hint)
    for k, channel in enumerate(facts.channels):
        if channel.minimum == channel.maximum:
            message = f"channel {k} of case `{case.name}` is {channel.minimum:g} in every voxel"
            found("error", "constant", message, "remove the case")
    if case.label is None:
        return facts, findings
    try:
        noted(case.label)
        label = read_label(case.label)
    except UserError as error:
        found("error", "label", error.message, error.hint)
        return facts, findings
    if grid is not None:
        # the order of the axes may differ, the place of the voxels may not
        turned = reorient(label, grid[0])
        if difference := same_grid(*grid, turned.affine, turned.array.shape[1:]):
            message = f"label `{case.label}` is not on the grid of image `{case.images[0]}`: {difference}"
            hint = "resample the label onto the image with nearest neighbour, or correct its header"
            found("error", "geometry", message, hint)
    counts = count_labels(label.array)
    if not any(counts.keys() - {0}):
        found("warning", "empty", f"label `{case.label}` has no voxel but background")
    return replace(facts, counts=counts), findings


def _image_facts(case: Case, volume: Volume, dtype: str) -> CaseFacts:
    upright, _, _ = to_ras(volume)
    return CaseFacts(
        case,
        shape=upright.array.shape[1:],
        spacing=spacing_of(upright.affine),
        axes=orientation(volume.affine),
        dtype=dtype,
        channels=tuple(_channel_facts(channel) for channel in volume.array),
        digest=voxel_digest(volume.array),
    )


def _channel_facts(channel: np.ndarray) -> ChannelFacts:
    step = int(np.ceil((channel.size / SAMPLED) ** (1 / 3)))
    low, median, high = np.percentile(channel[::step, ::step, ::step], (0.5, 50, 99.5))
    return ChannelFacts(float(channel.min()), float(low), float(median), float(high), float(channel.max()))


def count_labels(label: np.ndarray) -> dict[int, int]:
    """Voxels per value of an array of whole numbers from 0."""
    if label.dtype.itemsize > 2:
        values, numbers = np.unique(label, return_counts=True)
    else:  # many times faster
        counts = np.bincount(label.ravel(order="K"))
        values = np.flatnonzero(counts)
        numbers = counts[values]
    return dict(zip(values.tolist(), numbers.tolist(), strict=True))


def voxel_digest(array: np.ndarray) -> str:
    """A digest of the values of (c, x, y, z) that no order of the voxels, header or compression changes.

    Each value is hashed by itself (splitmix64, Steele et al. 2014) and the hashes of a channel are added: a
    copy that was re-oriented or mirrored, in the file or in the header alone, is still the same patient.

    >>> array = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    >>> voxel_digest(array) == voxel_digest(array[:, ::-1].transpose(0, 3, 1, 2))
    True
    >>> voxel_digest(array) == voxel_digest(array + 1)
    False
    """
    sums = []
    for channel in array:
        values = channel.ravel(order="K")
        total = 0
        for start in range(0, values.size, CHUNK):
            some = values[start : start + CHUNK].astype(np.float32) + np.float32(0)  # -0.0 is 0.0
            total += int(_mixed(some.view(np.uint32).astype(np.uint64)).sum(dtype=np.uint64))
        sums.append(total % 2**64)
    return hashlib.sha256(repr((sorted(array.shape[1:]), sums)).encode()).hexdigest()[:32]


def _mixed(bits: np.ndarray) -> np.ndarray:
    bits += np.uint64(0x9E3779B97F4A7C15)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits
