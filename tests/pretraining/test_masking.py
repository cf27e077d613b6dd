"""What is hidden, exactly, and patches normalised against a plain loop."""

from __future__ import annotations

import pytest
import torch

from unetrkit.pretraining.masking import draw_hidden, in_voxels, normalised


@pytest.mark.parametrize(
    ("parts", "share", "hidden"), [(216, 0.75, 162), (48, 0.6, 28), (7, 0.6, 4), (2, 0.1, 1), (1, 0.75, 0)]
)
def test_each_row_hides_exactly_its_share(parts: int, share: float, hidden: int) -> None:
    drawn = draw_hidden(torch.Generator().manual_seed(0), 5, parts, share)
    assert drawn.sum(1).tolist() == [hidden] * 5


def test_rows_differ_and_every_part_is_hidden_as_often() -> None:
    drawn = draw_hidden(torch.Generator().manual_seed(0), 4000, 10, 0.6).float()
    torch.testing.assert_close(drawn.mean(0), torch.full((10,), 0.6), rtol=0, atol=0.03)
    assert not torch.equal(drawn[0], drawn[1])
    again = draw_hidden(torch.Generator().manual_seed(0), 4000, 10, 0.6).float()
    assert torch.equal(drawn, again)


def test_patches_in_voxels_and_normalised_equal_a_plain_loop() -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 2, 5, 4, 7, dtype=torch.double) + 3
    found, mean, deviation = normalised(image, 4)
    patches = torch.arange(8.0).view(2, 1, 2, 1, 2)
    spread = in_voxels(patches, 4, (5, 4, 7))
    for x, z in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = (slice(None), slice(None), slice(4 * x, 4 * x + 4), slice(0, 4), slice(4 * z, 4 * z + 4))
        for number in range(2):
            assert spread[place][number].unique().tolist() == [patches[number, 0, x, 0, z]]
            part = image[place][number]
            torch.testing.assert_close(
                found[place][number], (part - part.mean()) / (part.var() + 1e-6).sqrt()
            )
    torch.testing.assert_close(found * deviation + mean, image)


def test_a_constant_patch_and_a_single_voxel_stay_finite() -> None:
    assert normalised(torch.full((1, 1, 5, 4, 4), 0.7), 4)[0].abs().max() < 1e-3
