"""What is to be segmented, and what would go wrong: looked at before any work is done."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unetrkit.data.datalist import Case, read_dataset
from unetrkit.data.folds import split_cases
from unetrkit.data.layouts import ENDINGS, IMAGE_FOLDERS, stem
from unetrkit.data.parts import Part
from unetrkit.data.plan import Plan
from unetrkit.errors import UserError
from unetrkit.inference.model import Model
from unetrkit.progress import say

LISTS = (".json", ".csv", ".tsv")
LABEL_WORDS = "seg|segmentations?|labels?|labelmap|masks?|msk|gt|truth|pred|predictions?"
LABEL_LIKE = re.compile(rf"[_.-]({LABEL_WORDS})$", re.IGNORECASE)
# what models must agree on to be averaged; the rest of a plan is for training and for people
SAME = ("channels", "classes", "spacing", "intensity", "crop_foreground", "resample")


@dataclass(frozen=True)
class Choice:
    """Which cases of a data set: of a split (training, validation, test, all), and which part of those."""

    split: str = "all"
    part: Part | None = None
    allow_outside: bool = False


def choose_cases(inputs: Path, choice: Choice, models: Sequence[Model]) -> list[Case]:
    """One scan (a file, or the folder of a DICOM series), or the cases of a data set's split.

    A folder of folders of DICOM series has a case for each. In a folder of scans, files that are named as
    label maps are (X_mask) are left out, with a line on stderr. The validation cases are those of the fold
    that the models were trained on (`origin.fold`).
    Raises UserError where there are none.
    """
    if (inputs.is_file() and inputs.suffix.lower() not in LISTS) or _is_series(inputs):
        return [_scan(inputs)]
    cases = [_scan(folder) for folder in _series_in(inputs)]
    if not cases:
        channels = len(models[0].plan.channels)
        cases = list(read_dataset(inputs, allow_outside=choice.allow_outside, channels=channels).cases)
        cases = _without_labels(inputs, cases)
    chosen, split = cases, choice.split
    if split == "test":
        chosen = [case for case in cases if case.split == "test"]
    elif split in ("training", "validation"):
        folds = {model.description["origin"].get("fold") for model in models}
        if len(folds) > 1:
            message = "the models were trained on different folds, so what validates one has trained another"
            raise UserError(message, hint="predict the test cases, or use one model at a time")
        training, validation = split_cases(cases, folds.pop())
        chosen = training if split == "training" else validation
    elif split != "all":
        raise UserError(f"`{split}` is not a split", hint="training, validation, test or all")
    if not chosen:
        message = f"`{inputs}` has no {split} cases among its {len(cases)}"
        raise UserError(message, hint="choose another `--split`: training, validation, test or all")
    return list(choice.part.of(chosen)) if choice.part else chosen


def _scan(path: Path) -> Case:
    path = path.absolute()  # `.` has a name
    return Case(stem(path), (path,), None, stem(path), "test")


def _series_in(folder: Path) -> list[Path]:
    """The DICOM series right below a folder that no data list describes."""
    if not folder.is_dir() or (folder / "dataset.json").exists():
        return []
    files = sorted(folder.iterdir())
    series = [path for path in files if _is_series(path)]
    others = set(files) - set(series)
    if series and any(p.name.lower().endswith(ENDINGS) or p.name in IMAGE_FOLDERS for p in others):
        hint = f"predict the series by itself: `unetrkit predict {series[0]} …`, or move it away"
        raise UserError(f"`{folder}` holds scans and the DICOM series `{series[0]}`", hint=hint)
    return series


def _without_labels(folder: Path, cases: list[Case]) -> list[Case]:
    """The cases without the files that lie right in `folder` and have the name of a label map."""
    if not folder.is_dir() or (folder / "dataset.json").exists():
        return cases
    root = folder.resolve()
    named = [c for c in cases if c.images[0].parent == root and LABEL_LIKE.search(stem(c.images[0]))]
    if named:
        some = ", ".join(f"`{case.images[0].name}`" for case in named[:10])
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        say(f"left out, being named as label maps are: {some}{more}; to segment one, give its path")
    return [case for case in cases if case not in named]


def doubts_about(image: np.ndarray, plan: Plan) -> list[str]:
    """Why an image (c, x, y, z) may be of another kind than the plan's, judged by one voxel in 64.

    A CT has air far below every window; what starts at 0 is an MR, or a CT that is not in HU.
    """
    doubts = []
    for name, channel, how in zip(plan.channels, image, plan.intensity, strict=True):
        low, high = np.percentile(channel[::4, ::4, ::4], [1, 99])
        shared = min(high, how.upper) - max(low, how.lower)
        little = shared < 0.2 * min(high - low, how.upper - how.lower)
        if how.kind == "window" and (little or how.lower < 0 <= channel.min()):
            window = f"the model's window of {name} is {how.lower:g} to {how.upper:g}"
            found = f"its intensities are {low:g} to {high:g}"
            doubts.append(f"{found}, {window}: is it the same modality?")
    return doubts


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
    shared = *(plan.get(name) for name in SAME), [model.window, model.description["image_size"]]
    return [json.dumps(value) for value in shared]


def require_free(out: Path, cases: Sequence[Case], overwrite: bool, recorded: Collection[str]) -> None:
    """Raises UserError where label maps in `out` could replace scans, labels or earlier label maps.

    Only those of `recorded` cases are label maps that a prediction wrote, which `overwrite` may replace.
    """
    files = [file for case in cases for file in (*case.images, case.label) if file]
    if out.resolve() in {folder for file in files for folder in (file.resolve(), file.resolve().parent)}:
        message = f"`{out}` holds the scans themselves"
        raise UserError(message, hint="choose another folder for the label maps")
    there = {case.name: path for case in cases if (path := out / f"{case.name}.nii.gz").exists()}
    foreign = [path for name, path in there.items() if name not in recorded]
    found = foreign or list(there.values())
    if foreign or (found and not overwrite):
        others = f" and {len(found) - 1} others" if len(found) > 1 else ""
        if foreign:
            message = f"`{found[0]}`{others} would be replaced, but no prediction recorded there wrote it"
            hint = "choose another folder; --overwrite replaces what `predictions.json` lists"
            raise UserError(message, hint=hint)
        message = f"`{found[0]}`{others} exist{'' if others else 's'} already"
        raise UserError(message, hint="another folder, or --overwrite to replace them")
