"""Filling in what was hidden: the published loss from its formula, gradients, seeds, odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unetrkit.errors import UserError
from unetrkit.pretraining import OBJECTIVES
from unetrkit.pretraining.masked_autoencoder import MaskedAutoencoderPretraining

OBJECTIVE = OBJECTIVES["masked_autoencoder"]
SMALL = {"width": 48, "heads": 4, "depth": 4, "decoder_depth": 1, "decoder_width": 24, "decoder_heads": 2}
ENCODERS = ("unetr", "primus")


def quick(encoder: str = "unetr", **settings: Any) -> MaskedAutoencoderPretraining:
    torch.manual_seed(0)
    chosen = OBJECTIVE.settings(encoder=encoder, **settings)  # type: ignore[call-arg]
    objective = OBJECTIVE.build(2, (32, 32, 48), SMALL, chosen)
    assert isinstance(objective, MaskedAutoencoderPretraining)
    return objective


def batch(*size: int, count: int = 2) -> dict[str, Tensor]:
    image = torch.rand(count, 2, *size, generator=torch.Generator().manual_seed(1))
    return {"image": image, "case": torch.arange(count), "modality": torch.zeros(count, dtype=torch.long)}


def seeded(objective: MaskedAutoencoderPretraining, given: dict[str, Tensor], seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return objective(given)["loss"]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("published", [True, False])
def test_loss_equals_the_published_formula(encoder: str, published: bool) -> None:
    """Patches as rows: normalised by mean and unbiased variance, the mean over the hidden rows' own means."""
    objective = quick(encoder, **(OBJECTIVE.published if published else {}))
    given, p = batch(32, 32, 48), objective.network.patch
    found = seeded(objective, given)

    def rows(image: Tensor) -> Tensor:
        cubes = image.unfold(2, p, p).unfold(3, p, p).unfold(4, p, p)  # b c i j k p p p
        return cubes.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(4).flatten(1, 3)  # b n ppp*c

    torch.manual_seed(3)
    predicted, hidden = objective.predict(given["image"])
    mask = rows(hidden.float())[:, :, 0]
    assert mask.sum(1).tolist() == [0.75 * mask.shape[1]] * 2
    target = rows(given["image"])
    if published:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    per_patch = ((rows(predicted) - target) ** 2).mean(-1)
    torch.testing.assert_close(found, (per_patch * mask).sum() / mask.sum())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_is_hidden_says_nothing_and_what_is_seen_costs_nothing(encoder: str) -> None:
    objective = quick(encoder).eval()
    given = batch(32, 32, 48)
    torch.manual_seed(3)
    predicted, hidden = objective.predict(given["image"])
    torch.manual_seed(3)
    other = objective.predict(given["image"].where(~hidden, torch.rand(())))
    assert torch.equal(predicted, other[0]) and torch.equal(hidden, other[1])
    # against an image that is as predicted where it was hidden, and the same where it was seen
    perfect = given["image"].where(~hidden, predicted.detach())
    assert seeded(objective, {**given, "image": perfect}).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_learns_from_odd_sizes(encoder: str) -> None:
    objective = quick(encoder)
    seeded(objective, batch(35, 18, 50, count=1)).backward()
    still = [key for key, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_the_seed_decides_what_is_hidden() -> None:
    objective, given = quick(), batch(32, 32, 48)
    assert torch.equal(seeded(objective, given), seeded(objective, given))
    assert not torch.equal(seeded(objective, given), seeded(objective, given, seed=4))


def test_bfloat16_is_finite_and_the_loss_float32() -> None:
    objective = quick()
    with torch.autocast("cpu", torch.bfloat16):
        loss = seeded(objective, batch(32, 20, 48))
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("normalised_targets", [True, False])
def test_pictures_show_what_was_seen_as_it_was(normalised_targets: bool) -> None:
    objective, given = quick(normalised_targets=normalised_targets), batch(35, 18, 50)
    torch.manual_seed(3)
    with torch.no_grad():
        pictures = objective.restore(given)
        torch.manual_seed(3)
        predicted, hidden = objective.predict(given["image"])
    assert {name: picture.shape for name, picture in pictures.items()} == dict.fromkeys(
        ("original", "corrupted", "restored"), given["image"].shape
    )
    black = given["image"].amin((1, 2, 3, 4), keepdim=True)
    assert torch.equal(pictures["corrupted"], given["image"].where(~hidden, black))
    seen = pictures["restored"].where(~hidden, 0)
    assert torch.equal(seen, pictures["original"].where(~hidden, 0))
    filled = pictures["restored"].where(hidden, 0)
    assert torch.equal(filled, predicted.where(hidden, 0)) is not normalised_targets
    if normalised_targets:  # a network that knows nothing yet fills in each patch's mean
        assert (filled.sum() / hidden.sum() / 2).item() == pytest.approx(0.5, abs=0.05)


def test_what_is_seen_fills_in_what_is_hidden() -> None:
    """Crops of one value each, 1 or -1: who does not look loses 1."""
    objective, generator = quick(), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        value = torch.randint(2, (8, 1, 1, 1, 1), generator=generator) * 2.0 - 1
        given = {"image": value.expand(-1, 2, 16, 16, 48)}
        loss = seeded(objective, given, seed=step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[:5]) / 5 > 0.8 and sum(losses[-5:]) / 5 < 0.1


def test_crops_of_one_patch_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        OBJECTIVE.build(1, (16, 16, 16), SMALL, OBJECTIVE.settings())
    assert caught.value.message == "a crop of 16 x 16 x 16 voxels is one patch of 16³"
