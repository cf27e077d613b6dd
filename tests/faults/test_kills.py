"""Kill -9 at random moments, and the same command again: bitwise what a run that was never stopped leaves."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.pretraining.test_run import NETWORK
from tests.pretraining.test_run import SMALL as FEW
from tests.training.several import cubes, pretrained, ranks, said, started, trained
from tests.training.volumes import SMALL, four_volumes

from unetrkit.training.loop import LoopSettings

KILLS = int(os.environ.get("KILLS", "3"))  # of each run
LEFT = ("last", "best", "metrics.jsonl", "model/model.json", "model/weights.safetensors", "exported")
RUNS = [
    *(("loop", 0, world) for world in (1, 2)),
    *(
        (what, workers, world)
        for what in ("train", *sorted(NETWORK))
        for workers in (0, 2)
        for world in (1, 2)
    ),
]
# of the tiny network, whose time is mostly validations and saves: five times as many kills
LOOP = LoopSettings(steps=60, validate_every=5, save_every=3, log_every=2, device="cpu", ema=0.9)
OFTEN = ["loop.steps=8", "loop.validate_every=3", "loop.save_every=2", "loop.log_every=1", "loop.ema=0.9"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_volumes(tmp_path_factory.mktemp("data"))


def command(what: str, store: Path, out: Path, workers: int) -> Callable[[], None]:
    if what == "loop":
        return partial(cubes, out, LOOP)
    words = [f"data={store}", f"out={out}"]
    if what == "train":
        return partial(trained, *words, *SMALL, *OFTEN, "augment.set=none", f"loop.workers={workers}")
    words += [f"objective={what}", *FEW, *OFTEN, f"loop.workers={workers}", "watch.pictures=1"]
    return partial(pretrained, *words, *(f"network_options.{option}" for option in NETWORK[what]))


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("what", "workers", "world"), RUNS)
def test_killed_at_random_moments_it_ends_bitwise_the_same(
    store: Path, tmp_path: Path, what: str, workers: int, world: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = killed(store, tmp_path, (what, workers, world), 5 * KILLS if what == "loop" else KILLS)
    with capsys.disabled():
        print(f"\n{what}, {workers} workers, {world} ranks: killed {kills} times, bitwise the same")


@pytest.mark.slow
def test_one_run_of_the_harness(store: Path, tmp_path: Path) -> None:
    assert killed(store, tmp_path, ("masked_autoencoder", 2, 2), 1) == 1


def killed(store: Path, folder: Path, run: tuple[str, int, int], times: int) -> int:
    """Runs it whole, and again with so many kills, each at a random moment of its work. How many hit it."""
    what, workers, world = run
    log, again = folder / "log", command(what, store, folder / "killed" / "run", workers)
    for _ in range(2):  # the first time imports torch
        start = seconds_of(world, log, idle)
    work = seconds_of(world, log, command(what, store, folder / "whole" / "run", workers)) - start
    chance, kills = random.Random(f"{run}"), 0
    for _ in range(times * 10):  # where it ends first, it was no kill
        processes = started(world, log, again)
        processes[0].join(start + chance.uniform(0, work / (times + 1)))
        # one of them, as when its machine is lost, which the others must notice, or all, as in a power cut
        lost = processes if chance.random() < 0.5 else [chance.choice(processes)]
        alive = [process for process in lost if process.exitcode is None]
        kills += bool(alive)
        for process in alive:
            process.kill()
        for process in processes:
            process.join(600)
            assert process.exitcode is not None, said(log, world)
        if kills == times:
            break
        if not alive:  # it has been done already: from the beginning
            shutil.rmtree(folder / "killed")
    assert kills == times
    codes, words = ranks(world, log, again)
    assert codes == [0] * world, words
    left = [name for name in LEFT if (folder / "whole" / "run" / name).exists()]
    assert len(left) >= 4
    for name in left:
        whole, other = (folder / how / "run" / name for how in ("whole", "killed"))
        assert whole.read_bytes() == other.read_bytes(), name
    return kills


def seconds_of(world: int, log: Path, work: Callable[[], None]) -> float:
    began = time.monotonic()
    codes, words = ranks(world, log, work)
    assert codes == [0] * world, words
    return time.monotonic() - began


def idle() -> None:
    """What starting takes."""
