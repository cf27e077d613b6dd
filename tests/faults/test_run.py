"""A run that meets what it should not: a scan that broke, a torn checkpoint, NaN; and a thousand steps."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.several import cubes, ranks, trained
from tests.training.volumes import SMALL, four_volumes
from torch import Tensor

from unetrkit.data.datalist import read_dataset
from unetrkit.data.prepare import prepare
from unetrkit.data.store import Store
from unetrkit.training import checkpoint
from unetrkit.training.loop import LoopSettings

LEFT = ("last", "best", "metrics.jsonl")


def same(one: Path, other: Path) -> None:
    for name in LEFT:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_a_scan_that_broke_is_named_and_prepared_again(tmp_path: Path, workers: int, world: int) -> None:
    data = tmp_path / "data"
    data.mkdir()
    store = four_volumes(data)
    words = [f"data={store}", *SMALL, "loop.steps=6", f"loop.workers={workers}"]
    codes, said = ranks(world, tmp_path / "log", trained, *words, f"out={tmp_path / 'whole'}")
    assert codes == [0] * world, said
    broken = store / "cases" / "1_image" / "image.chunks"
    content = broken.read_bytes()
    broken.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    codes, said = ranks(world, tmp_path / "log", trained, *words, f"out={tmp_path / 'run'}")
    assert codes == [2] * world
    assert sum(text.count("1_image") for text in said) >= 1 and "Traceback" not in "".join(said)
    opened = Store.open(store)
    prepare(read_dataset(data / "dataset.json"), opened.plan, store, workers=1)
    assert broken.read_bytes() == content
    codes, said = ranks(world, tmp_path / "log", trained, *words, f"out={tmp_path / 'run'}")
    assert codes == [0] * world, said
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.faults
@pytest.mark.parametrize("world", [1, 2])
def test_a_torn_checkpoint_is_said_and_the_one_before_taken(tmp_path: Path, world: int) -> None:
    settings = LoopSettings(steps=12, validate_every=4, save_every=3, log_every=1, device="cpu", amp="off")
    assert ranks(world, tmp_path / "log", cubes, tmp_path / "whole", settings)[0] == [0] * world
    assert ranks(world, tmp_path / "log", cubes, tmp_path / "run", settings)[0] == [0] * world
    last = (tmp_path / "run" / "last").read_bytes()
    (tmp_path / "run" / "last").write_bytes(last[: len(last) // 2])
    codes, said = ranks(world, tmp_path / "log", cubes, tmp_path / "run", settings)
    assert codes == [0] * world, said
    assert said[0].count("is damaged: its content does not match its checksum; going on from") == 1
    assert "going on from step 9 of 12" in said[0] and not any(said[1:])
    same(tmp_path / "run", tmp_path / "whole")


def poison(number: int) -> None:
    """Makes the loss of the fourth and the fifth step of rank 0 NaN."""
    os.environ["POISON"] = str(number in (3, 4) and os.environ["RANK"] == "0")


def nan_or(value: Tensor) -> Tensor:
    return value * (float("nan") if os.environ.get("POISON") == "True" else 1.0)


def poisoned(folder: Path, settings: LoopSettings) -> None:
    from unetrkit.training import segmentation

    plain = segmentation.dice_cross_entropy

    def spoilt(*arguments: Any) -> dict[str, Tensor]:
        return {name: nan_or(value) for name, value in plain(*arguments).items()}

    segmentation.dice_cross_entropy = spoilt
    cubes(folder, settings, poison)


def test_nan_on_one_rank_leaves_the_step_out_on_all(tmp_path: Path) -> None:
    settings = LoopSettings(steps=6, validate_every=6, save_every=6, log_every=1, device="cpu", amp="off")
    codes, said = ranks(2, tmp_path / "log", poisoned, tmp_path / "run", settings)
    assert codes == [0, 0], said
    assert said[0].count("the loss is not finite at step") == 2 and said[1] == ""
    first, second = (torch.load(tmp_path / "run" / f"weights-{rank}") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [one["step"] for one in records if one["event"] == "training" and "loss" not in one] == [4, 5]


def note_memory(file: Path, step: int) -> None:
    if step in (199, 999):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with open(file, "a") as noted:
            noted.write(f"{pages * os.sysconf('SC_PAGE_SIZE')}\n")


@pytest.mark.faults
def test_a_thousand_steps_take_no_more_memory_than_two_hundred(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noting = partial(note_memory, tmp_path / "memory")
    settings = LoopSettings(steps=1000, validate_every=50, save_every=25, log_every=5, device="cpu", ema=0.9)
    codes, said = ranks(1, tmp_path / "log", cubes, tmp_path / "run", settings, noting)
    assert codes == [0], said
    early, late = map(int, (tmp_path / "memory").read_text().split())
    with capsys.disabled():
        print(f"\nmemory after 200 steps {early / 2**20:.1f} MB, after 1,000 {late / 2**20:.1f} MB")
    assert late - early < 4 * 2**20
    assert checkpoint.load(tmp_path / "run" / "last")["state"]["step"] == 1000
