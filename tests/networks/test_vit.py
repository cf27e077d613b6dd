"""The vision transformer and UNETR at other sizes than the published one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unetrkit.networks import build
from unetrkit.networks.blocks import initialise
from unetrkit.networks.published import translate
from unetrkit.networks.vit import PATCHES, ViT, ViTSize

SMALL = {"depth": 5, "width": 48, "heads": 4, "feature_size": 4}


def vit(**size: object) -> ViT:
    torch.manual_seed(0)
    network = ViT(2, (32, 32, 48), ViTSize(**{"depth": 4, "width": 24, "heads": 4, **size}))
    initialise(network)
    return network.eval()


def image(*size: int) -> Tensor:
    return torch.rand(2, 2, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("patch", [8, 16])
def test_vit_of_another_size_equals_monai(patch: int) -> None:
    from monai.networks.nets import ViT as Theirs

    torch.manual_seed(0)
    theirs = Theirs(2, (32, 32, 48), (patch,) * 3, 24, 60, num_layers=8, num_heads=4, proj_type="conv").eval()
    ours = vit(depth=8, mlp_ratio=2.5, patch=patch)
    named = translate({f"vit.{name}": weight for name, weight in theirs.state_dict().items()})
    ours.load_state_dict({name.removeprefix("encoder."): weight for name, weight in named.items()})
    x = image(32, 32, 48)
    with torch.no_grad():
        last, hidden = theirs(x)
        expected = [hidden[tap] for tap in {8: (2, 5), 16: (2, 4, 6)}[patch]] + [last]
        for found, tokens in zip(ours(x), expected, strict=True):
            torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, rtol=1e-5, atol=1e-5)


def test_unetr_of_another_width_equals_monai() -> None:
    from monai.networks.nets import UNETR

    torch.manual_seed(0)
    size = (32, 48, 32)
    theirs = UNETR(2, 3, size, feature_size=4, hidden_size=36, mlp_dim=54, num_heads=3).eval()
    ours = build("unetr", 2, 3, size, {"feature_size": 4, "width": 36, "mlp_ratio": 1.5, "heads": 3}).eval()
    ours.load_state_dict(translate(theirs.state_dict()))
    x = image(*size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "taps"),
    [
        ({}, (3, 6, 9)),  # UNETR's published ones
        ({"depth": 8}, (2, 4, 6)),
        ({"depth": 24}, (6, 12, 18)),
        ({"depth": 3}, (0, 1, 2)),
        ({"patch": 8}, (4, 8)),
        ({"patch": 32}, (2, 4, 7, 9)),
        ({"patch": 2}, ()),
        ({"taps": (0, 1, 11)}, (0, 1, 11)),
    ],
)
def test_taps_are_spaced_evenly_unless_given(size: dict, taps: tuple[int, ...]) -> None:
    assert ViTSize(**size).tapped == taps


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_of_any_power_of_two_has_its_levels(patch: int) -> None:
    torch.manual_seed(0)
    network = build("unetr", 2, 3, (32, 32, 32), {**SMALL, "patch": patch})
    maps: list[Tensor] = []
    for skip in network.skip:
        skip.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    size = (patch + 3, 2 * patch, 7)
    logits = network(image(*size))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    # from the image down every level has half the voxels of the padded image, twice the channels
    padded = [-(-extent // patch) * patch for extent in size]
    coarser = [(2, 4 * 2**level, *(e // 2**level for e in padded)) for level in range(patch.bit_length() - 1)]
    grid = (2, 48, *(extent // patch for extent in padded))
    assert [tuple(x.shape) for x in maps] == [(2, 4, *size), *coarser[1:], grid]


def test_parameters_of_every_patch_follow_the_formula() -> None:
    def residual(inside: int, out: int) -> int:
        return 27 * inside * out + 27 * out * out + (inside * out if inside != out else 0)

    for patch in PATCHES:
        with torch.device("meta"):
            network = build("unetr", 2, 3, (64, 64, 64), {**SMALL, "patch": patch})
        w, levels = 48, patch.bit_length() - 1
        block = 3 * w * w + (w * w + w) + (4 * w * w + 4 * w) + (4 * w * w + w) + 4 * w
        encoder = (2 * patch**3 * w + w) + (64 // patch) ** 3 * w + 5 * block + 2 * w
        f = [4 * 2**level for level in range(levels)]
        skip = residual(2, f[0])
        for level in range(1, levels):
            again = levels - level - 1
            skip += 8 * w * f[level] + again * (8 * f[level] ** 2 + residual(f[level], f[level]))
        up = sum(8 * c * d + residual(2 * d, d) for d, c in zip(f, [*f[1:], w], strict=True))
        head = 3 * f[0] + 3
        assert sum(p.numel() for p in network.parameters()) == encoder + skip + up + head


def test_tokens_are_encoded_alike_in_any_order() -> None:
    network = vit()
    x = image(32, 32, 48)
    with torch.no_grad():
        tokens = network.embed(x)
        assert tokens.shape == (2, 12, 24)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
        whole = network.encode(tokens)
        for found, expected in zip(network.encode(tokens[:, order]), whole, strict=True):
            torch.testing.assert_close(found, expected[:, order])
        for found, expected in zip(network(x), whole, strict=True):
            assert torch.equal(found.flatten(2).transpose(1, 2), expected)


def test_visible_tokens_see_nothing_of_the_others() -> None:
    network = vit()
    x = image(32, 32, 48)
    other = x.clone()
    other[:, :, 16:, :16, 16:32] = 7  # token 1, 0, 1 of a grid of 2, 2, 3
    hidden = (1 * 2 + 0) * 3 + 1
    visible = [token for token in range(12) if token != hidden]
    with torch.no_grad():
        tokens, others = network.embed(x), network.embed(other)
        assert not torch.equal(tokens[:, hidden], others[:, hidden])
        assert torch.equal(network.encode(tokens[:, visible])[-1], network.encode(others[:, visible])[-1])
        assert not torch.allclose(
            network.encode(tokens)[-1][:, visible], network.encode(others)[-1][:, visible]
        )


def test_a_stem_stands_between_the_image_and_the_patches() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    network, plain = vit(), vit()
    network.stem = Twice()
    x = image(20, 32, 17)
    with torch.no_grad():
        assert torch.equal(network(x)[-1], plain(2 * x)[-1])
