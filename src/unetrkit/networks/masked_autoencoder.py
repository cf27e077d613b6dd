"""Masked autoencoders: a vision transformer encodes visible patches, a light one fills in the hidden ones.

He et al. 2022, https://arxiv.org/abs/2111.06377; in 3D: Wald et al. 2024, https://arxiv.org/abs/2412.17041
"""

from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.networks.blocks import initialise, run
from unetrkit.networks.primus import PrimusSize, RotaryViT, primus, rotary
from unetrkit.networks.unetr import takes
from unetrkit.networks.vit import Block, ViT, ViTSize
from unetrkit.networks.windows import Size


@dataclass(frozen=True, kw_only=True)
class FillingSize:
    """How large the transformer is that fills in; pre-training leaves it behind.

    As it stands, VideoMAE's for ViT-B (arXiv 2203.12602): half the encoder's width, 4 blocks.

    Raises UserError: sizes that are none, or that do not fit each other.
    """

    decoder_depth: int = 4
    # channels of a token: a third of them says, in pairs, where it is along each axis
    decoder_width: int = 384
    decoder_heads: int = 6

    def __post_init__(self) -> None:
        for option in ("decoder_depth", "decoder_heads"):
            if getattr(self, option) < 1:
                raise UserError(f"`{option}` is {getattr(self, option)}", hint="1 or more is needed")
        if self.decoder_width < 1 or self.decoder_width % 6 or self.decoder_width % self.decoder_heads:
            hint = f"a multiple of 6 and of `decoder_heads`, {self.decoder_heads}, is needed"
            raise UserError(f"`decoder_width` is {self.decoder_width}", hint=hint)


class Filling(nn.Module):
    """Encoded visible tokens -> all patches: what is hidden starts as one learned token.

    Where a token is, fixed sines and cosines say: any grid has them.
    """

    def __init__(self, width: int, values: int, size: FillingSize, *, checkpointing: bool) -> None:
        super().__init__()
        dim = size.decoder_width
        self.checkpointing = checkpointing
        self.narrow = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        blocks = (Block(dim, size.decoder_heads, 4 * dim, 0.0) for _ in range(size.decoder_depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, values)

    def reset(self) -> None:
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, seen: Tensor, visible: Tensor, grid: Size) -> Tensor:
        """seen: (b, m, width); visible: (b, m), their numbers among the n patches. Gives (b, n, values)."""
        seen = self.narrow(seen)
        b, _, dim = seen.shape
        place = rotary(grid, dim, seen.device).flatten(2)  # 1 n c
        hidden = self.mask_token.to(seen.dtype).expand(b, place.shape[1], dim)
        x = hidden.scatter(1, visible[:, :, None].expand_as(seen), seen) + place
        for block in self.blocks:
            x = run(block, x, checkpointing=self.checkpointing)
        return self.head(self.norm(x))


class MaskedAutoencoder(nn.Module):
    """Image (b, c, x, y, z) -> reconstruction (b, c, x, y, z), of any size, from its visible patches alone.

    `visible` (b, m): of each image the numbers of m patches, z fastest; the encoder's blocks see no other.
    None given: all of them, and nothing is filled in. `encoder` is the one of `unetr` or `primus_*`, name for
    name.
    """

    def __init__(self, encoder: ViT | RotaryViT, channels: int, patch: int, filling: FillingSize) -> None:
        super().__init__()
        self.patch = patch
        self.encoder = encoder
        width, values = encoder.channels[-1], channels * patch**3
        self.reconstruction = Filling(width, values, filling, checkpointing=encoder.checkpointing)
        initialise(self)

    def grid(self, image: Tensor) -> Size:
        """How many patches cover an image along each axis."""
        x, y, z = (-(-extent // self.patch) for extent in image.shape[2:])
        return (x, y, z)

    def forward(self, image: Tensor, visible: Tensor | None = None) -> Tensor:
        b, c, x, y, z = image.shape
        grid, p = self.grid(image), self.patch
        if visible is None:
            visible = torch.arange(prod(grid), device=image.device).expand(b, -1)
        patches: Tensor = self.reconstruction(self.encode(image, visible), visible, grid)
        cubes = patches.view(b, *grid, c, p, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)  # b c x p y p z p
        return cubes.reshape(b, c, *(p * extent for extent in grid))[:, :, :x, :y, :z]

    def encode(self, image: Tensor, visible: Tensor) -> Tensor:
        """The visible patches as tokens after the last block, normed, (b, m, width)."""
        own = torch.arange(len(image), device=image.device)[:, None]
        if isinstance(self.encoder, ViT):
            return self.encoder.encode(self.encoder.embed(image)[own, visible])[-1]
        tokens, table = self.encoder.embed(image)
        return self.encoder.encode(tokens[own, visible], table[0, visible])


@takes(FillingSize)
@takes(ViTSize)
def masked_autoencoder(in_channels: int, image_size: Size = (96, 96, 96), **sizes: Any) -> MaskedAutoencoder:
    """The transformer of `unetr`, and a light one that fills in.

    * image_size: position embeddings are learned on its grid of patches; give what fine-tuning will use.
    * sizes: of the encoder, see `ViTSize`, and of what fills in, see `FillingSize`.

    Raises UserError: an option has a value that the network cannot have.
    """
    filling = _filling(sizes)
    size = ViTSize(**sizes)
    return MaskedAutoencoder(ViT(in_channels, image_size, size), in_channels, size.patch, filling)


@takes(FillingSize)
@takes(PrimusSize)
def masked_autoencoder_primus(
    in_channels: int, image_size: Size = (96, 96, 96), **sizes: Any
) -> MaskedAutoencoder:
    """The transformer of `primus_s`, or of another by `width`, `depth` and `heads`, and a light one.

    The options are those of `primus`, and `FillingSize`'s. Raises UserError as they do.
    """
    filling = _filling(sizes)
    whole = primus(in_channels, 1, image_size, **sizes)
    return MaskedAutoencoder(whole.encoder, in_channels, RotaryViT.patch, filling)


def _filling(sizes: dict[str, Any]) -> FillingSize:
    """Takes its own out of the options."""
    own = {field.name: sizes.pop(field.name) for field in fields(FillingSize) if field.name in sizes}
    return FillingSize(**own)
