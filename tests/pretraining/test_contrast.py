"""The contrastive loss against MONAI's and a plain loop; two processes against one with both batches."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.two_processes import run_two
from torch import Tensor, nn

from unetrkit.pretraining.contrast import ContrastSettings, contrast, gathered, nt_xent


def views(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 3, 7, generator=generator)
    return first, first + 0.5 * torch.randn(first.shape, generator=generator)


def by_loop(first: Tensor, second: Tensor, temperature: float, groups: list[int] | None = None) -> float:
    vectors = [*first.flatten(1).double(), *second.flatten(1).double()]
    count = len(first)
    groups = groups or list(range(count))
    losses = []
    for i, own in enumerate(vectors):
        positive = (i + count) % (2 * count)
        others = [k for k in range(2 * count) if k == positive or groups[k % count] != groups[i % count]]
        likeness = {k: math.exp(F.cosine_similarity(own, vectors[k], dim=0) / temperature) for k in others}
        losses.append(-math.log(likeness[positive] / sum(likeness.values())))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_equals_monai_and_a_plain_loop(count: int, temperature: float) -> None:
    from monai.losses import ContrastiveLoss

    first, second = views(count)
    found = nt_xent(first, second, temperature=temperature).item()
    assert found == pytest.approx(by_loop(first, second, temperature), rel=1e-5, abs=1e-6)
    theirs = ContrastiveLoss(temperature=temperature)(first.flatten(1), second.flatten(1))
    assert found == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)


def test_crops_of_one_volume_are_not_told_from_each_other() -> None:
    first, second = views(5)
    groups = [3, 1, 3, 0, 1]
    found = nt_xent(first, second, temperature=0.5, groups=torch.tensor(groups))
    assert found.item() == pytest.approx(by_loop(first, second, 0.5, groups), rel=1e-5, abs=1e-6)
    assert found < nt_xent(first, second, temperature=0.5)


@pytest.mark.parametrize("groups", [None, torch.tensor([4])])
def test_of_one_crop_there_is_nothing_to_tell(groups: Tensor | None) -> None:
    first, second = (x.requires_grad_() for x in views(1))
    loss = nt_xent(first, second, temperature=0.5, groups=groups)
    loss.backward()
    assert loss == 0 and torch.equal(first.grad, torch.zeros_like(first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_finite_at_temperature_0_005_under_autocast_too(dtype: torch.dtype) -> None:
    first, _ = views(4)
    first = first.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = nt_xent(first, -first.detach(), temperature=0.005)  # as unlike as can be
    loss.backward()
    assert loss.dtype == torch.float32
    # the likeness of a crop to its own other view is -1, to the most like crop about 0.4: 280 apart
    exact = by_loop_in_logarithms(first.detach(), -first.detach(), 0.005)
    assert loss.item() == pytest.approx(exact, rel=1e-5, abs=1e-6) and loss > 200
    assert first.grad.isfinite().all() and first.grad.abs().sum() > 0


def by_loop_in_logarithms(first: Tensor, second: Tensor, temperature: float) -> float:
    z = F.normalize(torch.cat((first, second)).double().flatten(1))
    logits = z @ z.T / temperature
    count = len(first)
    rows = []
    for i, row in enumerate(logits):
        others = torch.cat((row[:i], row[i + 1 :]))
        rows.append(others.logsumexp(0) - row[(i + count) % (2 * count)])
    return torch.stack(rows).mean().item()


def test_settings_choose_the_negatives() -> None:
    first, second = views(4)
    case = torch.tensor([0, 0, 1, 1])
    repaired = contrast(first, second, case, ContrastSettings())
    assert repaired == nt_xent(first, second, temperature=0.5, groups=case)
    published = contrast(first, second, case, ContrastSettings(same_volume_negatives=True, gathered=False))
    assert published == nt_xent(first, second, temperature=0.5)


# two processes: this file runs as their program


def test_two_processes_contrast_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    said = run_two("-W", "error::FutureWarning", __file__, tmp_path / "meeting")
    assert [text.split()[-1] for text in said] == ["equal", "equal"], "\n".join(said)


class Contrasting(nn.Module):
    """A mean over crops, local to each process, times a contrast over all: as in the objectives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(21, 6)

    def forward(self, first: Tensor, second: Tensor, case: Tensor) -> Tensor:
        one, other = (self.layer(x.flatten(1)) for x in (first, second))
        return (1 + contrast(one, other, case, ContrastSettings())) * one.square().mean()


def process(meeting: str, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    alone = Contrasting().double()
    shared = nn.parallel.DistributedDataParallel(Contrasting().double())
    shared.module.load_state_dict(alone.state_dict())
    first, second = (x.double() for x in views(6))
    case = torch.tensor([0, 0, 1, 2, 1, 1])  # volume 1 is on both
    own = slice(3 * rank, 3 * rank + 3)
    whole = gathered(first[own])
    assert torch.equal(whole, first)
    assert torch.equal(gathered(case[own]), case)
    shared(first[own], second[own], case[own]).backward()
    # one process with the whole batch
    one, other = (alone.layer(x.flatten(1)) for x in (first, second))
    loss = (1 + nt_xent(one, other, temperature=0.5, groups=case)) * one.square().mean()
    loss.backward()
    for found, expected in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-12)
    with torch.no_grad():  # as in validation, which one process may do alone
        if rank == 0:
            assert torch.equal(gathered(first[own]), first[own])
    print("equal", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    process(sys.argv[1], int(sys.argv[2]))
