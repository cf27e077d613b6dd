"""Spatial augmentations: exact flips and quarter turns, and one interpolated warp (turn, zoom, elastic)."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Matrix = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class Orientation:
    """Flips of (x, y, z), then quarter turns in the (x, y) plane, from x towards y."""

    flips: tuple[bool, bool, bool] = (False, False, False)
    turns: int = 0


@dataclass(frozen=True)
class Warp:
    """Where each voxel of the result is taken from.

    `matrix` carries offsets from the centre of the result to those from the centre of the source, in voxels.
    `elastic` is the standard deviation of the smooth random displacements along (x, y, z), in voxels; the
    displacements themselves follow from `seed`.
    """

    matrix: Matrix
    elastic: tuple[float, float, float] = (0.0, 0.0, 0.0)
    seed: int = 0


def draw_orientation(
    generator: torch.Generator, p_flip: float, p_rot90: float, size: tuple[int, int, int]
) -> Orientation:
    """Each axis is flipped with probability `p_flip`; 1 to 3 quarter turns with probability `p_rot90`.

    A patch with unequal x and y sides keeps its shape: it is only turned by two quarters.
    """
    x, y, z, rotate, k = torch.rand(5, generator=generator).tolist()
    turns = 0
    if rotate < p_rot90:
        turns = 1 + int(3 * k) if size[0] == size[1] else 2
    return Orientation((x < p_flip, y < p_flip, z < p_flip), turns)


def apply_orientation(orientation: Orientation, tensor: Tensor) -> Tensor:
    """(..., x, y, z) -> the same, exact for any type; possibly a view of `tensor`.

    A turn is a flip and an exchange of the two axes, so flips and turns together cost one copy at most.
    """
    x, y, z = orientation.flips
    x ^= orientation.turns in (2, 3)
    y ^= orientation.turns in (1, 2)
    axes = [axis for axis, flipped in ((-3, x), (-2, y), (-1, z)) if flipped]
    if axes:
        tensor = tensor.flip(axes)
    return tensor.transpose(-3, -2) if orientation.turns % 2 else tensor


def warp_matrix(
    angles: tuple[float, float, float], zoom: float, spacing: tuple[float, float, float]
) -> Matrix:
    """Rotation by `angles` (radians, about x, then y, then z; in mm) and magnification by `zoom`, for voxels.

    >>> warp_matrix((0.0, 0.0, 0.0), 2.0, (1.5, 1.5, 2.0))
    ((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5))
    """
    rotation = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        about = torch.eye(3, dtype=torch.float64)
        about[i, i] = about[j, j] = math.cos(angle)
        about[i, j], about[j, i] = -math.sin(angle), math.sin(angle)
        rotation = about @ rotation
    scale = torch.tensor(spacing, dtype=torch.float64)
    # the source of a voxel: the inverse rotation, in millimetres, so that unequal spacing does not shear
    matrix = rotation.T * scale / scale[:, None] / zoom
    first, second, third = (tuple(row) for row in matrix.tolist())
    return first, second, third


def apply_warp(warp: Warp, tensor: Tensor, mode: Literal["bilinear", "nearest"]) -> Tensor:
    """(..., x, y, z) -> the same shape and type, in one interpolation ("bilinear" is trilinear here).

    Beyond the edges the nearest voxel is repeated, alike for image and label. Labels: mode="nearest".
    """
    volume = tensor.reshape(1, -1, *tensor.shape[-3:]).to(torch.float32)
    grid = _warp_grid(warp, tensor.shape[-3:], tensor.device)
    moved = F.grid_sample(volume, grid, mode=mode, padding_mode="border", align_corners=False)
    return moved.reshape(tensor.shape).to(tensor.dtype)


def _warp_grid(warp: Warp, size: torch.Size, device: torch.device) -> Tensor:
    """Sampling positions (1, x, y, z, 3) as grid_sample wants them: in [-1, 1], last axis first."""
    half = torch.tensor(size, dtype=torch.float64) / 2
    matrix = (torch.tensor(warp.matrix, dtype=torch.float64) / half[:, None]).flip(0)  # z y x from x y z
    offsets = (torch.arange(s) - (s - 1) / 2 for s in size)
    columns = zip(matrix.T, offsets, strict=True)
    x, y, z = (torch.outer(column, o).to(device, torch.float32) for column, o in columns)
    grid = x.T[:, None, :, None] + y.T[None, :, :, None] + z  # x y 3 z
    if any(warp.elastic):
        x, y, z = (_spline(s).to(device) for s in size)
        # drawn on the CPU: the same field on every device
        generator = torch.Generator().manual_seed(warp.seed)
        nodes = torch.randn(x.shape[1], y.shape[1], 3, z.shape[1], generator=generator)
        nodes *= (torch.tensor(warp.elastic) / half).flip(0).to(torch.float32)[:, None]
        nodes = torch.einsum("yj,ijck->iyck", y, nodes.to(device))
        grid += torch.einsum("xi,iyck->xyck", x, nodes) @ z.T
    return grid.permute(0, 1, 3, 2)[None]


# voxels between control points: 36 mm at 1.5 mm spacing, so displacements of a few millimetres do not fold
CONTROL_SPACING = 24


def _spline(size: int) -> Tensor:
    """Weights (size, nodes) of independent control points at each voxel: cubic B-splines of variance 1.

    Deformation by cubic B-splines: Rueckert et al., IEEE TMI 18(8), 1999.
    """
    nodes = torch.arange(-1, size // CONTROL_SPACING + 3)
    distance = (torch.arange(size)[:, None] / CONTROL_SPACING - nodes).abs()
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp_min(0) ** 3 / 6
    return F.normalize(torch.where(distance < 1, near, far), dim=1)
