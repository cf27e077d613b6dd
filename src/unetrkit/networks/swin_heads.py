"""Swin UNETR's encoder with three heads, and the whole of it, to learn from scans without labels.

Tang et al. 2022, https://arxiv.org/abs/2111.14791 (rotation, contrast, reconstruction);
Valanarasu et al. 2023, https://arxiv.org/abs/2307.16896 (the whole network reconstructs)
"""

from collections.abc import Callable
from functools import partial, wraps
from itertools import pairwise
from typing import Any, Literal, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.networks.blocks import SLOPE, EncoderDecoder, initialise
from unetrkit.networks.convolution import conv
from unetrkit.networks.norm import instance_norm_
from unetrkit.networks.swin import SwinEncoder, SwinOptions
from unetrkit.networks.swin_unetr import swin_unetr


class Refining(nn.Module):
    """(b, dim, x, y, z) -> (b, channels, 32x, 32y, 32z): convolution, norm and doubling, five times.

    What the publication calls "vae". A map of one voxel, from an image of 32 x 32 x 32, is not normed: norm
    would leave nothing of it, and the published network raises there.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        widths = [dim // part for part in (1, 2, 4, 8, 16, 16)]
        self.convs = nn.ModuleList(conv(coarse, fine, 3) for coarse, fine in pairwise(widths))
        self.head = nn.Conv3d(widths[-1], channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        for refine in self.convs:
            x = refine(x)
            one_voxel = x.shape[2:].numel() == 1
            x = F.leaky_relu(x, SLOPE) if one_voxel else instance_norm_(x, SLOPE)
            x = F.interpolate(x, scale_factor=2, mode="trilinear")
        return self.head(x)


def _doubling(dim: int, channels: int) -> nn.Sequential:
    widths = [*(dim // part for part in (1, 2, 4, 8, 16)), channels]
    return nn.Sequential(*(nn.ConvTranspose3d(a, b, 2, stride=2) for a, b in pairwise(widths)))


RECONSTRUCTIONS: dict[str, Callable[..., nn.Module]] = {
    "vae": Refining,
    "deconv": _doubling,
    "large_kernel_deconv": partial(nn.ConvTranspose3d, kernel_size=32, stride=32),
}


class SwinHeads(nn.Module):
    """Image (b, c, x, y, z) -> {"rotation": (b, 4), "contrast": (b, 512), "reconstruction": like the image}.

    Any size. The heads see the encoder's last map: "pooled" its mean, "single_token" one corner of it each,
    as published: rotation its first token, contrast its second. `encoder` is the one of `swin_unetr`, name
    for name.
    """

    def __init__(self, encoder: SwinEncoder, channels: int, *, reconstruction: str, heads: str) -> None:
        super().__init__()
        self.pooled = heads == "pooled"
        dim = encoder.channels[-1]
        self.encoder = encoder
        self.rotation = nn.Linear(dim, 4)
        self.contrast = nn.Linear(dim, 512)
        self.reconstruction = RECONSTRUCTIONS[reconstruction](dim, channels)
        initialise(self)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x, y, z = image.shape[2:]
        last = self.encoder(image)[-1]
        tokens = last.flatten(2)  # b c n
        if self.pooled:
            rotation = contrast = tokens.mean(2)
        else:
            rotation, contrast = tokens[:, :, 0], tokens[:, :, min(1, tokens.shape[2] - 1)]
        return {
            "rotation": self.rotation(rotation),
            "contrast": self.contrast(contrast),
            "reconstruction": self.reconstruction(last)[:, :, :x, :y, :z],
        }


def swin_heads(
    in_channels: int,
    image_size: tuple[int, int, int] = (96, 96, 96),
    *,
    feature_size: int = 48,
    reconstruction: Literal["vae", "deconv", "large_kernel_deconv"] = "vae",
    heads: Literal["pooled", "single_token"] = "pooled",
    **swin: Unpack[SwinOptions],
) -> SwinHeads:
    """The Swin transformer of Swin UNETR with heads for rotation, contrast and reconstruction.

    `image_size` decides nothing here.

    * feature_size: channels at half resolution, a multiple of 12, as in the network to be fine-tuned.
    * reconstruction: "vae" refines and doubles five times, "deconv" doubles with transposed convolutions,
      "large_kernel_deconv" is one of them, 32 voxels wide.
    * heads: what rotation and contrast are told from, see `SwinHeads`; published: "single_token".
    * swin: the encoder's options, as `swin_unetr` has them.

    Raises UserError: an option has a value that the network cannot have.
    """
    encoder = SwinEncoder(in_channels, feature_size, **swin)
    return SwinHeads(encoder, in_channels, reconstruction=reconstruction, heads=heads)


@wraps(swin_unetr, assigned=())  # it has that network's options, whatever they are
def swin_unetr_reconstruction(
    in_channels: int, image_size: tuple[int, int, int] = (96, 96, 96), **options: Any
) -> EncoderDecoder:
    """Swin UNETR with as many channels out as in; all but `decoder.head` moves on to segmentation by name."""
    return swin_unetr(in_channels, in_channels, image_size, **options)
