"""Weights of another shape: what fits is what it means, what does not is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.networks import published_files as files
from torch import Tensor, nn

from unetrkit.errors import UserError, many
from unetrkit.networks import build
from unetrkit.networks.adapt import change_channels, resize_bias_table, resize_positions
from unetrkit.networks.audit import Audit, match
from unetrkit.networks.identify import identify
from unetrkit.networks.published import rename


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def loaded(state: dict[str, Tensor], ours: nn.Module, source: tuple[int, ...] | None = None) -> Audit:
    fitting, audit = match(rename(state), ours, source)
    ours.eval().load_state_dict(fitting, strict=False)
    return audit


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3)])
@torch.no_grad()
def test_other_input_channels_answer_the_same_image_alike(before: int, after: int) -> None:
    theirs = files.swin(before, 3)
    ours = build("swin_unetr_tiny", after, 3, (32, 32, 32), rename(theirs.state_dict()).options)
    audit = loaded(theirs.state_dict(), ours)
    x = torch.randn(1, 1, 64, 32, 32)
    found, expected = ours(x.repeat(1, after, 1, 1, 1)), theirs(x.repeat(1, before, 1, 1, 1))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    names = {"encoder.embedding.weight", "skip.0.conv1.weight", "skip.0.shortcut.weight"}
    assert {entry.name for entry in audit.adapted} == names
    assert {entry.note for entry in audit.adapted} == {f"from {many(before, 'input channel')} to {after}"}
    assert audit.encoder_share == audit.decoder_share == 1


@torch.no_grad()
def test_other_input_channels_of_a_linear_embedding() -> None:
    weight = torch.randn(5, 2 * 16**3, dtype=torch.double)
    image = torch.randn(16**3, dtype=torch.double)
    answer = weight @ image.repeat(2)
    torch.testing.assert_close(change_channels(weight, 2, 3) @ image.repeat(3), answer)


@pytest.fixture(scope="module")
def vit() -> dict[str, Tensor]:
    """Weights of a UNETR but for its position embeddings."""
    torch.manual_seed(0)
    return build("unetr", 1, 2, (16, 16, 16), {}).state_dict()


def unetr(vit: dict[str, Tensor], size: tuple[int, int, int]) -> nn.Module:
    """With these weights and positions of its own; made without drawing 88 million random numbers."""
    with torch.device("meta"):
        network = build("unetr", 1, 2, size, {}).eval()
    position = {"encoder.position": torch.randn(network.encoder.position.shape)}
    network.load_state_dict(vit | position, assign=True)
    return network


@pytest.mark.parametrize("size", [(64, 48, 32), (32, 32, 32), (64, 32, 16)])
@torch.no_grad()
def test_positions_for_another_size_are_what_the_network_would_take(
    vit: dict[str, Tensor], size: tuple[int, int, int]
) -> None:
    trained, ours = unetr(vit, (48, 48, 48)), unetr(vit, size)
    audit = loaded(trained.state_dict(), ours)
    x = torch.randn(1, 1, *size)
    torch.testing.assert_close(ours(x), trained(x))
    grid = "x".join(str(extent // 16) for extent in size)
    assert [(e.name, e.note) for e in audit.adapted] == [
        ("encoder.position", f"interpolated from 3x3x3 to {grid} patches")
    ]


@torch.no_grad()
def test_as_many_positions_on_another_grid_are_not_taken_as_they_are(vit: dict[str, Tensor]) -> None:
    trained, ours = unetr(vit, (32, 32, 32)), unetr(vit, (128, 16, 16))
    assert [entry.name for entry in loaded(trained.state_dict(), ours).adapted] == ["encoder.position"]
    x = torch.randn(1, 1, 128, 16, 16)
    torch.testing.assert_close(ours(x), trained(x))
    # where the file's own grid is named it is that one
    assert not loaded(trained.state_dict(), ours, (8, 1, 1)).adapted


@torch.no_grad()
def test_a_grid_that_is_no_cube_has_to_be_named(vit: dict[str, Tensor]) -> None:
    trained, ours = unetr(vit, (64, 48, 32)), unetr(vit, (48, 48, 48))
    with pytest.raises(UserError, match="24 position embeddings, and the file does not say") as no:
        match(rename(trained.state_dict()), ours)
    assert "init_size=" in no.value.hint
    loaded(trained.state_dict(), ours, (4, 3, 2))
    x = torch.randn(1, 1, 48, 48, 48)
    torch.testing.assert_close(ours(x), trained(x))
    with pytest.raises(UserError, match="24 position embeddings do not lie on a grid of 5x5x5"):
        match(rename(trained.state_dict()), ours, (5, 5, 5))


def test_positions_follow_a_ramp() -> None:
    ramp = torch.arange(4.0).reshape(4, 1, 1).expand(4, 4, 4).reshape(1, 64, 1)
    found = resize_positions(ramp, (4, 4, 4), (8, 4, 2)).reshape(8, 4, 2)
    # the middle of a half patch is a quarter of a patch away from the middle of the patch
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    torch.testing.assert_close(found, expected[:, None, None].expand(8, 4, 2))


def test_bias_tables_of_another_window() -> None:
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 9)] * 3, indexing="ij")  # of a window of 5
    table = torch.stack([axes[0] + 2 * axes[1], axes[2]], -1).reshape(-1, 2)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, 13)] * 3, indexing="ij")
    expected = torch.stack([axes[0] + 2 * axes[1], axes[2]], -1).reshape(-1, 2)
    torch.testing.assert_close(resize_bias_table(table, (13**3, 2)), expected)
    state = build("swin_unetr_tiny", 1, 2, (32, 32, 32), {}).state_dict()
    name = "encoder.stages.0.blocks.0.attention.bias"
    full = state[name]
    cube = full.t().reshape(1, 3, 13, 13, 13)
    state[name] = F.interpolate(cube, (9, 9, 9), mode="trilinear", align_corners=True).reshape(3, 729).t()
    fitting, audit = match(rename(state), build("swin_unetr_tiny", 1, 2, (32, 32, 32), {}))
    assert fitting[name].shape == full.shape and [e.name for e in audit.adapted] == [name]
    state[name] = torch.zeros(2197, 5)  # other heads
    fitting, audit = match(rename(state), build("swin_unetr_tiny", 1, 2, (32, 32, 32), {}))
    assert name not in fitting and name in {e.name for e in audit.missing}


def test_other_classes_drop_the_head_and_nothing_else() -> None:
    theirs = files.swin(1, 14)
    ours = build("swin_unetr_tiny", 1, 3, (32, 32, 32), rename(theirs.state_dict()).options)
    audit = loaded(theirs.state_dict(), ours)
    assert {e.name: e.note for e in audit.skipped if "head" in e.note or "class" in e.note} == {
        "out.conv.conv.weight": "is for 14 classes, not 3",
        "out.conv.conv.bias": "is for 14 classes, not 3",
    }
    assert {entry.name for entry in audit.missing} == {"decoder.head.weight", "decoder.head.bias"}
    head = sum(p.numel() for p in ours.decoder.head.parameters())
    assert audit.decoder[1] - audit.decoder[0] == head and audit.encoder_share == 1


def test_another_feature_size_brings_nothing() -> None:
    state = build("swin_unetr_small", 1, 2, (32, 32, 32), {}).state_dict()
    ours = build("swin_unetr_tiny", 1, 2, (32, 32, 32), {})
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    fitting, audit = match(rename(state), ours)
    assert audit.encoder_share < 0.3 and fitting  # bias tables and the head do not depend on it
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_the_table_and_json_tell_every_tensor_once() -> None:
    theirs = files.swin(2, 14)
    _, audit = match(rename(theirs.state_dict()), ours := build("swin_unetr_tiny", 1, 3, (32, 32, 32), {}))
    told = audit.to_dict()
    network = [entry["name"] for word in ("loaded", "adapted", "missing") for entry in told[word]]
    assert sorted(network) == sorted(ours.state_dict())
    assert len(told["loaded"]) + len(told["adapted"]) + len(told["skipped"]) == len(theirs.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert all(shapes[e.name] == e.shape for e in (*audit.loaded, *audit.adapted, *audit.missing))
    assert all(entry.shape and entry.note for entry in audit.skipped)
    table = audit.table()
    assert "encoder   100.0 % of 694,998 parameters" in table
    assert "skipped   10 tensors" in table and "and 7 more: is computed, not learned" in table
    assert "out.conv.conv.weight (14, 12, 1, 1, 1) and 1 more: is for 14 classes, not 3" in table


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    state = files.swin(1, 2).state_dict()
    state["encoder1.layer.conv1.conv.weight"][0, 0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"`encoder1.layer.conv1.conv.weight` in the weights is not finite"):
        match(rename(state), build("swin_unetr_tiny", 1, 2, (32, 32, 32), {}))


def test_what_a_file_holds_is_told_by_its_shapes() -> None:
    with torch.device("meta"):
        small = rename(build("swin_unetr_small", 4, 3, (32, 32, 32), {}).state_dict())
        other = rename(build("swin_unetr_tiny", 1, 3, (32, 32, 32), {"feature_size": 36}).state_dict())
        unetr = rename(build("unetr", 2, 5, (96, 96, 96), {"feature_size": 32}).state_dict())
        whole = build("unetr", 1, 5, (96, 96, 64), {}).state_dict()
        encoder = rename({name: tensor for name, tensor in whole.items() if name.startswith("encoder.")})
    assert identify(small, {}).words() == "swin_unetr_small, 4 channels, 3 classes"
    assert identify(other, {}).options == {"feature_size": 36}
    found = identify(unetr, {})
    assert (found.words(), found.image_size) == ("unetr, 2 channels, 5 classes", (96, 96, 96))
    assert found.options == {"feature_size": 32}
    found = identify(encoder, {})
    assert (found.words(), found.image_size) == ("unetr, 1 channel, no output layer", None)
    assert identify(rename(files.swin(use_v2=True).state_dict()), {}).options == {
        "merging": "published",
        "relative_positions": "sliced",
        "residual_stages": True,
    }


SIZES = {"width": 24, "depth": 5, "mlp_ratio": 0.5, "heads": 4}


def test_a_unetr_of_another_size_is_told_by_its_shapes() -> None:
    with torch.device("meta"):
        sized = rename(build("unetr", 1, 5, (32, 32, 32), SIZES).state_dict())
    assert identify(sized, {}).options == {"width": 24, "depth": 5, "mlp_ratio": 0.5}
    # what a model of ours says of itself is all that there is to say
    assert identify(sized, {"network": "unetr_light_vit", "options": {"stem": True}}).options == {
        "stem": True
    }


@pytest.mark.parametrize("network", ["unetr", "swin_unetr_tiny"])
def test_an_encoder_of_which_a_part_is_used_is_no_whole_one(network: str) -> None:
    small = {"heads": 4, "width": 24}
    of_file, ours = {
        "unetr": ({"depth": 6}, {"depth": 4}),
        "swin_unetr_tiny": ({"residual_stages": True}, {}),
    }[network]
    more = small if network == "unetr" else {}
    state = build(network, 1, 2, (32, 32, 32), more | of_file).state_dict()
    _, audit = match(rename(state), built := build(network, 1, 2, (32, 32, 32), more | ours))
    own = sum(parameter.numel() for parameter in built.encoder.parameters())
    whole = sum(weight.numel() for name, weight in state.items() if name.startswith("encoder."))
    assert (audit.encoder, audit.unplaced) == ((own, own), whole - own)
    assert audit.encoder_share == own / whole < 0.99 and not audit.missing
    assert f"and {whole - own:,} of the file's that have no place" in audit.table()


READ = {  # by a rule of its own each
    *(f"encoder.{name}" for name in ("position", "embedding.weight", "embedding.bias")),
    *(f"encoder.stages.0.blocks.0.attention.{name}" for name in ("bias", "qkv.bias", "qkv.weight")),
    *("encoder.blocks.0.mlp.linear1.weight", "skip.0.conv1.weight", "skip.0.shortcut.weight"),
    *("encoder.stages.0.merging.reduction.weight", "decoder.head.weight", "decoder.head.bias"),
}
MISSHAPEN = [torch.tensor(1.0), torch.ones(3), torch.ones(2197, 5), torch.ones(1, 1, 1, 1, 1, 1)]


@pytest.mark.parametrize("value", MISSHAPEN, ids=lambda value: f"{value.ndim}d")
@pytest.mark.parametrize("kind", ["swin_unetr_tiny", "unetr"])
def test_a_weight_of_any_shape_is_placed_or_named(kind: str, value: Tensor) -> None:
    options = {"width": 24, "heads": 4, "depth": 3} if kind == "unetr" else {}
    network = build(kind, 1, 2, (32, 32, 32), options)
    for name in READ & network.state_dict().keys():
        named = rename({**network.state_dict(), name: value})
        if name == "encoder.embedding.weight" and value.ndim < 2:
            with pytest.raises(UserError, match="have no patch embedding"):
                identify(named, {})
        elif identify(named, {}).network.startswith(kind[:4]):
            fitting, audit = match(named, network)
            assert name not in fitting and name in {entry.name for entry in audit.skipped}


@pytest.mark.parametrize("value", MISSHAPEN, ids=lambda value: f"{value.ndim}d")
def test_a_published_embedding_of_any_shape_has_a_name(value: Tensor) -> None:
    names = ("vit.patch_embedding.patch_embeddings.weight", "vit.blocks.0.mlp.linear1.weight")
    named = rename(dict.fromkeys(names, value))
    assert named.tensors["encoder.embedding.weight"].numel() == value.numel()


def test_two_tensors_for_one_weight_must_be_one() -> None:
    state = files.swin(1, 2).state_dict()
    name = "out.conv.conv.bias"
    again = rename({**state, f"module.{name}": state[name].clone()})
    assert {e.name: e.note for e in again.left}[f"module.{name}"] == f"is `{name}` again"
    with pytest.raises(UserError, match=f"`{name}` and `module.{name}` differ and are one weight"):
        rename({**state, f"module.{name}": state[name] + 1})


def test_weights_of_another_network_are_refused() -> None:
    swin_2d = ["layers.0.blocks.0.attn.qkv.weight"]
    vit_2d = ["blocks.0.attn.qkv.weight", "patch_embed.proj.weight"]
    for names in (swin_2d, vit_2d):
        with pytest.raises(UserError, match=f"no published UNETR or Swin UNETR .* `{names[0]}`"):
            rename({name: torch.ones(1) for name in names})
