"""The report of `check` for a terminal: what the data set is, in a few lines, then what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unetrkit.data.check import Report
from unetrkit.data.inspection import Finding

FINDINGS = 3  # of one kind that are shown; the others are counted
NAMES = 8  # of the cases of the others
CLASSES = 25


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints what the data set is, its classes, and the findings: errors last, where they are in sight."""
    console = console or Console()
    console.print(
        f"[bold]{escape(report.dataset.name)}[/bold]\n{escape(_summary(report))}\n", highlight=False
    )
    if any(facts.shape for facts in report.cases):
        console.print(_ranges_table(report), "")
    if any(facts.counts for facts in report.cases):
        console.print(_class_table(report), "")
    for colour, findings in (("yellow", report.warnings), ("red", report.errors)):
        alike = sorted(findings, key=_kind)
        for _, group in groupby(alike, key=_kind):
            _print_group(list(group), report.dataset.root, colour, console)
    console.print(
        f"{_many(len(report.cases), 'case')} read: {_many(len(report.errors), 'error')}, "
        f"{_many(len(report.warnings), 'warning')}",
        style="bold red" if report.errors else "bold green",
        highlight=False,
    )


def _summary(report: Report) -> str:
    cases = report.dataset.cases
    splits = Counter(case.split for case in cases)
    parts = [
        ", ".join(f"{n} {split}" for split, n in splits.items()),
        f"{sum(case.label is not None for case in cases)} with a label",
        _many(len({case.subject for case in cases}), "subject"),
    ]
    folds = Counter(case.fold for case in cases if case.fold is not None)
    if folds:
        parts.append(f"declared folds of {', '.join(str(folds[fold]) for fold in sorted(folds))}")
    for kinds in (
        Counter(f.axes for f in report.cases if f.axes),
        Counter(f.dtype for f in report.cases if f.dtype),
    ):
        parts.append(
            ", ".join(f"{kind} ({n})" if len(kinds) > 1 else kind for kind, n in kinds.most_common(4))
        )
    return "; ".join(part for part in parts if part)


def _ranges_table(report: Report) -> Table:
    table = _table("", "min", "median", "max")
    _add_range(table, "size (R x A x S voxels)", [facts.shape for facts in report.cases if facts.shape])
    _add_range(table, "spacing (mm)", [facts.spacing for facts in report.cases if facts.spacing])
    for k, name in enumerate(report.dataset.channels):
        channels = [facts.channels[k] for facts in report.cases if len(facts.channels) > k]
        if channels:
            _add_range(table, f"{name} percentile 0.5", [(channel.low,) for channel in channels])
            _add_range(table, f"{name} percentile 99.5", [(channel.high,) for channel in channels])
    return table


def _add_range(table: Table, name: str, rows: Sequence[Iterable[float]]) -> None:
    values = np.array([tuple(row) for row in rows], dtype=np.float64)
    columns = (values.min(axis=0), np.median(values, axis=0), values.max(axis=0))
    table.add_row(escape(name), *(" x ".join(f"{value:.4g}" for value in column) for column in columns))


def _class_table(report: Report) -> Table:
    voxels: Counter[int] = Counter()
    cases: Counter[int] = Counter()
    for facts in report.cases:
        voxels.update(facts.counts or {})
        cases.update((facts.counts or {}).keys())
    declared = report.dataset.labels
    values = sorted(declared.keys() | voxels.keys())
    total = sum(voxels.values())
    table = _table("label", "name", "cases", "voxels")
    table.columns[1].justify = "left"
    for value in values[:CLASSES]:
        name = declared.get(value, "not declared" if declared else "")
        table.add_row(str(value), escape(name), str(cases[value]), f"{100 * voxels[value] / total:.3g} %")
    if len(values) > CLASSES:
        table.add_row("", f"and {len(values) - CLASSES} more", "", "")
    return table


def _print_group(findings: Sequence[Finding], root: Path, colour: str, console: Console) -> None:
    for finding in findings[:FINDINGS]:
        message = finding.message.replace(f"`{root}/", "`")
        console.print(
            f"[{colour}]{finding.severity}[/{colour}] ({finding.code}): {escape(message)}",
            highlight=False,
            soft_wrap=True,
        )
    if len(findings) > FINDINGS:
        names = [finding.case for finding in findings[FINDINGS:]]
        some = ", ".join(names[:NAMES]) + (", …" if len(names) > NAMES else "")
        console.print(
            f"  and {_many(len(names), 'case')} more: {escape(some)}", highlight=False, soft_wrap=True
        )
    if findings[0].hint:
        console.print(f"  hint: {escape(findings[0].hint)}", highlight=False, soft_wrap=True)
    console.print()


def _kind(finding: Finding) -> tuple[str, str]:
    return finding.code, finding.hint


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for k, heading in enumerate(headings):
        table.add_column(heading, justify="right" if k else "left")
    return table


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
