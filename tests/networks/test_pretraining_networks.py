"""The networks that learn without labels, against MONAI 1.6.1 and the published heads with equal weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.networks import PRETRAINING_NETWORKS, build, build_pretraining
from unetrkit.networks.published import translate
from unetrkit.networks.swin import SwinEncoder
from unetrkit.networks.swin_heads import Refining, SwinOptions

CUBE = (96, 96, 96)
SMALL: dict[str, dict[str, object]] = {
    "swin_heads": {"feature_size": 12},
    "swin_unetr_reconstruction": {"feature_size": 12},
    "masked_autoencoder": {"depth": 4, "width": 48, "heads": 4},
    "masked_autoencoder_primus": {"depth": 2, "width": 48, "heads": 4},
}
# stands for what is hidden, and a plain call hides nothing
IDLE = {"reconstruction.mask_token"}
RECONSTRUCTIONS = ("vae", "deconv", "large_kernel_deconv")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def quick(name: str, **options: object) -> nn.Module:
    return build_pretraining(name, 2, (32, 32, 32), {**SMALL.get(name, {}), **options})


def outputs(network: nn.Module, image: Tensor) -> list[Tensor]:
    found = network(image)
    return list(found.values()) if isinstance(found, Mapping) else [found]


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    published = {"vae": 19_097_191, "deconv": 11_593_351, "large_kernel_deconv": 33_624_631}
    # of "vae" five convolutions have a bias that the norm after them takes away again; ours have none
    idle = {"vae": 384 + 192 + 96 + 48 + 48}
    with torch.device("meta"):
        for reconstruction, expected in published.items():
            heads = build_pretraining("swin_heads", 1, CUBE, {"reconstruction": reconstruction})
            assert count(heads) == expected - idle.get(reconstruction, 0)
        autoencoder = build_pretraining("vit_autoencoder", 1, CUBE, {})
        whole = build_pretraining("swin_unetr_reconstruction", 1, CUBE, {})
        segmenting = build("swin_unetr_base", 1, 14, CUBE, {})
    assert count(autoencoder) == 89_146_641 - 18_432  # MONAI's norm_cross_attn, which nothing reads
    assert count(segmenting) - count(whole) == 13 * 49  # the head's other classes


@pytest.mark.parametrize(
    ("name", "tuned"),
    [
        ("vit_autoencoder", "unetr"),
        ("swin_heads", "swin_unetr_tiny"),
        ("swin_unetr_reconstruction", "swin_unetr_tiny"),
    ],
)
def test_weights_move_to_the_network_that_is_fine_tuned_by_name(name: str, tuned: str) -> None:
    pretrained = quick(name)
    network = build(tuned, 2, 5, (32, 32, 32), {})
    parts = ("encoder.",) if name != "swin_unetr_reconstruction" else ("encoder.", "skip.", "decoder.up.")
    moved = {key: w for key, w in pretrained.state_dict().items() if key.startswith(parts)}
    wanted = {key for key in network.state_dict() if key.startswith(parts)}
    assert moved.keys() == wanted
    unknown = network.load_state_dict(moved, strict=False).unexpected_keys
    assert unknown == []
    image = torch.rand(1, 2, 40, 32, 33)
    with torch.no_grad():
        for a, b in zip(
            network.eval().encoder(image)[-1:], pretrained.eval().encoder(image)[-1:], strict=True
        ):
            assert torch.equal(a, b)
    if name == "swin_unetr_reconstruction":
        assert pretrained.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("embedding", ["conv", "perceptron"])
def test_vit_autoencoder_equals_monai(embedding: str) -> None:
    from monai.networks.nets import ViTAutoEnc

    size = (32, 48, 64)
    theirs = ViTAutoEnc(2, size, 16, out_channels=2, proj_type=embedding).eval()
    ours = build_pretraining("vit_autoencoder", 2, size, {}).eval()
    weights = theirs.state_dict()
    decoder = {key: weights.pop(key) for key in list(weights) if key.startswith("conv3d_transpose")}
    encoder = translate({f"vit.{key}": weight for key, weight in weights.items()})
    decoder = {re.sub(r"conv3d_transpose(_1)?", r"decoder.\1", key): w for key, w in decoder.items()}
    decoder = {
        re.sub(r"decoder\.(_1)?\.", lambda m: f"decoder.{int(bool(m[1]))}.", k): w for k, w in decoder.items()
    }
    ours.load_state_dict(encoder | decoder)
    x = torch.randn(2, 2, *size)
    with torch.no_grad():
        found, expected = ours(x), theirs(x)[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


class PublishedHeads(nn.Module):
    """What the published network computes, from its description: heads on corner tokens, biases and all."""

    def __init__(self, feature_size: int, reconstruction: str) -> None:
        from monai.networks.nets.swin_unetr import SwinTransformer

        super().__init__()
        dim = 16 * feature_size
        self.swinViT = SwinTransformer(
            2, feature_size, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24), spatial_dims=3
        )
        self.rotation_head = nn.Linear(dim, 4)
        self.contrastive_head = nn.Linear(dim, 512)
        widths = [dim // part for part in (1, 2, 4, 8, 16, 16)]
        layers: list[nn.Module] = []
        if reconstruction == "vae":
            for i in range(5):
                layers += [
                    nn.Conv3d(widths[i], widths[i + 1], 3, padding=1),
                    nn.InstanceNorm3d(widths[i + 1]),
                ]
                layers += [nn.LeakyReLU(), nn.Upsample(scale_factor=2, mode="trilinear")]
            layers.append(nn.Conv3d(widths[5], 2, 1))
        elif reconstruction == "deconv":
            widths[5] = 2
            layers = [nn.ConvTranspose3d(widths[i], widths[i + 1], 2, 2) for i in range(5)]
        else:
            layers = [nn.ConvTranspose3d(dim, 2, 32, 32)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        last = self.swinViT(x)[4]
        tokens = last.flatten(2)
        rotation, contrast = self.rotation_head(tokens[..., 0]), self.contrastive_head(tokens[..., 1])
        return [rotation, contrast, self.conv(last)]

    def translated(self, reconstruction: str) -> dict[str, Tensor]:
        """Their weights under our names."""
        ours = {}
        for key, weight in self.state_dict().items():
            key = key.replace("rotation_head", "rotation").replace("contrastive_head", "contrast")
            if key.startswith("swinViT"):
                ours |= translate({key: weight})
            elif not key.startswith("conv."):
                ours[key] = weight
            elif reconstruction == "large_kernel_deconv":
                ours[key.replace("conv.0", "reconstruction")] = weight
            elif reconstruction == "deconv":
                ours[key.replace("conv", "reconstruction")] = weight
            elif key.startswith("conv.20"):
                ours[key.replace("conv.20", "reconstruction.head")] = weight
            elif key.endswith("weight"):  # the biases before a norm do nothing
                number = int(key.split(".")[1]) // 4
                ours[f"reconstruction.convs.{number}.weight"] = weight
        return ours


@pytest.mark.parametrize(
    ("reconstruction", "feature_size"),
    [("vae", 12), ("vae", 24), ("deconv", 12), ("large_kernel_deconv", 12)],
)
def test_swin_heads_equal_the_published_ones(reconstruction: str, feature_size: int) -> None:
    theirs = PublishedHeads(feature_size, reconstruction).double().eval()
    size = (64, 32, 32)
    options = {
        "feature_size": feature_size,
        "reconstruction": reconstruction,
        "heads": "single_token",
        "relative_positions": "sliced",
    }
    ours = build_pretraining("swin_heads", 2, size, options).double().eval()
    ours.load_state_dict(theirs.translated(reconstruction))
    x = torch.randn(2, 2, *size, dtype=torch.double)  # the norm of two voxels magnifies rounding
    with torch.no_grad():
        found, expected = ours(x), theirs(x)
    assert list(found) == ["rotation", "contrast", "reconstruction"]
    for a, b in zip(found.values(), expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 1e-10 * b.abs().max()


def test_pooled_heads_see_the_mean_of_all_tokens() -> None:
    network = quick("swin_heads").eval()
    x = torch.rand(2, 2, 64, 33, 32)
    with torch.no_grad():
        mean = network.encoder(x)[-1].mean((2, 3, 4))
        found = network(x)
    torch.testing.assert_close(
        found["rotation"], F.linear(mean, network.rotation.weight, network.rotation.bias)
    )
    torch.testing.assert_close(
        found["contrast"], F.linear(mean, network.contrast.weight, network.contrast.bias)
    )


# one voxel; the published network raises at 32; an odd size
@pytest.mark.parametrize("size", [(1, 1, 1), (32, 32, 32), (35, 18, 50)])
@pytest.mark.parametrize("name", PRETRAINING_NETWORKS)
def test_any_size_is_reconstructed_and_trains(name: str, size: tuple[int, int, int]) -> None:
    network = quick(name)
    found = outputs(network, torch.rand(2, 2, *size))
    assert found[-1].shape == (2, 2, *size)
    sum(x.square().mean() for x in found).backward()
    still = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    if size == (35, 18, 50):
        still += [key for key, p in network.named_parameters() if p.grad.abs().sum() == 0]
    assert [key for key in still if key not in IDLE] == []


@pytest.mark.parametrize("heads", ["pooled", "single_token"])
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_an_image_of_one_bottom_voxel_still_reaches_the_reconstruction(
    reconstruction: str, heads: str
) -> None:
    network = quick("swin_heads", reconstruction=reconstruction, heads=heads)
    found = network(torch.rand(2, 2, 32, 32, 32))
    assert found["rotation"].shape == (2, 4) and found["contrast"].shape == (2, 512)
    one, other = found["reconstruction"]
    assert (one - other).norm() > 0.01 * one.norm()


def test_a_map_of_one_voxel_is_refined_without_its_norm() -> None:
    """With it nothing would be left of the map but rounding, which the next norm would magnify."""
    head = Refining(192, 2).double()
    x = torch.randn(2, 192, 1, 1, 1, dtype=torch.double)
    y = torch.einsum(
        "oi,bi->bo", head.convs[0].weight[:, :, 1, 1, 1], x.flatten(1)
    )  # the other taps see zeros
    y = F.leaky_relu(y)[:, :, None, None, None].expand(2, 96, 2, 2, 2)
    for refine in head.convs[1:]:
        y = F.leaky_relu(F.instance_norm(F.conv3d(y, refine.weight, padding=1)))
        y = F.interpolate(y, scale_factor=2, mode="trilinear")
    torch.testing.assert_close(head(x), F.conv3d(y, head.head.weight, head.head.bias))


def test_reconstruction_takes_every_option_of_the_network_it_wraps() -> None:
    network = quick("swin_unetr_reconstruction", merging="published", checkpointing=True)
    assert network.decoder.checkpointing
    assert network.encoder.stages[0].merging.corners[4] == "101"


def test_swin_heads_takes_every_option_of_the_encoder() -> None:
    parameters = inspect.signature(SwinEncoder).parameters.values()
    assert set(SwinOptions.__annotations__) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("name", "options", "message", "hint"),
    [
        ("swin_head", {}, "`swin_head` is not a network", "did you mean `swin_heads`?"),
        ("unetr", {}, "`unetr` is not a network", ""),
        (
            "swin_heads",
            {"head": "pooled"},
            "`head` is not an option of `swin_heads`",
            "did you mean `heads`?",
        ),
        ("swin_heads", {"heads": "poold"}, "`heads` is `poold`", "did you mean `pooled`?"),
        ("swin_heads", {"merging": "publish"}, "`merging` is `publish`", "`published`"),
        ("swin_heads", {"feature_size": 20}, "`feature_size` is 20", "multiple of 12"),
        ("swin_heads", {"drop_path": 1.5}, "`drop_path` is 1.5", "probability"),
        ("swin_unetr_reconstruction", {"feature_size": 20}, "`feature_size` is 20", "multiple of 12"),
        ("swin_unetr_reconstruction", {"classes": 2}, "`classes` is not an option", ""),
        ("vit_autoencoder", {"feature_size": 4}, "`feature_size` is not an option", ""),
        ("vit_autoencoder", {"patch": 3}, "`patch` is 3", "one of [2, 4, 8, 16, 32]"),
        ("vit_autoencoder", {"dropout": -1}, "`dropout` is -1", "probability"),
        ("masked_autoencoder", {"patch": 12}, "`patch` is 12", "is needed"),
        (
            "masked_autoencoder",
            {"decoder_width": 100},
            "`decoder_width` is 100",
            "of 6 and of `decoder_heads`",
        ),
        ("masked_autoencoder", {"decoder_heads": 0}, "`decoder_heads` is 0", "1 or more"),
        ("masked_autoencoder_primus", {"width": 100}, "`width` is 100", "multiple of 36"),
        ("masked_autoencoder_primus", {"patch": 16}, "`patch` is not an option", ""),
    ],
)
def test_build_refuses_in_the_users_words(name: str, options: dict, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        build_pretraining(name, 1, CUBE, options)
    assert message in caught.value.message
    assert hint in caught.value.hint
