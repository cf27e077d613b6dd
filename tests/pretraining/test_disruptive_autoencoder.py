"""Restoring what was disrupted: the published losses from their formulas, gradients, seeds, odd sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unetrkit.networks import build
from unetrkit.networks.audit import match
from unetrkit.networks.published import rename
from unetrkit.pretraining import OBJECTIVES, disruptive_autoencoder
from unetrkit.pretraining.corruptions import draw_seed
from unetrkit.pretraining.disruptive_autoencoder import (
    DisruptiveAutoencoder,
    between_modalities,
    published_contrast,
)
from unetrkit.pretraining.masking import draw_hidden

OBJECTIVE = OBJECTIVES["disruptive_autoencoder"]
MASKINGS = ("channels", "tokens", "zeros")


def quick(**settings: Any) -> DisruptiveAutoencoder:
    torch.manual_seed(0)
    chosen = OBJECTIVE.settings(**settings)
    objective = OBJECTIVE.build(2, (32, 32, 32), {"feature_size": 12}, chosen)
    assert isinstance(objective, DisruptiveAutoencoder)
    return objective


def batch(*size: int, modality: tuple[int, ...] = (7, 2, 7)) -> dict[str, Tensor]:
    image = torch.rand(len(modality), 2, *size, generator=torch.Generator().manual_seed(1))
    return {"image": image, "case": torch.arange(len(modality)), "modality": torch.tensor(modality)}


def seeded(objective: DisruptiveAutoencoder, given: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return objective(given)


def test_the_published_form_equals_its_formulas() -> None:
    """Noise, nearest down and up, 60 % of the embedding's channels zero in the batch; L1 and contrast."""
    objective = quick(**OBJECTIVE.published).eval()
    given = batch(32, 64, 32)
    with torch.no_grad():
        found = seeded(objective, given)

        generator = torch.Generator().manual_seed(3)
        noise = torch.Generator().manual_seed(draw_seed(generator))
        zero = draw_hidden(generator, 1, 12, 0.6)[0]
        assert zero.sum() == 7
        noisy = given["image"] + 0.1**0.5 * torch.randn(given["image"].shape, generator=noise)
        coarse = F.interpolate(F.interpolate(noisy, (8, 16, 8)), (32, 64, 32))
        network = objective.network
        hook = network.encoder.embedding.register_forward_hook(
            lambda _, inputs, tokens: tokens * (~zero)[:, None, None, None]
        )
        restored, bottom = network(coarse), network.encoder(coarse)[4].flatten(1)
        hook.remove()
        rank = torch.from_numpy(np.unique(np.array([7, 2, 7]), return_inverse=True)[1])
        matrix = torch.einsum("id,jd->ij", bottom, bottom) * math.exp(0.07)
        contrast = (F.cross_entropy(matrix, rank) + F.cross_entropy(matrix.T, rank)) / 2
        reconstruction = F.l1_loss(restored, given["image"])
    torch.testing.assert_close(found["reconstruction"], reconstruction)
    torch.testing.assert_close(found["contrast"], contrast, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["loss"], reconstruction + 0.03 * contrast, rtol=1e-4, atol=1e-4)


def test_channels_are_masked_for_each_crop_alone() -> None:
    given, shown = batch(16, 16, 16), []
    for masked_alone in (True, False):
        objective = quick(masked_alone=masked_alone)
        stage = objective.network.encoder.stages[0]
        stage.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
        seeded(objective, given)
    alone, alike = ((tokens == 0).flatten(1, 3).all(1) for tokens in shown)  # b c
    assert alone.sum(1).tolist() == alike.sum(1).tolist() == [7, 7, 7]
    assert len(alike.unique(dim=0)) == 1 and len(alone.unique(dim=0)) == 3


@pytest.mark.parametrize("masking", ["tokens", "zeros"])
def test_what_a_cube_hides_reaches_neither_encoder_nor_skip(masking: str) -> None:
    objective = quick(masking=masking, block=8, coarsening=1, noise_variance=0).eval()
    given = batch(24, 17, 24)
    torch.manual_seed(3)
    with torch.no_grad():
        shown, masked, restored, _ = objective.pass_through(given["image"])
        assert masked.float().mean().item() == pytest.approx(0.6, abs=0.1)
        assert torch.equal(shown, given["image"].masked_fill(masked, 0))
        torch.manual_seed(3)
        other = objective.pass_through(given["image"].where(~masked, torch.rand(())))
    assert torch.equal(restored, other[2])


def test_tokens_stand_for_the_cubes_that_are_masked() -> None:
    objective, shown = quick(masking="tokens", block=4), []
    objective.network.encoder.stages[0].register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    torch.manual_seed(3)
    _, masked, _, _ = objective.pass_through(batch(12, 9, 8)["image"])
    is_token = (shown[0] == objective.mask_token).all(-1)
    assert torch.equal(is_token, F.max_pool3d(masked.float(), 2, ceil_mode=True)[:, 0] > 0)


def test_only_masked_voxels_count_where_asked() -> None:
    objective = quick(masking="zeros", block=8, restored="masked", contrast_weight=0).eval()
    given = batch(24, 17, 24)
    with torch.no_grad():
        found = seeded(objective, given)["loss"]
        torch.manual_seed(3)
        _, masked, restored, _ = objective.pass_through(given["image"])
    where = masked.expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(found, (restored - given["image"])[where].abs().mean())


@pytest.mark.parametrize("masking", MASKINGS)
def test_every_parameter_learns(masking: str) -> None:
    objective = quick(masking=masking)
    seeded(objective, batch(35, 18, 50))["loss"].backward()
    still = [key for key, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    assert ("mask_token" in dict(objective.named_parameters())) is (masking == "tokens")


@pytest.mark.parametrize("form", [{}, OBJECTIVE.published], ids=["default", "published"])
def test_one_crop_alone_learns_and_its_contrast_is_zero(form: dict[str, Any]) -> None:
    objective = quick(**form)
    found = seeded(objective, batch(35, 18, 50, modality=(1,)))
    found["loss"].backward()
    assert found["contrast"].item() == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("form", [{}, OBJECTIVE.published], ids=["default", "published"])
def test_the_seed_decides_and_bfloat16_is_finite(form: dict[str, Any]) -> None:
    objective, given = quick(**form), batch(32, 20, 33)
    found = seeded(objective, given)["loss"]
    assert torch.equal(found, seeded(objective, given)["loss"])
    assert not torch.equal(found, seeded(objective, given, seed=4)["loss"])
    with torch.autocast("cpu", torch.bfloat16):
        half = seeded(objective, given)
    half["loss"].backward()
    assert {part.dtype for part in half.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_pictures_are_those_of_the_step() -> None:
    objective, given = quick().eval(), batch(32, 20, 33)
    torch.manual_seed(3)
    with torch.no_grad():
        pictures = objective.restore(given)
        loss = seeded(objective, given)["reconstruction"]
    assert list(pictures) == ["original", "corrupted", "restored"]
    torch.testing.assert_close((pictures["restored"] - given["image"]).abs().mean(), loss)
    noise = pictures["corrupted"][:, :, ::4, ::4, ::4] - given["image"][:, :, ::4, ::4, ::4]
    assert noise.var().item() == pytest.approx(0.1, rel=0.1)


def test_all_but_the_head_moves_on() -> None:
    objective = quick(masking="tokens")
    network = build("swin_unetr_tiny", 2, 5, (32, 32, 32), {})
    state, audit = match(rename({f"module.{key}": w for key, w in objective.state_dict().items()}), network)
    assert audit.encoder_share == 1 and not audit.adapted
    assert {*network.state_dict()} - {*state} == {"decoder.head.weight", "decoder.head.bias"}
    assert "module.mask_token" in {entry.name for entry in audit.skipped}


def plain(features: Tensor, modality: list[int], temperature: float) -> float:
    """Khosla et al.'s formula, term by term."""
    vectors, terms = [f / f.norm() for f in features], []
    for i, anchor in enumerate(vectors):
        others = [j for j in range(len(vectors)) if j != i]
        positives = [j for j in others if modality[j] == modality[i]]
        total = sum(math.exp(float(anchor @ vectors[j]) / temperature) for j in others)
        if positives:
            likely = [math.exp(float(anchor @ vectors[j]) / temperature) / total for j in positives]
            terms.append(-sum(map(math.log, likely)) / len(positives))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("modality", [[0, 0, 1, 1], [0, 2, 0, 1, 0, 2], [5, 5, 3]])
def test_contrast_between_modalities_equals_a_plain_loop(modality: list[int]) -> None:
    torch.manual_seed(0)
    features = torch.randn(len(modality), 8)
    found = between_modalities(features, torch.tensor(modality), 0.2)
    assert found.item() == pytest.approx(plain(features.double(), modality, 0.2), rel=1e-5)


def test_contrast_draws_together_what_is_of_one_modality() -> None:
    one, other = torch.eye(2)
    modality = torch.tensor([0, 0, 1, 1])
    together = between_modalities(torch.stack([one, one, other, other]), modality, 0.07)
    apart = between_modalities(torch.stack([one, other, one, other]), modality, 0.07)
    assert together < 1e-5 and apart > 10


@pytest.mark.parametrize("modality", [[1], [1, 1, 1], [0, 1], [0, 0, 1]])
def test_contrast_and_its_gradient_are_finite_at_any_batch(modality: list[int]) -> None:
    torch.manual_seed(0)
    features = torch.randn(len(modality), 8, requires_grad=True)
    loss = between_modalities(features, torch.tensor(modality), 0.005)
    loss.backward()
    assert features.grad is not None and loss.isfinite() and features.grad.isfinite().all()
    told = modality == [0, 0, 1]  # otherwise there are no others, or none of one's own
    assert (loss.item() > 0) is told and bool(features.grad.abs().sum() > 0) is told


def test_published_contrast_wants_a_batch_of_one_modality_to_be_its_first_crop() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    alike = published_contrast(features, torch.tensor([4, 4]))
    other = published_contrast(features, torch.tensor([4, 6]))
    assert alike.item() == pytest.approx(
        0.5 + math.log(1 + math.exp(-math.exp(0.07))) - 0.5 + math.exp(0.07) / 2
    )
    assert other < alike


def test_crops_of_all_processes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(16, 16, 16, modality=(0, 1))
    monkeypatch.setattr(disruptive_autoencoder, "gathered", lambda x: torch.cat((x, x)))
    assert seeded(quick(), given)["contrast"] > 0  # two of each modality
    assert seeded(quick(gathered=False), given)["contrast"] == 0
