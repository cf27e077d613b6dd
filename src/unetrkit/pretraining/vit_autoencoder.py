"""UNETR's transformer learns to restore two corrupted views of a crop, and that they are of the same crop.

MONAI's tutorial on self-supervised pre-training of vision transformers (`vit_unetr_ssl`).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unetrkit.data.augment import Probability
from unetrkit.networks import build_pretraining
from unetrkit.networks.vit_autoencoder import ViTAutoencoder
from unetrkit.networks.windows import Size
from unetrkit.pretraining.contrast import ContrastSettings, contrast
from unetrkit.pretraining.corruptions import (
    Painting,
    draw_boxes,
    draw_seed,
    generator_of_step,
    paint,
    shuffle,
)

Sides = tuple[Probability, Probability]  # least and greatest, as shares of the crop's


class ViTAutoencoderSettings(ContrastSettings):
    """Losses and corruptions; sides are shares of the crop's: crops of any size are corrupted alike."""

    # of the published code; its text says 0.005, which its form of the loss turns into NaN
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    # what the contrast compares: the mean of the encoder's last map, which moves on to segmentation, or, as
    # published, whole reconstructions: near-copies of two near-equal images, whose likeness says little
    contrast: Literal["features", "reconstructions"] = "features"
    # which views are compared with the crop; as published the second one's reconstruction may be anything
    restored_views: Literal["both", "first"] = "both"
    # whether no box is shorter than the one before, as published: MONAI draws them so, see `draw_boxes`
    growing_boxes: bool = False
    # each view of a crop is painted over in `boxes` boxes of `inside_sides`, or outside of as many of
    # `outside_sides`
    boxes: int = Field(default=6, ge=1)
    p_outside: Probability = 0.5
    inside_sides: Sides = (0.052, 0.333)  # of 96 voxels: 5 to 32
    outside_sides: Sides = (0.208, 0.667)  # of 96 voxels: 20 to 64
    # then, so often, the voxels of `shuffled_boxes` boxes are shuffled
    p_shuffle: Probability = 0.8
    shuffled_boxes: int = Field(default=10, ge=0)
    shuffled_side: Probability = 0.083  # of 96 voxels: 8


PUBLISHED: dict[str, Any] = {
    "contrast": "reconstructions",
    "restored_views": "first",
    "growing_boxes": True,
    "same_volume_negatives": True,
    "gathered": False,
}


class ViTAutoencoderPretraining(nn.Module):
    """{"image": (b, c, x, y, z), "case": (b,)} -> {"loss", "reconstruction", "contrast"}.

    With r the mean absolute error of the reconstruction and n that of telling the views, the loss is r + n r:
    the contrast counts less the better crops are restored.
    """

    def __init__(self, network: ViTAutoencoder, settings: ViTAutoencoderSettings) -> None:
        super().__init__()
        self.network = network
        self.settings = settings

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, generator = batch["image"], generator_of_step()
        views = torch.cat([self.corrupt(image, generator), self.corrupt(image, generator)])
        last = self.network.encoder(views)[-1]
        restored = self.network.decode(last, image.shape[2:]).float()
        first, second = restored.chunk(2)
        reconstruction = F.l1_loss(first, image)
        if self.settings.restored_views == "both":
            reconstruction = (reconstruction + F.l1_loss(second, image)) / 2
        if self.settings.contrast == "features":
            first, second = last.float().mean((2, 3, 4)).chunk(2)
        likeness = contrast(first, second, batch["case"], self.settings)
        loss = reconstruction + likeness * reconstruction
        return {"loss": loss, "reconstruction": reconstruction, "contrast": likeness}

    def restore(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The crops, their first views and what the network makes of them; (b, c, x, y, z) each."""
        view = self.corrupt(batch["image"], generator_of_step())
        return {"original": batch["image"], "corrupted": view, "restored": self.network(view).float()}

    def corrupt(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """One view of each crop of (b, c, x, y, z): painted over, then shuffled."""
        s, size = self.settings, image.shape[2:]
        chances = torch.rand(2, len(image), generator=generator)
        outside = tuple((chances[0] < s.p_outside).tolist())
        sides = (s.outside_sides if out else s.inside_sides for out in outside)
        boxes = tuple(draw_boxes(generator, s.boxes, size, one, growing=s.growing_boxes) for one in sides)
        image = paint(Painting(boxes, outside, draw_seed(generator)), image)
        counts = [s.shuffled_boxes * (chance < s.p_shuffle) for chance in chances[1].tolist()]
        side = (s.shuffled_side, s.shuffled_side)
        shuffled = [draw_boxes(generator, count, size, side) for count in counts]
        return shuffle(shuffled, draw_seed(generator), image)


def build(
    in_channels: int, image_size: Size, options: Mapping[str, Any], settings: ViTAutoencoderSettings
) -> ViTAutoencoderPretraining:
    """The objective with a new network. Raises UserError for an option that the network cannot have."""
    network = build_pretraining("vit_autoencoder", in_channels, image_size, options)
    assert isinstance(network, ViTAutoencoder)
    return ViTAutoencoderPretraining(network, settings)
