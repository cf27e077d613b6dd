"""The improved UNETR of the study of four changes: stem, lighter transformer, aligned skips, fused scales.

https://github.com/Weng1002/DeepLearning-UNETR. Its figure shows all four; its committed code has the stem and
the fusion, at feature size 32 only, and those compute the same here. Of the other two there is only the
figure: what we made of them stands at `LIGHT` and `Alignment`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.networks.blocks import Decoder, EncoderDecoder, Up, run
from unetrkit.networks.convolution import conv
from unetrkit.networks.norm import instance_norm_
from unetrkit.networks.unetr import decoder_channels, grow, skips, takes
from unetrkit.networks.vit import ViT, ViTSize

# "8 blocks, hidden 512". The figure keeps skips 3, 6 and 9, but 8 blocks have no 9: evenly spaced, 2, 4, 6.
LIGHT = ViTSize(depth=8, width=512, heads=8)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Which of the study's four changes a network has."""

    stem: bool = False
    light_vit: bool = False
    skip_alignment: bool = False
    fpn_fusion: bool = False


@takes(Changes)
def unetr_fpn(
    in_channels: int,
    classes: int,
    image_size: tuple[int, int, int] = (96, 96, 96),
    *,
    feature_size: int = 32,
    patch_embedding: Literal["conv", "perceptron"] = "conv",
    dropout: float = 0.0,
    checkpointing: bool = False,
    deep_supervision: int = 0,
    **changes: bool,
) -> EncoderDecoder:
    """UNETR with any of four changes: (b, in_channels, x, y, z) -> logits (b, classes, x, y, z), of any size.

    Without a change it is `unetr`; weights of what is unchanged have the same names.

    * feature_size, patch_embedding, dropout, checkpointing, deep_supervision: as in `unetr`; the study's
      feature size is 32.
    * changes: `stem`, see `Stem`; `light_vit`, see `LIGHT`; `skip_alignment`, see `Alignment`;
      `fpn_fusion`, see `FusingDecoder`.

    Raises UserError: an option has a value that the network cannot have.
    """
    has = Changes(**changes)
    size = LIGHT if has.light_vit else ViTSize()
    size = replace(size, patch_embedding=patch_embedding, dropout=dropout, checkpointing=checkpointing)
    encoder = ViT(in_channels, image_size, size, stem=Stem(in_channels) if has.stem else None)
    channels = decoder_channels(feature_size, encoder)
    skip = skips(in_channels, channels, grow_aligned if has.skip_alignment else grow)
    kind = FusingDecoder if has.fpn_fusion else Decoder
    decoder = kind(channels, classes, checkpointing=checkpointing, deep_supervision=deep_supervision)
    return EncoderDecoder(encoder, skip, decoder)


class Stem(nn.Module):
    """What the transformer sees in place of the image (b, c, x, y, z): neighbourhoods, in as many channels.

    Only the transformer: the finest skip has the image itself.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, 16, 3)  # the study's has a bias here, which the norm takes away again
        self.conv2 = nn.Conv3d(16, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv2(F.relu(instance_norm_(self.conv1(image))))


class Alignment(nn.Module):
    """A skip on its level's grid, projected among its own channels, each then of mean 0 and variance 1.

    The study says "reshape + skip alignment" and shows no more; its committed code has none. Ours makes the
    scales alike where they meet, in the decoder and in the fusion. Left alone, the skip at 1/8 comes straight
    from a transposed convolution, as loud as its tokens are: those of a tapped block have no norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm_(self.projection(x))


def grow_aligned(in_channels: int, out_channels: int, times: int) -> nn.Sequential:
    """`grow`, and what comes out is aligned."""
    return grow(in_channels, out_channels, times).append(Alignment(out_channels))


class Fusion(nn.Module):
    """Maps of several scales, resized to the first one's grid, joined, reduced by one matrix and a ReLU."""

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.reduction = nn.Conv3d(sum(channels), out_channels, 1)

    def forward(self, *maps: Tensor) -> Tensor:
        # resizing mixes voxels and the matrix mixes channels: either may come first. Reduced first, there are
        # few channels to resize and the joined map, 16 f channels at 1/2, is never there.
        weights = self.reduction.weight.split(self.channels, dim=1)
        fused = F.conv3d(maps[0], weights[0], self.reduction.bias)
        for x, weight in zip(maps[1:], weights[1:], strict=True):
            reduced = F.conv3d(x, weight)
            if reduced.shape[2:] != fused.shape[2:]:
                reduced = F.interpolate(reduced, fused.shape[2:], mode="trilinear")
            fused = fused + reduced
        return F.relu(fused, inplace=True)


class FusingDecoder(Decoder):
    """The decoder with a feature pyramid before its last step, to full resolution.

    That step doubles, instead of the map that the decoder has made at 1/2, this map and all skips from 1/2
    down fused into `channels[0]` channels.
    """

    def __init__(self, channels: Sequence[int], classes: int, **options: Any) -> None:
        super().__init__(channels, classes, **options)
        full, half, *_ = channels
        self.fusion = Fusion((half, *channels[1:-1]), full)
        self.up[0] = Up(full, full)

    def step(self, level: int, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        if level == 0:
            x = run(self.fusion, x, *features[1:-1], checkpointing=self.checkpointing)
        return super().step(level, x, features)
