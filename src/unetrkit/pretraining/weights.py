"""What a pre-training leaves: a folder like a model's, which `unetrkit train … init=` begins with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from unetrkit.inference.model import PRETRAINED, Sealed, write_folder
from unetrkit.networks import build
from unetrkit.networks.identify import options_for

Size = tuple[int, int, int]


class Pretrained(Sealed):
    """What its `model.json` holds: the network is the one to tune."""

    format: Literal["unetrkit-pretrained"] = PRETRAINED


def network_to_tune(
    networks: Sequence[str], pretrained: nn.Module, in_channels: int, size: Size, options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The one of `networks`, and its options, whose encoder is `pretrained.encoder`, name for name.

    options: those that the pre-training network was made with.
    """
    wanted = _shapes(pretrained.get_submodule("encoder"))
    plain = {name: value for name, value in options.items() if name != "feature_size"}
    for some in (plain, options):  # the name of a size is better than a size
        for name in networks:
            own = options_for(name, some)
            with torch.device("meta"):
                network = build(name, in_channels, 2, size, own)
            if _shapes(network.get_submodule("encoder")) == wanted:
                return name, own
    raise RuntimeError(f"none of {networks} has the encoder that was pre-trained")


def save_pretrained(folder: Path, network: nn.Module, description: Mapping[str, Any]) -> None:
    """Writes the encoder, and skips and decoder where the network has those of its network to tune.

    description: the fields of `Pretrained` without its hashes. What restores the image, the head, stays.
    """
    state = network.state_dict()
    whole = any(name.startswith("skip.") for name in state)
    kept = {
        name: value
        for name, value in state.items()
        if name.startswith("encoder.") or (whole and not name.startswith("decoder.head."))
    }
    write_folder(folder, kept, lambda sha256: Pretrained(**description, sha256=sha256))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
