"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from unetrkit.config import Settings

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class OptimSettings(Settings):
    """The defaults are the published recipe's: AdamW, 1e-4, 1e-5, warm-up of 1 %, cosine to 0."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: Rate = 1e-4
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    # "all" is what was published. "weights" spares biases, norms and position tables: of use with a decay a
    # thousand times stronger, as in pre-training; at 1e-5 the two cannot be told apart
    decay: Literal["all", "weights"] = "all"
    # of sgd (Nesterov)
    momentum: Fraction = 0.99
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    # steps; never more than a tenth of the run, so that a trial of a few steps trains too
    warmup: Annotated[int, Field(ge=0)] = 500
    # where cosine and poly end
    lowest_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


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


def build_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer of the parameters that have a gradient; its rate is set before every step."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    spared = {n for n, p in trained.items() if settings.decay == "weights" and not _is_weight(n, p)}
    groups = [
        {"params": [p for n, p in trained.items() if n not in spared], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in trained.items() if n in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # fused: one pass over all parameters, on a CPU too
    if settings.name == "sgd":
        return torch.optim.SGD(groups, settings.lr, momentum=settings.momentum, nesterov=True, fused=True)
    kind = torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam
    return kind(groups, settings.lr, fused=True)


def _is_weight(name: str, parameter: nn.Parameter) -> bool:
    """Of a convolution or a linear layer: norms and biases are vectors, tables are not called `weight`."""
    return parameter.ndim > 1 and name.rpartition(".")[2] == "weight"
