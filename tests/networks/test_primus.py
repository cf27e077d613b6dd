"""Primus against formulas and loops that do what the words say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.networks import build
from unetrkit.networks.primus import Attention, Block, LightDecoder, Primus, SwiGLU, _rotary, rotary, rotate

CPU = torch.device("cpu")
# of dynamic-network-architectures 0.4.4 with one channel, 14 classes and 96 x 96 x 96
PARAMETERS = {"s": 24_174_098, "b": 94_131_038, "m": 147_661_030, "l": 326_989_622}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small(**options: object) -> Primus:
    torch.manual_seed(0)
    network = build("primus_s", 2, 3, (32, 16, 24), {"width": 24, "heads": 2, "depth": 2, **options})
    assert isinstance(network, Primus)
    with torch.no_grad():  # zeros and ones hide mistakes
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith(("bias", "scale1", "scale2")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network


def image(*size: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 2, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_count_is_the_published_one(size: str) -> None:
    with torch.device("meta"):
        network = build(f"primus_{size}", 1, 14, (96, 96, 96), {})
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[size]
    assert len(network.state_dict()) == len(list(network.parameters()))  # no tables


def test_angles_are_the_definition() -> None:
    grid, dim = (3, 2, 4), 12
    table = rotary(grid, dim, CPU)
    assert table.shape == (1, 24, 2, 6)
    for token in range(24):
        place = (token // 8, token // 4 % 2, token % 4)
        for axis in range(3):
            for pair in range(2):
                angle = place[axis] * 10_000 ** (-pair / 2)
                found = table[0, token, :, 2 * axis + pair].tolist()
                assert found == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)


def test_pairs_of_channels_are_turned_in_their_plane() -> None:
    table = rotary((2, 3, 2), 12, CPU)
    x = torch.randn(1, 12, 5, 12)
    as_complex = torch.view_as_complex(x.unflatten(3, (6, 2)).contiguous())
    turned = as_complex * torch.complex(*table.unbind(2))[:, :, None]
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(turned).flatten(3))


def test_scores_depend_only_on_the_displacement() -> None:
    """One query and one key at every place: the score of two places is that of any two as far apart."""
    grid = (4, 3, 5)
    table = rotary(grid, 24, CPU)
    q, k = torch.randn(2, 1, 1, 1, 24).expand(2, 1, 60, 1, 24)
    scores = torch.einsum("bnhd,bmhd->nm", rotate(q, table), rotate(k, table)).view(*grid, *grid)
    torch.testing.assert_close(scores[1:, 1:, 1:, 1:, 1:, 1:], scores[:-1, :-1, :-1, :-1, :-1, :-1])
    assert scores.std() > 0.1  # and they do depend on it
    assert (scores[0, 0, 1, 0, 0, 0] - scores[0, 0, 0, 0, 0, 1]).abs() > 1e-3  # on its direction too
    # other grids, the same angles
    larger = rotate(q[:, :1].expand(1, 210, 1, 24), rotary((5, 6, 7), 24, CPU)).view(5, 6, 7, 24)
    torch.testing.assert_close(larger[:4, :3, :5], rotate(q, table).view(*grid, 24))


def test_attention_equals_the_formula() -> None:
    torch.manual_seed(3)
    attention = Attention(24, 2).double()
    nn.init.normal_(attention.norm.weight)
    x, grid = torch.randn(2, 12, 24, dtype=torch.double), (2, 3, 2)
    table = rotary(grid, 12, CPU)
    answers = []
    for head in (slice(0, 12), slice(12, 24)):
        q, k, v = (linear(x)[:, :, head] for linear in (attention.q, attention.k, attention.v))
        q, k = (rotate(t[:, :, None], table)[:, :, 0] for t in (q, k))
        weights = torch.stack([(q[b] @ k[b].T / 12**0.5).exp() for b in range(2)])
        answers.append(weights @ v / weights.sum(2, keepdim=True))
    normed = F.layer_norm(torch.cat(answers, 2), (24,), attention.norm.weight, attention.norm.bias)
    torch.testing.assert_close(attention(x, table), normed @ attention.proj.weight.T + attention.proj.bias)
    assert attention.k.bias is None  # turned with the keys it would not cancel; published keys have none


def test_swiglu_equals_the_formula() -> None:
    mlp = SwiGLU(12).double()
    nn.init.normal_(mlp.norm.weight)
    x = torch.randn(2, 5, 12, dtype=torch.double)
    gate, value = (x @ linear.weight.T + linear.bias for linear in (mlp.gate, mlp.linear1))
    assert gate.shape == (2, 5, 32)
    hidden = gate / (1 + (-gate).exp()) * value
    variance, mean = torch.var_mean(hidden, dim=2, correction=0, keepdim=True)
    hidden = (hidden - mean) / (variance + 1e-5).sqrt() * mlp.norm.weight + mlp.norm.bias
    torch.testing.assert_close(mlp(x), hidden @ mlp.linear2.weight.T + mlp.linear2.bias)


def test_block_adds_both_branches_scaled_per_channel() -> None:
    block = Block(12, 1, number=1, drop_path=0.5).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x, table = torch.randn(2, 8, 12, dtype=torch.double), rotary((2, 2, 2), 12, CPU)
    between = x + block.attention(block.norm1(x), table) * block.scale1
    torch.testing.assert_close(block(x, table), between + block.mlp(block.norm2(between)) * block.scale2)


def test_whole_network_is_its_parts() -> None:
    """Cubes of voxels cut by a loop, the blocks one after the other, the decoder's kernels voxel by voxel."""
    network = small().double().eval()
    encoder, decoder = network.encoder, network.decoder
    x = image(16, 16, 8, batch=1).double()
    positions = F.interpolate(
        encoder.position.view(4, 2, 3, 24).movedim(-1, 0)[None], (2, 2, 1), mode="trilinear"
    )
    tokens = []
    for i in range(2):
        for j in range(2):
            cube = x[0, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            tokens.append(encoder.embedding.weight @ cube.flatten() + encoder.embedding.bias)
            tokens[-1] = tokens[-1] + positions[0, :, i, j, 0]
    t = torch.stack(tokens)[None]
    for block in encoder.blocks:
        t = block(t, rotary((2, 2, 1), 12, CPU))
    y = encoder.norm(t).view(1, 2, 2, 1, 24)
    for step, conv in enumerate([*decoder.up, decoder.head]):
        doubled = torch.einsum("bxyzc,cdijk->bxiyjzkd", y, conv.weight)
        y = doubled.flatten(5, 6).flatten(3, 4).flatten(1, 2) + conv.bias
        if step < 2:
            norm = decoder.norm[step]
            y = F.gelu(F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, 1e-6))
    torch.testing.assert_close(network(x), y.movedim(-1, 1))


@pytest.mark.parametrize(
    ("width", "classes", "channels"), [(396, 14, (160, 64)), (396, 2, (88, 16)), (864, 3, (168, 32))]
)
def test_decoder_channels_fall_in_proportion(width: int, classes: int, channels: tuple[int, ...]) -> None:
    # the published widths: round(width / (width / (2 * classes)) ** (step / 3)) to eights
    with torch.device("meta"):
        decoder = LightDecoder(width, classes)
    assert tuple(step.out_channels for step in decoder.up) == channels


@pytest.mark.parametrize("size", [(1, 1, 1), (9, 3, 16), (32, 16, 24)])
def test_any_size_trains(size: tuple[int, int, int]) -> None:
    network = small(checkpointing=True)
    logits = network(image(*size))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    if size == (9, 3, 16):  # with a single token attention has nothing to choose
        still = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
        assert still == []


def test_checkpointing_changes_neither_logits_nor_gradients() -> None:
    outputs, gradients = [], []
    for checkpointing in (False, True):
        network = small(checkpointing=checkpointing, drop_path=0.5)
        torch.manual_seed(2)
        outputs.append(network(image(20, 33, 16)))
        outputs[-1].square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients)


def test_some_tokens_with_their_rows_of_the_table_are_encoded_alone() -> None:
    """What a masked autoencoder asks for: each image its own tokens, in any order."""
    encoder = small().double().encoder
    tokens, table = encoder.embed(image(24, 16, 24).double())
    assert tokens.shape == (2, 18, 24) and table.shape == (1, 18, 2, 6)
    torch.testing.assert_close(
        encoder.encode(tokens, table), encoder(image(24, 16, 24).double())[0].flatten(2).mT
    )
    seen = torch.stack([torch.randperm(18)[:7] for _ in range(2)])
    found = encoder.encode(tokens[torch.arange(2)[:, None], seen], table[0, seen])
    for b in range(2):
        alone = encoder.encode(tokens[b : b + 1, seen[b]], table[:, seen[b]])
        torch.testing.assert_close(found[b : b + 1], alone)
        reverse = encoder.encode(tokens[b : b + 1, seen[b].flip(0)], table[:, seen[b].flip(0)])
        torch.testing.assert_close(reverse.flip(1), alone)  # a set: the table says where each token is


def test_tables_of_a_prediction_serve_training_after_it() -> None:
    _rotary.cache_clear()
    network = small()
    with torch.inference_mode():
        network(image(16, 16, 16))
    network(image(16, 16, 16)).sum().backward()
    assert rotary((2, 2, 2), 12, CPU) is rotary((2, 2, 2), 12, CPU)


def test_it_begins_as_published() -> None:
    network = small(width=192, heads=8, depth=4, drop_path=0.3)
    encoder = network.encoder
    assert [block.keep.rate for block in encoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    weights = {
        encoder.embedding.weight: math.sqrt(2 / 1.0001 / 1024),
        encoder.blocks[3].attention.q.weight: 0.02,
        encoder.blocks[0].attention.proj.weight: 0.02 / math.sqrt(2),
        encoder.blocks[3].mlp.linear2.weight: 0.02 / math.sqrt(8),
        network.decoder.up[0].weight: math.sqrt(2 / 1.0001 / (8 * network.decoder.up[0].out_channels)),
    }
    for weight, spread in weights.items():
        assert weight.std().item() == pytest.approx(spread, rel=0.02)


def test_drop_path_drops_whole_branches_as_often_as_asked() -> None:
    block = Block(12, 1, number=1, drop_path=0.4)
    kept = block.keep(torch.ones(5000, 1, 2))
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert block.eval().keep(kept) is kept


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"width": 400}, "`width` is 400", "multiple of 36"),
        ({"heads": 5}, "`width` is 396", "multiple of 30"),
        ({"heads": 0}, "`heads` is 0", "1 or more"),
        ({"depth": 0}, "`depth` is 0", "1 or more"),
        ({"drop_path": 1}, "`drop_path` is 1", "probability"),
        ({"patch": 8}, "`patch` is not an option", ""),
    ],
)
def test_build_refuses_in_the_users_words(options: dict, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        build("primus_s", 1, 2, (96, 96, 96), options)
    assert message in caught.value.message
    assert hint in caught.value.hint
