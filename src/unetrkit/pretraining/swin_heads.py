"""Swin UNETR's encoder learns how far a crop was turned, which views are of one crop, and to restore them.

Tang et al. 2022, https://arxiv.org/abs/2111.14791
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unetrkit.networks import build_pretraining
from unetrkit.networks.swin_heads import SwinHeads
from unetrkit.networks.windows import Size
from unetrkit.pretraining.contrast import ContrastSettings, contrast
from unetrkit.pretraining.corruptions import draw_turns, generator_of_step, turn
from unetrkit.pretraining.exchange import draw_exchange, exchange


class SwinHeadsSettings(ContrastSettings):
    """Heads and corruptions."""

    # what rotation and contrast are told from: the mean of the encoder's last map, or, as published, one
    # corner of it each, though a corner of a crop may show nothing but air
    heads: Literal["pooled", "single_token"] = "pooled"
    # about which axis crops are turned; as published about x, though the paper says z. Coarser slices would
    # tell a turn about x without any anatomy
    rotation_axis: Literal["x", "z"] = "z"
    # what a crop takes over from another: clean voxels; published: of crops before it corrupted ones
    mixing: Literal["clean", "corrupted"] = "clean"
    # the greatest share of a crop that is covered by noise, and the same again that comes from another crop
    most_corrupted: Annotated[float, Field(ge=0, le=1)] = 0.3


PUBLISHED: dict[str, Any] = {
    "heads": "single_token",
    "rotation_axis": "x",
    "mixing": "corrupted",
    "same_volume_negatives": True,
    "gathered": False,
}


class SwinHeadsPretraining(nn.Module):
    """{"image": (b, c, x, y, z), "case": (b,)} -> {"loss", "rotation", "contrast", "reconstruction"}.

    The loss is the sum of the three: cross-entropy of the quarter turns, NT-Xent between two views of each
    crop, mean absolute error of the restored views.
    """

    def __init__(self, network: SwinHeads, settings: SwinHeadsSettings) -> None:
        super().__init__()
        self.network = network
        self.settings = settings

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, generator = batch["image"], generator_of_step()
        first, second = self.view(image, generator), self.view(image, generator)
        turned, corrupted, turns = (torch.cat(pair) for pair in zip(first, second, strict=True))
        found = self.network(corrupted)
        one, other = found["contrast"].chunk(2)
        parts = {
            "rotation": F.cross_entropy(found["rotation"].float(), turns),
            "contrast": contrast(one, other, batch["case"], self.settings),
            "reconstruction": F.l1_loss(found["reconstruction"].float(), turned),
        }
        return {"loss": torch.stack([*parts.values()]).sum(), **parts}

    def restore(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The turned crops, their first views and what the network makes of them; (b, c, x, y, z) each."""
        turned, corrupted, _ = self.view(batch["image"], generator_of_step())
        restored = self.network(corrupted)["reconstruction"].float()
        return {"original": turned, "corrupted": corrupted, "restored": restored}

    def view(self, image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """One view of each crop: turned, and corrupted besides, (b, c, x, y, z); its quarter turns, (b,)."""
        size, axis = image.shape[2:], {"x": 0, "z": 2}[self.settings.rotation_axis]
        turns = draw_turns(generator, len(image), size, axis)
        turned = turn(turns, axis, image)
        drawn = draw_exchange(generator, len(image), size, self.settings.most_corrupted)
        corrupted = exchange(drawn, turned, clean=self.settings.mixing == "clean")
        return turned, corrupted, torch.tensor(turns, device=image.device)


def build(
    in_channels: int, image_size: Size, options: Mapping[str, Any], settings: SwinHeadsSettings
) -> SwinHeadsPretraining:
    """The objective with a new network. Raises UserError for an option that the network cannot have."""
    options = {"heads": settings.heads, **options}
    network = build_pretraining("swin_heads", in_channels, image_size, options)
    assert isinstance(network, SwinHeads)
    return SwinHeadsPretraining(network, settings)
