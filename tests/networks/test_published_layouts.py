"""Every published layout loads whole, and the network then computes what MONAI's does with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tests.networks import published_files as files
from torch import Tensor, nn

from unetrkit.networks import build
from unetrkit.networks.audit import Audit, match
from unetrkit.networks.identify import identify
from unetrkit.networks.published import rename
from unetrkit.networks.weights_file import read_weights

SIZE = (32, 48, 32)
STATE = dict[str, Tensor]


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    torch.manual_seed(0)
    return files.swin()


@pytest.fixture(scope="module")
def unetr() -> nn.Module:
    from monai.networks.nets import UNETR

    torch.manual_seed(0)
    return files.shaken(UNETR(1, 14, SIZE, proj_type="conv"))


@pytest.fixture(scope="module")
def autoencoder() -> nn.Module:
    from monai.networks.nets import ViTAutoEnc

    torch.manual_seed(0)
    return files.shaken(ViTAutoEnc(1, (48, 48, 48), (16, 16, 16), proj_type="conv"))


def through_a_file(
    path: Path, content: object, network: str, size: tuple[int, ...] = SIZE, **more: object
) -> tuple[nn.Module, Audit]:
    """Saved, opened and loaded into a network of ours that starts elsewhere."""
    torch.save(content, path)
    named = rename(read_weights(path).tensors)
    torch.manual_seed(1)
    ours = build(network, 1, 14, size, identify(named, {}).options | more).eval()
    state, audit = match(named, ours)
    ours.load_state_dict(state, strict=False)
    return ours, audit


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def reasons(audit: Audit) -> dict[str, str]:
    return {entry.name: entry.note for entry in audit.skipped}


@torch.no_grad()
def test_a_whole_swin_unetr(swin: nn.Module, tmp_path: Path) -> None:
    ours, audit = through_a_file(
        tmp_path / "model.pt", files.checkpoint(swin.state_dict()), "swin_unetr_tiny"
    )
    x = torch.randn(1, 1, 64, 32, 64)
    assert_same(ours(x), swin(x))
    assert (audit.layout, audit.adapted, audit.missing) == ("A", (), ())
    assert audit.encoder_share == audit.decoder_share == 1
    assert len(audit.loaded) == len(list(swin.parameters()))
    assert set(reasons(audit).values()) == {"is computed, not learned"}
    assert audit.options == {"merging": "published", "relative_positions": "sliced"}


ENCODERS: dict[str, tuple[str, Callable[[STATE], object], set[str]]] = {
    "model_swinvit": ("B", files.layout_b, {"rotation_head", "contrastive_head", "norm"}),
    "SSLHead": ("C", files.layout_c, {"rotation_head", "contrastive_head", "conv"}),
    "old SSLHead": (
        "C",
        lambda s: files.layout_c(s, "swin_vit."),
        {"rotation_head", "contrastive_head", "conv"},
    ),
}


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_every_tensor_of_a_pretrained_swin_arrives(kind: str, swin: nn.Module, tmp_path: Path) -> None:
    layout, make, heads = ENCODERS[kind]
    ours, audit = through_a_file(tmp_path / "model.pt", make(swin.state_dict()), "swin_unetr_tiny")
    x = torch.randn(2, 1, 32, 64, 32)
    for found, expected in zip(ours.encoder(x), swin.swinViT(x), strict=True):
        assert_same(found, expected)
    theirs = dict(swin.swinViT.named_parameters())
    assert (audit.layout, len(audit.loaded), audit.encoder_share) == (layout, len(theirs), 1)
    assert audit.encoder == (sum(p.numel() for p in theirs.values()),) * 2
    assert audit.decoder_share == 0 and all(not e.name.startswith("encoder.") for e in audit.missing)
    left = {name.removeprefix("module.").partition(".")[0] for name in reasons(audit)}
    assert left >= heads and not any("no name" in why for why in reasons(audit).values())


@torch.no_grad()
def test_the_original_loader_s_way_loads_nothing(swin: nn.Module) -> None:
    """What `--use_ssl_pretrained` did: strip, and load what happens to match. Ours must not be able to."""
    inner = files.layout_b(swin.state_dict())["state_dict"]
    stripped = {name.removeprefix("module."): tensor for name, tensor in inner.items()}
    fresh = files.swin()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    fresh.load_state_dict(stripped, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    named = rename(stripped)
    assert len(named.tensors) == len(list(swin.swinViT.parameters()))


@torch.no_grad()
def test_a_disruptive_autoencoder_brings_its_decoder(swin: nn.Module, tmp_path: Path) -> None:
    ours, audit = through_a_file(tmp_path / "ssl.pth", files.layout_d(swin.state_dict()), "swin_unetr_tiny")
    x = torch.randn(1, 1, 32, 64, 32)
    assert_same(ours(x), swin(x))
    assert (audit.layout, audit.encoder_share, audit.decoder_share, audit.missing) == ("D", 1, 1, ())
    assert "shortcut" in reasons(audit)["encoder10.layer.conv3.conv.weight"]
    assert "pre-training" in reasons(audit)["encoder.mask_token"]


UNETRS: dict[str, Callable[[STATE], Mapping[str, object]]] = {
    "as it is": dict,
    "of MONAI 0.7": files.old_unetr,
    "of MONAI 1.4, in a container": lambda state: files.checkpoint(files.unetr_of_1_4(state)),
}


@pytest.mark.parametrize("kind", UNETRS)
@torch.no_grad()
def test_a_unetr(kind: str, unetr: nn.Module, tmp_path: Path) -> None:
    ours, audit = through_a_file(tmp_path / "unetr.pth", UNETRS[kind](unetr.state_dict()), "unetr")
    x = torch.randn(1, 1, *SIZE)
    assert_same(ours(x), unetr(x))
    assert (audit.layout, audit.encoder_share, audit.decoder_share) == ("E", 1, 1)
    assert not audit.adapted and not audit.missing and audit.options == {"patch_embedding": "conv"}
    assert not any("no name" in why or "no part" in why for why in reasons(audit).values())


@torch.no_grad()
def test_a_perceptron_is_the_same_map(tmp_path: Path) -> None:
    from monai.networks.nets import UNETR

    theirs = files.shaken(UNETR(1, 14, SIZE, proj_type="perceptron"))
    ours, audit = through_a_file(tmp_path / "unetr.pth", theirs.state_dict(), "unetr")
    x = torch.randn(1, 1, *SIZE)
    assert_same(ours(x), theirs(x))
    assert audit.options == {"patch_embedding": "perceptron"}
    # … of a network that says "conv" too
    state, _ = match(
        rename(theirs.state_dict()), other := build("unetr", 1, 14, SIZE, {"patch_embedding": "conv"})
    )
    other.eval().load_state_dict(state)
    assert_same(other(x), theirs(x))


@torch.no_grad()
def test_a_vit_autoencoder(autoencoder: nn.Module, tmp_path: Path) -> None:
    content = files.checkpoint(
        {f"module.{n}": t for n, t in autoencoder.state_dict().items()}, max_accuracy=0.1
    )
    ours, audit = through_a_file(tmp_path / "best.pt", content, "unetr", (48, 48, 48))
    x = torch.randn(1, 1, 48, 48, 48)
    _, hidden = autoencoder(x)
    expected = [hidden[i] for i in (3, 6, 9)]
    for found, tokens in zip(ours.encoder(x), expected, strict=False):
        assert_same(found.flatten(2).transpose(1, 2), tokens)
    assert (audit.layout, audit.encoder_share) == ("F", 1)
    assert "head" in reasons(audit)["module.conv3d_transpose.weight"]


def test_the_residual_convolutions_of_v2_have_names(tmp_path: Path) -> None:
    named = rename(files.swin(use_v2=True).state_dict())
    convolutions = {f"encoder.stages.{s}.conv.conv{c}.weight" for s in range(4) for c in (1, 2)}
    assert {name for name in named.tensors if ".conv.conv" in name} == convolutions
    assert named.options["residual_stages"] is True
    assert {entry.note for entry in named.left} == {"is computed, not learned"}


@torch.no_grad()
def test_a_swin_unetr_of_the_second_version_and_another_feature_size(tmp_path: Path) -> None:
    theirs = files.swin(feature_size=24, use_v2=True)
    ours, audit = through_a_file(tmp_path / "v2.pt", theirs.state_dict(), "swin_unetr_small")
    x = torch.randn(1, 1, 64, 32, 32)
    assert_same(ours(x), theirs(x))
    assert (audit.encoder_share, audit.decoder_share, audit.missing) == (1, 1, ())


@torch.no_grad()
def test_a_unetr_of_another_width_and_its_own_heads(tmp_path: Path) -> None:
    from monai.networks.nets import UNETR

    sizes = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 36, "num_heads": 4}
    theirs = files.shaken(UNETR(1, 14, SIZE, **sizes))
    ours, audit = through_a_file(tmp_path / "unetr.pth", theirs.state_dict(), "unetr", heads=4)
    x = torch.randn(1, 1, *SIZE)
    assert_same(ours(x), theirs(x))
    assert (audit.encoder_share, audit.decoder_share, audit.missing) == (1, 1, ())
