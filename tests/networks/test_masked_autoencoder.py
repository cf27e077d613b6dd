"""Masked autoencoders: only what is visible is encoded, and everything stands where it belongs."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.networks import build, build_pretraining
from unetrkit.networks.audit import match
from unetrkit.networks.masked_autoencoder import MaskedAutoencoder
from unetrkit.networks.published import rename

ENCODERS: dict[str, tuple[str, dict[str, object]]] = {
    "masked_autoencoder": ("unetr", {"depth": 4, "width": 48, "heads": 4}),
    "masked_autoencoder_primus": ("primus_s", {"depth": 2, "width": 48, "heads": 4}),
}
FILLING = {"decoder_depth": 1, "decoder_width": 24, "decoder_heads": 2}
SIZE = (33, 20, 48)


def quick(name: str, **options: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    network = build_pretraining(name, 2, (32, 32, 48), {**ENCODERS[name][1], **FILLING, **options})
    assert isinstance(network, MaskedAutoencoder)
    return network.eval()


def image(batch: int = 2) -> Tensor:
    return torch.rand(batch, 2, *SIZE, generator=torch.Generator().manual_seed(1))


def some(network: MaskedAutoencoder, count: int) -> Tensor:
    x, y, z = network.grid(image())
    return torch.stack([torch.randperm(x * y * z)[:count] for _ in range(2)])


@pytest.mark.parametrize("name", ENCODERS)
def test_the_whole_encoder_moves_on(name: str) -> None:
    tuned, size = ENCODERS[name]
    pretrained = quick(name).state_dict()
    network = build(tuned, 2, 5, (32, 32, 48), size)
    state, audit = match(rename({f"module.network.{key}": w for key, w in pretrained.items()}), network)
    wanted = {key for key in network.state_dict() if key.startswith("encoder.")}
    assert state.keys() == wanted == {key for key in pretrained if key.startswith("encoder.")}
    assert audit.encoder_share == 1 and not audit.adapted
    assert {entry.name for entry in audit.skipped} == {
        f"module.network.{key}" for key in pretrained if key.startswith("reconstruction.")
    }


@pytest.mark.parametrize("name", ENCODERS)
def test_only_visible_patches_go_through_the_blocks(name: str) -> None:
    network, seen = quick(name), []
    for block in network.encoder.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].shape, output.shape)))
    network(image(), some(network, 5))
    assert seen == [((2, 5, 48), (2, 5, 48))] * len(network.encoder.blocks)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_hidden_cannot_be_seen(name: str) -> None:
    network = quick(name)
    visible, p = some(network, 5), network.patch
    x, y, z = network.grid(image())
    shown = torch.zeros(2, x * y * z).scatter(1, visible, 1.0).view(2, 1, x, y, z)
    shown = F.interpolate(shown, scale_factor=float(p))[:, :, :33, :20, :48]
    hidden = torch.where(shown > 0, image(), torch.randn(image().shape))
    with torch.no_grad():
        assert torch.equal(network(image(), visible), network(hidden, visible))
        assert not torch.equal(network(image(), visible), network(image(), some(network, 5)))


@pytest.mark.parametrize("name", ENCODERS)
def test_the_order_of_what_is_visible_says_nothing(name: str) -> None:
    network = quick(name).double()
    whole, every = image().double(), torch.arange(prod(network.grid(image())))
    with torch.no_grad():
        expected = network(whole)
        shuffled = every[torch.randperm(len(every))].expand(2, -1)
        torch.testing.assert_close(network(whole, shuffled), expected)
        assert torch.equal(network(whole), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_patches_are_put_back_where_they_were_taken(name: str) -> None:
    network = quick(name)
    network.encoder.encode = lambda tokens, *table: tokens if table else [tokens]  # type: ignore[method-assign]

    class Same(nn.Module):
        def forward(self, seen: Tensor, visible: Tensor, grid: tuple[int, int, int]) -> Tensor:
            return seen

    network.reconstruction = Same()
    values = 2 * network.patch**3
    embedding = nn.Linear(values, values, bias=False)
    nn.init.eye_(embedding.weight)
    network.encoder.embedding.weight = embedding.weight
    network.encoder.embedding.bias = None
    network.encoder.positions = lambda grid: torch.zeros(())  # type: ignore[method-assign]
    with torch.no_grad():
        assert torch.equal(network(image()), image())


@pytest.mark.parametrize("name", ENCODERS)
def test_filling_equals_a_plain_loop(name: str) -> None:
    """Two images, whose tokens are put in their places one by one, with sines and cosines written out."""
    filling = quick(name).reconstruction.double()
    grid, visible = (2, 1, 3), torch.tensor([[4, 0], [1, 5]])
    seen = torch.randn(2, 2, 48, dtype=torch.double)
    tokens = torch.empty(2, 6, 24, dtype=torch.double)
    for number in range(2):
        for place in range(6):
            at = (place // 3, 0, place % 3)
            angle = [at[axis] / 10_000 ** (pair / 4) for axis in range(3) for pair in range(4)]
            angles = torch.tensor(angle, dtype=torch.double)
            inside = (visible[number] == place).nonzero().flatten().tolist()
            start = filling.narrow(seen[number, inside[0]]) if inside else filling.mask_token
            tokens[number, place] = start + torch.cat((angles.cos(), angles.sin()))
    for block in filling.blocks:
        tokens = block(tokens)
    expected = filling.head(filling.norm(tokens))
    # the table of places is kept in float32
    torch.testing.assert_close(filling(seen, visible, grid), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_learns_where_something_is_hidden(name: str) -> None:
    network = quick(name).train()
    network(image(), some(network, 5)).square().mean().backward()
    still = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_most_of_the_arithmetic_is_saved() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(visible: Tensor | None) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            network.encode(torch.empty(1, 1, 96, 96, 96), visible)
        return int(counter.get_total_flops())

    with torch.device("meta"):
        network = build_pretraining("masked_autoencoder", 1, (96, 96, 96), {})
        quarter = flops(torch.empty(1, 54, dtype=torch.long))
        whole = flops(torch.empty(1, 216, dtype=torch.long))
    # the embedding of all patches is 4 % of the whole, a quarter of the tokens costs 25 % and less attention
    assert 0.25 < quarter / whole < 0.30
