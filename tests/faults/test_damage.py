"""A thousand flipped bytes and truncations of stores, checkpoints and models: noticed, or without effect."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.data.small_store import small_plan, small_store
from torch import nn

from unetrkit.data.store import Store
from unetrkit.errors import UserError
from unetrkit.inference.model import load_model, save_model
from unetrkit.networks import build
from unetrkit.training import checkpoint

Content = Callable[[], object]


def store(folder: Path) -> Content:
    small_store(folder, cases=2)

    def content() -> object:
        opened = Store.open(folder)
        arrays = [
            array.tobytes()
            for case in opened.cases
            for array in (
                case.whole_image(),
                case.label((0, 0, 0), case.shape),
                *(case.centres(k) for k in range(len(case.counts))),
            )
        ]
        return opened.plan, [(case.name, case.counts, case.grid) for case in opened.cases], arrays

    return content


def saved(folder: Path) -> Content:
    checkpoint.save(folder / "last", {"weights": torch.randn(500), "step": 3})
    return lambda: digest(checkpoint.load(folder / "last")["weights"])


def model(folder: Path) -> Content:
    options = {"feature_size": 12}
    network = build("swin_unetr_tiny", 1, 5, (32, 32, 32), options)
    save_model(
        folder / "model",
        network,
        name="swin_unetr_tiny",
        image_size=(32, 32, 32),
        options=options,
        plan=small_plan(),
        origin={},
    )

    def content() -> object:
        loaded = load_model(folder / "model")
        return loaded.plan, loaded.description, digests(loaded.network)

    return content


def digests(network: nn.Module) -> list[str]:
    return [digest(value) for value in network.state_dict().values()]


def digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()


def damaged(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    if chance.random() < 0.3:
        return content[:place]
    return content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]


def count_noticed(folder: Path, content: Content, times: int) -> int:
    """Each time another file of the folder is damaged, and whole again after. How often it was noticed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    whole, chance, noticed = content(), random.Random(folder.name), 0
    for number in range(times):
        file = chance.choice(files)
        before = file.read_bytes()
        file.write_bytes(damaged(before, chance))
        try:
            assert content() == whole, f"damage {number} of `{file}` went unnoticed"
        except UserError:
            noticed += 1
        file.write_bytes(before)
    assert content() == whole
    return noticed


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("make", "times"), [(store, 600), (saved, 300), (model, 100)])
def test_damage_is_noticed_or_without_effect(
    tmp_path: Path,
    make: Callable[[Path], Content],
    times: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / make.__name__
    folder.mkdir()
    noticed = count_noticed(folder, make(folder), times)
    with capsys.disabled():
        print(f"\n{make.__name__}: {times} damages, {noticed} noticed, the others without effect")
    assert noticed > 0.9 * times


def test_some_damage_of_a_checkpoint_and_a_store(tmp_path: Path) -> None:
    for make in (saved, store):
        folder = tmp_path / make.__name__
        folder.mkdir()
        assert count_noticed(folder, make(folder), 20) > 15
        shutil.rmtree(folder)
