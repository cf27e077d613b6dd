"""The loop: stopped, killed and resumed it ends where it would have; what is not finite stops it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.training.tiny import OPTIM, Cubes, measure, objective, run
from torch import nn

from unetrkit.errors import Interrupted, UserError
from unetrkit.memory import peak_memory
from unetrkit.training import checkpoint
from unetrkit.training.loop import LoopSettings


def loop(**changes: Any) -> LoopSettings:
    usual = {"steps": 20, "validate_every": 6, "save_every": 5, "log_every": 4, "device": "cpu", "amp": "off"}
    return LoopSettings(**(usual | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run; checkpoints are the same bytes where they hold the same values."""
    return {name: (folder / name).read_bytes() for name in ("last", "best", "metrics.jsonl", "exported")}


def at(moment: int, what: Callable[[], None]) -> Callable[[int], None]:
    return lambda number: what() if number == moment else None


def interrupt(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"accumulate": 3, "clip": 0.1},
        {"ema": 0.9, "seed": 7},
    ],
    ids=["float32", "bf16", "fp16", "accumulate", "ema"],
)
def test_stopped_and_resumed_equals_never_stopped_bitwise(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = loop(**changes)
    run(tmp_path / "whole", settings)
    seventh = 7 * settings.accumulate
    with pytest.raises(Interrupted, match="stopped after step 8 of 20"):
        run(tmp_path / "parts", settings, Cubes(before=at(seventh, interrupt)))
    capsys.readouterr()
    state = run(tmp_path / "parts", settings)
    assert "going on from step 8 of 20" in capsys.readouterr().err
    assert state.step == 20
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("step", [5, 6, 19])
def test_a_stop_before_a_save_or_a_validation_loses_neither(tmp_path: Path, step: int) -> None:
    run(tmp_path / "whole", loop())
    with pytest.raises(Interrupted, match=f"step {step + 1} of 20"):
        run(tmp_path / "parts", loop(), Cubes(before=at(step, interrupt)))
    run(tmp_path / "parts", loop())
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_stop_within_a_validation_abandons_it_and_repeats_it(tmp_path: Path) -> None:
    def interrupted(trained: nn.Module) -> dict[str, float]:
        interrupt(signal.SIGINT)
        raise AssertionError("went on")

    run(tmp_path / "whole", loop())
    with pytest.raises(Interrupted, match="step 6 of 20"):
        run(tmp_path / "parts", loop(), validate=interrupted)
    run(tmp_path / "parts", loop())
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_second_signal_ends_at_once_and_handlers_are_put_back(tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loop(), Cubes(before=at(7, twice)))
    assert checkpoint.load(tmp_path / "last")["state"]["step"] == 5
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_finished_run_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, loop())
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("[lb]*st")}
    before = contents(tmp_path)
    assert run(tmp_path, loop()) == first
    assert "has done its 20 steps already" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("[lb]*st")} == times


@pytest.mark.parametrize(
    "changes",
    [
        {"learner": {}},
        {"learner": []},
        {"state": {"x": 1}},
        {"state": None},
        {"state": {"step": "a"}},
        {"state": {"step": -5}},
        {"state": {"step": 21}},
        {"state": {"step": 2, "sums": [1]}},
        {"log": {}},
        {"log": None},
        {"learner": {"objective": {"network.0.weight": torch.zeros(1)}}},
    ],
    ids=str,
)
def test_a_whole_checkpoint_that_is_not_of_the_run_is_said_and_stays(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    run(tmp_path, loop())
    last = tmp_path / "last"
    checkpoint.save(last, checkpoint.load(last) | changes)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is not of this run"):
        run(tmp_path, loop())
    assert contents(tmp_path) == before


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(tmp_path: Path) -> None:
    def kill() -> None:
        raise OSError

    with pytest.raises(OSError):
        run(tmp_path, loop(log_every=1), Cubes(before=at(3, kill)))
    assert checkpoint.load(tmp_path / "last")["state"]["step"] == 0
    (tmp_path / "last").unlink()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="lost its checkpoints"):
        run(tmp_path, loop(log_every=1))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before != b""


def test_slow_steps_are_saved_by_the_clock_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "few", loop(save_every=100))
    monkeypatch.setattr("unetrkit.training.loop.SAVE_SECONDS", -1)
    seen: list[int] = []
    save = checkpoint.save_last

    def noting(folder: Path, state: dict[str, Any]) -> None:
        seen.append(state["state"]["step"])
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save_last", noting)
    run(tmp_path / "many", loop(save_every=100))
    assert seen == list(range(21))
    assert contents(tmp_path / "few") == contents(tmp_path / "many")


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, loop(seed=seed))
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a["last"] != c["last"]


def test_metrics_are_means_since_the_last_record(tmp_path: Path) -> None:
    run(tmp_path / "every", loop(log_every=1))
    run(tmp_path / "fourth", loop(log_every=4))

    def losses(name: str) -> dict[int, float]:
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return {r["step"]: r["loss"] for r in records if r["event"] == "training"}

    every, fourth = losses("every"), losses("fourth")
    assert sorted(fourth) == [4, 8, 12, 16, 20]
    assert fourth[8] == pytest.approx(sum(every[step] for step in (5, 6, 7, 8)) / 4)
    assert every[20] < 0.8 * every[1]


def test_validation_comes_at_its_steps_and_at_the_end_and_the_best_is_kept(tmp_path: Path) -> None:
    scores = iter([0.1, 0.5, 0.3, 0.2])
    state = run(tmp_path, loop(), validate=lambda trained: {"score": next(scores)})
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    measured = [(r["step"], r["score"]) for r in records if r["event"] == "validation"]
    assert measured == [(6, 0.1), (12, 0.5), (18, 0.3), (20, 0.2)]
    assert (state.best_step, state.best) == (12, {"score": 0.5})
    assert checkpoint.load(tmp_path / "best")["state"]["step"] == 12
    assert (tmp_path / "exported").read_text() == "12"


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    class Joined(Cubes):
        def __call__(self, start: int, stop: int):
            for number in range(start, stop):
                parts = list(Cubes()(2 * number, 2 * number + 2))
                yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    run(tmp_path / "two", loop(steps=3, accumulate=2), dropout=0)
    run(tmp_path / "one", loop(steps=3), Joined(size=4), dropout=0)
    two, one = (checkpoint.load(tmp_path / name / "last")["learner"]["objective"] for name in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


def test_the_average_is_what_is_validated_and_exported(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []
    settings = loop(steps=3, validate_every=1, save_every=1, ema=0.5)

    def look(trained: nn.Module) -> dict[str, float]:
        seen.append(trained.network[0].weight.detach().clone())
        return {"score": len(seen)}

    run(tmp_path / "a", settings, validate=look)
    run(tmp_path / "b", settings.model_copy(update={"steps": 2}), validate=measure)
    saved = checkpoint.load(tmp_path / "a" / "last")["learner"]
    weight = saved["objective"]["network.0.weight"]
    assert torch.equal(saved["average"]["module.network.0.weight"], seen[2])
    # after two updates the decay is min(0.5, 3/12)
    torch.testing.assert_close(seen[2], seen[1] * 0.25 + weight * 0.75)


def poisoned(numbers: set[int], times: int = 10**6, before: Callable[[int], None] = lambda n: None) -> Cubes:
    """Batches of which some hold a NaN, the first so many times that they are made."""
    left = dict.fromkeys(numbers, times)

    class Poisoned(Cubes):
        def __call__(self, start: int, stop: int):
            for number, batch in enumerate(super().__call__(start, stop), start):
                if left.get(number, 0):
                    left[number] -= 1
                    batch["image"][0, 0, 3, 3, 3] = float("nan")
                yield batch

    return Poisoned(before=before)


def record(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["event"] == event]


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_step_that_is_not_finite_is_left_out_and_its_cases_named(
    tmp_path: Path, amp: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = run(tmp_path, loop(amp=amp, log_every=1), poisoned({12, 14}))
    said = capsys.readouterr().err
    assert "warning: the loss is not finite at step 12, left out: cases `case12`" in said
    assert "step 14, left out: cases `case14`" in said
    assert (state.step, state.skipped, state.halved) == (20, 0, 0)
    assert [r["step"] for r in record(tmp_path, "training") if "loss" not in r] == [13, 15]
    saved = checkpoint.load(tmp_path / "last")["learner"]["objective"]
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_steps_left_out_are_left_out_again_where_a_run_goes_on(tmp_path: Path) -> None:
    run(tmp_path / "whole", loop(), poisoned({8, 9, 10, 13}))
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", loop(), poisoned({8, 9, 10, 13}, before=at(9, interrupt)))
    run(tmp_path / "parts", loop(), poisoned({8, 9, 10, 13}))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_too_many_in_a_row_go_back_to_the_last_checkpoint_at_half_the_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = loop(skips=3, log_every=1)
    state = run(tmp_path, settings, poisoned({11, 12, 13, 14}, times=1))
    assert (state.step, state.halved) == (20, 1)
    assert (
        "3 steps in a row were not finite: going back to step 10, at a rate of 1/2" in capsys.readouterr().err
    )
    run(tmp_path / "plain", settings)
    plain = {one["step"]: one["lr"] for one in record(tmp_path / "plain", "training")}
    rates = [(one["step"], one["lr"] / plain[one["step"]]) for one in record(tmp_path, "training")]
    assert rates == [(step, 1.0 if step <= 10 else 0.5) for step in range(1, 21)]


def test_what_stays_not_finite_ends_the_run_with_what_was_tried(tmp_path: Path) -> None:
    always = set(range(12, 20))
    with pytest.raises(
        UserError, match="at step 15, after going back 2 times to half the rate: rate"
    ) as found:
        run(tmp_path, loop(skips=3), poisoned(always))
    assert "`case15`" in found.value.message
    assert checkpoint.load(tmp_path / "last")["state"]["step"] == 10


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_loss_that_is_not_finite_stops_and_poisons_nothing(tmp_path: Path, amp: str) -> None:
    with pytest.raises(UserError, match=r"the loss is not finite at step 12: rate 0\.00.*`case12`") as found:
        run(tmp_path, loop(amp=amp, skips=0), poisoned({12}))
    assert "optim.lr" in found.value.hint
    saved = checkpoint.load(tmp_path / "last")
    assert saved["state"]["step"] == 10
    assert all(torch.isfinite(value).all() for value in saved["learner"]["objective"].values())


def test_a_gradient_that_is_not_finite_stops_before_a_weight_changes(tmp_path: Path) -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"loss": self.weight.abs().sqrt().sum()}  # 0, with an infinite slope

    from unetrkit.training.loop import fit

    rooted = Rooted()
    with pytest.raises(UserError, match="the gradient is not finite at step 0"):
        fit(
            rooted,
            Cubes(),
            tmp_path,
            loop(skips=0),
            OPTIM,
            validate=lambda trained, step, show: measure(trained),
            better="score",
            export=lambda best, state: None,
        )
    assert rooted.weight.item() == 0


@pytest.mark.parametrize("moment", [0, 3])
def test_too_little_memory_names_what_to_lower_and_other_errors_stay(tmp_path: Path, moment: int) -> None:
    with pytest.raises(UserError, match=f"the computer's memory is too small for step {moment}") as found:
        run(tmp_path / "a", loop(), Cubes(before=at(moment, lambda: torch.empty(2**50))))
    assert "`sampling.batch_size=1` with `loop.accumulate=2`" in found.value.hint
    assert "a smaller `sampling.patch_size`" in found.value.hint
    used = float(re.search(r"until then it took (\S+) GB$", found.value.message)[1]) * 1e9
    assert used == pytest.approx(peak_memory(), rel=0.01)
    with pytest.raises(RuntimeError, match="shape"):
        run(tmp_path / "b", loop(), Cubes(before=at(moment, lambda: torch.empty(6).view(4))))


def test_too_little_memory_for_one_crop_names_the_settings_of_crops(tmp_path: Path) -> None:
    crops = Cubes(1, at(0, lambda: torch.empty(2**50)), ("crops.batch_size", "crops.patch_size"))
    with pytest.raises(UserError, match="memory is too small") as found:
        run(tmp_path, loop(), crops)
    assert "a smaller `crops.patch_size`" in found.value.hint and "batch_size" not in found.value.hint


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    run(tmp_path / "free", loop(steps=2, log_every=1))
    run(tmp_path / "clipped", loop(steps=2, log_every=1, clip=1e-12))
    start = objective().state_dict()

    def moved(name: str) -> float:
        end = checkpoint.load(tmp_path / name / "last")["learner"]["objective"]
        return max(float((end[key] - start[key]).abs().max()) for key in start)

    # a gradient far below Adam's epsilon of 1e-8 hardly moves a weight
    assert moved("free") > 1e-3
    assert moved("clipped") < 1e-5


def test_a_disk_that_is_full_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(UserError, match="GB free, and checkpoints need"):
        run(tmp_path, loop())


@pytest.mark.parametrize("moment", [7, 13])
def test_a_disk_that_fills_up_costs_nothing_that_was_saved(tmp_path: Path, moment: int) -> None:
    run(tmp_path / "whole", loop())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = Cubes(before=at(moment, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))))
    try:
        with pytest.raises(UserError, match="cannot write") as found:
            run(tmp_path / "run", loop(), full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free some space" in found.value.hint
    assert checkpoint.load(tmp_path / "run" / "last")["state"]["step"] == moment // 5 * 5
    assert checkpoint.load(tmp_path / "run" / "best")["state"]["step"] == moment // 6 * 6
    assert not any(path.name.endswith((".tmp", ".new")) for path in (tmp_path / "run").iterdir())
    run(tmp_path / "run", loop())
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch finds no GPU"):
        run(tmp_path, loop(device="cuda"))


KILLED = """
import hashlib, os, random, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # which an optimizer's first step imports: once here, not in every child
from tests.training.tiny import run
from unetrkit.training.loop import LoopSettings
torch.set_num_threads(1)
settings = LoopSettings(steps=50, validate_every=7, save_every=5, log_every=4, device="cpu", ema=0.9)

def child(folder):
    process = os.fork()
    if process == 0:
        sys.stderr = open(os.devnull, "w")
        run(folder, settings)
        os._exit(0)
    return process

def moment(folder):
    try:
        return (folder / "last").stat().st_mtime_ns
    except FileNotFoundError:
        return 0

def hashes(folder):
    return [hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("last", "best", "metrics.jsonl")]

root, random = Path(sys.argv[1]), random.Random(0)
os.waitpid(child(root / "whole"), 0)
kills, status, resumed = 0, 1, 0
while status != 0:
    process = child(root / "killed")
    before = moment(root / "killed")
    while kills < 6 and moment(root / "killed") == before:  # then between two saves, or within the next
        time.sleep(0.0005)
    if kills < 6:
        time.sleep(random.uniform(0, 0.04))
        os.kill(process, signal.SIGKILL)
    resumed += before > 0
    status = os.waitpid(process, 0)[1]
    kills += status != 0
print(kills, resumed, hashes(root / "whole") == hashes(root / "killed"))
"""


GROUP = """
import sys
import time
import time
from pathlib import Path
import torch
from torch.utils.data import DataLoader
from tests.training.tiny import Cubes, run
from unetrkit.errors import Interrupted
from unetrkit.training.loop import LoopSettings

class Loaded(Cubes):
    def __call__(self, start, stop):
        made = [next(Cubes()(n, n + 1)) for n in range(8)] * 1000
        yield from DataLoader(made, batch_size=None, num_workers=2, multiprocessing_context="fork")

try:
    settings = LoopSettings(steps=5000, device="cpu")
    run(Path(sys.argv[1]), settings, Loaded(before=lambda n: None))
except Interrupted as stopped:
    print(stopped.message)
    raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_every_process_of_a_job_ends_the_step_and_them(tmp_path: Path, number: int) -> None:
    root = Path(__file__).parents[2]
    job = subprocess.Popen(
        [sys.executable, "-c", GROUP, str(tmp_path / "run")],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    began = time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < began + 60:
        time.sleep(0.05)
    os.killpg(job.pid, number)
    said, problems = job.communicate(timeout=20)
    assert said.startswith("stopped after step"), problems
    step = checkpoint.load(tmp_path / "run" / "last")["state"]["step"]
    assert f"stopped after step {step} of 5000" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(job.pid, 0)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_bitwise_the_same(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    kills, resumed, same = done.stdout.split()
    assert int(kills) >= 3 and int(resumed) >= 3 and same == "True", done.stdout
