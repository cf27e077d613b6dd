"""What tells, without labels, whether an encoder learns or collapses.

Effective rank: Roy and Vetterli 2007; alignment and uniformity: Wang and Isola 2020,
https://arxiv.org/abs/2005.10242
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLLAPSED = 0.1  # of the spread of the same encoder before training


class Geometry(NamedTuple):
    """How the features of a set of crops lie, all as floats.

    * spread: their distance from their mean, as a share of their length; 0 where all are one point
    * effective_rank: of how many directions they make use, from 1 to the smaller of crops - 1 and channels
    * alignment: the mean squared distance of two views of a crop, features of length 1; the less the better
    * uniformity: log of the mean of exp(-2 d²) over pairs of crops, from 0 (one point) downwards
    """

    spread: float
    effective_rank: float
    alignment: float
    uniformity: float


def pooled(encoder: nn.Module, image: Tensor) -> Tensor:
    """Image (b, c, x, y, z) -> the mean of the encoder's last map, (b, channels), float32."""
    last: Tensor = encoder(image)[-1]
    return last.float().mean((2, 3, 4))


def geometry(first: Tensor, second: Tensor) -> Geometry:
    """Of the features (n, channels) of two views of each of n crops; n of 3 or more.

    >>> corners = torch.eye(4)
    >>> [round(value, 3) for value in geometry(corners, corners)]
    [0.866, 3.0, 0.0, -4.0]
    """
    centred = first - first.mean(0)
    spread = centred.norm(dim=1).mean() / first.norm(dim=1).mean().clamp_min(1e-12)
    one, other = F.normalize(first, dim=1), F.normalize(second, dim=1)
    alignment = (one - other).square().sum(1).mean()
    uniformity = torch.pdist(one).square().mul(-2).exp().mean().log()
    return Geometry(float(spread), effective_rank(centred), float(alignment), float(uniformity))


def effective_rank(centred: Tensor) -> float:
    """The exponential of the entropy of the singular values of (n, channels); 0 where there is nothing."""
    values = torch.linalg.svdvals(centred.double())
    total = values.sum()
    if total <= 0:
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def collapse(now: Geometry, before: Geometry) -> str:
    """Why the features are of no use any more, against those before training; "" where they are.

    To a point: all crops look alike. To a line: their features differ in one direction only.
    """
    if now.spread < COLLAPSED * before.spread:
        return f"all crops look alike to it: a spread of {now.spread:.2g}, at first {before.spread:.2g}"
    if now.effective_rank < 1.2 and before.effective_rank > 2:
        rank = f"an effective rank of {now.effective_rank:.2f}, at first {before.effective_rank:.2f}"
        return f"crops differ in one direction only: {rank}"
    return ""
