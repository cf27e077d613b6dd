"""The vision transformer of UNETR with a small decoder, to learn from scans without labels.

The network of MONAI's tutorial on self-supervised pre-training (`ViTAutoEnc`).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from unetrkit.networks.blocks import initialise
from unetrkit.networks.unetr import takes
from unetrkit.networks.vit import ViT, ViTSize


class ViTAutoencoder(nn.Module):
    """Image (b, c, x, y, z) -> reconstruction (b, c, x, y, z), of any size.

    `encoder` is the one of `unetr`, name for name.
    """

    def __init__(self, encoder: ViT, channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        patch = encoder.size.patch
        coarse = 2 ** (patch.bit_length() // 2)  # of 16, as published, 4 and 4; of 8, 4 and 2
        self.decoder = nn.Sequential(
            nn.ConvTranspose3d(encoder.channels[-1], 16, coarse, stride=coarse),
            nn.ConvTranspose3d(16, channels, patch // coarse, stride=patch // coarse),
        )
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(self.encoder(image)[-1], image.shape[2:])

    def decode(self, last: Tensor, size: Sequence[int]) -> Tensor:
        """The encoder's last map (b, width, x/p, y/p, z/p) -> reconstruction (b, c, *size)."""
        x, y, z = size
        reconstruction: Tensor = self.decoder(last)
        return reconstruction[:, :, :x, :y, :z]


@takes(ViTSize)
def vit_autoencoder(
    in_channels: int, image_size: tuple[int, int, int] = (96, 96, 96), **size: Any
) -> ViTAutoencoder:
    """As it stands ViT-B/16, and two transposed convolutions: (b, in_channels, x, y, z) -> the same.

    * image_size: position embeddings are learned on its grid of patches; give what fine-tuning will use.
    * size: the transformer's own options, see `ViTSize`; `unetr` of the same size is fine-tuned from it.

    Raises UserError: an option has a value that the network cannot have.
    """
    return ViTAutoencoder(ViT(in_channels, image_size, ViTSize(**size)), in_channels)
