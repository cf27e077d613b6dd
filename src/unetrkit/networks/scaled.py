"""What is cut and what a network sees of it at different sizes, as in Azure's Swin UNETR example."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Scaled(nn.Module):
    """(b, c, x, y, z) -> logits of the same size, from a network that sees it `factors` times as large."""

    def __init__(self, network: nn.Module, factors: Sequence[float]) -> None:
        super().__init__()
        self.network, self.factors = network, factors

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[2:]
        seen = [round(n * factor) for n, factor in zip(size, self.factors, strict=True)]
        return scaled(self.network(scaled(image, seen)), size)


def scaled(values: Tensor, size: Sequence[int]) -> Tensor:
    """(b, c, *any) interpolated linearly to (b, c, *size); the faces of both grids coincide."""
    if values.shape[2:] == tuple(size):
        return values
    return F.interpolate(values, tuple(size), mode="trilinear", align_corners=False)


def scaled_label(label: Tensor, size: Sequence[int]) -> Tensor:
    """(b, *any) class indices to (b, *size), each the nearest: between 6 and 0 there is no 3."""
    return F.interpolate(label[:, None], tuple(size), mode="nearest-exact")[:, 0]


def seen_as(network: nn.Module, cut: Sequence[int], size: Sequence[int]) -> nn.Module:
    """The network for what is cut: as it is, or `Scaled` where it was trained on `cut` made `size`."""
    factors = [seen / n for seen, n in zip(size, cut, strict=True)]
    return network if tuple(cut) == tuple(size) else Scaled(network, factors)
