"""Supervised segmentation as an objective: a batch of patches and labels to named losses."""

from __future__ import annotations

from torch import Tensor, nn

from unetrkit.training.losses import LossSettings, dice_cross_entropy


class Segmentation(nn.Module):
    """{"image": (b, c, x, y, z), "label": (b, x, y, z) indices} -> {"loss", "dice_loss", "cross_entropy"}."""

    def __init__(self, network: nn.Module, loss: LossSettings) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return dice_cross_entropy(self.network(batch["image"]), batch["label"], self.loss)
