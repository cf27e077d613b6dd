"""A training run: from a prepared store to a folder that goes on, repeats itself and predicts."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, JsonValue
from torch import nn

from unetrkit.config import Settings
from unetrkit.data.augment import AugmentSettings
from unetrkit.data.copies import copy_of
from unetrkit.data.files import read_json
from unetrkit.data.folds import first_cases, split_cases
from unetrkit.data.loader import Steps, batches
from unetrkit.data.remote import Place, placed, spelt
from unetrkit.data.sampling import SamplingSettings
from unetrkit.data.store import Store
from unetrkit.errors import UserError
from unetrkit.inference.model import load_model, save_model
from unetrkit.inference.predict import PredictSettings
from unetrkit.networks import build
from unetrkit.networks.scaled import seen_as
from unetrkit.ranks import this_rank
from unetrkit.training.folder import Job, carry_out
from unetrkit.training.initial import LONGEST, MINIMUM, begin, open_initial, provenance
from unetrkit.training.learner import Batch, device_of
from unetrkit.training.log import say
from unetrkit.training.loop import LoopSettings, State
from unetrkit.training.losses import LossSettings
from unetrkit.training.optim import OptimSettings
from unetrkit.training.segmentation import Segmentation
from unetrkit.training.validation import Validation, ValidationSettings

Axis = Annotated[int, Field(ge=1, le=LONGEST)]


class TrainSettings(Settings):
    """Everything about a training run; a recipe states what differs from these."""

    # the store that `unetrkit prepare` made; it, the run and `init` may be the URLs of an object store
    data: Place
    # the run's folder; null: runs/NETWORK-STORE
    out: Place | None = None
    network: str
    # what the network's own entry in `networks` takes
    network_options: dict[str, JsonValue] = Field(default_factory=dict)
    # published weights, a MONAI bundle, or a model, run or checkpoint of ours; null: random weights
    init: Place | None = None
    # the least share of the encoder's parameters that must come from there
    init_minimum: float = Field(default=MINIMUM, ge=0, le=1)
    # let torch compile a TorchScript archive that cannot be read otherwise; its code may run
    init_trust: bool = False
    # the size in voxels that its position embeddings were trained at, where it does not tell
    init_size: tuple[Axis, Axis, Axis] | None = None
    # null: the data list's own validation cases, else fold 0
    fold: int | None = Field(default=None, ge=0)
    # the first so many of the training cases, in the data list's order; null: all
    cases: int | None = Field(default=None, ge=1)
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
            rank=this_rank(),
        )

    @property
    def lower(self) -> tuple[str, str]:
        sampling = self.settings.sampling
        return "sampling.batch_size", f"sampling.{'network' if sampling.network_size else 'patch'}_size"

    def cases(self, number: int) -> list[str]:
        how, seed = self.settings, self.settings.loop.seed
        return Steps(self.store, self.names, how.sampling, how.augment, seed, this_rank()).cases(number)


def train(settings: TrainSettings) -> State:
    """Trains a network, or goes on where the same command stopped; a finished run stays as it is.

    What the weights of `init` need to mean what they meant becomes an option of the network, unless
    `network_options` says otherwise. A run that goes on does not read them again.

    Writes config.yaml (all settings), run.json (plan, cases and their hashes), metrics.jsonl, the checkpoints
    `last` and `best`, and `model`, the best network with its plan: enough to predict with. Raises UserError
    for what the user can correct and Interrupted for Ctrl-C or SIGTERM. A damaged `model` is written again.
    """
    job = job_of(settings)
    state = carry_out(job)
    say(job.after)
    return state


def job_of(settings: TrainSettings) -> Job:
    """What `train` carries out; nothing is written yet. Raises UserError for what the user can correct."""
    store = Store.open(settings.data)
    if not store.plan.classes:
        raise UserError(
            f"the cases in `{spelt(settings.data)}` were prepared without labels: "
            "no segmentation can be learnt",
            hint="`unetrkit pretrain` learns without labels; to train, prepare a list with labels",
        )
    data, init = placed(settings.data), settings.init and placed(settings.init)
    home = placed(settings.out or Path("runs") / f"{settings.network}-{data.name}")
    settings = settings.model_copy(update={"data": data, "out": home, "init": init})
    out, where = copy_of(home, "runs"), spelt(home)
    training, validation = split_cases(store.cases, settings.fold)
    training = first_cases(training, settings.cases)
    plan, patch = store.plan, settings.sampling.patch_size or store.plan.patch_size
    seen = settings.sampling.network_size or patch
    torch.manual_seed(settings.loop.seed)
    begun, initial, options = _begun_with(out), None, dict(settings.network_options)
    if init is not None and begun is None:
        initial = open_initial(init, trust=settings.init_trust, size=settings.init_size)
        options = initial.options(settings.network) | options
    elif begun is not None:
        options = begun["options"] | options
    network = build(settings.network, len(plan.channels), len(plan.classes), seen, options)
    about: list[str] = []
    if initial is not None and init is not None:
        audit = begin(network, settings.network, initial, options, settings.init_minimum)
        begun = provenance(initial, audit, initial.options(settings.network))
        about = [f"begins with `{spelt(init)}`", *audit.summary(), *audit.notes]
    origin = {"init": begun} if begun else {}
    measured = validation[: settings.validation.cases]
    some = f"{len(measured)} of " if len(measured) < len(validation) else ""
    cases = f"{len(training)} cases, validated on {some}{len(validation)}"
    device = device_of(settings.loop.device).type
    measure = Validation(
        plan, measured, PredictSettings(overlap=settings.validation.overlap, window=patch, device=device)
    )

    def export(objective: nn.Module, state: State) -> None:
        save_model(
            out / "model",
            objective.get_submodule("network"),
            name=settings.network,
            image_size=seen,
            patch_size=patch,
            options=options,
            plan=plan,
            origin={"run": out.name, "fold": settings.fold, "step": state.best_step} | state.best | origin,
        )

    return Job(
        settings,
        out,
        settings.loop,
        settings.optim,
        Segmentation(network, settings.loss, settings.sampling.network_size),
        Patches(store.path, tuple(case.name for case in training), settings),
        validate=lambda objective, step, show: measure(
            seen_as(objective.get_submodule("network"), patch, seen), show
        ),
        better="dice",
        export=export,
        load=load_model,
        made_of={
            "plan": store.plan_hash,
            "training": [case.name for case in training],
            "validation": [case.name for case in validation],
            "sources": {case.name: case.source for case in training + validation},
            **origin,
        },
        about=(f"{settings.network} on {cases}, in {where}", *about),
        after=f"next: unetrkit predict SCANS PREDICTIONS --model {where}",
    )


def _begun_with(out: Path) -> dict[str, Any] | None:
    """What a run that has a checkpoint began with, as its record says; None for random weights."""
    record = out / "run.json"
    if not record.exists() or not any((out / name).exists() for name in ("last", "previous")):
        return None
    began = read_json(record)
    found = began.get("init") if isinstance(began, dict) else None
    return found if isinstance(found, dict) and isinstance(found.get("options"), dict) else None
