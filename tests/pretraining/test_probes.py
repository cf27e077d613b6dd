"""The linear probe: perfect where features tell the classes, chance where they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.data.small_store import small_store
from torch import Tensor, nn

from unetrkit.pretraining.probes import Probe

CPU = torch.device("cpu")


class Recalls(nn.Module):
    """An encoder that knows the label of each patch: the oracle of a probe."""

    def __init__(self, probe: Probe, wrong: float = 0.0) -> None:
        super().__init__()
        self.known = {float(b["image"].sum()): b["label"] for b in probe.fit + probe.measure}
        self.wrong = wrong

    def forward(self, image: Tensor) -> list[Tensor]:
        label = self.known[float(image.sum())].long()
        generator = torch.Generator().manual_seed(int(label.sum()))
        noise = torch.rand(label.shape, generator=generator) < self.wrong
        label = torch.where(noise, torch.randint(0, 5, label.shape, generator=generator), label)
        return [nn.functional.one_hot(label, 5).movedim(-1, 1).float()]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return Probe.of(small_store(tmp_path_factory.mktemp("probe")), (16, 16, 16), 4)


def test_features_that_tell_the_classes_give_a_dice_of_one(probe: Probe) -> None:
    assert probe.dice(Recalls(probe), CPU) == pytest.approx(1.0)


def test_worse_features_give_a_lower_dice(probe: Probe) -> None:
    some, many = (probe.dice(Recalls(probe, wrong), CPU) for wrong in (0.2, 0.9))
    assert 0.9 > some > many + 0.2


def test_features_of_nothing_tell_nothing(probe: Probe) -> None:
    assert probe.dice(lambda image: [torch.zeros(1, 2, 4, 4, 4)], CPU) < 0.3  # type: ignore[arg-type]


def test_the_same_patches_every_time(probe: Probe, tmp_path: Path) -> None:
    again = Probe.of(small_store(tmp_path), (16, 16, 16), 4)
    for one, other in zip(probe.fit + probe.measure, again.fit + again.measure, strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["label"], other["label"])
    assert not any(torch.equal(one["image"], other["image"]) for one in probe.fit for other in probe.measure)
