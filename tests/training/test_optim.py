"""Learning rates as numbers; which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from unetrkit.networks import build
from unetrkit.training.optim import OptimSettings, build_optimizer, learning_rate, set_rate


def test_warm_up_begins_above_zero_and_ends_at_the_rate() -> None:
    settings = OptimSettings(lr=2e-4, warmup=50)
    rates = [learning_rate(step, 5000, settings) for step in range(5000)]
    assert rates[0] == 2e-4 / 50
    assert rates[24] == pytest.approx(1e-4)
    assert rates[49] == rates[50] == 2e-4
    assert min(rates) > 0


@pytest.mark.parametrize("step", [50, 51, 1000, 2525, 4999])
def test_cosine_is_the_published_curve(step: int) -> None:
    found = learning_rate(step, 5000, OptimSettings(lr=1e-4, warmup=50))
    published = 0.5 * 1e-4 * (1 + math.cos(math.pi * (step - 50) / (5000 - 50)))
    assert found == pytest.approx(published, rel=1e-12)


def test_schedules_end_at_the_lowest_rate_and_constant_stays() -> None:
    def last(schedule: str) -> float:
        settings = OptimSettings(lr=1.0, lowest_lr=0.1, warmup=0, schedule=schedule)
        return learning_rate(10**6, 10**6, settings)

    assert (last("cosine"), last("poly"), last("constant")) == (0.1, 0.1, 1.0)
    assert learning_rate(50, 100, OptimSettings(lr=1.0, warmup=0, schedule="poly")) == pytest.approx(0.5**0.9)


def test_warm_up_takes_no_more_than_a_tenth_of_a_short_run() -> None:
    rates = [learning_rate(step, 20, OptimSettings(lr=1.0, warmup=500)) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert learning_rate(0, 1, OptimSettings(lr=1.0)) == 1.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 1)
        self.norm = nn.LayerNorm(3)
        self.position_table = nn.Parameter(torch.ones(5, 3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_decay_spares_what_is_not_a_weight_when_asked() -> None:
    def decays(decay: str) -> list[tuple[float, int]]:
        optimizer = build_optimizer(Block(), OptimSettings(weight_decay=0.1, decay=decay))
        return [(g["weight_decay"], sum(p.numel() for p in g["params"])) for g in optimizer.param_groups]

    assert decays("all") == [(0.1, 6 + 3 + 3 + 3 + 15)]
    assert decays("weights") == [(0.1, 6), (0.0, 3 + 3 + 3 + 15)]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_one_step_of_each_optimizer_is_torch_s_own(name: str) -> None:
    def descend(optimizer_of: object) -> torch.Tensor:
        weight = nn.Linear(3, 1, bias=False)
        nn.init.ones_(weight.weight)
        optimizer = optimizer_of(weight)  # type: ignore[operator]
        for _ in range(3):
            optimizer.zero_grad()
            weight(torch.tensor([[1.0, -2.0, 3.0]])).square().sum().backward()
            optimizer.step()
        return weight.weight.detach()

    plain = {
        "adamw": lambda m: torch.optim.AdamW(m.parameters(), 1e-2, (0.8, 0.9), weight_decay=0.1),
        "adam": lambda m: torch.optim.Adam(m.parameters(), 1e-2, (0.8, 0.9), weight_decay=0.1),
        "sgd": lambda m: torch.optim.SGD(m.parameters(), 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    }[name]
    settings = OptimSettings(name=name, lr=1e-2, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9))
    torch.testing.assert_close(descend(lambda m: build_optimizer(m, settings)), descend(plain))


def test_layers_of_an_encoder_learn_the_slower_the_earlier_and_not_at_all_while_frozen() -> None:
    network = build("unetr", 1, 2, (16, 16, 16), {"depth": 4, "width": 12, "heads": 2, "patch": 8})
    objective = nn.ModuleDict({"network": network})
    settings = OptimSettings(encoder_lr=0.5, layer_decay=0.5, frozen_encoder=3, weight_decay=0.1)
    optimizer = build_optimizer(objective, settings)
    names = {id(p): name for name, p in objective.named_parameters()}

    def rates(step: int) -> dict[str, float]:
        set_rate(optimizer, step, 0.8)
        return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    rate = rates(3)
    assert len(rate) == len(names)
    assert rate["network.encoder.norm.weight"] == rate["network.encoder.blocks.3.mlp.linear1.bias"] == 0.4
    assert rate["network.encoder.blocks.0.norm1.weight"] == pytest.approx(0.4 / 8)
    assert (
        rate["network.encoder.position"]
        == rate["network.encoder.embedding.weight"]
        == pytest.approx(0.4 / 16)
    )
    assert rate["network.skip.0.conv1.weight"] == rate["network.decoder.head.bias"] == 0.8
    frozen = rates(2)
    assert {value for name, value in frozen.items() if "encoder." in name} == {0.0}
    assert frozen["network.decoder.head.weight"] == 0.8


def test_a_frozen_encoder_keeps_its_weights_bit_for_bit_while_the_rest_learns() -> None:
    torch.manual_seed(0)
    objective = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    optimizer = build_optimizer(objective, OptimSettings(frozen_encoder=2, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    for step in range(3):
        set_rate(optimizer, step, 0.01)
        optimizer.zero_grad()
        objective["head"](objective["encoder"](torch.ones(1, 2))).square().sum().backward()
        optimizer.step()
        same = {name: torch.equal(p, before[name]) for name, p in objective.named_parameters()}
        assert same["encoder.weight"] == same["encoder.bias"] == (step < 2)
        assert not same["head.weight"]
