"""How a case goes from its own voxel grid to the plan's and back: axes, box, spacing.

Voxel coordinates are (x, y, z) indices; an affine takes them to RAS+ millimetres (right, anterior, superior).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

if TYPE_CHECKING:
    from unetrkit.data.volume import Volume

Triple = tuple[int, int, int]
Flips = tuple[bool, bool, bool]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Grid:
    """What brought a case from its own grid to the network's, so that it can be undone.

    `axes` and `flips` bring the native array to RAS+ axes (see `to_ras`), `box` crops it there,
    and `size` is what the box is resampled to: the shape that the network sees.

    >>> affine, box = Grid.nested(np.eye(4)), ((1, 9), (0, 4), (2, 6))
    >>> grid = Grid((4, 6, 9), affine, (2, 0, 1), (True, False, False), box, (4, 2, 2))
    >>> grid.box_shape
    (8, 4, 4)
    >>> Grid.from_dict(grid.to_dict()) == grid
    True
    """

    shape: Triple
    affine: tuple[tuple[float, ...], ...]
    axes: Triple
    flips: Flips
    box: Box
    size: Triple

    @staticmethod
    def nested(affine: np.ndarray) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(float(value) for value in row) for row in affine)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; floats keep every bit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """The inverse of `to_dict`, also after JSON has made lists of the tuples."""
        return TypeAdapter(cls).validate_python(values)

    @property
    def box_shape(self) -> Triple:
        """The shape of the box before resampling: RAS+ axes, native spacing."""
        return _triple([stop - start for start, stop in self.box])


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Millimetres between neighbouring voxels along each array axis.

    >>> spacing_of(np.diag([-2.0, 3.0, 0.5, 1.0]))
    (2.0, 3.0, 0.5)
    """
    x, y, z = np.sqrt((np.asarray(affine, dtype=np.float64)[:3, :3] ** 2).sum(axis=0))
    return float(x), float(y), float(z)


def ras_axes(affine: np.ndarray) -> tuple[Triple, Flips]:
    """Which array axis lies nearest to R, A and S, and which of these three must be reversed.

    Takes the assignment with the largest product of cosines. Ties (an exact 45 degree turn) are broken by the
    resulting directions, so that the answer does not depend on the order in which the axes are stored.

    >>> ras_axes(np.array([[0, 0, -1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]))
    ((2, 0, 1), (True, False, False))
    """
    directions = np.asarray(affine, dtype=np.float64)[:3, :3] / np.asarray(spacing_of(affine))

    def score(axes: Sequence[int]) -> tuple[float, ...]:
        chosen = directions[:, list(axes)]
        chosen = chosen * np.where(np.diag(chosen) < 0, -1.0, 1.0)
        return (round(float(np.prod(np.diag(chosen))), 6), *np.round(chosen, 6).ravel().tolist())

    axes = max(permutations(range(3)), key=score)
    flips = tuple(bool(directions[row, axis] < 0) for row, axis in enumerate(axes))
    return axes, flips  # type: ignore[return-value]


def orientation(affine: np.ndarray) -> str:
    """The anatomical directions of increasing index, one letter per array axis.

    >>> orientation(np.diag([-1.0, -1.0, 2.0, 1.0]))
    'LPS'
    """
    axes, flips = ras_axes(affine)
    letters = [""] * 3
    for row, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        letters[axis] = ("LPI" if flip else "RAS")[row]
    return "".join(letters)


def turn(array: np.ndarray, axes: Sequence[int], flips: Sequence[bool]) -> np.ndarray:
    """A view (..., x, y, z) -> (..., R, A, S): permutes the last three axes, then reverses by `flips`."""
    lead = array.ndim - 3
    turned = array.transpose(*range(lead), *(lead + axis for axis in axes))
    return np.flip(turned, tuple(lead + row for row in range(3) if flips[row]))


def turn_back(array: np.ndarray, axes: Sequence[int], flips: Sequence[bool]) -> np.ndarray:
    """A view; the inverse of `turn`.

    >>> array, how = np.arange(24).reshape(2, 3, 4), ((2, 0, 1), (True, False, True))
    >>> bool((turn_back(turn(array, *how), *how) == array).all())
    True
    """
    stored = [bool(flips[row]) for row in np.argsort(axes)]  # flips along the axes that result
    return turn(array, np.argsort(axes).tolist(), stored)


def to_ras(volume: Volume) -> tuple[Volume, Triple, Flips]:
    """Permutes and reverses the array's axes to those nearest to RAS+; no voxel moves in space.

    An oblique volume stays oblique. The array is a view. Also returns what `turn_back` needs.
    """
    axes, flips = ras_axes(volume.affine)
    array = turn(volume.array, axes, flips)
    return replace(volume, array=array, affine=volume.affine @ _turned(array, axes, flips)), axes, flips


def _turned(array: np.ndarray, axes: Triple, flips: Flips) -> np.ndarray:
    """The affine (4, 4) from voxels of a turned array (..., R, A, S) to voxels of the array it came from."""
    step = np.zeros((4, 4))
    step[3, 3] = 1
    for row, (axis, flip) in enumerate(zip(axes, flips, strict=True)):
        step[axis, row] = -1 if flip else 1
        step[axis, 3] = array.shape[row - 3] - 1 if flip else 0
    return step


def reorient(volume: Volume, affine: np.ndarray) -> Volume:
    """Stores a volume in the axis order of another grid (a label written L,A,S for an image L,P,S).

    Nothing is interpolated; whether the two grids are then the same is `same_grid`'s question.
    """
    upright, _, _ = to_ras(volume)
    axes, flips = ras_axes(affine)
    back = np.linalg.inv(_turned(upright.array, axes, flips))
    return replace(volume, array=turn_back(upright.array, axes, flips), affine=upright.affine @ back)


def target_size(shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]) -> Triple:
    """The number of voxels of `new_spacing` in the extent of `shape` voxels of `spacing`; at least 1 an axis.

    >>> target_size((100, 100, 7), (0.7, 0.7, 5.0), (1.5, 1.5, 2.0))
    (47, 47, 18)
    """
    # halves go up, and 1e-6 keeps a half a half when its product comes out one bit too low
    extents = zip(shape, spacing, new_spacing, strict=True)
    return _triple([max(1, int(n * old / new + 0.5 + 1e-6)) for n, old, new in extents])


def resample(array: np.ndarray, size: Triple) -> np.ndarray:
    """Trilinear resampling of (c, x, y, z) to (c, *size), float32; the outer faces stay where they are.

    A linear function of position stays that function, but is constant within half an old voxel of a face.
    The same size gives the same values, bit for bit.
    """
    import torch

    array = np.ascontiguousarray(array, dtype=np.float32)
    if array.shape[1:] == tuple(size):
        return array
    tensor = torch.from_numpy(array)[None]  # 1 c x y z
    resampled = torch.nn.functional.interpolate(tensor, tuple(size), mode="trilinear", align_corners=False)
    return resampled[0].numpy()


def resample_label(array: np.ndarray, size: Triple) -> np.ndarray:
    """Nearest-voxel resampling of integers (x, y, z) to `size`; the outer faces stay where they are."""
    if array.shape == tuple(size):
        return np.ascontiguousarray(array)
    # one index per axis and no arithmetic on the values, so any integer type keeps its own
    for axis, (old, new) in enumerate(zip(array.shape, size, strict=True)):
        nearest = ((np.arange(new) + 0.5) * (old / new)).astype(np.int64)
        array = array.take(np.minimum(nearest, old - 1), axis=axis)
    return np.ascontiguousarray(array)


def crop(array: np.ndarray, grid: Grid) -> np.ndarray:
    """A view (..., x, y, z) native -> (..., *grid.box_shape): RAS+ axes, inside the box."""
    if array.shape[-3:] != grid.shape:
        raise ValueError(f"an array of {array.shape[-3:]} is not on the grid of {grid.shape}")
    x, y, z = (slice(start, stop) for start, stop in grid.box)
    return turn(array, grid.axes, grid.flips)[..., x, y, z]


def paste(label: np.ndarray, grid: Grid) -> np.ndarray:
    """An integer label in the box (RAS+ axes, native spacing, `grid.box_shape`) -> the native grid.

    Outside the box it is 0.
    """
    if label.shape != grid.box_shape:
        raise ValueError(f"a label of {label.shape} does not fill the box of {grid.box_shape}")
    native: np.ndarray = np.zeros(grid.shape, dtype=label.dtype)
    crop(native, grid)[...] = label
    return native


def same_grid(
    affine_a: np.ndarray,
    shape_a: Sequence[int],
    affine_b: np.ndarray,
    shape_b: Sequence[int],
    tolerance_voxels: float = 0.05,
) -> str | None:
    """None where two grids hold the same voxels at the same places, else the words for how b differs from a.

    No corner may be farther from its counterpart than `tolerance_voxels` of a's smallest spacing: rounding in
    headers stays below 0.01, and 0.05 have no effect on a label. The axis order counts: see `reorient`.

    >>> shifted = np.eye(4)
    >>> shifted[2, 3] = 12
    >>> same_grid(np.eye(4), (9, 9, 9), shifted, (9, 9, 9))
    'its origin is 12 mm away'
    """
    if tuple(shape_a) != tuple(shape_b):
        return f"its shape is {_by(shape_b)} instead of {_by(shape_a)}"
    if not (np.isfinite(affine_a).all() and np.isfinite(affine_b).all()):
        return "its affine is not finite"
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in shape_a))], dtype=np.float64)
    distance = np.linalg.norm((corners @ (affine_b - affine_a).T)[:, :3], axis=1).max()
    spacing_a, spacing_b = spacing_of(affine_a), spacing_of(affine_b)
    if distance <= tolerance_voxels * min(spacing_a):
        return None
    if not np.allclose(spacing_a, spacing_b, rtol=1e-3):
        return f"its spacing is {_by(spacing_b)} mm instead of {_by(spacing_a)} mm"
    if orientation(affine_a) != orientation(affine_b):
        return f"its axes are {orientation(affine_b)} instead of {orientation(affine_a)}"
    turned = affine_a[:3, :3] / np.asarray(spacing_a) - affine_b[:3, :3] / np.asarray(spacing_b)
    degrees = np.degrees(2 * np.arcsin(min(np.linalg.norm(turned, axis=0).max() / 2, 1)))
    if degrees > 0.05:
        return f"its axes are turned by {degrees:.3g} degrees"
    return f"its origin is {distance:.4g} mm away"


def off_grid(volume: Volume, other: Volume) -> str | None:
    """`same_grid` of two volumes."""
    shape, other_shape = volume.array.shape[1:], other.array.shape[1:]
    return same_grid(volume.affine, shape, other.affine, other_shape)


def _by(values: Sequence[float]) -> str:
    return "x".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)


def _triple(values: Sequence[int]) -> Triple:
    x, y, z = values
    return int(x), int(y), int(z)
