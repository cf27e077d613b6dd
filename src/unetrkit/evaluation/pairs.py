"""Which prediction belongs to which case."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unetrkit.data.datalist import Case, Dataset
from unetrkit.errors import UserError

SUFFIX = ".nii.gz"


@dataclass(frozen=True)
class Pair:
    """A labelled case and its predicted label map."""

    case: Case
    label: Path
    prediction: Path

    @property
    def name(self) -> str:
        return self.case.name


def pair_cases(predictions: Path, dataset: Dataset) -> tuple[list[Pair], list[str]]:
    """The cases that have a label and a prediction, in the data set's order, and notes on what was left out.

    Raises UserError where a file belongs to no case and where a declared split is only partly predicted.
    """
    if not predictions.is_dir():
        raise UserError(f"there is no folder `{predictions}`", hint="make it with `unetrkit predict`")
    files = {path.name.removesuffix(SUFFIX): path for path in sorted(predictions.glob(f"[!.]*{SUFFIX}"))}
    if not files:
        message = f"`{predictions}` holds no label map `*{SUFFIX}`"
        raise UserError(message, hint="make some: `unetrkit predict`")
    known = {case.name for case in dataset.cases}
    strangers = [path.name for name, path in files.items() if name not in known]
    if strangers:
        message = f"`{predictions}` holds {listed(strangers)}, and no such case is in the data set"
        hint = f"a prediction is named CASE{SUFFIX}; `{dataset.cases[0].name}{SUFFIX}` would be one"
        raise UserError(message, hint=hint)
    for split in ("validation", "test"):
        wanted = [case.name for case in dataset.cases if case.split == split and case.label is not None]
        missing = [name for name in wanted if name not in files]
        if missing and len(missing) < len(wanted):
            message = f"`{predictions}` has no prediction for {listed(missing)} of the {split} split"
            hint = "a mean over part of a split is not its mean: predict the whole split, or none of it"
            raise UserError(message, hint=hint)
    pairs = [Pair(c, c.label, files[c.name]) for c in dataset.cases if c.label and c.name in files]
    unlabelled = len(files) - len(pairs)
    if not pairs:
        message = f"none of the cases predicted in `{predictions}` has a label to compare with"
        hint = "predict cases that have a label: `unetrkit predict DATALIST … --split validation`"
        raise UserError(message, hint=hint)
    splits = {pair.case.split for pair in pairs}
    labelled = sum(case.split in splits and case.label is not None for case in dataset.cases)
    notes = [f"Predicted cases without a label, left out: {unlabelled}."] if unlabelled else []
    if len(pairs) < labelled:
        notes.append(f"{len(pairs)} of {labelled} labelled cases were predicted.")
    return pairs, notes


def listed(items: Sequence[object], most: int = 5) -> str:
    """Names in a message: the first few, and how many more.

    >>> listed(["a", "b", "c"], most=2)
    '`a`, `b` and 1 more'
    """
    shown = ", ".join(f"`{item}`" for item in items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")
