"""Records in the trackers: each once, in order, over kills and resumes; a tracker never ends a run."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from training.tiny import Cubes, run
from unetrkit.config import apply_overrides
from unetrkit.errors import UserError
from unetrkit.training import trackers
from unetrkit.training.loop import LoopSettings
from unetrkit.training.trackers import Tracker, mirrored

SETTINGS = LoopSettings(
    steps=12, validate_every=6, save_every=4, log_every=2, workers=0, device="cpu", trackers=("wandb",)
)


@pytest.fixture
def fake(monkeypatch):
    """A tracker that remembers what it was sent, in place of wandb."""
    sent: list[tuple[int, dict[str, float]]] = []
    opened: list[str | None] = []

    def open_fake(folder, name, settings):
        opened.append(name)
        return Tracker("the-run", lambda step, values: sent.append((step, values)), lambda: None)

    monkeypatch.setitem(trackers.OPEN, "wandb", open_fake)
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ())
    return sent, opened


def records(folder: Path) -> list[tuple[int, dict[str, float]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], {f"{line['event']}/{k}": v for k, v in line.items() if k not in ("step", "event")})
        for line in lines
    ]


def test_every_record_is_sent_once_over_a_kill_and_a_resume(tmp_path, fake):
    sent, opened = fake

    def killed(number: int) -> None:
        if number == 11:
            raise KeyboardInterrupt  # nothing is saved: steps 9 to 11 are done again

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", SETTINGS, Cubes(before=killed))
    assert [step for step, _ in sent][-1] == 10
    run(tmp_path / "run", SETTINGS)
    assert sent == records(tmp_path / "run")
    steps = [step for step, _ in sent]
    assert steps == sorted(steps) and len(steps) == 6 + 2
    assert opened == [None, "the-run"]


def test_a_tracker_that_fails_is_warned_of_once_and_training_ends_well(tmp_path, fake, monkeypatch, capsys):
    def broken(step, values):
        raise ConnectionError("https://me:secret@host/api: the server is gone")

    monkeypatch.setitem(
        trackers.OPEN, "wandb", lambda folder, name, settings: Tracker("x", broken, lambda: None)
    )
    assert run(tmp_path / "run", SETTINGS).step == 12
    printed = capsys.readouterr().err
    assert printed.count("https://host/api: the server is gone") == 1 and "secret" not in printed


def test_a_tracker_that_does_not_open_does_not_stop_training(tmp_path, fake, monkeypatch, capsys):
    def refuses(folder, name, settings):
        raise OSError("no login")

    monkeypatch.setitem(trackers.OPEN, "wandb", refuses)
    assert run(tmp_path / "run", SETTINGS).step == 12
    assert capsys.readouterr().err.count("no login") == 1


def test_a_tracker_that_is_asked_for_later_gets_the_history(tmp_path, fake):
    half = SETTINGS.model_copy(update={"trackers": (), "validate_every": 12})

    def stopped(number: int) -> None:
        if number == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", half, Cubes(before=stopped))
    run(tmp_path / "run", half.model_copy(update={"trackers": ("wandb",)}))
    assert fake[0] == records(tmp_path / "run") and len(fake[0]) == 7


def test_what_a_killed_process_took_along_is_sent_again(tmp_path, fake, monkeypatch):
    kept: list[int] = []
    forgetful = Tracker("x", lambda step, values: kept.append(step), lambda: None, lasting=False)
    monkeypatch.setitem(trackers.OPEN, "wandb", lambda folder, name, settings: forgetful)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "event": "training", "loss": null}\n{"step": 2, "ev')
    mirror = mirrored(("wandb",), tmp_path)
    mirror.__enter__()(2, "training", {"loss": 1.0})  # and killed: never left
    with mirrored(("wandb",), tmp_path):
        pass
    with mirrored(("wandb",), tmp_path):
        pass
    assert kept == [1, 2, 1]


def test_a_record_without_trackers_is_the_same_bytes(tmp_path, fake):
    run(tmp_path / "with", SETTINGS)
    run(tmp_path / "without", SETTINGS.model_copy(update={"trackers": ()}))
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]
    assert not (tmp_path / "without" / trackers.RECORD).exists()


def test_only_rank_0_sends(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with mirrored(("wandb",), tmp_path) as mirror:
        mirror(1, "training", {"loss": 1.0})
    assert fake == ([], []) and not list(tmp_path.iterdir())


def test_what_is_not_finite_is_left_out(tmp_path, fake):
    with mirrored(("wandb",), tmp_path) as mirror:
        mirror(3, "validation", {"dice": math.nan, "dice/liver": 0.5})
    assert fake[0] == [(3, {"validation/dice/liver": 0.5})]


def test_a_package_that_is_missing_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "mlflow", ("not_installed_anywhere",))
    with pytest.raises(UserError, match="needs the `mlflow` extra") as caught:
        run(tmp_path / "run", SETTINGS.model_copy(update={"trackers": ("mlflow",)}))
    assert caught.value.hint == "pip install 'unetrkit[mlflow]'"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_server_of_mlflow_needs_no_database_here(tmp_path, fake, monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "mlflow", ("json", "not_installed_anywhere"))
    monkeypatch.setitem(trackers.OPEN, "mlflow", trackers.OPEN["wandb"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with mirrored(("mlflow",), tmp_path) as mirror:
        mirror(1, "training", {"loss": 1.0})
    assert len(fake[0]) == 1


def test_one_tracker_or_several_on_the_command_line():
    assert apply_overrides(LoopSettings, ["trackers=wandb"]).trackers == ("wandb",)
    assert apply_overrides(LoopSettings, ["trackers=tensorboard,mlflow"]).trackers == (
        "tensorboard",
        "mlflow",
    )
    with pytest.raises(UserError, match="neptune"):
        apply_overrides(LoopSettings, ["trackers=neptune"])


def in_a_process(folder: Path, name: str, *, upto: int, die: bool = False) -> None:
    """Sends a record for each step to a real tracker, as a run would, in a process that may be killed."""
    code = f"""
    import os, signal
    from pathlib import Path
    from unetrkit.training.log import Metrics
    from unetrkit.training.trackers import mirrored
    folder = Path({str(folder)!r})
    path = folder / "metrics.jsonl"
    with mirrored(("{name}",), folder) as mirror, Metrics(path, {{}}, None, mirror) as out:
        for step in range(1, {upto} + 1):
            out.write(step, "training", {{"loss": 1 / step}})
            out.write(step, "validation", {{"dice/IVC (vein)": step / 10}})
        if {die}:
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == (-9 if die else 0), done.stderr
    assert "warning: " + name not in done.stderr, done.stderr


def tensorboard_history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def mlflow_history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    warnings.simplefilter("ignore")  # of its own database library
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("unetrkit").experiment_id])
    assert len(runs) == 1 and runs[0].data.params["optim.lr"] == "0.001"
    names = runs[0].data.metrics
    return {n: [(m.step, m.value) for m in client.get_metric_history(runs[0].info.run_id, n)] for n in names}


def wandb_history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from wandb.proto import wandb_internal_pb2

    history: dict[str, list[tuple[int, float]]] = {}
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # one run, in as many parts as it was begun
    for file in files:
        for content in leveldb_records(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            items = record.history.item
            values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in items}
            for name in values.keys() & {"training/loss", "validation/dice/IVC (vein)"}:
                history.setdefault(name, []).append((values["step"], values[name]))
    return history


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's form, whose header of 7 bytes is part of the first block."""
    position, record = 7, b""
    while position + 7 <= len(content) + 7:
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position - 7 + 4 : position])
        record += content[position : position + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.parametrize(
    ("name", "history", "organ"),
    [
        ("tensorboard", tensorboard_history, "validation/dice/IVC (vein)"),
        ("mlflow", mlflow_history, "validation/dice/IVC _vein_"),
        ("wandb", wandb_history, "validation/dice/IVC (vein)"),
    ],
)
def test_a_real_tracker_holds_every_record_once_after_a_kill(tmp_path, monkeypatch, name, history, organ):
    if not all(find_spec(package) for package in trackers.PACKAGES[name]):
        pytest.skip(f"{name} is not installed")
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "config.yaml").write_text("optim: {lr: 1e-3}\n")
    in_a_process(tmp_path, name, upto=3, die=True)
    in_a_process(tmp_path, name, upto=6)
    found = history(tmp_path)
    assert [step for step, _ in found["training/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["training/loss"]] == pytest.approx([1 / s for s in range(1, 7)])
    assert [value for _, value in found[organ]] == pytest.approx([s / 10 for s in range(1, 7)])
