"""Dice plus cross-entropy against MONAI's and against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from unetrkit.training.losses import LossSettings, dice_cross_entropy

SWIN = LossSettings()
UNETR = LossSettings(squared=True, smooth_numerator=0, smooth_denominator=1e-6)


def _patch(seed: int = 0, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, classes, 6, 5, 4, generator=generator)
    label = torch.randint(0, classes - 1, (2, 6, 5, 4), generator=generator)  # the last class is absent
    return logits, label.to(torch.uint8)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("form", [SWIN, UNETR])
def test_loss_and_gradient_equal_monai(form: LossSettings, background: bool) -> None:
    from monai.losses import DiceCELoss

    changes = {"background": background, "dice_weight": 0.7, "cross_entropy_weight": 1.3}
    settings = form.model_copy(update=changes)
    oracle = DiceCELoss(
        include_background=background,
        to_onehot_y=True,
        softmax=True,
        squared_pred=settings.squared,
        smooth_nr=settings.smooth_numerator,
        smooth_dr=settings.smooth_denominator,
        lambda_dice=0.7,
        lambda_ce=1.3,
    )
    logits, label = _patch()
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = dice_cross_entropy(ours, label, settings)["loss"]
    expected = oracle(theirs, label[:, None].long())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_terms_of_a_uniform_prediction_are_what_paper_and_pencil_say(dtype: torch.dtype) -> None:
    label = torch.tensor([0, 0, 0, 1], dtype=dtype).reshape(1, 4, 1, 1)
    terms = dice_cross_entropy(torch.zeros(1, 2, 4, 1, 1), label, UNETR)
    assert terms["cross_entropy"].item() == pytest.approx(math.log(2), rel=1e-6)
    # p = 1/2: class 0: 2*1.5 / (4/4 + 3), class 1: 2*0.5 / (4/4 + 1)
    dice = 1 - (3 / 4 + 1 / 2) / 2
    assert terms["dice_loss"].item() == pytest.approx(dice, rel=1e-6)
    assert terms["loss"].item() == pytest.approx(dice + math.log(2), rel=1e-6)


def test_an_absent_class_costs_one_in_unetr_s_form_and_nothing_in_swin_unetr_s() -> None:
    label = torch.zeros(1, 4, 4, 4, dtype=torch.uint8)
    logits = torch.stack([torch.full((1, 4, 4, 4), 40.0), torch.full((1, 4, 4, 4), -40.0)], dim=1)
    assert dice_cross_entropy(logits, label, UNETR)["dice_loss"].item() == pytest.approx(0.5, abs=1e-6)
    assert dice_cross_entropy(logits, label, SWIN)["dice_loss"].item() == pytest.approx(0.0, abs=1e-6)


def test_loss_of_a_large_patch_keeps_its_precision() -> None:
    logits = torch.randn(1, 3, 96, 96, 96, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(1, 96, 96, 96)
    exact = torch.softmax(logits.double(), 1)
    dice = 1 - (2 * exact[:, 0].sum() + 1e-5) / (exact[:, 0].sum() + 96**3 + 1e-5)
    found = dice_cross_entropy(logits, label.to(torch.uint8), SWIN)["dice_loss"].item()
    absent = 2 - sum(1e-5 / (exact[:, c].sum() + 1e-5) for c in (1, 2))
    assert found == pytest.approx(((dice + absent) / 3).item(), rel=1e-7)


def test_loss_is_float32_under_autocast() -> None:
    logits, label = _patch()
    with torch.autocast("cpu", torch.bfloat16):
        half = dice_cross_entropy(logits, label, SWIN)
    assert half["loss"].dtype == torch.float32
    assert torch.equal(half["loss"], dice_cross_entropy(logits, label, SWIN)["loss"])
