"""What every network of both tables must stand: two processes, export, autocast, copies, and its names.

A new entry joins by itself: entries that are one network at the sizes of `SMALL` are tested once, and
`NAMES` wants a line for each. As a program: `python tests/networks/test_proofs.py names unetr` lists a
network's weights.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import pickle
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from tests.two_processes import run_two
from torch import Tensor, nn

from unetrkit.networks import NETWORKS, PRETRAINING_NETWORKS, build, build_pretraining
from unetrkit.networks.vit import ViTSize

# by the beginning of a name, the longest that fits; a vision transformer is 48 wide besides
SMALL: dict[str, dict[str, object]] = {
    "": {},
    "unetr": {"feature_size": 4, "depth": 5, "width": 48, "heads": 4},
    "unetr_": {"feature_size": 4},
    "vit_autoencoder": {"depth": 5, "width": 48, "heads": 4},
    "swin": {"feature_size": 12},
    "primus": {"width": 24, "heads": 2, "depth": 2},
    "masked": {"width": 48, "heads": 4, "depth": 3, "decoder_width": 24, "decoder_heads": 2},
}
SIZE = (33, 20, 16)


def options(name: str) -> dict[str, object]:
    return SMALL[max((start for start in SMALL if name.startswith(start)), key=len)]


def distinct() -> list[str]:
    """The first name of each network that differs from the others at its small size."""
    names: dict[str, str] = {}
    for name, network in {**NETWORKS, **PRETRAINING_NETWORKS}.items():
        function, bound = (network.func, network.keywords) if isinstance(network, partial) else (network, {})
        names.setdefault(f"{function} {sorted({**bound, **options(name)}.items())}", name)
    return list(names.values())


def built(name: str, channels: int, classes: int, size: tuple[int, int, int], **given: object) -> nn.Module:
    if name in NETWORKS:
        return build(name, channels, classes, size, given)
    return build_pretraining(name, channels, size, given)


def small(name: str) -> nn.Module:
    return copy.deepcopy(_small(name))


@lru_cache(maxsize=1)
def _small(name: str) -> nn.Module:
    torch.manual_seed(0)
    narrow = ViTSize(depth=5, width=48, heads=4)
    rooms = [importlib.import_module(f"unetrkit.networks.{room}") for room in ("vit", "unetr_fpn")]
    with ExitStack() as stack:
        for room in rooms:
            stack.enter_context(mock.patch.object(room, "ViTSize", lambda: narrow))
        stack.enter_context(mock.patch.object(rooms[1], "LIGHT", narrow))
        return built(name, 2, 3, (32, 32, 32), **options(name))


def image(batch: int = 1) -> Tensor:
    return torch.rand(batch, 2, *SIZE, generator=torch.Generator().manual_seed(1))


def outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    found = network(x)
    return list(found.values()) if isinstance(found, Mapping) else [found]


def loss(network: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([x.square().mean() for x in outputs(network, x)]).sum()


def assert_close(found: list[Tensor], expected: list[Tensor], relative: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= relative * b.abs().max()


def test_small_networks_are_small() -> None:
    large = {
        name: count
        for name in distinct()
        if (count := sum(p.numel() for p in small(name).parameters())) > 5e6
    }
    assert large == {}  # else these proofs take minutes: give it a line in SMALL


class Scales(nn.Module):
    """A network with deep supervision as an objective calls it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        return dict(enumerate(self.network.scales(x)))


def trained_apart() -> dict[str, Callable[[], nn.Module]]:
    """What two processes train, by name."""
    options = {**SMALL["swin"], "deep_supervision": 2}
    deep = {"deep_supervision": lambda: Scales(built("swin_unetr_tiny", 2, 3, SIZE, **options))}
    return {name: partial(small, name) for name in distinct()} | deep


# two processes, as `torchrun --nproc-per-node 2`: this file runs as their program


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    said = run_two(__file__, "process", tmp_path / "meeting")
    for text in said:
        assert text.split() == list(trained_apart())


def process(meeting: str, rank: int) -> None:
    """Two steps of every network, each process with its own image, beside one process with both.

    A parameter that got no gradient in the first step would stop the second: `find_unused_parameters` is off.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    for name, make in trained_apart().items():
        torch.manual_seed(0)
        alone = make().double()
        shared = nn.parallel.DistributedDataParallel(copy.deepcopy(alone))
        both = image(batch=2).double()
        for _ in range(2):
            for network, images in ((shared, both[rank : rank + 1]), (alone, both)):
                network.zero_grad()
                loss(network, images).backward()
            for (key, expected), found in zip(alone.named_parameters(), shared.parameters(), strict=True):
                torch.testing.assert_close(
                    found.grad, expected.grad, rtol=1e-6, atol=1e-10, msg=f"{name} {key}"
                )
            with torch.no_grad():
                for parameter in (*alone.parameters(), *shared.parameters()):
                    parameter -= 0.01 * parameter.grad
        print(name, flush=True)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", distinct())
def test_exported_program_computes_the_same(name: str) -> None:
    network = small(name).eval()
    with torch.no_grad():
        program = torch.export.export(network, (image(),), strict=False).module()
        other = image().flip(2)
        assert_close(outputs(program, other), outputs(network, other), 1e-5)


@pytest.mark.parametrize("name", distinct())
def test_copies_and_other_memory_formats_compute_the_same(name: str) -> None:
    network = small(name).eval()
    with torch.no_grad():
        expected = outputs(network, image(2))
        for same in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert all(torch.equal(a, b) for a, b in zip(outputs(same, image(2)), expected, strict=True))
        last = image(2).to(memory_format=torch.channels_last_3d)
        assert not last.is_contiguous()
        assert_close(outputs(network, last), expected, 1e-5)
        network.to(memory_format=torch.channels_last_3d)
        assert_close(outputs(network, last), expected, 1e-5)


@pytest.mark.parametrize("name", distinct())
def test_autocast_predicts_and_trains(name: str) -> None:
    network = small(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        predicted = outputs(network.eval(), image(2))
    with torch.autocast("cpu", torch.bfloat16):
        trained = outputs(network.train(), image(2))
        loss(network, image(2)).backward()
    still = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert still == []
    whole = outputs(network, image(2))
    for half, other, exact in zip(predicted, trained, whole, strict=True):
        assert (half - exact).norm() < 0.05 * exact.norm()
        assert (other - exact).norm() < 0.05 * exact.norm()


# How many weights, and a hash of their names and shapes with one channel, 14 classes and 96 x 96 x 96.
NAMES = {
    "unetr": (170, "103a1d14ae82e543"),
    "unetr_stem": (173, "21f1ba9a9fe09ae1"),
    "unetr_light_vit": (126, "3d9d3c05e3dce212"),
    "unetr_skip_alignment": (173, "658aab0518387bb5"),
    "unetr_fpn_fusion": (172, "344f696091e4a286"),
    "unetr_fpn": (134, "ee1060f4a7e7011a"),
    "swin_unetr_tiny": (151, "a408b9313f2133b1"),
    "swin_unetr_small": (151, "869a7e262251427f"),
    "swin_unetr_base": (151, "30bac4e77c68887a"),
    "primus_s": (291, "058d1cdc98d909ad"),
    "primus_b": (291, "e96863d9eaa05561"),
    "primus_m": (383, "dc5a91f4fc3366ef"),
    "primus_l": (567, "1c7ca5a3d485559d"),
    "vit_autoencoder": (141, "23be06d4c1fbb5f6"),
    "masked_autoencoder": (188, "2485c120b7a1e435"),
    "masked_autoencoder_primus": (332, "a31d07d959b565c1"),
    "swin_heads": (129, "78119be39938751e"),
    "swin_unetr_reconstruction": (151, "b4e873b944b0c471"),
}


def names(name: str) -> str:
    with torch.device("meta"):
        network = built(name, 1, 14, (96, 96, 96))
    return "".join(sorted(f"{key} {tuple(weight.shape)}\n" for key, weight in network.state_dict().items()))


@pytest.mark.parametrize("name", [*NETWORKS, *PRETRAINING_NETWORKS])
def test_weights_keep_their_names_and_shapes(name: str) -> None:
    text = names(name)
    found = (text.count("\n"), hashlib.sha256(text.encode()).hexdigest()[:16])
    assert found == NAMES.get(name), (
        f"\n`{name}` is new, or the weights that people have saved do not fit it any more."
        f"\nLet their names load too (`networks/published.py` shows how) and say so in the changelog."
        f"\nWhat changed: `python tests/networks/test_proofs.py names {name}` before and after, and diff."
        f"\nThen the line in NAMES is\n    {name!r}: {found},".replace("'", '"')
    )


if __name__ == "__main__":
    if sys.argv[1] == "process":
        process(sys.argv[2], int(sys.argv[3]))
    else:
        sys.stdout.write(names(sys.argv[2]))
