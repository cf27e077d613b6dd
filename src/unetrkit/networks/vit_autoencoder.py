"""The vision transformer of UNETR with a small decoder, to learn from scans without labels.

The network of MONAI's tutorial on self-supervised pre-training (`ViTAutoEnc`).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from unetrkit.networks.blocks import initialise
from unetrkit.networks.vit import ViT


class ViTAutoencoder(nn.Module):
    """Image (b, c, x, y, z) -> reconstruction (b, c, x, y, z), of any size.

    `encoder` is the one of `unetr`, name for name.
    """

    def __init__(self, encoder: ViT, channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Sequential(
            nn.ConvTranspose3d(encoder.channels[-1], 16, 4, stride=4),
            nn.ConvTranspose3d(16, channels, 4, stride=4),
        )
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        x, y, z = image.shape[2:]
        reconstruction: Tensor = self.decoder(self.encoder(image)[-1])
        return reconstruction[:, :, :x, :y, :z]


def vit_autoencoder(
    in_channels: int,
    image_size: tuple[int, int, int] = (96, 96, 96),
    *,
    patch_embedding: Literal["conv", "perceptron"] = "conv",
    dropout: float = 0.0,
    checkpointing: bool = False,
) -> ViTAutoencoder:
    """ViT-B/16 and two transposed convolutions: (b, in_channels, x, y, z) -> the same.

    Args:
        image_size: position embeddings are learned on its grid of patches; give what fine-tuning will use.
        patch_embedding: how the embedding begins, see `PatchEmbedding`.
        dropout: in the transformer.
        checkpointing: compute activations twice instead of keeping them.

    Raises:
        UserError: an option has a value that the network cannot have.
    """
    encoder = ViT(
        in_channels,
        image_size,
        patch_embedding=patch_embedding,
        dropout=dropout,
        checkpointing=checkpointing,
    )
    return ViTAutoencoder(encoder, in_channels)
