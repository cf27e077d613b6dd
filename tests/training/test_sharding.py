"""Sharded over ranks a run learns the same, survives the same, and goes on with any number of them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.training.several import (
    cubes,
    first_gradient,
    ranks,
    saved_again,
    step_of_each_network,
    trained,
)
from tests.training.test_distributed import fail, loop, only
from tests.training.tiny import objective
from tests.training.volumes import SMALL, four_volumes
from torch import Tensor

from unetrkit.data.copies import MARK
from unetrkit.inference.model import load_model
from unetrkit.training import checkpoint
from unetrkit.training.initial import open_initial
from unetrkit.training.loop import LoopSettings
from unetrkit.training.sharding import complete

SHARDED = "loop.sharding=full"


def full(**changes: Any) -> LoopSettings:
    return loop(sharding="full", **changes)


SETTINGS = full(ema=0.9, accumulate=2, clip=0.1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_volumes(tmp_path_factory.mktemp("data"))


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the last checkpoint, by their path."""

    def below(value: Any, path: str) -> dict[str, Tensor]:
        if isinstance(value, Tensor):
            return {path: value}
        inner = value.items() if isinstance(value, dict) else ()
        return {name: one for key, part in inner for name, one in below(part, f"{path}/{key}").items()}

    return below(complete(checkpoint.load(folder / "last"), {})["learner"], "")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_the_same(run: Path, other: Path) -> None:
    """Bit for bit; the headers of safetensors name the same things in any order, so files differ."""
    for name in ("best", "metrics.jsonl", "exported"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    assert same(tensors(run), tensors(other)) and len(tensors(run)) > 12
    states = [checkpoint.load(one / "last") for one in (run, other)]
    assert states[0]["state"] == states[1]["state"] and states[0]["log"] == states[1]["log"]
    assert len(states[0]["shards"]) == len(states[1]["shards"]) == 2


def test_two_ranks_with_one_patch_have_the_gradient_of_one_with_two(store: Path, tmp_path: Path) -> None:
    two = (tmp_path / "log", first_gradient, store, tmp_path / "two", 1, SHARDED)
    assert ranks(2, *two)[0] == [0, 0]
    assert ranks(1, tmp_path / "log", first_gradient, store, tmp_path / "one", 2)[0] == [0]
    one, first, second = (torch.load(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    assert torch.equal(first, second) and len(one) > 1e6
    assert (first - one).abs().max() < 1e-6 * one.abs().max()


def test_every_network_learns_in_parts_what_it_learns_whole(tmp_path: Path) -> None:
    """A module that is used without being called, of a unit that is not whole then, would not."""
    codes, said = ranks(2, tmp_path / "log", step_of_each_network, tmp_path / "found")
    assert codes == [0, 0], said
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found-{rank}")
        assert len(found) > 10
        for name, (whole, parts, share) in found.items():
            assert parts == pytest.approx(whole, rel=1e-5), name
            assert 0.4 < share < 0.6, name


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"accumulate": 2, "clip": 0.1}, {"amp": "fp16"}], ids=str)
def test_a_run_in_parts_ends_as_one_of_copies(tmp_path: Path, changes: dict[str, Any]) -> None:
    for name, settings in (("copies", loop(**changes)), ("parts", full(**changes))):
        codes, said = ranks(2, tmp_path / "log", cubes, tmp_path / name, settings)
        assert codes == [0, 0], said
    copies, parts = (tensors(tmp_path / name) for name in ("copies", "parts"))
    assert copies.keys() == parts.keys()
    for name in copies:
        torch.testing.assert_close(parts[name], copies[name], rtol=1e-4, atol=1e-6, msg=name)
    first, second = (torch.load(tmp_path / "parts" / f"weights-{rank}") for rank in (0, 1))
    kept = "/average/module." if "ema" in changes else "/objective/"
    assert all(torch.equal(first[name], parts[kept + name]) for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks in parts."""
    folder = tmp_path_factory.mktemp("ended")
    assert ranks(2, folder / "log", cubes, folder / "run", SETTINGS)[0] == [0, 0]
    return folder / "run"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("end", "codes"), [(kill, [2, -9]), (ask, [130, 130])], ids=["kill -9", "SIGTERM"])
def test_ended_and_gone_on_with_equals_never_ended_bitwise(
    ended: Path, tmp_path: Path, end: Callable[[], None], codes: list[int]
) -> None:
    assert ranks(2, tmp_path / "log", cubes, tmp_path / "run", SETTINGS, only(1, end, 9))[0] == codes
    again, said = ranks(2, tmp_path / "log", cubes, tmp_path / "run", SETTINGS)
    assert again == [0, 0] and f"going on from step {4 if end is kill else 5} of 6" in said[0]
    assert_the_same(tmp_path / "run", ended)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, until an error amid its sixth step."""
    folder = tmp_path_factory.mktemp("stopped")
    codes, _ = ranks(2, folder / "log", cubes, folder / "run", SETTINGS, only(1, fail, 11))
    assert codes == [2, 2]
    return folder / "run"


@pytest.mark.parametrize(("world", "how"), [(1, "full"), (2, "none"), (2, "full"), (4, "full")])
def test_any_number_of_ranks_takes_over_what_two_have_left(
    stopped: Path, tmp_path: Path, world: int, how: str
) -> None:
    settings = SETTINGS.model_copy(update={"sharding": how})
    codes, said = ranks(world, tmp_path / "log", saved_again, stopped, tmp_path, settings)
    assert codes == [0] * world, said
    assert (tmp_path / "last").is_dir() == (world > 1 and how == "full")
    assert same(tensors(tmp_path), tensors(stopped)) and len(tensors(stopped)) > 12
    codes, said = ranks(2, tmp_path / "log", saved_again, tmp_path, tmp_path / "back", SETTINGS)
    assert codes == [0, 0], said
    assert same(tensors(tmp_path / "back"), tensors(stopped))


def test_a_run_goes_on_with_four_ranks_and_says_so(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    codes, said = ranks(4, tmp_path / "log", cubes, tmp_path / "run", SETTINGS)
    assert codes == [0] * 4, said
    assert "the checkpoint is of 2 ranks, not of 4" in said[0] and "going on from step 4 of 6" in said[0]
    assert len(checkpoint.load(tmp_path / "run" / "last")["shards"]) == 4


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [flip, Path.unlink], ids=["flipped", "lost"])
@pytest.mark.parametrize("which", ["shard-00002*", "state"])
def test_a_torn_last_falls_back_to_the_previous_and_ends_the_same(
    stopped: Path, ended: Path, tmp_path: Path, which: str, harm: Callable[[Path], None]
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    (file,) = (tmp_path / "run" / "last").glob(which)
    harm(file)
    (tmp_path / "run" / "last.new").mkdir()
    (tmp_path / "run" / "last.new" / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"begun")
    codes, said = ranks(2, tmp_path / "log", cubes, tmp_path / "run", SETTINGS)
    assert codes == [0, 0], said
    assert f"going on from `{tmp_path / 'run' / 'previous'}`" in said[0] and "step 2 of 6" in said[0]
    assert not said[1]
    assert_the_same(tmp_path / "run", ended)
    assert not list((tmp_path / "run").glob("*.new")) + list((tmp_path / "run").glob("*.old"))


def fill() -> None:
    """From now on this process finds the disk full where it writes its part."""

    def no_space(*_: Any, **__: Any) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    safetensors.torch.save = no_space


def test_a_disk_that_fills_up_on_one_rank_costs_nothing_that_was_saved(ended: Path, tmp_path: Path) -> None:
    codes, said = ranks(2, tmp_path / "log", cubes, tmp_path / "run", SETTINGS, only(1, fill, 7))
    assert codes == [2, 2]
    assert "free some space" in "".join(said)
    assert f"error: cannot write `{tmp_path / 'run' / 'last'}" in "".join(said)
    assert checkpoint.load(tmp_path / "run" / "last")["state"]["step"] == 2
    assert not (tmp_path / "run" / "last.new").exists()
    assert ranks(2, tmp_path / "log", cubes, tmp_path / "run", SETTINGS)[0] == [0, 0]
    assert_the_same(tmp_path / "run", ended)


def test_each_rank_writes_its_part_and_nothing_that_is_executed(stopped: Path) -> None:
    files = sorted(file.name for file in (stopped / "last").iterdir())
    assert files == [*(f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)), "state"]
    first, second = (safetensors.torch.load_file(stopped / "last" / name) for name in files[:2])
    for name, value in objective().state_dict().items():
        for kept in ("objective", "average/module."):
            key = f"/learner/{kept}{'' if kept.endswith('.') else '/'}{name}"
            assert [len(first[key]), len(second[key])] == [len(value) // 2] * 2


def test_a_network_is_trained_exported_and_taken_from_in_parts(store: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"data={store}", f"out={tmp_path / 'run'}", SHARDED, "optim.frozen_encoder=1"]
    words += ["optim.encoder_lr=0.5", "optim.layer_decay=0.75", "loop.amp=bf16"]
    codes, said = ranks(2, tmp_path / "log", trained, *words)
    assert codes == [0, 0], said
    assert not said[1] and said[0].count("validation after step 4") == 1
    weights = load_model(tmp_path / "run" / "model").network.state_dict()
    best = checkpoint.load(tmp_path / "run" / "best")["learner"]["best"]
    assert all(torch.equal(best[f"network.{name}"], value) for name, value in weights.items())
    taken = open_initial(tmp_path / "run" / "last").weights.tensors
    last = tensors(tmp_path / "run")
    assert taken and all(torch.equal(last[f"/objective/{name}"], value) for name, value in taken.items())
    (tmp_path / "run" / "model" / "weights.safetensors").unlink()
    codes, said = ranks(2, tmp_path / "log", trained, *words)
    assert codes == [0, 0] and "writing it again" in said[0]
    again = load_model(tmp_path / "run" / "model").network.state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_many_files_are_not_sent_to_a_url_and_that_is_said(store: Path, tmp_path: Path) -> None:
    (tmp_path / MARK).touch()  # beside what is a copy
    words = [*SMALL, f"data={store}", f"out={tmp_path / 'run'}", SHARDED]
    codes, said = ranks(2, tmp_path / "log", trained, *words)
    assert codes == [2, 2] and "which are not sent to URLs" in "".join(said)
    assert not (tmp_path / "run").exists()
