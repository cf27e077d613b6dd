"""Which cases train and which validate: folds per subject, the same on every machine and in every version."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, TypeVar

from unetrkit.errors import UserError, many

Split = Literal["training", "validation", "test"]


class Splittable(Protocol):
    """What folds need to know of a case; `Case` and `StoredCase` have it."""

    @property
    def subject(self) -> str: ...

    @property
    def split(self) -> Split: ...

    @property
    def fold(self) -> int | None: ...


AnyCase = TypeVar("AnyCase", bound=Splittable)


def assign_folds(subjects: Iterable[str], folds: int = 5, seed: int = 0) -> dict[str, int]:
    """The fold of each subject, from one name per case (a subject with three scans is named three times).

    Subjects are put in the order of a hash of seed and name, those with most cases first, and each goes to
    the fold that has fewest cases. The order of the cases does not matter, nor does any random state.

    >>> assign_folds(["ann", "ann", "ben", "cleo"], folds=2)
    {'ann': 0, 'cleo': 1, 'ben': 1}
    """
    counts = Counter(subjects)
    rank = {name: hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in counts}
    sizes = [0] * folds
    chosen: dict[str, int] = {}
    for subject in sorted(counts, key=lambda name: (-counts[name], rank[name])):
        fold = sizes.index(min(sizes))
        sizes[fold] += counts[subject]
        chosen[subject] = fold
    return chosen


def split_cases(
    cases: Sequence[AnyCase], fold: int | None, folds: int = 5, seed: int = 0
) -> tuple[list[AnyCase], list[AnyCase]]:
    """The cases to train on and those to validate on; test cases are in neither.

    fold None: the declared validation cases where there are any, else fold 0.
    fold k: the training cases are cross-validated, and declared validation cases take no part. Folds declared
    in the data list win; a case declared without one then always trains. Otherwise `assign_folds` makes them.

    Raises UserError where a side is empty, the fold does not exist, or a subject would be on both sides.
    """
    training = [case for case in cases if case.split == "training"]
    validation = [case for case in cases if case.split == "validation"]
    if fold is not None or not validation:
        training, validation = _cross_validate(training, fold or 0, folds, seed)
    both = sorted({case.subject for case in training} & {case.subject for case in validation})
    if both:
        message = f"subject `{both[0]}` has cases for training and for validation ({len(both)} such subjects)"
        hint = "put all cases of a subject into one split and one fold of the data list"
        raise UserError(message, hint=hint)
    return training, validation


def first_cases(cases: list[AnyCase], count: int | None) -> list[AnyCase]:
    """The first `count` cases, or all of them for None. Raises UserError where there are fewer."""
    if count is not None and count > len(cases):
        message = f"{many(count, 'training case')} are asked for, and there are {len(cases)}"
        raise UserError(message, hint="give fewer, or add cases to the data list")
    return cases[:count]


def _cross_validate(
    cases: list[AnyCase], fold: int, folds: int, seed: int
) -> tuple[list[AnyCase], list[AnyCase]]:
    fold_of = [case.fold for case in cases]
    declared = sorted({k for k in fold_of if k is not None})
    if declared and fold not in declared:
        raise UserError(f"fold {fold} is not declared in the data list", hint=f"its folds are {declared}")
    if not declared:
        if folds < 2 or not 0 <= fold < folds:
            message = f"there is no fold {fold} among {folds} folds"
            raise UserError(message, hint="2 or more folds, counted from 0")
        chosen = assign_folds((case.subject for case in cases), folds, seed)
        fold_of = [chosen[case.subject] for case in cases]
    training = [case for case, k in zip(cases, fold_of, strict=True) if k != fold]
    validation = [case for case, k in zip(cases, fold_of, strict=True) if k == fold]
    if not training or not validation:
        subjects, left = len({case.subject for case in cases}), many(len(training), "case")
        few = "" if declared else "there are too few subjects to make folds: "
        message = f"{few}fold {fold} leaves {left} for training and {len(validation)} for validation"
        hint = f"the data set has {many(subjects, 'subject')} for training; use fewer folds, or add cases"
        raise UserError(message, hint=hint)
    return training, validation
