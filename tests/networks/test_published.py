"""Ours against MONAI 1.6.1 with the same weights; MONAI is the oracle, here only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tests.networks.published_files import published_merging, shaken
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.networks import build
from unetrkit.networks.audit import match
from unetrkit.networks.identify import identify
from unetrkit.networks.published import rename, translate


@pytest.fixture(scope="module", autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def swin(**options: object) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    return shaken(SwinUNETR(in_channels=2, out_channels=3, feature_size=12, **options))


def ours_like(theirs: nn.Module, name: str, size: tuple[int, int, int], **options: object) -> nn.Module:
    network = build(name, 2, 3, size, options)
    network.load_state_dict(translate(theirs.state_dict()))
    return network


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


# stage 1 has 16 to 48 tokens an axis, none a multiple of 7; stages 3 and 4 have windows smaller than 7
@pytest.mark.parametrize("size", [(64, 32, 96), (64, 64, 32)])
def test_swin_unetr_equals_monai(size: tuple[int, int, int]) -> None:
    theirs = swin().eval()
    ours = ours_like(theirs, "swin_unetr_tiny", size, relative_positions="sliced").eval()
    x = torch.randn(2, 2, *size)
    with torch.no_grad():
        assert_same(ours(x), theirs(x))


def test_second_version_of_swin_unetr_equals_monai() -> None:
    theirs = swin(use_v2=True).eval()
    options = {"relative_positions": "sliced", "residual_stages": True}
    ours = ours_like(theirs, "swin_unetr_tiny", (64, 32, 64), **options).eval()
    x = torch.randn(1, 2, 64, 32, 64)
    with torch.no_grad():
        assert_same(ours(x), theirs(x))


def test_published_merging_equals_monai_before_1_5() -> None:
    theirs = swin(downsample=published_merging()).eval()
    options = {"relative_positions": "sliced"}
    x = torch.randn(1, 2, 64, 32, 64)
    with torch.no_grad():
        old = theirs(x)
        ours = ours_like(theirs, "swin_unetr_tiny", (64, 32, 64), merging="published", **options).eval()
        assert_same(ours(x), old)
        other = ours_like(theirs, "swin_unetr_tiny", (64, 32, 64), merging="full", **options).eval()
        assert (other(x) - old).norm() > 0.01 * old.norm()


def small_unetr() -> nn.Module:
    from monai.networks.nets import UNETR

    options = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 4}
    return shaken(UNETR(2, 3, (32, 32, 32), **options))


SLICED = {"relative_positions": "sliced"}
TRAINED: dict[str, tuple[Callable[[], nn.Module], str, dict[str, object]]] = {
    "unetr": (small_unetr, "unetr", {"feature_size": 4, "width": 24, "heads": 4, "mlp_ratio": 2.0}),
    "swin": (swin, "swin_unetr_tiny", SLICED),
    "swin V2": (partial(swin, use_v2=True), "swin_unetr_tiny", SLICED | {"residual_stages": True}),
    "old merging": (
        lambda: swin(downsample=published_merging()),
        "swin_unetr_tiny",
        SLICED | {"merging": "published"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_gradients_equal_monai(kind: str) -> None:
    make, name, options = TRAINED[kind]
    size = (32, 32, 32) if name == "unetr" else (64, 32, 32)
    theirs = make().double()
    ours = ours_like(theirs, name, size, **options).double()
    x = torch.randn(1, 2, *size, dtype=torch.double)
    weight = torch.randn(1, 3, *size, dtype=torch.double)
    for network in (theirs, ours):
        (network(x) * weight).sum().backward()
    assert_same_gradients(ours, theirs)


def test_a_vit_autoencoder_of_another_depth_and_its_gradients_equal_monai() -> None:
    from monai.networks.nets import ViTAutoEnc

    size, small = (32, 32, 32), {"hidden_size": 24, "mlp_dim": 48, "num_layers": 5, "num_heads": 4}
    theirs = shaken(ViTAutoEnc(2, size, (16, 16, 16), **small)).double()
    named = rename(theirs.state_dict())
    ours = build("unetr", 2, 3, size, identify(named, {}).options | {"heads": 4}).double()
    ours.load_state_dict(match(named, ours)[0], strict=False)
    x = torch.randn(1, 2, *size, dtype=torch.double)
    weight = torch.randn(3, 24, 8, dtype=torch.double)
    _, hidden = theirs(x)
    expected = torch.cat([hidden[tap].transpose(1, 2) for tap in (1, 2, 3)])
    found = torch.cat([tokens.flatten(2) for tokens in ours.encoder(x)[:3]])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for answer in (found, expected):
        (answer * weight).sum().backward()
    assert_same_gradients(ours.encoder, theirs, "encoder.", untouched=("encoder.blocks.4.", "encoder.norm."))


def assert_same_gradients(
    ours: nn.Module, theirs: nn.Module, prefix: str = "", untouched: tuple[str, ...] = ()
) -> None:
    expected = translate({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        name = prefix + name
        if untouched and name.startswith(untouched):
            continue
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.parametrize("size", [(48, 64, 48), (34, 52, 18), (33, 41, 62)])
def test_swin_encoder_equals_monai_at_sizes_its_network_refuses(size: tuple[int, int, int]) -> None:
    theirs = swin().eval()
    ours = ours_like(theirs, "swin_unetr_tiny", size, relative_positions="sliced").eval()
    x = torch.randn(2, 2, *size)
    with torch.no_grad():
        for found, expected in zip(ours.encoder(x), theirs.swinViT(x), strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize("embedding", ["conv", "perceptron"])
def test_unetr_equals_monai(embedding: str) -> None:
    from monai.networks.nets import UNETR

    size = (32, 48, 64)
    theirs = UNETR(2, 3, size, proj_type=embedding).eval()
    ours = ours_like(theirs, "unetr", size, patch_embedding=embedding).eval()
    x = torch.randn(2, 2, *size)
    with torch.no_grad():
        assert_same(ours(x), theirs(x))


def test_translate_names_a_weight_that_is_not_one() -> None:
    with pytest.raises(UserError, match=r"`swinViT.layers1c.0.conv` is not"):
        translate({"swinViT.layers1c.0.conv": torch.zeros(1)})
