"""Supervised segmentation as an objective: a batch of patches and labels to named losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unetrkit.data.chunks import Triple
from unetrkit.networks.blocks import EncoderDecoder
from unetrkit.networks.scaled import scaled, scaled_label
from unetrkit.training.losses import LossSettings, dice_cross_entropy


class Segmentation(nn.Module):
    """{"image": (b, c, x, y, z), "label": (b, x, y, z) indices} -> {"loss", "dice_loss", "cross_entropy"}.

    network_size: what the network sees and the loss compares; None: the patches as they are.
    Of a network with deep supervision `loss` is the mean over its scales, each coarser one half as heavy as
    the one before; the other two are of the finest alone, as they are without.
    """

    def __init__(self, network: nn.Module, loss: LossSettings, network_size: Triple | None = None) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.network_size = network_size

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, label = batch["image"], batch["label"]
        if self.network_size:  # on the batch's device: what is read, sent and augmented stays small
            image, label = scaled(image, self.network_size), scaled_label(label, self.network_size)
        if not isinstance(self.network, EncoderDecoder) or not self.network.deep_supervision:
            return dice_cross_entropy(self.network(image), label, self.loss)
        terms, weights = [], []
        for level, logits in enumerate(self.network.scales(image)):
            terms.append(dice_cross_entropy(logits, coarsened(label, level), self.loss))
            weights.append(0.5**level)
        losses = [weight * term["loss"] for weight, term in zip(weights, terms, strict=True)]
        return terms[0] | {"loss": torch.stack(losses).sum() / sum(weights)}


def coarsened(label: Tensor, level: int) -> Tensor:
    """Labels (b, x, y, z), the grid halved `level` times, sizes rounded up: each cube's central voxel."""
    step = 2**level
    for axis in (1, 2, 3):
        last = label.shape[axis] - 1
        centres = torch.arange(0, last + 1, step, device=label.device) + step // 2
        label = label.index_select(axis, centres.clamp(max=last))
    return label
