"""The contrastive loss between two views of each crop: NT-Xent, also over the crops of every process.

Chen et al. 2020, https://arxiv.org/abs/2002.05709
"""

from typing import Annotated, Any

import torch
import torch.distributed
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from unetrkit.config import Settings


class ContrastSettings(Settings):
    """What the views of a crop are told from."""

    # of the cosine similarities
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    # whether a crop is told from other crops of its own volume. They overlap, or show the same patient: as
    # negatives, as published, they teach to forget what they have in common
    same_volume_negatives: bool = False
    # whether the crops of all processes are told from each other; of the one or two crops that fit a GPU, as
    # published, there is next to nothing to be told from
    gathered: bool = True


def contrast(first: Tensor, second: Tensor, case: Tensor, settings: ContrastSettings) -> Tensor:
    """`nt_xent` between vectors (b, ...) of two views of crops from volumes of number `case`, (b,)."""
    if settings.gathered:
        first, second, case = gathered(first), gathered(second), gathered(case)
    groups = None if settings.same_volume_negatives else case
    return nt_xent(first, second, temperature=settings.temperature, groups=groups)


def nt_xent(first: Tensor, second: Tensor, *, temperature: float, groups: Tensor | None = None) -> Tensor:
    """How well each crop's other view is told from the views of other crops; a scalar, float32 or wider.

    first, second: (n, ...), one view each of n crops, flattened to vectors. Each of the 2n vectors is to find
    its other view among the 2n - 1 others by cosine similarity: the mean cross-entropy of
    similarity / `temperature`. Of one crop nothing can be told: 0.

    groups: (n,), where given crops of equal number are not told from each other. Two crops of one volume
    overlap or show the same patient: as negatives, as published, they teach to forget what is common to them.

    From logits, so that it and its gradient are finite at temperature 0.005, where exp(1 / temperature)
    overflows. Oracle: MONAI's ContrastiveLoss, at the temperatures that it bears.
    """
    count = len(first)
    wide = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        vectors = F.normalize(torch.cat((first, second)).flatten(1).to(wide))  # 2n c
        logits = vectors @ vectors.T / temperature  # 2n 2n
        itself = torch.eye(2 * count, dtype=torch.bool, device=first.device)
        hidden = itself
        if groups is not None:
            hidden = (groups[:, None] == groups).repeat(2, 2) & ~itself.roll(count, 1) | itself
        positive = torch.arange(2 * count, device=first.device).roll(count)
        return F.cross_entropy(logits.masked_fill(hidden, -torch.inf), positive)


def gathered(tensor: Tensor) -> Tensor:
    """(n, ...) of this process -> (processes x n, ...) of all of them, in the order of their ranks.

    The gradient is the sum over all processes' losses: the mean that data parallel training makes of it is
    the gradient of one process with the whole batch. Every process must call it, with equal shapes. Without
    gradients, as in validation, which one process may do alone, it is the tensor itself.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or not torch.is_grad_enabled():
        return tensor
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather is deprecated in torch 2.13, and what it names instead is not
    # in the torch before

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].clone()
        torch.distributed.all_reduce(whole)
        return whole.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
