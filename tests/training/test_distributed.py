"""Several ranks train as one: the same weights, one voice, and an end when one of them ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.several import cubes, first_gradient, mean_and_any, pretrained, ranks
from tests.training.volumes import SMALL, four_volumes

from unetrkit.errors import UserError
from unetrkit.pretraining import OBJECTIVES
from unetrkit.ranks import this_rank
from unetrkit.training import checkpoint
from unetrkit.training.loop import LoopSettings
from unetrkit.training.optim import OptimSettings

ROOT = Path(__file__).parents[2]
LOST = "error: another rank of this training has ended or does not answer"


def loop(**changes: Any) -> LoopSettings:
    usual = {"steps": 6, "validate_every": 3, "save_every": 2, "log_every": 1, "device": "cpu", "amp": "off"}
    return LoopSettings(**(usual | changes))


def only(rank: int, what: Any, step: int | None = None) -> Any:
    """Does `what` on one rank, at one step."""
    return partial(_only, rank, what, step)


def _only(rank: int, what: Any, moment: int | None, step: int | None = None) -> None:
    if this_rank().rank == rank and step == moment:
        what()


def fail() -> None:
    raise UserError("`scan7` cannot be read", hint="look at it")


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def torchrun(*words: str | Path, processes: int = 2) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*start, *map(str, words)]


def done(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, **more)


def environment() -> dict[str, str]:
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_volumes(tmp_path_factory.mktemp("data"))


def test_two_ranks_with_one_patch_have_the_gradient_of_one_with_two(store: Path, tmp_path: Path) -> None:
    assert ranks(2, tmp_path / "log", first_gradient, store, tmp_path / "two", 1)[0] == [0, 0]
    assert ranks(1, tmp_path / "log", first_gradient, store, tmp_path / "one", 2)[0] == [0]
    one, first, second = (torch.load(tmp_path / name) for name in ("one-0", "two-0", "two-1"))
    assert torch.equal(first, second) and len(one) > 1e6
    # in float64: in float32 the rounding of the norms' gradients is 1e-4 of it already
    assert (first - one).abs().max() < 1e-6 * one.abs().max()


def test_what_is_logged_is_the_mean_of_ranks_and_what_one_wants_all_do(tmp_path: Path) -> None:
    assert ranks(2, tmp_path / "log", mean_and_any, tmp_path / "found")[0] == [0, 0]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"found-{rank}") == [1.5, 5.0, False, True]


def test_ranks_have_the_same_weights_and_share_what_they_measure(tmp_path: Path) -> None:
    codes, said = ranks(2, tmp_path / "log", cubes, tmp_path / "run", loop(ema=0.9, accumulate=2))
    assert codes == [0, 0], said
    first, second = (torch.load(tmp_path / "run" / f"weights-{rank}") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert said[1] == "" and said[0].count("validation after step 6") == 1
    assert checkpoint.load(tmp_path / "run" / "last")["ranks"] == 2


@pytest.mark.parametrize("world", [1, 4])
def test_a_run_goes_on_with_another_number_of_ranks_and_says_so(tmp_path: Path, world: int) -> None:
    codes, said = ranks(2, tmp_path / "log", cubes, tmp_path / "run", loop(), only(1, fail, 5))
    assert codes == [2, 2] and checkpoint.load(tmp_path / "run" / "last")["state"]["step"] == 4
    shutil.rmtree(tmp_path / "log")
    codes, said = ranks(world, tmp_path / "log", cubes, tmp_path / "run", loop())
    assert codes == [0] * world, said
    assert f"the checkpoint is of 2 ranks, not of {world}: no longer bitwise the same" in said[0]
    assert "going on from step 4 of 6" in said[0] and not any(said[1:])
    assert checkpoint.load(tmp_path / "run" / "last")["state"]["step"] == 6


def test_an_error_of_one_rank_is_said_and_ends_the_others(tmp_path: Path) -> None:
    codes, said = ranks(2, tmp_path / "log", cubes, tmp_path / "run", loop(), only(1, fail, 3))
    assert codes == [2, 2]
    assert said[1] == "error: `scan7` cannot be read\n\nhint: look at it\n"
    assert LOST in said[0] and "Traceback" not in said[0]


def test_an_error_amid_a_validation_is_that_of_all_and_said_once(tmp_path: Path) -> None:
    codes, said = ranks(2, tmp_path / "log", cubes, tmp_path / "run", loop(), nothing, only(1, fail))
    assert codes == [2, 2]
    assert "".join(said).count("error: ") == "".join(said).count("`scan7` cannot be read") == 1


def nothing(step: int) -> None:
    """Before a step."""


@pytest.mark.parametrize("amid", [False, True], ids=["step", "validation"])
def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_step(tmp_path: Path, amid: bool) -> None:
    when = (nothing, only(1, ask)) if amid else (only(1, ask, 2),)
    codes, said = ranks(2, tmp_path / "log", cubes, tmp_path / "run", loop(), *when)
    assert codes == [130, 130], said
    assert "".join(said).count("error: stopped after step 3 of 6, which is saved") == 1
    saved = checkpoint.load(tmp_path / "run" / "last")["state"]
    assert (saved["step"], saved["validated"]) == (3, 0)
    assert ranks(2, tmp_path / "log", cubes, tmp_path / "run", loop())[0] == [0, 0]
    assert ranks(2, tmp_path / "log", cubes, tmp_path / "whole", loop())[0] == [0, 0]
    for name in ("last", "best", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_pre_training_trains_and_is_watched_on_two_ranks(store: Path, tmp_path: Path, objective: str) -> None:
    from tests.pretraining.test_run import NETWORK
    from tests.pretraining.test_run import SMALL as FEW

    words = [f"data={store}", f"objective={objective}", *FEW, "loop.steps=2", f"out={tmp_path / 'run'}"]
    words += [f"network_options.{option}" for option in NETWORK[objective]]
    codes, said = ranks(2, tmp_path / "log", pretrained, *words)
    assert codes == [0, 0], said
    assert said[1] == "" and said[0].count("validation after step 2") == 1
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 1
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(("scale", "factor"), [("linear", 4), ("sqrt", 2)])
def test_the_rate_is_scaled_by_the_patches_of_a_step(tmp_path: Path, scale: str, factor: float) -> None:
    def rate(folder: Path) -> float:
        return float(re.findall(r'"lr": ([\d.e-]+)', (folder / "metrics.jsonl").read_text())[0])

    optim = OptimSettings(lr=1e-3, warmup=0)
    few = loop(steps=1)
    assert ranks(1, tmp_path / "log", cubes, tmp_path / "one", few, nothing, none, optim)[0] == [0]
    more = few.model_copy(update={"accumulate": 2}), nothing, none, optim.model_copy(update={"scale": scale})
    assert ranks(2, tmp_path / "log", cubes, tmp_path / "run", *more)[0] == [0, 0]
    assert rate(tmp_path / "run") == pytest.approx(factor * rate(tmp_path / "one"))


def none() -> None:
    """Amid a validation."""


# ---- under torchrun itself


@pytest.mark.slow
def test_torchrun_is_all_that_it_takes(store: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "none.yaml"
    recipe.write_text("{}\n")
    words = ["-m", "unetrkit", "train", recipe, *SMALL, "loop.steps=2", f"out={tmp_path / 'run'}"]
    found = done(torchrun(*words, f"data={store}"))
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("swin_unetr_tiny on 3 cases") == found.stderr.count("next: unetrkit") == 1
    assert "Warning" not in found.stderr.replace("OMP_NUM_THREADS", "")
    assert checkpoint.load(tmp_path / "run" / "last")["ranks"] == 2
    wrong = done(torchrun(*words, "data=nowhere"))
    assert wrong.returncode != 0
    assert wrong.stderr.count("error: there is no store in") == 1
    wrong = done(torchrun(*words, f"data={store}", "--fast"))
    assert wrong.returncode != 0 and wrong.stderr.lower().count("error: no such option") == 1


@pytest.mark.slow
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).with_name("ending.py")
    for name, how in (("run", "killed"), ("whole", "alive")):
        begun = torchrun("--max-restarts=1", script, tmp_path / name, how)
        found = done(begun, timeout=280)
        assert found.returncode == 0, found.stderr
        if name == "run":
            assert "going on from step 6 of 12" in found.stderr
    for name in ("last", "best", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job(tmp_path: Path) -> None:
    found = done(torchrun(Path(__file__).with_name("ending.py"), tmp_path / "run", "hangs"), timeout=280)
    assert found.returncode != 0
    assert found.stderr.count(LOST) == 1


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_ends(tmp_path: Path) -> None:
    command = torchrun(Path(__file__).with_name("ending.py"), tmp_path / "run", "slow")
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as job:
        began = time.monotonic()
        while not (tmp_path / "run" / "at-1").exists() and time.monotonic() < began + 200:
            time.sleep(0.1)
        time.sleep(1)
        job.terminate()
        said = job.communicate(timeout=200)[1]
    assert job.returncode != 0
    found = re.findall(r"error: stopped after step (\d+) of 1000", said)
    assert found == [str(checkpoint.load(tmp_path / "run" / "last")["state"]["step"])], said
