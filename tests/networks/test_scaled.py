"""Interpolation between what is cut and what a network sees, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import nn

from unetrkit.networks.scaled import Scaled, scaled, scaled_label, seen_as

SIZES = [((8, 6, 4), (16, 12, 8)), ((8, 6, 4), (16, 9, 4)), ((9, 12, 8), (6, 8, 8))]


def places(size, target):
    """Where the centres of `target` voxels lie among `size` voxels of the same extent."""
    axes = [(np.arange(t) + 0.5) * n / t - 0.5 for n, t in zip(size, target, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_images_are_interpolated_as_by_scipy(size, target):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = scaled(image, target)
    for ours, one in zip(found.flatten(0, 1), image.flatten(0, 1), strict=True):
        expected = map_coordinates(one.numpy(), places(size, target), order=1, mode="nearest")
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)
    assert scaled(image, size) is image


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_a_label_is_that_of_the_nearest_voxel_and_none_is_invented(size, target):
    label = 6 * torch.randint(0, 2, (2, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = scaled_label(label, target)
    assert found.dtype == torch.uint8 and set(found.unique().tolist()) == {0, 6}
    for ours, one in zip(found, label, strict=True):
        # half way between two voxels torch takes the upper one
        nearest = np.floor(places(size, target) + 0.5 + 1e-9).astype(int)
        assert np.array_equal(ours.numpy(), one.numpy()[tuple(nearest)])
    # what the original did to the numbers: classes that are not there
    assert set(scaled(label[:, None].float(), target).round().unique().tolist()) - {0.0, 6.0}


def test_what_is_enlarged_and_its_label_stay_at_one_place():
    image = torch.zeros(1, 1, 8, 8, 8)
    image[..., 2:6, 3:5, 1:7] = 1
    large, label = scaled(image, (16, 24, 16))[0, 0], scaled_label(image[:, 0], (16, 24, 16))[0]
    for values in (large.numpy(), label.numpy()):
        middle = [(values * grid).sum() / values.sum() for grid in np.indices(values.shape)]
        np.testing.assert_allclose(middle, [7.5, 11.5, 7.5], atol=1e-5)


def test_a_network_sees_every_window_at_its_own_scale_and_answers_at_the_window_s_size():
    seen = []
    conv = nn.Conv3d(1, 2, 3, padding=1)
    conv.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network = seen_as(conv, (16, 16, 16), (32, 16, 24))
    assert isinstance(network, Scaled)
    for window in ((16, 16, 16), (24, 16, 8)):
        image = torch.rand(1, 1, *window)
        target = (window[0] * 2, window[1], window[2] * 3 // 2)
        with torch.no_grad():
            assert torch.equal(network(image), scaled(conv(scaled(image, target)), window))
        assert seen[-2].shape[2:] == target
    assert seen_as(conv, (16, 16, 16), (16, 16, 16)) is conv
