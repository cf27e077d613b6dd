"""The whole Swin UNETR learns to restore crops that are noisy, coarse and partly masked, of any modality.

Valanarasu et al. 2023, https://arxiv.org/abs/2307.16896
"""

from collections.abc import Mapping
from math import sqrt
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unetrkit.config import Settings
from unetrkit.networks import build_pretraining
from unetrkit.networks.blocks import EncoderDecoder
from unetrkit.networks.convolution import arranged
from unetrkit.networks.swin import SwinEncoder
from unetrkit.networks.windows import Size
from unetrkit.pretraining.contrast import gathered
from unetrkit.pretraining.corruptions import add_noise, coarsen, draw_seed, generator_of_step
from unetrkit.pretraining.masking import draw_hidden, in_voxels

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DisruptiveAutoencoderSettings(Settings):
    """Disruptions, what is to be restored of them, and the contrast between modalities."""

    # variance of the Gaussian noise, for images in [0, 1]
    noise_variance: Weight = 0.1
    # one voxel in so many is kept along each axis, and stands for those up to the next
    coarsening: int = Field(default=4, ge=1)
    # what is masked besides: "channels" of the patch embedding, as published; or cubes of the crop, where the
    # encoder finds "tokens" that it has learned for them, as in SimMIM, or "zeros" in the image
    masking: Literal["channels", "tokens", "zeros"] = "channels"
    # the share of channels or cubes that is masked
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    # the edge of a cube, in voxels, an even number
    block: int = Field(default=16, ge=2, multiple_of=2)
    # whether each crop loses channels of its own; as published all crops of a batch lose the same
    masked_alone: bool = True
    # which voxels the loss counts; with masked channels they all are
    restored: Literal["all", "masked"] = "all"
    # of the contrast between modalities; the published code has 0.02, its recipe 0.03
    contrast_weight: Weight = 0.03
    # "modalities": crops of one modality attract each other, see `between_modalities`; as published
    # "columns": each is to be like the crop at the place of its modality's number, see `published_contrast`
    contrast: Literal["modalities", "columns"] = "modalities"
    # of the cosine similarities between modalities; the published code multiplies by exp(0.07) instead
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.07
    # whether the crops of all processes are compared; the two that fit a GPU are seldom of two modalities and
    # never two of each
    gathered: bool = True


PUBLISHED: dict[str, Any] = {"masked_alone": False, "contrast": "columns", "gathered": False}


class DisruptiveAutoencoder(nn.Module):
    """{"image": (b, c, x, y, z), "modality": (b,)} -> {"loss", "reconstruction", "contrast"}.

    Mean absolute error of the restored crops, plus `contrast_weight` times the contrast between modalities.
    """

    def __init__(self, network: EncoderDecoder, settings: DisruptiveAutoencoderSettings) -> None:
        super().__init__()
        self.network = network
        self.settings = settings
        # it does not move on with the network, and in other forms would be a parameter without a gradient
        assert isinstance(network.encoder, SwinEncoder)
        token = torch.empty(network.encoder.channels[0]).normal_(std=0.02)
        self.mask_token = nn.Parameter(token) if settings.masking == "tokens" else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, modality, s = batch["image"], batch["modality"], self.settings
        _, masked, restored, bottom = self.pass_through(image)
        error = (restored - image).abs()
        if s.restored == "masked":
            reconstruction = (error * masked).sum() / (masked.sum() * image.shape[1]).clamp_min(1)
        else:
            reconstruction = error.mean()
        features = bottom.float().mean((2, 3, 4)) if s.contrast == "modalities" else bottom.float().flatten(1)
        if s.gathered:
            features, modality = gathered(features), gathered(modality)
        if s.contrast == "modalities":
            contrast = between_modalities(features, modality, s.temperature)
        else:
            contrast = published_contrast(features, modality)
        loss = reconstruction + s.contrast_weight * contrast
        return {"loss": loss, "reconstruction": reconstruction, "contrast": contrast}

    def restore(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The crops, what the network is shown, and what it makes of that; (b, c, x, y, z) each."""
        disrupted, _, restored, _ = self.pass_through(batch["image"])
        return {"original": batch["image"], "corrupted": disrupted, "restored": restored}

    def pass_through(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is shown, which voxels are masked (b, 1, …), what is restored, and the encoder's last map."""
        s, generator, encoder = self.settings, generator_of_step(), self.network.encoder
        assert isinstance(encoder, SwinEncoder)
        noisy = add_noise(sqrt(s.noise_variance), draw_seed(generator), image)
        disrupted = coarsen(s.coarsening, noisy)
        if s.masking == "channels":
            rows = len(image) if s.masked_alone else 1
            hidden = draw_hidden(generator, rows, encoder.channels[0], s.mask_ratio).to(image.device)
            masked = torch.ones_like(image[:, :1], dtype=torch.bool)
            tokens = encoder.embed(arranged(disrupted))  # b x y z c
            tokens = tokens.masked_fill(hidden[:, None, None, None], 0)
        else:
            masked = self.draw_cubes(generator, image)
            # in the published code the skip from the image sees what is masked, and only that: its mask is
            # upside down there
            disrupted = disrupted.masked_fill(masked, 0)
            tokens = encoder.embed(arranged(disrupted))
            if self.mask_token is not None:
                hidden = masked[:, 0, ::2, ::2, ::2, None]  # cubes begin and end between tokens
                tokens = torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)
        maps = encoder.encode(tokens)
        restored = self.network.decode([arranged(disrupted), *maps]).float()
        return disrupted, masked, restored, maps[-1]

    def draw_cubes(self, generator: torch.Generator, image: Tensor) -> Tensor:
        """Which voxels are masked, (b, 1, x, y, z)."""
        block = self.settings.block
        i, j, k = (-(-extent // block) for extent in image.shape[2:])
        hidden = draw_hidden(generator, len(image), i * j * k, self.settings.mask_ratio)
        cubes = hidden.view(-1, 1, i, j, k).to(image.device, non_blocking=True)
        return in_voxels(cubes, block, image.shape[2:])


def between_modalities(features: Tensor, modality: Tensor, temperature: float) -> Tensor:
    """How well crops of the same modality are told from those of others by cosine similarity; a scalar.

    features: (n, c); modality: (n,). For each crop with another of its modality, the mean over those of the
    cross-entropy of finding it among all other crops: Khosla et al. 2020, https://arxiv.org/abs/2004.11362.
    0 where all crops are of one modality: nothing is told, and the loss would only draw them together.
    """
    with torch.autocast(features.device.type, enabled=False):
        vectors = F.normalize(features.float())
        itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
        # not -inf: a row of nothing else would have no finite gradient
        logits = (vectors @ vectors.T / temperature).masked_fill(itself, torch.finfo(torch.float32).min)
        same = modality[:, None] == modality
        positive = same & ~itself
        if_found = F.log_softmax(logits, dim=1).masked_fill(~positive, 0).sum(1)
        anchor = positive.any(1) & ~same.all()
        loss = -(if_found / positive.sum(1).clamp_min(1) * anchor).sum() / anchor.sum().clamp_min(1)
    return loss


def published_contrast(features: Tensor, modality: Tensor) -> Tensor:
    """The published contrast, for comparison: each crop is to be most alike the crop at its modality's place.

    features: (n, c), whole maps, not normalised; modality: (n,). Modalities are numbered by rank among those
    of the batch, and the number is read as a column of the n x n matrix of dot products times exp(0.07): of a
    batch of one modality, every crop is to be most alike the first. As the matrix is symmetric, the mean over
    its rows and columns that the publication takes is that over its rows.
    """
    with torch.autocast(features.device.type, enabled=False):
        place = modality.unique(return_inverse=True)[1]
        return F.cross_entropy(features.float() @ features.float().T * torch.tensor(0.07).exp(), place)


def build(
    in_channels: int, image_size: Size, options: Mapping[str, Any], settings: DisruptiveAutoencoderSettings
) -> DisruptiveAutoencoder:
    """The objective with a new network. Raises UserError for an option that the network cannot have."""
    network = build_pretraining("swin_unetr_reconstruction", in_channels, image_size, options)
    assert isinstance(network, EncoderDecoder)
    return DisruptiveAutoencoder(network, settings)
