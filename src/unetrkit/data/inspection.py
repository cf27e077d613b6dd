"""What can be said of one case by reading it once: facts, and what is wrong with it by itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from unetrkit.data.datalist import Case
from unetrkit.data.geometry import Triple, orientation, ras_axes, reorient, same_grid, spacing_of
from unetrkit.data.volume import Volume, read_header, read_image, read_label
from unetrkit.errors import UserError

SAMPLED = (
    1_000_000  # voxels that percentiles are taken from; their error is then below 0.01 percentage points
)
CHUNK = 2**20  # values hashed at a time


@dataclass(frozen=True)
class Finding:
    """Something that a person should know of; `case` is empty where it concerns the whole data set.

    An error makes training fail or its result wrong; a warning may be as it should be.
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
        return {
            "name": self.case.name,
            "subject": self.case.subject,
            "split": self.case.split,
            "fold": self.case.fold,
            "images": [str(path) for path in self.case.images],
            "label": str(self.case.label) if self.case.label else None,
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

    facts, grid = CaseFacts(case), None
    try:
        headers = [read_header(path) for path in case.images]
        for path, header in zip(case.images, headers, strict=True):
            for note in header.notes:
                found("warning", "header", f"`{path}`: {note}")
        volume = read_image(case.images)
        facts = _image_facts(case, volume, str(headers[0].dtype))
        grid = (volume.affine, volume.array.shape[1:])
        del volume
    except UserError as error:
        found("error", "image", error.message, error.hint)
    for k, channel in enumerate(facts.channels):
        if channel.minimum == channel.maximum:
            path = case.images[k] if len(case.images) == len(facts.channels) else case.images[0]
            which = f"channel {k} of " if path == case.images[0] and len(facts.channels) > 1 else ""
            found("error", "constant", f"{which}`{path}` is {channel.minimum:g} in every voxel", "remove it")
    if case.label is None:
        return facts, findings
    try:
        for note in read_header(case.label).notes:
            found("warning", "header", f"`{case.label}`: {note}")
        label = read_label(case.label)
    except UserError as error:
        found("error", "label", error.message, error.hint)
        return facts, findings
    if grid is not None:
        affine, shape = grid
        turned = reorient(label, affine)  # the order of the axes may differ, the place of the voxels may not
        difference = same_grid(affine, shape, turned.affine, turned.array.shape[1:])
        if difference:
            found(
                "error",
                "geometry",
                f"label `{case.label}` is not on the grid of image `{case.images[0]}`: {difference}",
                "resample the label onto the image with nearest neighbour, or correct its header",
            )
    counts = _count(label.array)
    if not any(counts.keys() - {0}):
        found("warning", "empty", f"label `{case.label}` has no voxel but background")
    return replace(facts, counts=counts), findings


def _image_facts(case: Case, volume: Volume, dtype: str) -> CaseFacts:
    axes, _ = ras_axes(volume.affine)
    spacing = spacing_of(volume.affine)
    shape = volume.array.shape[1:]
    return CaseFacts(
        case,
        shape=(shape[axes[0]], shape[axes[1]], shape[axes[2]]),
        spacing=(spacing[axes[0]], spacing[axes[1]], spacing[axes[2]]),
        axes=orientation(volume.affine),
        dtype=dtype,
        channels=tuple(_channel_facts(channel) for channel in volume.array),
        digest=voxel_digest(volume.array),
    )


def _channel_facts(channel: np.ndarray) -> ChannelFacts:
    step = int(np.ceil((channel.size / SAMPLED) ** (1 / 3)))
    low, median, high = np.percentile(channel[::step, ::step, ::step], (0.5, 50, 99.5))
    return ChannelFacts(float(channel.min()), float(low), float(median), float(high), float(channel.max()))


def _count(label: np.ndarray) -> dict[int, int]:
    if label.dtype.itemsize <= 2:
        counts = np.bincount(label.ravel(order="K"))
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    return {int(value): int(n) for value, n in zip(*np.unique(label, return_counts=True), strict=True)}


def voxel_digest(array: np.ndarray) -> str:
    """A digest of the values of (c, x, y, z) that no order of the voxels, header or compression changes.

    Each value is hashed by itself (splitmix64, Steele et al. 2014) and the hashes of a channel are added: a
    copy that was re-oriented or mirrored, in the file or in the header alone, is still the same patient.
    Two different scans have the same values in the same numbers only where both have very few voxels or
    values.

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
            # + 0.0 makes -0.0 the same as 0.0
            bits = (
                (values[start : start + CHUNK].astype(np.float32) + np.float32(0))
                .view(np.uint32)
                .astype(np.uint64)
            )
            total += int(_mixed(bits).sum(dtype=np.uint64))
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
