"""A vision transformer learns to fill in three quarters of a crop from the quarter that it sees.

He et al. 2022, https://arxiv.org/abs/2111.06377; in 3D: Wald et al. 2024, https://arxiv.org/abs/2412.17041
"""

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from unetrkit.config import Settings
from unetrkit.errors import UserError
from unetrkit.networks import build_pretraining
from unetrkit.networks.masked_autoencoder import MaskedAutoencoder
from unetrkit.networks.windows import Size
from unetrkit.pretraining.corruptions import generator_of_step
from unetrkit.pretraining.masking import draw_hidden, in_voxels, normalised

NETWORKS = {"unetr": "masked_autoencoder", "primus": "masked_autoencoder_primus"}


class MaskedAutoencoderSettings(Settings):
    """What is hidden, from whom, and what is to be filled in."""

    # whose transformer learns: `unetr`'s, of patches of 16 voxels, or `primus_*`'s, of 8
    encoder: Literal["unetr", "primus"] = "unetr"
    # the share of its patches that each crop hides
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    # whether each patch is to be predicted at mean 0 and variance 1, as published for photographs. The values
    # of a scan mean something, and a flat patch would count as much as any organ: of 24 CTs of head and neck
    # 46 % of the patches vary by less than 40 HU, which is 0.02 % of the plain loss
    normalised_targets: bool = False


PUBLISHED: dict[str, Any] = {"normalised_targets": True}


class MaskedAutoencoderPretraining(nn.Module):
    """{"image": (b, c, x, y, z)} -> {"loss", "reconstruction"}: mean squared error of what was hidden."""

    def __init__(self, network: MaskedAutoencoder, settings: MaskedAutoencoderSettings) -> None:
        super().__init__()
        self.network = network
        self.settings = settings

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image = batch["image"]
        predicted, hidden = self.predict(image)
        target = normalised(image, self.network.patch)[0] if self.settings.normalised_targets else image
        error = ((predicted - target).square() * hidden).sum()
        # of a crop of one patch nothing is hidden
        loss = error / (hidden.sum() * image.shape[1]).clamp_min(1)
        return {"loss": loss, "reconstruction": loss}

    def restore(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The crops, what is seen of them, and that with the rest filled in; (b, c, x, y, z) each."""
        image = batch["image"]
        predicted, hidden = self.predict(image)
        if self.settings.normalised_targets:
            _, mean, deviation = normalised(image, self.network.patch)
            predicted = predicted * deviation + mean
        black = image.amin((1, 2, 3, 4), keepdim=True)
        seen, whole = image.where(~hidden, black), image.where(~hidden, predicted)
        return {"original": image, "corrupted": seen, "restored": whole}

    def predict(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What the network makes of the visible patches, (b, c, x, y, z), and what was hidden, (b, 1, …)."""
        grid = self.network.grid(image)
        hidden = draw_hidden(generator_of_step(), len(image), prod(grid), self.settings.mask_ratio)
        visible = (~hidden).nonzero()[:, 1].view(len(image), -1)
        patches = hidden.view(-1, 1, *grid).to(image.device, non_blocking=True)
        predicted = self.network(image, visible.to(image.device, non_blocking=True)).float()
        return predicted, in_voxels(patches, self.network.patch, image.shape[2:])


def build(
    in_channels: int, image_size: Size, options: Mapping[str, Any], settings: MaskedAutoencoderSettings
) -> MaskedAutoencoderPretraining:
    """The objective with a new network.

    Raises UserError for an option that the network cannot have, and for crops of a single patch.
    """
    network = build_pretraining(NETWORKS[settings.encoder], in_channels, image_size, options)
    assert isinstance(network, MaskedAutoencoder)
    if all(extent <= network.patch for extent in image_size):
        message = f"a crop of {' x '.join(map(str, image_size))} voxels is one patch of {network.patch}³"
        raise UserError(message, hint="nothing would be left to see: larger crops, or a smaller `patch`")
    return MaskedAutoencoderPretraining(network, settings)
