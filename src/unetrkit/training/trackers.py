"""The records of `metrics.jsonl` in TensorBoard, MLflow or Weights & Biases too, where they are asked for."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field

from unetrkit.config import flatten, listed, read_recipe
from unetrkit.data.files import atomic_write, read_start
from unetrkit.errors import MissingExtra
from unetrkit.training.log import say

TrackerName = Literal["tensorboard", "mlflow", "wandb"]
# on the command line names are no list
Trackers = Annotated[
    tuple[TrackerName, ...],
    BeforeValidator(listed),
    Field(description="tensorboard, mlflow, wandb, or several: `loop.trackers=tensorboard,wandb`"),
]
Mirror = Callable[[int, str, Mapping[str, float]], None]  # step, event, values
RECORD = "trackers.json"  # of each tracker: the name of its run, and the last step sent of each event


class Tracker(NamedTuple):
    run: str  # the tracker's own name of the run
    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]
    # whether what was logged outlives a killed process; else it is sent again
    lasting: bool = True


def require_packages(names: Sequence[TrackerName]) -> None:
    """Raises MissingExtra where a tracker's package is not installed."""
    for asked in names:
        served = asked == "mlflow" and "MLFLOW_TRACKING_URI" in os.environ
        # mlflow-skinny, which Azure ML's jobs have, writes to a server alone and needs no database
        if not all(find_spec(package) for package in PACKAGES[asked][: 1 if served else None]):
            raise MissingExtra(f"`loop.trackers`: {asked}", asked)


@contextmanager
def mirrored(names: Sequence[TrackerName], folder: Path) -> Iterator[Mirror]:
    """A function that sends a record to each tracker, `loss` of a training record as `training/loss`.

    Everything is written inside the run's `folder`, unless the tracker's own environment variables name a
    server. A run that goes on appends to the same run of the tracker; what metrics.jsonl holds and the
    tracker does not is sent first, and records that are repeated are not sent again: steps never go back.
    A tracker that fails is warned of once and left alone: training goes on. Only the process of rank 0 sends.
    """
    require_packages(names)
    wanted: list[str] = list(dict.fromkeys(names)) if os.environ.get("RANK", "0") == "0" else []
    saved = _read(folder / RECORD)
    sent: dict[str, dict[str, Any]] = {name: saved.setdefault(name, {}).copy() for name in wanted}
    trackers: dict[str, Tracker] = {}

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # whatever a tracker raises must not end days of training
            trackers.pop(name, None)
            why = re.sub(r"//[^/\s]*@", "//", str(error))  # an address may hold a password
            say(f"warning: {name} does not take the run's records: {why}; training goes on without it")
            return None

    def save(name: str) -> None:
        saved[name] = sent[name].copy()
        atomic_write(folder / RECORD, json.dumps(saved, indent=1).encode())

    def send(step: int, event: str, values: Mapping[str, float | None]) -> None:
        # finite values only: not every tracker knows NaN
        named = {f"{event}/{key}": v for key, v in values.items() if v is not None and math.isfinite(v)}
        for name, tracker in list(trackers.items()):
            if step > sent[name].get(event, 0):
                attempt(name, partial(tracker.log, step, named))
                sent[name][event] = step
                if tracker.lasting:
                    save(name)

    for name in wanted:
        opening = partial(OPEN[name], folder, sent[name].get("run"))
        opened = attempt(name, lambda opening=opening: opening(_settings(folder)))  # type: ignore[misc]
        if opened:
            trackers[name] = opened
            sent[name]["run"] = opened.run
            save(name)
    for line in _records(folder / "metrics.jsonl") if trackers else ():
        send(line.pop("step"), line.pop("event"), line)
    try:
        yield send
    finally:
        for name, tracker in list(trackers.items()):
            attempt(name, tracker.close)
            if name in trackers:
                save(name)


def _tensorboard(folder: Path, run: str | None, settings: dict[str, object]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    if run is None:
        writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()), 0)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # by itself it waits two minutes, which a killed process does not have

    return Tracker("tensorboard", log, writer.close)


def _mlflow(folder: Path, run: str | None, settings: dict[str, object]) -> Tracker:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    # a job of Azure ML says where its server is, and which run is its own. Of the stores in a folder, the
    # one of plain files refuses to be written since MLflow 3.7
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db")
    given = os.environ.get("MLFLOW_RUN_ID")
    if run is None:
        experiment = client.get_experiment_by_name("unetrkit")
        number = experiment.experiment_id if experiment else None
        if given is None and number is None:
            number = client.create_experiment("unetrkit", artifact_location=(folder.resolve()).as_uri())
        run = given or client.create_run(number, run_name=folder.resolve().name).info.run_id
        pairs = [Param(name, str(value)[:500]) for name, value in settings.items()]
        for k in range(0, len(pairs), 100):  # MLflow takes a hundred at a time
            client.log_batch(run, params=pairs[k : k + 100])

    def log(step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        # of other characters MLflow takes none
        named = [Metric(re.sub(r"[^\w\-./ :]", "_", key), v, now, step) for key, v in values.items()]
        client.log_batch(run, metrics=named)

    return Tracker(run, log, lambda: None if given else client.set_terminated(run))


def _wandb(folder: Path, run: str | None, settings: dict[str, object]) -> Tracker:
    import wandb

    # nothing leaves the machine, and nothing asks for an account, before the user says WANDB_MODE=online
    mode = os.environ.get("WANDB_MODE", "offline")
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "unetrkit"),
        name=folder.resolve().name,
        dir=folder,
        id=run,
        resume="allow" if mode == "online" else None,
        mode=mode,
        config=settings,
        settings=wandb.Settings(silent=True, console="off"),
    )
    # a validation comes after the training record of the same step: as steps of its own, never an order
    opened.define_metric("step")
    opened.define_metric("*", step_metric="step")

    def log(step: int, values: dict[str, float]) -> None:
        opened.log({**values, "step": step})

    # offline, blocks of 32 KB are written when they are full
    return Tracker(opened.id, log, opened.finish, lasting=mode == "online")


PACKAGES = {"tensorboard": ["tensorboard"], "mlflow": ["mlflow", "sqlalchemy"], "wandb": ["wandb"]}
OPEN = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}


def _settings(folder: Path) -> dict[str, object]:
    recipe = folder / "config.yaml"
    return flatten(read_recipe(recipe)) if recipe.exists() else {}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Those of a run that goes on, up to a torn or a damaged line, which `Metrics` sees to."""
    for line in read_start(path, -1).splitlines(keepends=True) if path.exists() else ():
        try:
            record = json.loads(line)
            known = line.endswith(b"\n") and {"step", "event"} <= record.keys()
        except (ValueError, AttributeError):
            known = False
        if not known:
            return
        yield record


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What was sent; nothing where the file is missing or damaged, which costs repeated records at most."""
    try:
        return {name: dict(entry) for name, entry in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
