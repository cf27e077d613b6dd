"""An exponential moving average of the weights (Polyak and Juditsky, 1992), used in their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


def average_of(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of `module` whose `update_parameters(module)` moves it towards the present weights.

    The decay begins low, (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten.
    Buffers are copied. `.module` is the averaged module.
    """

    def update(averaged: Tensors, present: Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(averaged, present, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(module, multi_avg_fn=update)
