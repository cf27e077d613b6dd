"""Which network a file of weights belongs to, as its shapes tell."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unetrkit.errors import UserError, many
from unetrkit.networks import NETWORKS, known_options
from unetrkit.networks.published import Named

SWIN_SIZES = {12: "swin_unetr_tiny", 24: "swin_unetr_small", 48: "swin_unetr_base"}
UNETR = {"feature_size": 16, "width": 768, "depth": 12, "mlp_ratio": 4}  # as published
BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")
# how a network is trained, not what it is: not taken over from a model
OF_TRAINING = {"checkpointing", "deep_supervision", "dropout", "drop_path"}


@dataclass(frozen=True)
class Identity:
    """What `networks.build` would make the file's own network from; None is what the file does not say."""

    network: str
    in_channels: int
    classes: int | None
    image_size: tuple[int, int, int] | None
    options: dict[str, Any]

    def words(self) -> str:
        """`swin_unetr_base, 1 channel, 14 classes`."""
        classes = "no output layer" if self.classes is None else f"{self.classes} classes"
        return f"{self.network}, {many(self.in_channels, 'channel')}, {classes}"


def identify(named: Named, description: Mapping[str, Any]) -> Identity:
    """The network of these weights. `description`: what a model of ours says of itself, else empty.

    Raises UserError where they have no patch embedding to tell by.
    """
    tensors = named.tensors
    head, first = (_rows(tensors, name) for name in ("decoder.head.weight", "skip.0.conv1.weight"))
    embedding = tensors.get("encoder.embedding.weight")
    if embedding is None or embedding.ndim < 2:
        hint = "expected the weights of an encoder, complete"
        raise UserError(f"the weights (layout {named.layout.key}) have no patch embedding", hint=hint)
    swin = any(name.startswith("encoder.stages.") for name in tensors)
    size: list[int] = description.get("image_size") or []
    options = {**named.options, **description.get("options", {})}
    width = embedding.shape[0]
    if swin:
        network = SWIN_SIZES.get(width, "swin_unetr_base")
        if width not in SWIN_SIZES:
            options.setdefault("feature_size", width)
    else:
        network = "unetr"
        if not description:
            inner = _rows(tensors, "encoder.blocks.0.mlp.linear1.weight") or 0
            depth = len({block[1] for name in tensors if (block := BLOCK.match(name))})
            found = {"feature_size": first, "width": width, "depth": depth, "mlp_ratio": inner / width}
            options |= {key: value for key, value in found.items() if value and value != UNETR[key]}
        position = tensors.get("encoder.position")
        side = round((position.shape[1] if position is not None and position.ndim == 3 else 0) ** (1 / 3))
        if not size and side and position is not None and side**3 == position.shape[1]:
            size = [16 * side] * 3
    return Identity(
        str(description.get("network", network)),
        description.get("in_channels", embedding.shape[1] if swin else max(1, embedding.shape[1] // 16**3)),
        head,
        (size[0], size[1], size[2]) if len(size) == 3 else None,
        {name: value for name, value in options.items() if name not in OF_TRAINING},
    )


def _rows(tensors: Mapping[str, Tensor], name: str) -> int | None:
    """How many outputs a layer has; None where it is not there, or is no layer."""
    return tensors[name].shape[0] if name in tensors and tensors[name].ndim else None


def options_for(network: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `network` has; all of them where it is not in the table, which `build` says."""
    if network not in NETWORKS:
        return dict(options)
    parameters = known_options(NETWORKS[network])
    # a Swin UNETR without an option that its weights need is an error, which `build` raises
    if "merging" in parameters and "merging" in options:
        return dict(options)
    return {name: value for name, value in options.items() if name in parameters}
