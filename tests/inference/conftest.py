"""Models small enough to know by heart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unetrkit import networks
from unetrkit.data.plan import Intensity, LabelClass, Plan
from unetrkit.inference.model import Model, save_model

IDS = (0, 7, 300)  # not contiguous, and beyond uint8


class Thresholds(nn.Module):
    """Class 1 above 0.4 and class 2 above 0.8 of the first channel, wherever it is."""

    def __init__(self, in_channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.bounds = nn.Parameter(torch.tensor([0.4, 0.8]))

    def forward(self, windows: Tensor) -> Tensor:
        value = windows[:, :1]
        return torch.cat([torch.zeros_like(value), value - self.bounds[0], 2 * value - self.bounds.sum()], 1)


def tiny(in_channels: int, classes: int, image_size: tuple[int, int, int], *, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv3d(in_channels, width, 5, padding=2), nn.Tanh(), nn.Conv3d(width, classes, 1))


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.NETWORKS, "tiny", tiny)
    monkeypatch.setitem(networks.NETWORKS, "thresholds", lambda c, k, image_size: Thresholds(c, k))


@pytest.fixture
def plan() -> Plan:
    return plan_of()


def plan_of(spacing: tuple[float, float, float] = (1.0, 1.0, 1.0), channels: int = 1) -> Plan:
    return Plan(
        dataset="small",
        channels=tuple("CT PET".split()[:channels]),
        classes=tuple(LabelClass(id=i, name=f"organ {i}") for i in IDS),
        spacing=spacing,
        intensity=(Intensity(kind="window", lower=0, upper=1000),) * channels,
        patch_size=(16, 16, 16),
    )


@pytest.fixture
def new_plan() -> Callable[..., Plan]:
    return plan_of


@pytest.fixture
def model(plan: Plan) -> Model:
    """A random network that looks 2 voxels around each."""
    torch.manual_seed(4)
    network = tiny(1, 3, (16, 16, 16)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():  # no class wins everywhere
        network[0].weight -= network[0].weight.mean((2, 3, 4), keepdim=True)
        network[2].bias.zero_()
    return Model(network, plan, {"image_size": [16, 16, 16], "origin": {}})


@pytest.fixture
def thresholds(plan: Plan) -> Model:
    return Model(Thresholds(), plan, {"image_size": [16, 16, 16], "origin": {}})


@pytest.fixture
def save(plan: Plan) -> Callable[..., Path]:
    """Saves a model folder of thresholds and returns it."""

    def saved(folder: Path, plan: Plan = plan, **origin: object) -> Path:
        network = Thresholds()
        save_model(
            folder, network, name="thresholds", image_size=(16, 16, 16), options={}, plan=plan, origin=origin
        )
        return folder

    return saved


@pytest.fixture
def blocks() -> np.ndarray:
    """An image (x, y, z), int16: one block of 600 and one of 950, classes 1 and 2 of `Thresholds`."""
    image = np.zeros((26, 22, 30), np.int16)
    image[3:20, 4:18, 5:25] = 100
    image[5:9, 6:12, 7:20] = 600
    image[12:18, 6:12, 9:22] = 950
    return image
