"""Swin UNETR: a Swin transformer encodes, convolutions decode.

Hatamizadeh et al. 2022, https://arxiv.org/abs/2201.01266
"""

from typing import Unpack

from torch import nn

from unetrkit.networks.blocks import Decoder, EncoderDecoder, ResidualBlock
from unetrkit.networks.swin import SwinEncoder, SwinOptions


def swin_unetr(
    in_channels: int,
    classes: int,
    image_size: tuple[int, int, int] = (96, 96, 96),
    *,
    feature_size: int = 24,
    deep_supervision: int = 0,
    **options: Unpack[SwinOptions],
) -> EncoderDecoder:
    """Swin UNETR: (b, in_channels, x, y, z) -> logits (b, classes, x, y, z).

    Any size of 1 or more, odd ones too: maps are padded where they are halved and cropped where they are
    doubled again, so that 48 x 64 x 48 costs what it is. `image_size` decides nothing here.

    * feature_size: channels at full and half resolution, a multiple of 12; they double at each level down.
    * deep_supervision: how many coarser scales are trained too, see `Decoder`; up to 4.
    * options: see `SwinOptions`.

    Raises UserError: an option has a value that the network cannot have.
    """
    encoder = SwinEncoder(in_channels, feature_size, **options)
    *fine, _, bottom = encoder.channels
    image = ResidualBlock(in_channels, feature_size)
    between = [ResidualBlock(width, width) for width in fine]
    skip = [image, *between, nn.Identity(), ResidualBlock(bottom, bottom)]
    widths, checkpointing = (feature_size, *encoder.channels), options.get("checkpointing", False)
    decoder = Decoder(widths, classes, checkpointing=checkpointing, deep_supervision=deep_supervision)
    return EncoderDecoder(encoder, skip, decoder)
