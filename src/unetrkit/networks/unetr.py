"""UNETR: a vision transformer encodes, convolutions decode.

Hatamizadeh et al. 2022, https://arxiv.org/abs/2103.10504
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from unetrkit.errors import UserError
from unetrkit.networks.blocks import Decoder, EncoderDecoder, ResidualBlock, check_rate, doubling
from unetrkit.networks.vit import ViT


def unetr(
    in_channels: int,
    classes: int,
    image_size: tuple[int, int, int] = (96, 96, 96),
    *,
    feature_size: int = 16,
    patch_embedding: Literal["conv", "perceptron"] = "conv",
    taps: tuple[int, ...] = (3, 6, 9),
    dropout: float = 0.0,
    checkpointing: bool = False,
) -> EncoderDecoder:
    """UNETR with ViT-B/16: (b, in_channels, x, y, z) -> logits (b, classes, x, y, z).

    Any size of 1 or more: the transformer sees the image padded to a multiple of 16, and the decoder crops
    what it doubles to the image. Position embeddings are learned on `image_size`'s grid of patches and
    interpolated for others.

    Args:
        feature_size: channels at full resolution; they double at each level down.
        patch_embedding: how the embedding begins, see `PatchEmbedding`.
        taps: the blocks, counted from 0, whose tokens become the skips at 1/2, 1/4 and 1/8. The
            default is the published one: the 4th, 7th and 10th block, where the paper says 3rd, 6th and 9th.
        dropout: in the transformer.
        checkpointing: compute activations twice instead of keeping them.

    Raises:
        UserError: an option has a value that the network cannot have.
    """
    if feature_size < 1:
        raise UserError(f"`feature_size` is {feature_size}", hint="1 or more is needed; published: 16 and 32")
    if len(taps) != 3 or not 0 <= taps[0] < taps[1] < taps[2] < ViT.depth:
        hint = f"three rising block numbers from 0 to {ViT.depth - 1} are needed, as in [3, 6, 9]"
        raise UserError(f"`taps` is {list(taps)}", hint=hint)
    check_rate("dropout", dropout)
    encoder = ViT(
        in_channels,
        image_size,
        patch_embedding=patch_embedding,
        taps=taps,
        dropout=dropout,
        checkpointing=checkpointing,
    )
    half, quarter, eighth, bottom = encoder.channels
    f = feature_size
    skip = [
        ResidualBlock(in_channels, f),
        grow(half, 2 * f, times=3),
        grow(quarter, 4 * f, times=2),
        grow(eighth, 8 * f, times=1),
        nn.Identity(),
    ]
    decoder = Decoder((f, 2 * f, 4 * f, 8 * f, bottom), classes, checkpointing=checkpointing)
    return EncoderDecoder(encoder, skip, decoder)


def grow(in_channels: int, out_channels: int, times: int) -> nn.Sequential:
    """A map of tokens doubled `times` times, refined after each but the first."""
    layers: list[nn.Module] = [doubling(in_channels, out_channels)]
    for _ in range(times - 1):
        layers += [doubling(out_channels, out_channels), ResidualBlock(out_channels, out_channels)]
    return nn.Sequential(*layers)
