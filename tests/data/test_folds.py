"""Folds per subject."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unetrkit.data.folds import Split, assign_folds, split_cases
from unetrkit.errors import UserError


@dataclass(frozen=True)
class Scan:
    subject: str
    split: Split = "training"
    fold: int | None = None


def scans(count: int, per_subject: int = 1) -> list[Scan]:
    return [Scan(f"subject {k // per_subject}") for k in range(count)]


@given(st.lists(st.text(max_size=5), min_size=1, max_size=60), st.integers(2, 7), st.integers(0, 3))
def test_assign_folds_is_balanced_and_ignores_the_order(subjects, folds, seed):
    chosen = assign_folds(subjects, folds, seed)
    assert chosen == assign_folds(reversed(subjects), folds, seed)
    sizes = Counter(chosen[subject] for subject in subjects)
    largest = max(Counter(subjects).values())
    assert max(sizes.values()) - min(sizes.get(fold, 0) for fold in range(folds)) <= largest


def test_assign_folds_stay_what_they_are():
    # golden: a change of these makes every published fold another one
    assert assign_folds([f"case_{k}" for k in range(10)], 5, 0) == {
        "case_5": 0, "case_3": 1, "case_1": 2, "case_7": 3, "case_9": 4,
        "case_4": 0, "case_6": 1, "case_8": 2, "case_2": 3, "case_0": 4,
    }  # fmt: skip
    assert assign_folds([f"case_{k}" for k in range(10)], 5, 1) != assign_folds(
        [f"case_{k}" for k in range(10)], 5, 0
    )


def test_assign_folds_do_not_depend_on_the_process():
    program = "from unetrkit.data.folds import assign_folds; print(assign_folds(map(str, range(30))))"
    command = [sys.executable, "-c", program]
    runs = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert runs == {f"{assign_folds(map(str, range(30)))}\n"}


def test_every_case_is_validated_once_and_no_subject_is_in_two_folds():
    cases = scans(60, per_subject=3)
    validated = []
    for fold in range(5):
        training, validation = split_cases(cases, fold)
        assert not {case.subject for case in training} & {case.subject for case in validation}
        assert len(training) + len(validation) == 60
        assert len(validation) == 12
        validated += validation
    assert Counter(validated) == Counter(cases)


def test_without_a_fold_the_declared_validation_is_taken():
    cases = [*scans(8), Scan("other", "validation"), Scan("third", "test")]
    training, validation = split_cases(cases, None)
    assert (training, validation) == (cases[:8], [cases[8]])


def test_without_a_fold_or_a_declared_validation_it_is_fold_0():
    assert split_cases(scans(20), None) == split_cases(scans(20), 0)


def test_declared_validation_takes_no_part_in_cross_validation():
    cases = [*scans(10), Scan("other", "validation"), Scan("third", "test")]
    training, validation = split_cases(cases, 1)
    assert sorted(case.subject for case in training + validation) == sorted(
        case.subject for case in scans(10)
    )


def test_declared_folds_win_and_a_case_without_one_trains():
    cases = [Scan("a", fold=0), Scan("b", fold=1), Scan("c", fold=1), Scan("d")]
    assert split_cases(cases, 1, seed=3) == ([cases[0], cases[3]], [cases[1], cases[2]])


@pytest.mark.parametrize(
    ("cases", "fold", "message"),
    [
        (scans(3), 4, "leaves 3 cases for training and 0 for validation"),
        (
            scans(1),
            None,
            "too few subjects to make folds: fold 0 leaves 0 cases for training and 1 for validation",
        ),
        ([], None, "leaves 0 cases"),
        (scans(10), 5, "there is no fold 5 among 5 folds"),
        (scans(10), -1, "there is no fold -1"),
        ([Scan("a", fold=0), Scan("b", fold=2)], 1, "fold 1 is not declared"),
        ([Scan("a", fold=0), Scan("a", fold=1)], 0, "subject `a` has cases for training and for validation"),
        ([Scan("a"), Scan("a", "validation")], None, "subject `a` has cases for training and for validation"),
    ],
)
def test_what_cannot_be_split_is_refused(cases, fold, message):
    with pytest.raises(UserError, match=message):
        split_cases(cases, fold)
