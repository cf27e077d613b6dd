"""A pre-training run: from stores of scans without labels to weights that a training begins with."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field, JsonValue
from torch import nn

from unetrkit.config import Settings, listed, settings_from
from unetrkit.data.copies import copy_of, send
from unetrkit.data.crops import Crops, CropSettings, Source, crop_batches
from unetrkit.data.folds import split_cases
from unetrkit.data.remote import Place, placed, spelt
from unetrkit.data.store import Store
from unetrkit.errors import UserError, nearest
from unetrkit.pretraining import OBJECTIVES
from unetrkit.pretraining.probes import Probe
from unetrkit.pretraining.report import write_report
from unetrkit.pretraining.watch import Watch, WatchSettings, measure_features, probed
from unetrkit.pretraining.weights import network_to_tune, save_pretrained
from unetrkit.ranks import this_rank
from unetrkit.training.folder import Job, carry_out
from unetrkit.training.initial import open_initial
from unetrkit.training.learner import Batch, device_of
from unetrkit.training.log import say
from unetrkit.training.loop import LoopSettings, State
from unetrkit.training.optim import OptimSettings

VALIDATION_SEED = 2023  # of the crops that are validated on, whatever the run's own
# on the command line names are no list
Stores = Annotated[tuple[Place, ...], BeforeValidator(listed), Field(min_length=1)]


class PretrainSettings(Settings):
    """Everything about a pre-training run; a recipe states what differs from these."""

    # one store that `unetrkit prepare` made, or several: `data=a,b`
    data: Stores
    # how often each of them is drawn from, in proportion; null: every scan as often as every other
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None
    # the run's folder; null: runs/OBJECTIVE-STORE
    out: Place | None = None
    objective: str
    # what is the objective's own: its corruptions and losses
    objective_options: dict[str, JsonValue] = Field(default_factory=dict)
    # what the pre-training network's own entry in `networks` takes
    network_options: dict[str, JsonValue] = Field(default_factory=dict)
    crops: CropSettings = CropSettings()
    optim: OptimSettings = OptimSettings()
    loop: LoopSettings = LoopSettings()
    watch: WatchSettings = WatchSettings()


@dataclass(frozen=True)
class Numbered:
    """The batches of a run, by their number."""

    crops: Crops
    workers: int
    lower: tuple[str, str] = ("crops.batch_size", "crops.patch_size")

    @property
    def size(self) -> int:
        return self.crops.settings.batch_size

    def __call__(self, start: int, stop: int) -> Generator[Batch]:
        c, steps = self.crops, range(start, stop)
        yield from crop_batches(
            c.sources, c.settings, seed=c.seed, steps=steps, workers=self.workers, rank=c.rank
        )

    def cases(self, number: int) -> list[str]:
        return self.crops.cases(number)


def pretrain(settings: PretrainSettings) -> State:
    """Pre-trains a network, or goes on where the same command stopped; a finished run stays as it is.

    Writes what a training run writes (config.yaml, run.json, metrics.jsonl, `last`, `best`), `model`, the
    best weights by the loss on fixed crops of the validation cases, pictures of what is restored, and
    report.html. Raises UserError for what the user can correct and Interrupted for Ctrl-C or SIGTERM.
    """
    job = job_of(settings)
    state = carry_out(job)
    assert isinstance(job.validate, Watch)
    if this_rank().first:
        say(f"look at {write_report(job.out, job.validate.untrained)}")
        send(job.out)
    say(job.after)
    return state


def job_of(settings: PretrainSettings) -> Job:
    """What `pretrain` carries out; nothing is written yet. Raises UserError for what the user can correct."""
    objective_name = settings.objective
    if objective_name not in OBJECTIVES:
        hint = nearest(objective_name, OBJECTIVES)
        raise UserError(f"`{objective_name}` is not an objective of pre-training", hint=hint)
    chosen = OBJECTIVES[objective_name]
    stores = [Store.open(path) for path in settings.data]
    home = placed(settings.out or Path("runs") / f"{objective_name}-{placed(settings.data[0]).name}")
    settings = _resolved(settings, home)
    out, where = copy_of(home, "runs"), spelt(home)
    own = settings_from(chosen.settings, settings.objective_options, "objective_options")
    splits = [split_cases(store.cases, None) for store in stores]
    weights = _weights(settings)
    plan = stores[0].plan
    patch = settings.crops.patch_size or plan.patch_size
    crops = settings.crops.model_copy(update={"patch_size": patch})
    parts: list[list[Source]] = [[], []]
    for store, split, weight in zip(stores, splits, weights, strict=True):
        for part, cases in zip(parts, split, strict=True):
            part.append(Source(store.path.resolve(), tuple(case.name for case in cases), weight))
    training, validation = map(tuple, parts)
    torch.manual_seed(settings.loop.seed)
    options = dict(settings.network_options)
    objective = chosen.build(len(plan.channels), patch, options, own)
    network = objective.get_submodule("network")
    tuned, tuned_options = network_to_tune(chosen.networks, network, len(plan.channels), patch, options)
    # the same for every run on these stores with this size of batch
    steps = range(max(1, settings.watch.crops // crops.batch_size))
    fixed = tuple(crop_batches(validation, crops, seed=VALIDATION_SEED, steps=steps, workers=0))
    wanted = settings.watch.probe
    probe = Probe.of(wanted, patch, settings.watch.probe_patches) if wanted else None
    device = device_of(settings.loop.device)
    before = measure_features(objective.to(device).eval(), fixed)
    untrained = before._asdict() | probed(probe, objective)
    watch = Watch(fixed, out, settings.watch.pictures, probe, before, untrained)

    def export(subject: nn.Module, state: State) -> None:
        description = {
            "network": tuned,
            "in_channels": len(plan.channels),
            "image_size": patch,
            "options": tuned_options,
            "plan": plan,
            "origin": {"run": out.name, "objective": objective_name, "step": state.best_step} | state.best,
        }
        save_pretrained(out / "model", subject.get_submodule("network"), description)

    seen, held = ([case for split in splits for case in split[side]] for side in (0, 1))
    parameters = sum(weight.numel() for weight in network.parameters())
    return Job(
        settings,
        out,
        settings.loop,
        settings.optim,
        objective,
        Numbered(Crops(training, crops, settings.loop.seed, this_rank()), settings.loop.workers),
        validate=watch,
        better="-loss",
        export=export,
        load=open_initial,
        made_of={
            "plan": [store.plan_hash for store in stores],
            "training": [case.name for case in seen],
            "validation": [case.name for case in held],
            "sources": {case.name: case.source for case in seen + held},
        },
        about=(
            f"{objective_name}, {parameters / 1e6:.1f} M weights, on {len(seen)} scans, watched on "
            f"{len(held)}, in {where}",
            "before training: " + ", ".join(f"{name} {value:.3g}" for name, value in untrained.items()),
        ),
        after=f"next: unetrkit train {tuned} init={where} data=LABELLED_STORE",
    )


def _resolved(settings: PretrainSettings, out: Path) -> PretrainSettings:
    """With absolute paths: the run goes on from anywhere."""
    probe = settings.watch.probe and placed(settings.watch.probe)
    watch = settings.watch.model_copy(update={"probe": probe})
    data = tuple(map(placed, settings.data))
    return settings.model_copy(update={"data": data, "out": out, "watch": watch})


def _weights(settings: PretrainSettings) -> Sequence[float | None]:
    if settings.weights is None:
        return [None] * len(settings.data)
    if len(settings.weights) != len(settings.data):
        message = f"`weights` has {len(settings.weights)} values for {len(settings.data)} stores"
        raise UserError(message, hint="one for each store of `data`")
    return settings.weights
