"""Intensity augmentations: one table from a name to a function of an image and one number.

The strong ones follow the published set of nnU-Net (Isensee et al., Nature Methods 2021, supplement), with
amounts relative to the patch, so that images in [0, 1] and in standard deviations are changed alike.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SPACE = (-3, -2, -1)


def scale(image: Tensor, amount: float, seed: int) -> Tensor:
    """Every value times 1 + `amount`."""
    return image * (1 + amount)


def shift(image: Tensor, amount: float, seed: int) -> Tensor:
    """Every value plus `amount`."""
    return image + amount


def contrast(image: Tensor, amount: float, seed: int) -> Tensor:
    """Distances from the mean of each channel times `amount`, kept within the channel's range."""
    mean = image.mean(SPACE, keepdim=True)
    least, most = image.amin(SPACE, keepdim=True), image.amax(SPACE, keepdim=True)
    return ((image - mean) * amount + mean).clamp(least, most)


def gamma(image: Tensor, amount: float, seed: int) -> Tensor:
    """Each channel's range to the power of `amount`, then its mean and standard deviation restored.

    A constant channel stays as it is.
    """
    least = image.amin(SPACE, keepdim=True)
    extent = (image.amax(SPACE, keepdim=True) - least).clamp_min(1e-8)
    bent = ((image - least) / extent).pow(amount)
    ratio = image.std(SPACE, keepdim=True) / bent.std(SPACE, keepdim=True).clamp_min(1e-8)
    return (bent - bent.mean(SPACE, keepdim=True)) * ratio + image.mean(SPACE, keepdim=True)


def noise(image: Tensor, amount: float, seed: int) -> Tensor:
    """Gaussian noise of `amount` times the channel's standard deviation; another stream on another device."""
    generator = torch.Generator(image.device).manual_seed(seed)
    field = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
    return torch.addcmul(image, field, amount * image.std(SPACE, keepdim=True))


def blur(image: Tensor, amount: float, seed: int) -> Tensor:
    """Gaussian blur of `amount` voxels (standard deviation), edges repeated."""
    radius = math.ceil(3 * amount)
    weights = [math.exp(-0.5 * (tap / amount) ** 2) for tap in range(-radius, radius + 1)]
    blurred = image.reshape(1, -1, *image.shape[-3:])
    for axis in range(3):
        widths = [0] * 6
        widths[4 - 2 * axis] = widths[5 - 2 * axis] = radius
        padded = F.pad(blurred, widths, mode="replicate")
        # sums of shifted views: a third of the time of conv3d with one channel
        blurred = torch.zeros_like(blurred)
        for tap, weight in enumerate(weights):
            shifted = padded.narrow(2 + axis, tap, image.shape[axis - 3])
            blurred.add_(shifted, alpha=weight / sum(weights))
    return blurred.reshape(image.shape)


def low_resolution(image: Tensor, amount: float, seed: int) -> Tensor:
    """Resampled to `amount` times as many voxels along each axis and back: what a coarser scan would show."""
    size = list(image.shape[-3:])
    volume = image.reshape(1, -1, *size)
    small = F.interpolate(volume, size=[max(round(s * amount), 1) for s in size], mode="nearest-exact")
    return F.interpolate(small, size=size, mode="trilinear", align_corners=False).reshape(image.shape)


INTENSITY: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "noise": noise,
    "blur": blur,
    "scale": scale,
    "contrast": contrast,
    "low_resolution": low_resolution,
    "gamma": gamma,
    "shift": shift,
}
