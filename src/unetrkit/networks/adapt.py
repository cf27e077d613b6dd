"""Weights of another shape, made to fit: other channels, another grid of patches, another window."""

from math import prod

import torch.nn.functional as F
from torch import Tensor

from unetrkit.errors import UserError, many
from unetrkit.networks.vit import resized

Grid = tuple[int, ...]
OTHER = "has another shape in this network"


def adapt(
    name: str, weight: Tensor, shape: Grid, source: Grid | None, target: Grid | None
) -> tuple[Tensor, str]:
    """The weight in the network's shape, and how it came to it.

    source, target: the grids of patches of the file's and the network's position embeddings; a source of
    None is taken to be a cube.

    Raises:
        ValueError: there is no way that keeps its meaning; the text says why.
        UserError: position embeddings whose grid is neither known nor a cube.
    """
    if weight.ndim != len(shape):
        raise ValueError(OTHER)
    if name == "encoder.position" and target is not None and weight.shape[::2] == (shape[0], shape[2]):
        source = source or cube(weight.shape[1])
        how = f"interpolated from {_by(source)} to {_by(target)} patches"
        return resize_positions(weight, source, target), how
    if name.endswith(".bias") and ".attention." in name and weight.ndim == 2:
        return resize_bias_table(weight, shape), f"interpolated from {weight.shape[0]} displacements"
    channels = _channels(name, weight, shape)
    if channels is not None:
        before, after = channels
        return change_channels(weight, before, after), f"from {many(before, 'input channel')} to {after}"
    if name.startswith(("decoder.head.", "decoder.coarse_heads.")) and weight.shape[1:] == shape[1:]:
        raise ValueError(f"is for {weight.shape[0]} classes, not {shape[0]}")
    raise ValueError(OTHER)


def change_channels(weight: Tensor, before: int, after: int) -> Tensor:
    """A first layer (out, before * k, …) for `after` input channels, that answers as strongly as it did.

    The channels' weights are summed and shared out evenly: n channels that show the same image get the answer
    that it had before. One to n is each weight / n; n to one is their sum, as if the one image stood in all.
    """
    parts = weight.unflatten(1, (before, -1))  # o c k …
    one = parts.sum(1, keepdim=True) / after
    return one.expand(-1, after, *parts.shape[2:]).flatten(1, 2)


def resize_positions(position: Tensor, source: Grid, target: Grid) -> Tensor:
    """Position embeddings (1, n, dim) of one grid of patches for another: what `ViT` does at another size."""
    if prod(source) != position.shape[1]:
        message = f"{position.shape[1]} position embeddings do not lie on a grid of {_by(source)}"
        hint = "name the size in voxels that they were trained at, a multiple of 16 an axis"
        raise UserError(message, hint=hint)
    return position if source == target else resized(position.float(), source, target)


def resize_bias_table(table: Tensor, shape: Grid) -> Tensor:
    """A table (displacements, heads) of one window for another: its ends stay its ends.

    Raises ValueError where the heads differ or a table is not that of a cube.
    """
    sides = [round(rows ** (1 / 3)) for rows in (table.shape[0], shape[0])]
    if table.shape[1] != shape[1] or [side**3 for side in sides] != [table.shape[0], shape[0]]:
        raise ValueError(OTHER)
    cubes = table.t().unflatten(1, (sides[0],) * 3)[None].float()  # 1 h x y z
    size = (sides[1],) * 3
    return F.interpolate(cubes, size, mode="trilinear", align_corners=True)[0].flatten(1).t()


def cube(count: int) -> Grid:
    """The grid of `count` patches, if it is a cube. Raises UserError else."""
    side = round(count ** (1 / 3))
    if side**3 != count:
        message = f"the weights have {count} position embeddings, and the file does not say how they lie"
        hint = "name the size in voxels that they were trained at: `init_size=96,96,64`"
        raise UserError(message, hint=hint)
    return (side, side, side)


def _channels(name: str, weight: Tensor, shape: Grid) -> tuple[int, int] | None:
    """Input channels before and after, for the layers that read the image."""
    if name == "encoder.embedding.weight" and weight.ndim == 2 and weight.shape[0] == shape[0]:
        cube_size = 16**3
        if weight.shape[1] % cube_size == 0 and shape[1] % cube_size == 0:
            return weight.shape[1] // cube_size, shape[1] // cube_size
    first = name in ("encoder.embedding.weight", "skip.0.conv1.weight", "skip.0.shortcut.weight")
    if first and weight.ndim == 5 and (weight.shape[0], *weight.shape[2:]) == (shape[0], *shape[2:]):
        return weight.shape[1], shape[1]
    return None


def _by(grid: Grid) -> str:
    return "x".join(map(str, grid))
