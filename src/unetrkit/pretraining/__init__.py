"""Learning from scans without labels: the objectives, by name, that train a network to restore them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from unetrkit.config import Settings
from unetrkit.pretraining import disruptive_autoencoder as dae
from unetrkit.pretraining import masked_autoencoder as mae
from unetrkit.pretraining import swin_heads, vit_autoencoder


@dataclass(frozen=True)
class Objective:
    """How a network is pre-trained.

    * settings: what a person may set
    * build: (in_channels, image_size, network_options, settings) -> a module with the network as `network`.
      Its forward takes {"image": (b, c, x, y, z), "case": (b,), "modality": (b,)} to named losses, among
      them "loss"; `restore` takes the same to "original", "corrupted" and "restored", (b, c, x, y, z) each.
      What it draws is a function of torch's seed: the same seed corrupts the same batch alike.
    * published: the settings of the published form, where they differ from the defaults
    * networks: those of `networks.NETWORKS` that are fine-tuned from it
    """

    settings: type[Settings]
    build: Callable[[int, tuple[int, int, int], Mapping[str, Any], Any], nn.Module]
    published: Mapping[str, Any]
    networks: tuple[str, ...]


SWIN = ("swin_unetr_tiny", "swin_unetr_small", "swin_unetr_base")

PRIMUS = ("primus_s", "primus_b", "primus_m", "primus_l")

OBJECTIVES: dict[str, Objective] = {
    name: Objective(settings, module.build, module.PUBLISHED, networks)
    for name, module, settings, networks in (
        ("vit_autoencoder", vit_autoencoder, vit_autoencoder.ViTAutoencoderSettings, ("unetr",)),
        ("swin_heads", swin_heads, swin_heads.SwinHeadsSettings, SWIN),
        ("disruptive_autoencoder", dae, dae.DisruptiveAutoencoderSettings, SWIN),
        ("masked_autoencoder", mae, mae.MaskedAutoencoderSettings, ("unetr", *PRIMUS)),
    )
}
