"""A training run: from a prepared store to a folder that goes on, repeats itself and predicts."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue
from torch import nn

import unetrkit
from unetrkit.config import Settings, flatten, load_recipe, to_yaml
from unetrkit.data.augment import AugmentSettings
from unetrkit.data.files import alone, atomic_write, read_json, write_problems
from unetrkit.data.folds import split_cases
from unetrkit.data.loader import batches
from unetrkit.data.sampling import SamplingSettings, case_at
from unetrkit.data.store import Store
from unetrkit.errors import UserError
from unetrkit.inference.model import load_model, save_model
from unetrkit.inference.predict import PredictSettings
from unetrkit.networks import build
from unetrkit.training import checkpoint
from unetrkit.training.initial import MINIMUM, begin, open_initial, provenance
from unetrkit.training.learner import Batch, build_learner, device_of
from unetrkit.training.log import say
from unetrkit.training.loop import LoopSettings, State, fit
from unetrkit.training.losses import LossSettings
from unetrkit.training.optim import OptimSettings, learning_rate
from unetrkit.training.segmentation import Segmentation
from unetrkit.training.validation import Validation, ValidationSettings

# what may change when a run goes on: where things are and how fast, not what is computed
FREE = {"data", "out", "loop.device", "loop.workers", "loop.save_every", "loop.log_every"}
FREE |= {"init_minimum", "init_trust", "loop.trackers"}

LOCK = ".train.lock"


class TrainSettings(Settings):
    """Everything about a training run; a recipe states what differs from these."""

    # the store that `unetrkit prepare` made
    data: Path
    # the run's folder; null: runs/NETWORK-STORE
    out: Path | None = None
    network: str
    # what the network's own entry in `networks` takes
    network_options: dict[str, JsonValue] = Field(default_factory=dict)
    # published weights, a MONAI bundle, or a model, run or checkpoint of ours; null: random weights
    init: Path | None = None
    # the least share of the encoder's parameters that must come from there
    init_minimum: float = Field(default=MINIMUM, ge=0, le=1)
    # let torch compile a TorchScript archive that cannot be read otherwise; its code may run
    init_trust: bool = False
    # the size in voxels that its position embeddings were trained at, where it does not tell
    init_size: tuple[int, int, int] | None = None
    # null: the data list's own validation cases, else fold 0
    fold: int | None = Field(default=None, ge=0)
    sampling: SamplingSettings = SamplingSettings()
    augment: AugmentSettings = AugmentSettings()
    loss: LossSettings = LossSettings()
    optim: OptimSettings = OptimSettings()
    loop: LoopSettings = LoopSettings()
    validation: ValidationSettings = ValidationSettings()


@dataclass(frozen=True)
class Patches:
    """The batches of a run, by their number."""

    store: Path
    names: tuple[str, ...]
    settings: TrainSettings

    @property
    def size(self) -> int:
        return self.settings.sampling.batch_size

    def __call__(self, start: int, stop: int) -> Generator[Batch]:
        yield from batches(
            self.store,
            self.names,
            self.settings.sampling,
            self.settings.augment,
            seed=self.settings.loop.seed,
            steps=range(start, stop),
            workers=self.settings.loop.workers,
        )

    def cases(self, number: int) -> list[str]:
        sampling, seed = self.settings.sampling, self.settings.loop.seed
        first, stop = number * sampling.batch_size, (number + 1) * sampling.batch_size
        positions = sorted({patch // sampling.patches_per_case for patch in range(first, stop)})
        return [self.names[case_at(seed, position, len(self.names))] for position in positions]


def train(settings: TrainSettings) -> State:
    """Trains a network, or goes on where the same command stopped; a finished run stays as it is.

    What the weights of `init` need to mean what they meant becomes an option of the network, unless
    `network_options` says otherwise. A run that goes on does not read them again.

    Writes config.yaml (all settings), run.json (plan, cases and their hashes), metrics.jsonl, the checkpoints
    `last` and `best`, and `model`, the best network with its plan: enough to predict with. Raises UserError
    for what the user can correct and Interrupted for Ctrl-C or SIGTERM. A damaged `model` is written again.
    """
    store = Store.open(settings.data)
    out = settings.out or Path("runs") / f"{settings.network}-{settings.data.resolve().name}"
    init = settings.init and settings.init.resolve()
    settings = settings.model_copy(
        update={"data": settings.data.resolve(), "out": out.resolve(), "init": init}
    )
    training, validation = split_cases(store.cases, settings.fold)
    plan, patch = store.plan, settings.sampling.patch_size or store.plan.patch_size
    torch.manual_seed(settings.loop.seed)
    begun, initial, options = _begun_with(out), None, dict(settings.network_options)
    if init is not None and begun is None:
        initial = open_initial(init, trust=settings.init_trust, size=settings.init_size)
        options = initial.options(settings.network) | options
    elif begun is not None:
        options = begun["options"] | options
    network = build(settings.network, len(plan.channels), len(plan.classes), patch, options)
    if initial is not None:
        audit = begin(network, settings.network, initial, settings.init_minimum)
        begun = provenance(initial, audit, initial.options(settings.network))
    device = device_of(settings.loop.device)
    measured = validation[: settings.validation.cases]
    measure = Validation(
        plan,
        measured,
        PredictSettings(
            overlap=settings.validation.overlap,
            window=patch,
            device=device.type,
        ),
    )
    names = tuple(case.name for case in training)
    record = {
        "plan": store.plan_hash,
        "training": names,
        "validation": [case.name for case in validation],
        "sources": {case.name: case.source for case in training + validation},
        **({"init": begun} if begun else {}),
    }

    def export(objective: nn.Module, state: State) -> None:
        save_model(
            out / "model",
            objective.get_submodule("network"),
            name=settings.network,
            image_size=patch,
            options=options,
            plan=plan,
            origin={
                "run": out.name,
                "fold": settings.fold,
                "step": state.best_step,
                **state.best,
                **({"init": begun} if begun else {}),
            },
        )

    _make_folder(out)
    with alone(out / LOCK, f"another process is training in `{out}`"):
        _open(out, settings, record)
        some = f"{len(measured)} of " if len(measured) < len(validation) else ""
        say(f"{settings.network} on {len(training)} cases, validated on {some}{len(validation)}, in {out}")
        if initial is not None:
            for line in (f"begins with `{init}`", *audit.summary(), *audit.notes):
                say(line)
        objective = Segmentation(network, settings.loss)
        state = fit(
            objective,
            Patches(settings.data, names, settings),
            out,
            settings.loop,
            settings.optim,
            validate=lambda objective, show: measure(objective.get_submodule("network"), show),
            better="dice",
            export=export,
        )
        try:
            load_model(out / "model")
        except UserError as problem:
            say(f"{problem.message}; writing it again from `{out / 'best'}`")
            learner = build_learner(objective, settings.loop, settings.optim)
            learner.load_state_dict(checkpoint.load(out / "best")["learner"])
            export(learner.subject, state)
    say(f"finished {state.step} steps; the best, dice {state.best['dice']:.4f}, is of step {state.best_step}")
    say(f"next: unetrkit predict SCANS PREDICTIONS --model {out}")
    return state


def _begun_with(out: Path) -> dict[str, Any] | None:
    """What a run that has a checkpoint began with, as its record says; None for random weights."""
    record = out / "run.json"
    if not record.exists() or not any((out / name).exists() for name in ("last", "previous")):
        return None
    began = read_json(record)
    found = began.get("init") if isinstance(began, dict) else None
    return found if isinstance(found, dict) and isinstance(found.get("options"), dict) else None


def _make_folder(out: Path) -> None:
    """Raises UserError where something else than a run is there already."""
    if out.exists() and not (out / "config.yaml").exists():
        if not out.is_dir() or any(not file.name.startswith(".") for file in out.iterdir()):
            raise UserError(f"`{out}` holds something that is not a run", hint="name a new folder as `out`")
    with write_problems(out):
        out.mkdir(parents=True, exist_ok=True)


def _open(out: Path, settings: TrainSettings, made_of: Mapping[str, object]) -> None:
    """Begins a new run, or goes on with the same. Raises UserError for any other."""
    config, record = out / "config.yaml", out / "run.json"
    if config.exists():
        _same_run(load_recipe(TrainSettings, config), settings, out)
        if not record.exists() and any((out / name).exists() for name in ("last", "previous")):
            raise UserError(
                f"`{record}`, which says what the run was trained on, is missing",
                hint="restore it, or begin a new run with another `out`",
            )
        began = read_json(record) if record.exists() else made_of
        for name, value in json.loads(json.dumps({**made_of})).items():
            if name == "init" and isinstance(began, dict) and began.get(name) != value:
                raise UserError(
                    f"`{settings.init}` is not the file that the run in `{out}` began with",
                    hint="another `out` begins a new run",
                )
            if not isinstance(began, dict) or began.get(name) != value:
                what = {"plan": "another plan", "sources": "other images or labels"}.get(name)
                what = what or f"other {name} cases"
                raise UserError(
                    f"`{settings.data}` has {what} than when the run in `{out}` began",
                    hint="another `out` begins a new run",
                )
    atomic_write(config, to_yaml(settings).encode())
    atomic_write(record, json.dumps({**made_of, "unetrkit": unetrkit.__version__}, indent=1).encode())


def _same_run(before: TrainSettings, now: TrainSettings, out: Path) -> None:
    """Settings that change what is computed must be the same; a longer run must begin with the same rates."""
    old, new = (flatten(settings.model_dump(mode="json")) for settings in (before, now))
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in FREE]
    if differing == ["loop.steps"]:
        steps, more = before.loop.steps, now.loop.steps
        same = (learning_rate(s, steps, now.optim) == learning_rate(s, more, now.optim) for s in range(steps))
        if more > steps and all(same):
            return
        raise UserError(
            f"`{out}` holds a run of {steps} steps, not of {more}",
            hint="it can go on for longer if its `optim.schedule` is constant; else choose another `out`",
        )
    if differing:
        name = differing[0]
        raise UserError(
            f"`{out}` holds another run: its `{name}` is {_json(old.get(name))}, not {_json(new.get(name))}",
            hint="another `out` begins a new run; with its own settings this one goes on",
        )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
