"""What holds for every network of the table, whatever it is made of."""

from __future__ import annotations

import copy
import importlib
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.networks import NETWORKS, build, known_options
from unetrkit.networks.vit import ViTSize

CUBE = (96, 96, 96)
ODD = (35, 18, 50)

# ours without MONAI's 18,432 that are never used; the improved UNETR's are derived in test_unetr_fpn
PARAMETERS = {
    ("unetr", 16): 92_784_046,
    ("unetr", 32): 101_787_214,
    ("unetr_stem", 32): 101_787_663,
    ("unetr_light_vit", 32): 39_420_750,
    ("unetr_skip_alignment", 32): 101_873_230,
    ("unetr_fpn_fusion", 32): 101_795_438,
    ("unetr_fpn", 32): 39_515_439,
    ("swin_unetr_tiny", 12): 4_078_220,
    ("swin_unetr_small", 24): 15_703_304,
    ("swin_unetr_base", 48): 62_187_296,
    ("primus_s", None): 24_174_098,
    ("primus_b", None): 94_131_038,
    ("primus_m", None): 147_661_030,
    ("primus_l", None): 326_989_622,
}


# what makes a network small, but keeps what it has that others have not
LIGHT = {"feature_size": 4, "light_vit": True}
SMALL: dict[str, dict[str, object]] = {
    "unetr": {"feature_size": 6, "depth": 5, "width": 48, "heads": 4},
    "unetr_stem": LIGHT,
    "unetr_light_vit": LIGHT,
    "unetr_skip_alignment": LIGHT,
    "unetr_fpn_fusion": LIGHT,
    "unetr_fpn": LIGHT,
    **{f"primus_{size}": {"width": 24, "heads": 2, "depth": 3} for size in "sbml"},
    "swin_unetr_small": {"feature_size": 12, "merging": "published"},
    "swin_unetr_base": {"feature_size": 12, "relative_positions": "sliced"},
}


def quick(name: str, **options: object) -> nn.Module:
    """A small network of the family `name`, seeded, for a small grid of patches."""
    return copy.deepcopy(_built(name, tuple({**SMALL.get(name, {}), **options}.items())))


@lru_cache(maxsize=4)
def _built(name: str, options: tuple[tuple[str, object], ...]) -> nn.Module:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # the light ViT's 27 million weights say no more than these
        light = ViTSize(depth=5, width=48, heads=4)
        patch.setattr(importlib.import_module("unetrkit.networks.unetr_fpn"), "LIGHT", light)
        return build(name, 2, 3, (32, 32, 32), dict(options))


def image(*size: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 2, *size, generator=torch.Generator().manual_seed(1))


def test_every_entry_of_the_table_has_its_numbers() -> None:
    assert {name for name, _ in PARAMETERS} == set(GOLDEN) == set(NETWORKS)


@pytest.mark.parametrize(("name", "feature_size"), PARAMETERS)
def test_parameter_count_is_the_published_one(name: str, feature_size: int | None) -> None:
    options = {"feature_size": feature_size} if feature_size else {}  # a primus has none
    with torch.device("meta"):
        network = build(name, 1, 14, CUBE, options)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name, feature_size]
    assert len(network.state_dict()) == len(list(network.parameters()))  # no tables, nothing twice


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient_at_an_odd_size(name: str) -> None:
    network = quick(name)
    logits = network(image(*ODD))
    assert logits.shape == (2, 3, *ODD)
    logits.square().mean().backward()
    still = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (17, 32, 31)])
def test_any_size_trains_even_a_single_voxel(name: str, size: tuple[int, int, int]) -> None:
    network = quick(name)
    logits = network(image(*size))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_changes_neither_logits_nor_gradients(name: str) -> None:
    rate = "drop_path" if name.startswith(("swin", "primus")) else "dropout"
    gradients, outputs = [], []
    for checkpointing in (False, True):
        network = quick(name, checkpointing=checkpointing, **{rate: 0.5})
        torch.manual_seed(2)
        outputs.append(network(image(20, 33, 16)))
        outputs[-1].square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert torch.equal(*outputs)
    for kept, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, computed)


SUPERVISED = [name for name in NETWORKS if "deep_supervision" in known_options(NETWORKS[name])]


def test_every_decoder_of_a_u_can_be_supervised_deeply() -> None:
    assert set(NETWORKS) - set(SUPERVISED) == {"primus_s", "primus_b", "primus_m", "primus_l"}


@pytest.mark.parametrize("name", ["unetr", "unetr_fpn", "swin_unetr_tiny"])  # one of each decoder
def test_every_head_of_deep_supervision_gets_a_gradient(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = quick(name, deep_supervision=2, checkpointing=checkpointing)
        scales = network.scales(image(19, 18, 9))
        sizes = [logits.shape for logits in scales]
        assert sizes == [(2, 3, 19, 18, 9), (2, 3, 10, 9, 5), (2, 3, 5, 5, 3)]
        torch.stack([logits.square().mean() for logits in scales]).sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    for kept, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, computed)


@pytest.mark.parametrize("name", ["unetr", "unetr_fpn", "swin_unetr_tiny"])  # one of each decoder
def test_deep_supervision_adds_heads_and_changes_no_prediction(name: str) -> None:
    deep, plain = quick(name, deep_supervision=3).eval(), quick(name).eval()
    left, heads = plain.load_state_dict(deep.state_dict(), strict=False)
    assert not left
    assert heads == [f"decoder.coarse_heads.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    x = image(19, 18, 9)
    with torch.no_grad():
        expected = plain(x)
        assert torch.equal(deep(x), expected)
        assert torch.equal(deep.scales(x)[0], expected)
        program = torch.export.export(deep, (x,), strict=False).module()
        assert (program(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_coarsest_map_of_each_decoder_can_be_supervised() -> None:
    for name, most in (("swin_unetr_tiny", 4), ("unetr_fpn", 3)):
        sizes = [logits.shape[2:] for logits in quick(name, deep_supervision=most).scales(image(32, 32, 32))]
        assert sizes == [(32 // 2**level,) * 3 for level in range(most + 1)]


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_finite_and_near_float32(name: str) -> None:
    network = quick(name)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(image(33, 48, 20))
    half.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    whole = network(image(33, 48, 20))
    assert (half - whole).norm() < 0.03 * whole.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_prediction_equals_training_without_dropping(name: str) -> None:
    network = quick(name)
    trained = network(image(32, 40, 24))
    network.eval()
    with torch.inference_mode():  # leaves nothing behind that a later training step would stumble on
        torch.testing.assert_close(network(image(32, 40, 24)), trained, rtol=1e-4, atol=1e-5)
    network.train()(image(32, 40, 24)).sum().backward()


def test_prediction_first_does_not_stop_training_after() -> None:
    from unetrkit.networks import windows

    windows._windows.cache_clear()
    windows._relative_index.cache_clear()
    network = quick("swin_unetr_tiny")
    with torch.inference_mode():
        network(image(32, 32, 32))
    network(image(32, 32, 32)).sum().backward()


def test_what_a_compiler_sees_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network = quick("swin_unetr_tiny")
    outputs = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        outputs.append(network(image(33, 20, 16)))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    outputs[1].sum().backward()


@pytest.mark.parametrize("name", NETWORKS)
def test_images_of_a_batch_do_not_see_each_other(name: str) -> None:
    network = quick(name).eval()
    both = image(32, 20, 33)
    with torch.no_grad():
        torch.testing.assert_close(network(both)[1:], network(both[1:]), rtol=1e-4, atol=1e-5)


# A changed number here changes what everyone's weights compute: say so in the changelog.
GOLDEN = {
    "unetr": [1.093305, -0.035304, -0.349317, 0.523780],
    "unetr_stem": [0.627351, -0.181670, -0.092780, 0.593248],
    "unetr_light_vit": [0.400237, -0.185016, 0.429477, 0.551914],
    "unetr_skip_alignment": [-0.985620, 0.685413, 1.108134, 0.592076],
    "unetr_fpn_fusion": [0.393332, -0.207404, -0.971369, 0.498595],
    "unetr_fpn": [0.158168, -0.041223, -0.603092, 0.512054],
    "swin_unetr_tiny": [-1.478653, -0.616728, -0.446129, 0.467466],
    "swin_unetr_small": [-0.767969, 0.161235, -0.069690, 0.528748],
    "swin_unetr_base": [-0.924743, 0.276245, 0.248392, 0.554362],
    "primus_s": [2.797615, -0.211014, 1.345062, 0.959028],
    "primus_b": [1.011512, 1.444937, -1.831074, 1.057548],
    "primus_m": [-2.223678, -0.535266, -1.120371, 1.037693],
    "primus_l": [-1.199004, 1.165380, -0.823113, 1.012185],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_the_golden_ones(name: str) -> None:
    torch.manual_seed(0)
    network = build(name, 2, 3, (32, 32, 32), {}).eval()  # as it stands in the table
    x = torch.linspace(0, 1, 2 * 33 * 48 * 20).reshape(1, 2, 33, 48, 20).sin()
    with torch.no_grad():
        logits = network(x)
    found = [logits[0, 0, 0, 0, 0], logits[0, 1, 16, 24, 10], logits[0, 2, 32, 47, 19], logits.std()]
    torch.testing.assert_close(torch.stack(found), torch.tensor(GOLDEN[name]), rtol=1e-4, atol=1e-4)


def test_positions_of_another_grid_are_interpolated() -> None:
    encoder = quick("unetr").encoder
    grid = torch.arange(8.0).view(2, 2, 2)
    with torch.no_grad():
        encoder.position.copy_(grid.flatten()[None, :, None].expand_as(encoder.position))
    assert encoder.positions((2, 2, 2)) is encoder.position
    found = encoder.positions((4, 2, 2))[0, :, 0].view(4, 2, 2)
    assert found[:, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]  # x rises by 4 between centres


def test_initial_weights_are_narrow_and_centred() -> None:
    network = quick("swin_unetr_tiny")
    weight = network.encoder.stages[3].blocks[0].mlp.linear1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.encoder.stages[0].blocks[0].attention.bias.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.encoder.stages[0].blocks[0].attention.qkv.bias.abs().max() == 0
    conv = quick("unetr").encoder.embedding.weight
    assert conv.abs().max().item() == pytest.approx(8192**-0.5, rel=1e-3)
    perceptron = quick("unetr", patch_embedding="perceptron").encoder.embedding.weight
    assert perceptron.std().item() == pytest.approx(0.02, rel=0.01)


def test_drop_path_drops_whole_branches_as_often_as_asked() -> None:
    block = quick("swin_unetr_tiny", drop_path=0.4).encoder.stages[3].blocks[1]
    kept = block.keep(torch.ones(5000, 1, 2))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert block.eval().keep(kept) is kept


@pytest.mark.parametrize(
    ("name", "options", "message", "hint"),
    [
        ("swin_unetr", {}, "`swin_unetr` is not a network", "did you mean `swin_unetr_tiny`?"),
        ("unetr", {"feature_sise": 8}, "`feature_sise` is not an option", "did you mean `feature_size`?"),
        ("unetr", {"merging": "full"}, "`merging` is not an option of `unetr`", ""),
        ("unetr", {"feature_size": "16"}, "`feature_size` is `16`", "type int"),
        ("unetr", {"feature_size": True}, "`feature_size` is `True`", "type int"),
        ("unetr", {"feature_size": 0}, "`feature_size` is 0", "1 or more"),
        ("unetr", {"taps": [3, 6]}, "`taps` is [3, 6]", "3 rising"),
        ("unetr", {"taps": [3, 9, 6]}, "`taps` is [3, 9, 6]", "3 rising"),
        ("unetr", {"taps": [3, 6, 12]}, "`taps` is [3, 6, 12]", "from 0 to 11"),
        ("unetr", {"taps": 3}, "`taps` is `3`", "list of whole numbers"),
        ("unetr", {"taps": [3, 6, 9], "patch": 8}, "`taps` is [3, 6, 9]", "2 rising"),
        ("unetr", {"taps": [1], "patch": 2}, "`taps` is [1]", "0 rising"),
        ("unetr", {"patch": 12}, "`patch` is 12", "[2, 4, 8, 16, 32]"),
        ("unetr", {"patch": 64}, "`patch` is 64", "[2, 4, 8, 16, 32]"),
        ("unetr", {"depth": 0}, "`depth` is 0", "1 or more"),
        ("unetr", {"depth": 2}, "`depth` is 2", "3 or more are needed, for a `patch` of 16 takes 3 `taps`"),
        ("unetr", {"width": -768}, "`width` is -768", "1 or more"),
        ("unetr", {"width": 512}, "`heads` is 12", "`width` is 512"),
        ("unetr", {"mlp_ratio": 0}, "`mlp_ratio` is 0", "4 is usual"),
        ("unetr", {"mlp_ratio": float("nan")}, "`mlp_ratio` is nan", "4 is usual"),
        ("unetr", {"mlp_ratio": 1e300}, "`mlp_ratio` is `1e+300`", "10,000 at most"),
        ("unetr", {"width": 10**21}, f"`width` is `{10**21}`", "10,000 at most"),
        ("swin_unetr_tiny", {"feature_size": 1_200_000}, "`feature_size` is `1200000`", "10,000 at most"),
        ("swin_unetr_tiny", {"feature_size": 9_996}, "would have 2,", "up to 10,000,000,000 are made"),
        ("unetr", {"mlp_ration": 4}, "`mlp_ration` is not an option", "did you mean `mlp_ratio`?"),
        ("unetr_fpn", {"feature_size": 0}, "`feature_size` is 0", "1 or more"),
        ("unetr_fpn", {"stem": 1}, "`stem` is `1`", "type bool"),
        ("unetr_fpn", {"fpn": True}, "`fpn` is not an option of `unetr_fpn`", ""),
        ("unetr", {"patch_embedding": "convolution"}, "`patch_embedding` is `convolution`", "conv"),
        ("unetr", {"deep_supervision": 4}, "`deep_supervision` is 4", "has 3 maps"),
        ("swin_unetr_tiny", {"deep_supervision": -1}, "`deep_supervision` is -1", "has 4 maps"),
        ("primus_s", {"deep_supervision": 1}, "not an option of `primus_s`", ""),
        ("unetr", {"dropout": 1}, "`dropout` is 1", "probability"),
        ("swin_unetr_base", {"feature_size": 32}, "`feature_size` is 32", "multiple of 12"),
        ("swin_unetr_base", {"merging": "publisched"}, "`merging` is `publisched`", "`published`"),
        ("swin_unetr_base", {"drop_path": -0.1}, "`drop_path` is -0.1", "probability"),
    ],
)
def test_build_refuses_in_the_users_words(name: str, options: dict, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        build(name, 1, 2, CUBE, options)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(("axis", "message"), [(2**13, "would have"), (2**70, "cannot be made")])
def test_an_image_for_which_there_is_no_memory_is_refused(axis: int, message: str) -> None:
    with pytest.raises(UserError, match=f"`unetr` {message} .*in such sizes"):
        build("unetr", 1, 2, (axis, axis, axis), {"depth": 3})
