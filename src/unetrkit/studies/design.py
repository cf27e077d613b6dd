"""What a study compares: rows, numbers of volumes and seeds; each combination is a training run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from unetrkit.config import listed, load_recipe, overridden, read_recipe, settings_from
from unetrkit.data.augment import AugmentSettings
from unetrkit.data.folds import first_cases, split_cases
from unetrkit.data.remote import placed, url_of
from unetrkit.data.store import Store, StoredCase
from unetrkit.errors import UserError, nearest
from unetrkit.networks import build
from unetrkit.training.folder import same_run
from unetrkit.training.initial import begin, open_initial
from unetrkit.training.loop import Count
from unetrkit.training.run import TrainSettings

RANDOM = "random"  # the row that begins with random weights


class StudySettings(TrainSettings):
    """Any setting of a training run, which all runs of the study share, and how many runs there are."""

    network: str = "swin_unetr_tiny"
    # train on the first so many cases; null: on all of them
    volumes: Annotated[
        tuple[Count, ...] | None, BeforeValidator(lambda n: (n,) if isinstance(n, int) else listed(n))
    ] = None
    # runs of each row, with the seeds loop.seed, loop.seed + 1, …
    seeds: Annotated[int, Field(ge=1, le=100)] = 3


class LabelEfficiencySettings(StudySettings):
    """Random weights against each of these: pre-training runs, models, published files."""

    init: Annotated[tuple[Path, ...], BeforeValidator(listed), Field(min_length=1)]  # type: ignore[assignment]


# The original's table only names its rows. Baseline is the published set, light is half as often and half as
# much, strong is everything there is.
AUGMENTATION: dict[str, AugmentSettings] = {
    "baseline": AugmentSettings(),
    "none": AugmentSettings(set="none"),
    "flip_only": AugmentSettings(p_rot90=0, p_scale=0, p_shift=0),
    "no_intensity": AugmentSettings(p_scale=0, p_shift=0),
    "light": AugmentSettings(p_flip=0.1, p_rot90=0.1, p_scale=0.05, scale=0.05, p_shift=0.05, shift=0.05),
    "strong": AugmentSettings(set="strong"),
}
# UNETR, each of the four changes alone, and all of them
ARCHITECTURE = (
    "unetr",
    "unetr_stem",
    "unetr_light_vit",
    "unetr_skip_alignment",
    "unetr_fpn_fusion",
    "unetr_fpn",
)
FEATURE_SIZE = 32  # of the original's table, in every row: `unetr` alone has 16
STUDIES: dict[str, type[StudySettings]] = {
    "label_efficiency": LabelEfficiencySettings,
    "augmentation": StudySettings,
    "architecture": StudySettings,
}
# what the study itself sets, and why nobody else may
OWN = {
    "cases": "`volumes` says how many cases each run trains on",
    "loop.validate_every": "a run is validated at its end only: a step chosen on the cases that are compared "
    "would flatter its run",
}
OWN_OF = {
    "augmentation": {"augment": "the rows of the study are the augmentations"},
    "architecture": {"network": "the rows of the study are the networks"},
}


@dataclass(frozen=True)
class Cell:
    """One training run of a study; it can be made anywhere, `unetrkit train FOLDER/config.yaml` makes it."""

    row: str
    volumes: int
    seed: int
    settings: TrainSettings

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def folder(self) -> Path:
        assert self.settings.out is not None
        return self.settings.out


@dataclass(frozen=True)
class Study:
    """`rows`, of which the first is what the others are compared with; `cells` in the order of making."""

    name: str
    out: Path
    rows: tuple[str, ...]
    volumes: tuple[int, ...]
    validation: tuple[StoredCase, ...]
    cells: tuple[Cell, ...]


def read_settings(name: str, overrides: Sequence[str], recipe: str | None = None) -> StudySettings:
    """The settings of the study `name`, from a recipe, if one is given, and `key=value`.

    Raises UserError for an unknown study or setting, and for one that the study itself sets.
    """
    if name not in STUDIES:
        raise UserError(f"there is no study `{name}`", hint=nearest(name, STUDIES))
    for setting in (override.partition("=")[0].strip() for override in overrides):
        for own, reason in {**OWN, **OWN_OF.get(name, {})}.items():
            if setting == own or setting.startswith(f"{own}."):
                raise UserError(f"`{setting}` is not for this study to be told", hint=reason)
    values = read_recipe(recipe) if recipe else {}
    return settings_from(STUDIES[name], overridden(values, overrides))


def design(name: str, settings: StudySettings) -> Study:
    """The study's cells. Raises UserError for what would stop one of them, before any has begun."""
    if settings.out and url_of(settings.out):
        hint = "name a folder of this machine, or one that all machines see"
        raise UserError("a study's runs are not on an object store", hint=hint)
    store = Store.open(settings.data)
    training, validation = split_cases(store.cases, settings.fold)
    volumes = tuple(sorted(set(settings.volumes or [len(training)])))
    first_cases(training, volumes[-1])
    out = (settings.out or Path("studies") / f"{name}-{placed(settings.data).name}").resolve()
    rows = _rows(name, settings, store)
    cells = []
    for seed in range(settings.loop.seed, settings.loop.seed + settings.seeds):
        for count in volumes:
            for row, changes in rows.items():
                folder = out / "cells" / f"{row}-n{count}-seed{seed}"
                cells.append(Cell(row, count, seed, _settings(settings, folder, count, seed, changes)))
    return Study(name, out, tuple(rows), volumes, tuple(validation), tuple(cells))


def _settings(
    study: StudySettings, out: Path, count: int, seed: int, changes: Mapping[str, Any]
) -> TrainSettings:
    """The settings of one run: the study's, without what only a study has, and what is this run's own."""
    shared = {name: getattr(study, name) for name in TrainSettings.model_fields}
    loop = study.loop.model_copy(update={"seed": seed, "validate_every": study.loop.steps})
    own = {"data": placed(study.data), "out": out, "cases": count, "loop": loop}
    # all validation cases are measured afterwards: the run itself needs only to see that it works
    if study.validation.cases is None:
        own["validation"] = study.validation.model_copy(update={"cases": 1})
    return TrainSettings.model_validate({**shared, **own, **changes})


def _rows(name: str, settings: StudySettings, store: Store) -> dict[str, dict[str, Any]]:
    """What differs in each row, the reference first."""
    if name == "augmentation":
        return {row: {"augment": augment} for row, augment in AUGMENTATION.items()}
    if name == "architecture":
        options = {"feature_size": FEATURE_SIZE, **settings.network_options}
        return {row: {"network": row, "network_options": options} for row in ARCHITECTURE}
    assert isinstance(settings, LabelEfficiencySettings)
    rows: dict[str, dict[str, Any]] = {}
    options = _common_options(settings, store)
    for path in settings.init:
        row = _row_name(path)
        if row in rows or row == RANDOM:
            raise UserError(f"two rows would be called `{row}`", hint="give one of the files another name")
        rows[row] = {"init": path.resolve(), "network_options": options}
    return {RANDOM: {"init": None, "network_options": options}, **rows}


def _row_name(path: Path) -> str:
    """What a table calls weights: the name of the run, or of the file without its ending."""
    path = path.resolve()
    path = path.parent if path.name in ("model", "last", "best") else path
    name = path.stem if path.is_file() else path.name
    return "".join(letter if letter.isalnum() or letter in "_." else "_" for letter in name)


def _common_options(settings: LabelEfficiencySettings, store: Store) -> dict[str, Any]:
    """What the network must be for the initial weights: random weights are given the same network.

    Raises UserError where weights do not fit, or need networks that differ.
    """
    plan, patch = store.plan, settings.sampling.patch_size or store.plan.patch_size
    found: dict[str, Any] | None = None
    for path in settings.init:
        initial = open_initial(path.resolve(), trust=settings.init_trust, size=settings.init_size)
        needed = initial.options(settings.network) | settings.network_options
        options = json.loads(json.dumps(needed))  # as a config.yaml has them: lists, no tuples
        if found is not None and options != found:
            message = f"`{path}` needs another network than `{settings.init[0]}`: {options}, not {found}"
            raise UserError(message, hint="make a study of each: random weights must have the same network")
        found = options
        network = build(settings.network, len(plan.channels), len(plan.classes), patch, options)
        begin(network, settings.network, initial, options, settings.init_minimum)
    return found or {}


def written(cell: Cell) -> bool:
    """Whether the cell's folder has its config.yaml. Raises UserError where that is of another run."""
    config, now = cell.folder / "config.yaml", cell.settings
    if config.exists():
        same_run(load_recipe(TrainSettings, config), now, now.loop, now.optim, cell.folder)
    return config.exists()
