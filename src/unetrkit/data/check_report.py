"""The report of `check` for a terminal: what the data set is, in a few lines, then what was found."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unetrkit.data.check import Report, by
from unetrkit.data.inspection import Finding
from unetrkit.errors import many

FINDINGS = 3  # of one kind that are shown; the others are counted
NAMES = 8  # of the cases of the others
CLASSES = 25


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints what the data set is, its classes, and the findings: errors last, where they are in sight."""
    console = console or Console()
    heading = f"[bold]{escape(report.dataset.name)}[/bold]"
    console.print(f"{heading}\n{escape(_summary(report))}\n", highlight=False)
    if any(facts.shape for facts in report.cases):
        console.print(_ranges_table(report), "")
    if any(facts.counts for facts in report.cases):
        console.print(_class_table(report), "")
    for colour, findings in (("yellow", report.warnings), ("red", report.errors)):
        kind = attrgetter("code", "hint")
        for _, group in groupby(sorted(findings, key=kind), key=kind):
            text = _group(list(group), colour).replace(escape(f"`{report.dataset.root}/"), "`")
            console.print(text, highlight=False, soft_wrap=True)
    found = f"{many(len(report.errors), 'error')}, {many(len(report.warnings), 'warning')}"
    colour = "red" if report.errors else "green"
    text = f"[bold {colour}]{many(len(report.cases), 'case')} read: {found}[/]"
    console.print(text, highlight=False)


def _summary(report: Report) -> str:
    cases = report.dataset.cases
    splits = Counter(case.split for case in cases)
    parts = [
        ", ".join(f"{n} {split}" for split, n in splits.items()),
        f"{sum(case.label is not None for case in cases)} with a label",
        many(len({case.subject for case in cases}), "subject"),
    ]
    folds = Counter(case.fold for case in cases if case.fold is not None)
    if folds:
        parts.append(f"declared folds of {', '.join(str(folds[fold]) for fold in sorted(folds))}")
    read = [facts for facts in report.cases if facts.shape]
    for kinds in (Counter(facts.axes for facts in read), Counter(facts.dtype for facts in read)):
        common = kinds.most_common(4)
        parts.append(", ".join(f"{kind} ({n})" if len(kinds) > 1 else kind for kind, n in common))
    return "; ".join(part for part in parts if part)


def _ranges_table(report: Report) -> Table:
    read = [facts for facts in report.cases if facts.shape]
    rows: list[tuple[str, list]] = [
        ("size (R x A x S voxels)", [facts.shape for facts in read]),
        ("spacing (mm)", [facts.spacing for facts in read]),
    ]
    for k, name in enumerate(report.dataset.channels):
        channels = [facts.channels[k] for facts in read if len(facts.channels) > k]
        rows.append((f"{name} percentile 0.5", [[channel.low] for channel in channels]))
        rows.append((f"{name} percentile 99.5", [[channel.high] for channel in channels]))
    table = _table("", "min", "median", "max")
    for name, values in rows:
        if values:
            columns = (np.min(values, axis=0), np.median(values, axis=0), np.max(values, axis=0))
            table.add_row(escape(name), *(by(column) for column in columns))
    return table


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


def _group(findings: Sequence[Finding], colour: str) -> str:
    """The findings of one kind: the first of them, the names of the others, what to do."""
    head = f"[{colour}]{findings[0].severity}[/{colour}] ({findings[0].code})"
    lines = [f"{head}: {escape(finding.message)}" for finding in findings[:FINDINGS]]
    names = list(dict.fromkeys(finding.case for finding in findings[FINDINGS:]))
    if names:
        some = ", ".join(names[:NAMES]) + (", …" if len(names) > NAMES else "")
        lines.append(f"  and {len(findings) - FINDINGS} more: {escape(some)}")
    if findings[0].hint:
        lines.append(f"  hint: {escape(findings[0].hint)}")
    return "\n".join(lines) + "\n"


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for k, heading in enumerate(headings):
        table.add_column(heading, justify="right" if k else "left")
    return table
