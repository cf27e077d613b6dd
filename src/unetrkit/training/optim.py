"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from unetrkit.config import Settings

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


AFTER = 10**6  # the layer of what follows all others, such as a last norm


class OptimSettings(Settings):
    """The defaults are the published recipe's: AdamW, 1e-4, 1e-5, warm-up of 1 %, cosine to 0."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Rate = 1e-4
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    # "all" is what was published. "weights" spares biases, norms and position tables: of use with a decay a
    # thousand times stronger, as in pre-training; at 1e-5 the two cannot be told apart
    decay: Literal["all", "weights"] = "all"
    # of `lr` (and `lowest_lr`), by n, the patches of a step over those of one rank's batch: ranks times
    # `loop.accumulate`. linear: n times (https://arxiv.org/abs/1706.02677), sqrt: its root, usual for Adam
    scale: Literal["none", "linear", "sqrt"] = "none"
    # of sgd (Nesterov)
    momentum: Fraction = 0.99
    # of adam and adamw: how much of the mean gradient, and of its mean square, a step keeps
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    # steps; never more than a tenth of the run, so that a trial of a few steps trains too
    warmup: Annotated[int, Field(ge=0)] = 500
    # where cosine and poly end
    lowest_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    # for fine-tuning: the rate of the encoder's last layer, as a share of `lr`
    encoder_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    # and that of each layer before it, as a share of the next one's (https://arxiv.org/abs/2106.08254); 0.75
    # is usual for a pre-trained transformer
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    # steps for which the encoder stays as it began, while the decoder learns to read it
    frozen_encoder: Annotated[int, Field(ge=0)] = 0


def learning_rate(step: int, steps: int, settings: OptimSettings) -> float:
    """The rate of step 0, 1, …, `steps` - 1.

    The warm-up climbs in equal parts and its first step already learns: the published schedule gave the whole
    first epoch a rate of 0.

    >>> few = OptimSettings(lr=1.0, warmup=4)
    >>> [round(learning_rate(step, 40, few), 3) for step in (0, 1, 3, 4, 22, 39)]
    [0.25, 0.5, 1.0, 1.0, 0.5, 0.002]
    """
    warmup = min(settings.warmup, steps // 10)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "poly": (1 - progress) ** 0.9,
        "constant": 1.0,
    }[settings.schedule]
    return settings.lowest_lr + (settings.lr - settings.lowest_lr) * left


def scaled(settings: OptimSettings, n: int) -> OptimSettings:
    """With the rates of a step that is `n` times as large as one rank's batch.

    >>> [scaled(OptimSettings(lr=1e-4, scale=how), 4).lr for how in ("none", "linear", "sqrt")]
    [0.0001, 0.0004, 0.0002]
    """
    factor = n ** {"none": 0.0, "linear": 1.0, "sqrt": 0.5}[settings.scale]
    rates = {"lr": settings.lr * factor, "lowest_lr": settings.lowest_lr * factor}
    return settings.model_copy(update=rates)


def build_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of the parameters that have a gradient; `set_rate` goes before every step."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    layers = {name: layer for name in trained if (layer := _layer(name)) is not None}
    last = max((layer for layer in layers.values() if layer < AFTER), default=0)
    grouped: dict[tuple[float, float, int], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        decays = settings.decay == "all" or _is_weight(name, parameter)
        scale, frozen = 1.0, 0
        if name in layers:
            scale = settings.encoder_lr * settings.layer_decay ** max(0, last - layers[name])
            frozen = settings.frozen_encoder
        key = (settings.weight_decay if decays else 0.0, scale, frozen)
        grouped.setdefault(key, []).append(parameter)
    groups = [
        {"params": some, "weight_decay": decay, "scale": scale, "frozen": frozen}
        for (decay, scale, frozen), some in sorted(grouped.items(), key=lambda one: -one[0][0])
    ]
    # fused: one pass over all parameters, on a CPU too
    if settings.name == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=settings.momentum, nesterov=True, fused=True)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, settings.lr, settings.betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, step: int, rate: float) -> None:
    """The rate of each group at a step, given that of all: lower for an encoder's layers, 0 while frozen."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if step < group["frozen"] else rate * group["scale"]


def _layer(name: str) -> int | None:
    """Which layer of an encoder a parameter is in, 0 being what goes before the first; None for all else.

    >>> [_layer(f"network.{name}") for name in ("encoder.position", "encoder.blocks.4.norm1.bias", "head")]
    [0, 5, None]
    """
    if not (inside := re.match(r"(?:network\.)?encoder\.(.*)", name)):
        return None
    if found := re.match(r"(?:blocks|stages)\.(\d+)\.", inside[1]):
        return int(found[1]) + 1
    return 0 if inside[1].startswith(("embedding", "position", "stem")) else AFTER


def _is_weight(name: str, parameter: nn.Parameter) -> bool:
    """Of a convolution or a linear layer: norms and biases are vectors, tables are not called `weight`."""
    return parameter.ndim > 1 and name.rpartition(".")[2] == "weight"
