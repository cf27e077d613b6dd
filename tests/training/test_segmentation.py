"""The objective of supervised training: one scale, and several of them under deep supervision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unetrkit.networks import build
from unetrkit.training.losses import LossSettings, dice_cross_entropy
from unetrkit.training.segmentation import Segmentation, coarsened

SIZE = (9, 18, 13)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(0, 3, (2, *SIZE), generator=generator, dtype=torch.uint8)
    return {"image": torch.rand(2, 1, *SIZE, generator=generator), "label": label}


def objective(**options: object) -> Segmentation:
    torch.manual_seed(0)
    network = build("swin_unetr_tiny", 1, 3, (32, 32, 32), options)
    return Segmentation(network, LossSettings(cross_entropy_weight=0.7))


def at(place: int, step: int, size: int) -> int:
    return min(place * step + step // 2, size - 1)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_coarser_label_is_the_central_voxel_of_each_cube(level: int) -> None:
    label, step = batch()["label"], 2**level
    found = coarsened(label, level)
    assert found.shape[1:] == tuple(-(-size // step) for size in SIZE)
    for x, y, z in torch.cartesian_prod(*map(torch.arange, found.shape[1:])).tolist():
        places = [at(place, step, size) for place, size in zip((x, y, z), SIZE, strict=True)]
        assert torch.equal(found[:, x, y, z], label[:, *places])


def test_coarser_labels_are_the_nearest_ones_where_sizes_halve_evenly() -> None:
    label = torch.rand(2, 8, 16, 24, generator=torch.Generator().manual_seed(2))
    expected = F.interpolate(label[:, None], scale_factor=0.25, mode="nearest-exact")[:, 0]
    assert torch.equal(coarsened(label, 2), expected)


@pytest.mark.parametrize("levels", [0, 2])
def test_at_another_network_size_the_loss_is_that_of_the_interpolated_batch(levels: int) -> None:
    made, given = objective(deep_supervision=levels), batch()
    size = (18, 36, 26)
    image = F.interpolate(given["image"], size, mode="trilinear")
    label = given["label"].repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = made({"image": image, "label": label})
    found = Segmentation(made.network, made.loss, size)(given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["loss"], made(given)["loss"])


def test_deep_supervision_weighs_each_scale_half_as_much_as_the_finer_one() -> None:
    made, given = objective(deep_supervision=2), batch()
    found = made(given)
    fine, half, quarter = made.network.scales(given["image"])
    losses = [
        dice_cross_entropy(logits, coarsened(given["label"], level), made.loss)["loss"]
        for level, logits in enumerate((fine, half, quarter))
    ]
    torch.testing.assert_close(found["loss"], (4 * losses[0] + 2 * losses[1] + losses[2]) / 7)
    finest = dice_cross_entropy(fine, given["label"], made.loss)
    assert found.keys() == finest.keys()
    assert torch.equal(found["dice_loss"], finest["dice_loss"])
    assert torch.equal(found["cross_entropy"], finest["cross_entropy"])
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_without_coarser_scales_the_loss_is_the_finest_ones() -> None:
    made, given = objective(), batch()
    expected = dice_cross_entropy(made.network(given["image"]), given["label"], made.loss)
    assert made(given) == expected
