"""From a volume to what a network sees: RAS+ axes, foreground box, spacing, normalised intensities."""

from collections.abc import Sequence

import numpy as np

from unetrkit.data.geometry import Box, Grid, crop, resample, resample_label, spacing_of, target_size, to_ras
from unetrkit.data.plan import Intensity, Plan
from unetrkit.data.source import LARGEST
from unetrkit.data.volume import Volume
from unetrkit.errors import UserError

UNKNOWN = 255  # class indices are uint8; this one marks ids that the plan does not know
SAMPLE = 2**21  # voxels of a case that its percentiles are estimated from


def preprocess(volume: Volume, plan: Plan, source: str = "the image") -> tuple[np.ndarray, Grid]:
    """The network's view of a case, (c, x, y, z) float32, and the grid that leads back to its own voxels.

    The axis order in which a volume is stored makes no difference, bit for bit. Raises UserError, in which
    `source` names the volume, where the channels are not the plan's or the result is too large.
    """
    if volume.array.shape[0] != len(plan.channels):
        raise UserError(
            f"{source} has {volume.array.shape[0]} channels, "
            f"the plan `{plan.dataset}` has {len(plan.channels)}: {', '.join(plan.channels)}",
            hint="give these channels in this order, as one 4D file or one file each",
        )
    upright, axes, flips = to_ras(volume)
    box = _whole(upright.array.shape[1:])
    if plan.crop_foreground:
        box = foreground_box(upright.array, plan.intensity)
    spacing = spacing_of(upright.affine)
    new_spacing = plan.spacing if plan.resample else spacing
    size = target_size([stop - start for start, stop in box], spacing, new_spacing)
    if np.prod(size, dtype=np.float64) * len(plan.channels) > LARGEST:
        hint = "check the spacing in the image's header, or prepare with a coarser one"
        raise UserError(f"at a spacing of {new_spacing} mm {source} would have {size} voxels", hint=hint)
    x, y, z = volume.array.shape[1:]
    grid = Grid((x, y, z), Grid.nested(volume.affine), axes, flips, box, size)
    array = resample(crop(volume.array, grid), size)
    if np.may_share_memory(array, volume.array):  # what follows works in place
        array = array.copy()
    for channel, intensity in zip(array, plan.intensity, strict=True):
        normalise(channel, intensity)
    return array, grid


def preprocess_label(label: np.ndarray, grid: Grid, plan: Plan) -> np.ndarray:
    """Label ids (1, x, y, z) on the case's own grid -> class indices (x, y, z) uint8 on the network's grid.

    Raises UserError for an id that is not one of the plan's classes.
    """
    if len(plan.classes) > UNKNOWN:
        raise UserError(
            f"the plan `{plan.dataset}` has {len(plan.classes)} classes; at most {UNKNOWN} can be stored",
            hint="merge classes, in the label files and in `labels`",
        )
    inside = crop(label[0], grid)
    table = np.full(65536, UNKNOWN, dtype=np.uint8)
    for index, label_class in enumerate(plan.classes):
        table[label_class.id] = index
    indices = table[np.clip(inside, 0, 65535)]
    unknown = (indices == UNKNOWN) | (inside < 0) | (inside > 65535)
    if unknown.any():
        ids = np.unique(inside[unknown]).tolist()
        message = f"the label holds ids that are not classes of the plan: {', '.join(map(str, ids[:10]))}"
        raise UserError(message, hint="name every id in the data set's `labels`")
    return resample_label(indices, grid.size)


def foreground_box(array: np.ndarray, intensity: tuple[Intensity, ...]) -> Box:
    """The smallest box around the voxels that hold something in any channel of (c, x, y, z).

    Something is above the window's lower end, or, on a relative scale, above the channel's minimum.
    Without such a voxel it is the whole volume.

    >>> image = np.full((1, 4, 5, 6), -1024.0, np.float32)
    >>> image[0, 1:3, 2, 3:] = 40
    >>> foreground_box(image, (Intensity(kind="window", lower=-175, upper=250),))
    ((1, 3), (2, 3), (3, 6))
    """
    mask = np.zeros((), dtype=bool)
    for channel, how in zip(array, intensity, strict=True):
        mask = mask | (channel > (how.lower if how.kind == "window" else channel.min()))
    if not mask.any():
        return _whole(array.shape[1:])
    box = []
    for others in ((1, 2), (0, 2), (0, 1)):
        hit = np.flatnonzero(mask.any(axis=others))
        box.append((int(hit[0]), int(hit[-1]) + 1))
    return box[0], box[1], box[2]


def _whole(shape: Sequence[int]) -> Box:
    x, y, z = shape
    return (0, x), (0, y), (0, z)


def normalise(channel: np.ndarray, intensity: Intensity) -> None:
    """Normalises one float32 channel (x, y, z) in place, as `Intensity` describes.

    A z-score takes its percentiles, mean and deviation from the voxels above the minimum; a channel of one
    value becomes 0.

    >>> channel = np.array([-1000.0, -175.0, 37.5, 250.0, 3000.0], np.float32)
    >>> normalise(channel, Intensity(kind="window", lower=-175, upper=250))
    >>> channel.tolist()
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    lower, upper = intensity.lower, intensity.upper
    if intensity.kind == "window":
        np.clip(channel, lower, upper, out=channel)
        channel -= np.float32(lower)
        channel /= np.float32(upper - lower)
        return
    values = channel[channel > channel.min()]
    if values.size == 0:
        channel[...] = 0
        return
    lowest, highest = np.percentile(values[:: 1 + values.size // SAMPLE], [lower, upper])
    np.clip(values, lowest, highest, out=values)
    mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    np.clip(channel, lowest, highest, out=channel)
    channel -= np.float32(mean)
    # one value above the minimum: its deviation is rounding, not contrast
    channel /= np.float32(max(deviation, 1e-6 * max(abs(lowest), abs(highest)), 1e-30))
