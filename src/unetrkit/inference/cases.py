"""What is to be segmented, and what would go wrong: looked at before any work is done."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from unetrkit.data.datalist import Case, read_dataset, split_cases
from unetrkit.data.layouts import ENDINGS, stem
from unetrkit.errors import UserError
from unetrkit.inference.model import Model

LISTS = (".json", ".csv", ".tsv")
# what models must agree on to be averaged; the rest of a plan is for training and for people
SAME = ("channels", "classes", "spacing", "intensity", "crop_foreground")


def choose_cases(inputs: Path, split: str, models: Sequence[Model], allow_outside: bool) -> list[Case]:
    """One scan (a file, or the folder of a DICOM series), or the cases of a data set's split.

    The validation cases are those of the fold that the models were trained on (`origin.fold`).
    Raises UserError where there are none.
    """
    if (inputs.is_file() and inputs.suffix.lower() not in LISTS) or _is_series(inputs):
        return [Case(stem(inputs), (inputs.absolute(),), None, stem(inputs), "test")]
    channels = len(models[0].plan.channels)
    cases = list(read_dataset(inputs, allow_outside=allow_outside, channels=channels).cases)
    chosen = cases
    if split == "test":
        chosen = [case for case in cases if case.split == "test"]
    elif split in ("training", "validation"):
        folds = {model.description["origin"].get("fold") for model in models}
        if len(folds) > 1:
            raise UserError(
                "the models were trained on different folds, so what validates one has trained another",
                hint="predict the test cases, or use one model at a time",
            )
        training, validation = split_cases(cases, folds.pop())
        chosen = training if split == "training" else validation
    elif split != "all":
        raise UserError(f"`{split}` is not a split", hint="training, validation, test or all")
    if not chosen:
        raise UserError(
            f"`{inputs}` has no {split} cases among its {len(cases)}",
            hint="choose another `--split`: training, validation, test or all",
        )
    return chosen


def _is_series(folder: Path) -> bool:
    """Whether a folder holds a DICOM file."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file() and not file.name.lower().endswith((*ENDINGS, *LISTS)):
            with open(file, "rb") as opened:
                if opened.read(132)[128:] == b"DICM":
                    return True
    return False


def require_one_plan(models: Sequence[Model], paths: Sequence[Path]) -> None:
    """Raises UserError for models that cannot be averaged, because they differ in more than their weights."""
    for model, path in zip(models[1:], paths[1:], strict=True):
        for name, expected, found in zip((*SAME, "window"), _shared(models[0]), _shared(model), strict=True):
            if expected != found:
                raise UserError(
                    f"`{path}` and `{paths[0]}` cannot be averaged: their {name.replace('_', ' ')} differ, "
                    f"{found[:200]} instead of {expected[:200]}",
                    hint="models that are averaged must come from one plan",
                )


def _shared(model: Model) -> list[str]:
    plan = model.plan.model_dump(mode="json")
    return [json.dumps(value) for value in (*(plan[name] for name in SAME), model.description["image_size"])]


def require_free(out: Path, cases: Sequence[Case], overwrite: bool, recorded: Collection[str]) -> None:
    """Raises UserError where label maps in `out` could replace scans, labels or earlier label maps.

    Only those of `recorded` cases are label maps that a prediction wrote, which `overwrite` may replace.
    """
    files = [file for case in cases for file in (*case.images, case.label) if file]
    if out.resolve() in {folder for file in files for folder in (file.resolve(), file.resolve().parent)}:
        raise UserError(
            f"`{out}` holds the scans themselves", hint="choose another folder for the label maps"
        )
    there = {case.name: path for case in cases if (path := out / f"{case.name}.nii.gz").exists()}
    foreign = [path for name, path in there.items() if name not in recorded]
    found = foreign or list(there.values())
    if foreign or (found and not overwrite):
        others = f" and {len(found) - 1} others" if len(found) > 1 else ""
        if foreign:
            raise UserError(
                f"`{found[0]}`{others} would be replaced, but no prediction recorded there wrote it",
                hint="choose another folder; --overwrite replaces what `predictions.json` lists",
            )
        raise UserError(
            f"`{found[0]}`{others} exist{'' if others else 's'} already",
            hint="another folder, or --overwrite to replace them",
        )
