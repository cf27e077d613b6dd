"""The improved UNETR: each of its four changes alone, and against the study's committed network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.networks import NETWORKS, build
from unetrkit.networks.published import translate
from unetrkit.networks.unetr_fpn import Alignment, Fusion, Stem

CUBE = (96, 96, 96)
NONE = {"stem": False, "light_vit": False, "skip_alignment": False, "fpn_fusion": False}
ROWS = {
    "unetr_stem": {"stem": True},
    "unetr_light_vit": {"light_vit": True},
    "unetr_skip_alignment": {"skip_alignment": True},
    "unetr_fpn_fusion": {"fpn_fusion": True},
    "unetr_fpn": dict.fromkeys(NONE, True),
}


def count(name: str, **options: object) -> int:
    with torch.device("meta"):
        network = build(name, 1, 14, CUBE, {"feature_size": 32, **options})
    return sum(p.numel() for p in network.parameters())


# MONAI's transformer, in the committed network too, has two vectors in each block that nothing reads; and the
# study's stem has a bias for each of its 16 channels that the norm right after it takes away
def unread(depth: int, width: int) -> int:
    return depth * 2 * width + 16


def test_stem_and_fusion_have_the_committed_networks_parameters() -> None:
    assert count("unetr_fpn", **{**NONE, "stem": True, "fpn_fusion": True}) == 101_814_335 - unread(12, 768)
    # what they add: the stem's two convolutions, and the fusion's matrix less half of the last doubling
    stem = 27 * 16 + (16 + 1)
    fusion = (512 * 32 + 32) - 8 * 32 * 32
    assert stem + 16 + fusion == 101_814_335 - 101_805_646
    assert count("unetr_stem") - count("unetr") == stem
    assert count("unetr_fpn_fusion") - count("unetr") == fusion


def test_all_four_have_the_figures_parameters_and_those_of_the_alignment() -> None:
    figure = 39_437_631 - unread(8, 512)  # derived from the figure, where an alignment has no parameters
    assert count("unetr_fpn", skip_alignment=False) == figure
    alignment = 64**2 + 128**2 + 256**2  # a matrix at 1/2, 1/4 and 1/8
    assert count("unetr_fpn") == figure + alignment
    assert count("unetr_skip_alignment") - count("unetr") == alignment


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_study_has_its_changes_and_no_other(name: str) -> None:
    with torch.device("meta"):
        ours = build(name, 2, 3, CUBE, {}).state_dict()
        same = build("unetr_fpn", 2, 3, CUBE, {**NONE, **ROWS[name]}).state_dict()
        plain = build("unetr", 2, 3, CUBE, {"feature_size": 32}).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in same.items()}
    added = {
        "stem": ["encoder.stem.conv1.weight", "encoder.stem.conv2.bias", "encoder.stem.conv2.weight"],
        "skip_alignment": [f"skip.{n}.projection.weight" for n in ("1.5", "2.3", "3.1")],
        "fpn_fusion": ["decoder.fusion.reduction.bias", "decoder.fusion.reduction.weight"],
    }
    expected = {key for change in ROWS[name] for key in added.get(change, [])}
    assert set(ours) - set(plain) == expected
    gone = set(plain) - set(ours)  # nothing is renamed: weights of a UNETR fit wherever nothing has changed
    assert {key.split(".")[2] for key in gone} == (
        {"8", "9", "10", "11"} if "light_vit" in ROWS[name] else set()
    )
    assert all(key.startswith("encoder.blocks.") for key in gone)
    if "light_vit" not in ROWS[name]:
        other = {key for key in plain if plain[key].shape != ours[key].shape}
        assert other == ({"decoder.up.0.doubling.weight"} if "fpn_fusion" in ROWS[name] else set())


def test_without_a_change_it_is_unetr() -> None:
    outputs = []
    for name, options in (("unetr_fpn", NONE), ("unetr", {})):
        torch.manual_seed(0)
        network = build(name, 2, 3, (32, 32, 32), {"feature_size": 4, **options}).eval()
        with torch.no_grad():
            outputs.append(network(torch.linspace(0, 1, 2 * 32 * 17 * 20).reshape(1, 2, 32, 17, 20)))
    assert torch.equal(*outputs)


def test_light_vit_is_the_figures() -> None:
    with torch.device("meta"):
        encoder = build("unetr_light_vit", 1, 2, CUBE, {}).encoder
    assert (len(encoder.blocks), encoder.position.shape[2], encoder.size.tapped) == (8, 512, (2, 4, 6))
    assert (encoder.blocks[0].attention.heads, encoder.blocks[0].mlp.linear1.out_features) == (8, 2048)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(27.4e6, rel=2e-3)


class Committed(nn.Module):
    """What the study's committed network computes, from MONAI's parts, for any feature size."""

    def __init__(self, channels: int, classes: int, size: tuple[int, int, int], f: int) -> None:
        from monai.networks.blocks import UnetrUpBlock
        from monai.networks.nets import UNETR

        super().__init__()
        self.parts = UNETR(channels, classes, size, feature_size=f)
        self.parts.decoder2 = UnetrUpBlock(3, f, f, 3, 2, "instance", res_block=True)
        self.stem = nn.Sequential(
            nn.Conv3d(channels, 16, 3, padding=1),
            nn.InstanceNorm3d(16),
            nn.ReLU(),
            nn.Conv3d(16, channels, 1),
        )
        self.fuse = nn.Conv3d(16 * f, f, 1)

    def forward(self, image: Tensor) -> Tensor:
        p = self.parts
        last, hidden = p.vit(self.stem(image))
        half, quarter, eighth, bottom = (
            p.proj_feat(tokens) for tokens in (hidden[3], hidden[6], hidden[9], last)
        )
        full, half, quarter, eighth = (
            p.encoder1(image),
            p.encoder2(half),
            p.encoder3(quarter),
            p.encoder4(eighth),
        )
        x = p.decoder3(p.decoder4(p.decoder5(bottom, eighth), quarter), half)
        scales = [F.interpolate(skip, x.shape[2:], mode="trilinear") for skip in (half, quarter, eighth)]
        return p.out(p.decoder2(F.relu(self.fuse(torch.cat((x, *scales), 1))), full))


def test_stem_and_fusion_compute_what_the_committed_network_computes() -> None:
    torch.manual_seed(0)
    size = (32, 48, 32)
    theirs = Committed(2, 3, size, 8).eval()
    weights = translate(theirs.parts.state_dict())
    weights["encoder.stem.conv1.weight"] = theirs.stem[0].weight  # without its bias, see `unread`
    weights["encoder.stem.conv2.weight"] = theirs.stem[3].weight
    weights["encoder.stem.conv2.bias"] = theirs.stem[3].bias
    weights["decoder.fusion.reduction.weight"] = theirs.fuse.weight
    weights["decoder.fusion.reduction.bias"] = theirs.fuse.bias
    options = {"feature_size": 8, "light_vit": False, "skip_alignment": False}
    ours = build("unetr_fpn", 2, 3, size, options).eval()
    ours.load_state_dict(weights)
    x = torch.randn(2, 2, *size)
    with torch.no_grad():
        found, expected = ours(x), theirs(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(7, 5, 6), (8, 4, 12)])
def test_fusion_equals_resizing_joining_and_then_reducing(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    fusion = Fusion((4, 4, 8, 16), 3).double()
    maps = [
        torch.randn(2, channels, *(-(-extent // times) for extent in size), dtype=torch.double)
        for channels, times in ((4, 1), (4, 1), (8, 2), (16, 4))
    ]
    joined = torch.cat([F.interpolate(x, size, mode="trilinear") for x in maps], dim=1)
    matrix = fusion.reduction.weight[:, :, 0, 0, 0]
    expected = torch.einsum("oc,bcxyz->boxyz", matrix, joined) + fusion.reduction.bias[:, None, None, None]
    torch.testing.assert_close(fusion(*maps), expected.clamp(min=0))


@torch.no_grad()
def test_stem_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    stem = Stem(2).double()
    image = torch.randn(1, 2, 3, 4, 5, dtype=torch.double)
    padded = F.pad(image, (1, 1, 1, 1, 1, 1))
    wide = torch.zeros(16, 3, 4, 5, dtype=torch.double)
    for x, y, z in torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(5)).tolist():
        around = padded[0, :, x : x + 3, y : y + 3, z : z + 3]
        wide[:, x, y, z] = (stem.conv1.weight * around).sum(dim=(1, 2, 3, 4))
    for channel in wide:
        channel.copy_(((channel - channel.mean()) / (channel.var(correction=0) + 1e-5).sqrt()).clamp(min=0))
    matrix = stem.conv2.weight[:, :, 0, 0, 0]
    expected = torch.einsum("oc,cxyz->oxyz", matrix, wide) + stem.conv2.bias[:, None, None, None]
    torch.testing.assert_close(stem(image)[0], expected)


def test_alignment_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    alignment = Alignment(3).double()
    x = 5 + 4 * torch.randn(2, 3, 4, 3, 2, dtype=torch.double)
    matrix = alignment.projection.weight[:, :, 0, 0, 0]
    for case, found in zip(x, alignment(x), strict=True):
        for row, channel in zip(matrix, found, strict=True):
            mixed = sum(weight * part for weight, part in zip(row, case, strict=True))
            expected = (mixed - mixed.mean()) / (mixed.var(correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(channel, expected)


@pytest.mark.parametrize("name", ["unetr_skip_alignment", "unetr_light_vit"])
@torch.no_grad()
def test_an_aligned_skip_has_its_scale_whatever_the_tokens_have(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, 1, 2, (32, 32, 32), {"feature_size": 4, "light_vit": True})
    maps: list[Tensor] = []
    for skip in network.skip[1:4]:
        skip.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    x = torch.rand(1, 1, 32, 32, 48)
    network(x)
    network.skip[3][0].weight *= 100  # as if block 6 spoke 100 times louder
    network(x)
    before, after = maps[2], maps[5]
    if name == "unetr_skip_alignment":
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
        for aligned in maps:
            variance, mean = torch.var_mean(aligned, dim=(2, 3, 4), correction=0)
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
            torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-2)
    else:
        torch.testing.assert_close(after, 100 * before, rtol=1e-3, atol=1e-3)


def test_the_rows_are_in_the_table() -> None:
    assert set(ROWS) < set(NETWORKS)


@pytest.mark.parametrize(("feature_size", "classes"), [(1, 1), (5, 14), (16, 2)])
def test_fusion_has_any_feature_size_and_any_number_of_classes(feature_size: int, classes: int) -> None:
    network = build("unetr_fpn", 3, classes, (32, 32, 32), {"feature_size": feature_size})
    logits = network(torch.rand(1, 3, 18, 9, 33))
    assert logits.shape == (1, classes, 18, 9, 33)
    assert logits.isfinite().all()
