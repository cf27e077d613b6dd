"""UNETR: a vision transformer encodes, convolutions decode.

Hatamizadeh et al. 2022, https://arxiv.org/abs/2103.10504
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from torch import nn

from unetrkit.errors import UserError
from unetrkit.networks.blocks import Decoder, EncoderDecoder, ResidualBlock
from unetrkit.networks.convolution import Doubling
from unetrkit.networks.vit import ViT, ViTSize


def takes(options: type) -> Callable[[Any], Any]:
    """Decorates a function whose `**` are the fields of the dataclass `options`: its signature names each.

    From signatures the table of networks reads what it can be asked for, and so does `help`.
    """

    def decorate(function: Any) -> Any:
        hints = get_type_hints(function) | get_type_hints(options)
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        every = [*own, *inspect.signature(options).parameters.values()]
        parameters = [p.replace(annotation=hints[p.name]) for p in every]
        function.__signature__ = signature.replace(parameters=parameters)
        function.__annotations__ = hints
        return function

    return decorate


@takes(ViTSize)
def unetr(
    in_channels: int,
    classes: int,
    image_size: tuple[int, int, int] = (96, 96, 96),
    *,
    feature_size: int = 16,
    deep_supervision: int = 0,
    **size: Any,
) -> EncoderDecoder:
    """UNETR, as it stands with ViT-B/16: (b, in_channels, x, y, z) -> logits (b, classes, x, y, z).

    Any size of 1 or more: the transformer sees the image padded to a multiple of the patch, and the decoder
    crops what it doubles to the image. Position embeddings are learned on `image_size`'s grid of patches and
    interpolated for others. A patch of 2**n voxels takes n doublings on the way back, 4 as published.

    * feature_size: channels at full resolution; they double at each level down.
    * deep_supervision: how many coarser scales are trained too, see `Decoder`; with a patch of 16 up to 3.
    * size: the transformer's own options, see `ViTSize`; its taps become the skips from 1/2 down.

    Raises UserError: an option has a value that the network cannot have.
    """
    vit = ViTSize(**size)
    encoder = ViT(in_channels, image_size, vit)
    channels = decoder_channels(feature_size, encoder)
    skip = skips(in_channels, channels)
    decoder = Decoder(channels, classes, checkpointing=vit.checkpointing, deep_supervision=deep_supervision)
    return EncoderDecoder(encoder, skip, decoder)


def decoder_channels(feature_size: int, encoder: ViT) -> tuple[int, ...]:
    """Channels of the maps from full resolution down: doubled at each level, the encoder's at its own grid.

    Raises UserError: a feature size below 1.
    """
    if feature_size < 1:
        raise UserError(f"`feature_size` is {feature_size}", hint="1 or more is needed; published: 16 and 32")
    levels = len(encoder.channels)
    return (*(feature_size * 2**level for level in range(levels)), encoder.channels[-1])


def grow(in_channels: int, out_channels: int, times: int) -> nn.Sequential:
    """A map of tokens doubled `times` times, refined after each but the first."""
    layers: list[nn.Module] = [Doubling(in_channels, out_channels)]
    for _ in range(times - 1):
        layers += [Doubling(out_channels, out_channels), ResidualBlock(out_channels, out_channels)]
    return nn.Sequential(*layers)


def skips(
    in_channels: int, channels: Sequence[int], grow: Callable[[int, int, int], nn.Module] = grow
) -> list[nn.Module]:
    """From the image and the tokens' maps, all on the coarsest grid, to the decoder's maps of `channels`."""
    full, *between, bottom = channels
    skip: list[nn.Module] = [ResidualBlock(in_channels, full)]  # made first: a seed gives the weights it gave
    skip += [grow(bottom, width, len(between) - level) for level, width in enumerate(between)]
    return [*skip, nn.Identity()]
