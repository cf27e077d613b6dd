"""Whether a data set can be trained on: every case is read once, then compared with the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np

from unetrkit.data.datalist import Case, Dataset, outside
from unetrkit.data.inspection import CaseFacts, ChannelFacts, Finding, inspect_case
from unetrkit.data.processes import for_each

SMALLEST = 8  # voxels along an axis
# HU of the percentiles 0.5 and 99.5: padding is not below, and above is only metal, which is small
CT_LOWEST, CT_HIGHEST = -4096, 6000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What `check` found: facts per case that was read, and findings: those of one case first."""

    dataset: Dataset
    cases: tuple[CaseFacts, ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "dataset": self.dataset.name,
            "root": str(self.dataset.root),
            "channels": list(self.dataset.channels),
            "labels": {str(value): name for value, name in self.dataset.labels.items()},
            "cases": [facts.to_dict() for facts in self.cases],
            "findings": [asdict(finding) for finding in self.findings],
        }


def check(dataset: Dataset, *, workers: int | None = None, progress: Progress | None = None) -> Report:
    """Reads every case once and says what is wrong or odd.

    Errors: what cannot be read; a label off its image's grid; label values that are not declared; a
    constant image; channels that differ in number; the same voxels or the same subject in two splits, or in
    two declared folds. Warnings: empty labels, odd headers, outlying sizes, spacings and intensities, the
    same voxels twice in one split, declared classes that never occur, files outside of the data set's
    folder.

    workers: processes, each with one case in memory; None means one for each core. progress: called with
    (cases read, cases in all). Raises UserError where a process is killed, as for want of memory.
    """
    inspected: dict[int, tuple[CaseFacts, list[Finding]]] = {}
    for position, result in for_each(inspect_case, dataset.cases, workers, lambda case: case.name):
        inspected[position] = result
        if progress:
            progress(len(inspected), len(dataset.cases))
    ordered = [inspected[position] for position in range(len(dataset.cases))]
    facts = [of_case for of_case, _ in ordered]
    findings = [finding for _, of_case in ordered for finding in of_case]
    for rule in (
        _outside,
        _channels,
        _values,
        _duplicates,
        _subjects,
        _sizes,
        _ct_units,
        _ranges,
        _unused_classes,
    ):
        findings += rule(dataset, facts)
    return Report(dataset, tuple(facts), tuple(findings))


def _outside(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    for case in dataset.cases:
        for path in (*case.images, *([case.label] if case.label else [])):
            if outside(path, dataset.root):
                message = f"`{path}` is not in the folder of the data set, `{dataset.root}`"
                yield Finding(case.name, "warning", "outside", message, "the list works on this machine only")


def _channels(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    expected = len(dataset.channels)
    for of_case in facts:
        if of_case.channels and len(of_case.channels) != expected:
            message = f"case `{of_case.case.name}` has {len(of_case.channels)} channels, not {expected}"
            names = ", ".join(dataset.channels)
            yield Finding(
                of_case.case.name,
                "error",
                "channels",
                message,
                f"the data set has: {names}; name the channels in `channel_names`",
            )


def _values(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    for of_case in facts:
        unknown = {value: n for value, n in (of_case.counts or {}).items() if value not in dataset.labels}
        if dataset.labels and unknown:
            some = ", ".join(f"{value} ({n} voxels)" for value, n in islice(unknown.items(), 8))
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            yield Finding(
                of_case.case.name,
                "error",
                "values",
                f"label `{of_case.case.label}` has values that are not declared: {some}{more}",
                f"declared are {_intervals(dataset.labels)}; add to `labels`, or correct the file",
            )


def _duplicates(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    first: dict[str, Case] = {}
    for of_case in facts:
        case = of_case.case
        # many constant images would be copies of each other
        if not of_case.digest or all(c.minimum == c.maximum for c in of_case.channels):
            continue
        other = first.setdefault(of_case.digest, case)
        if other is not case:
            message = f"case `{case.name}` has the same voxels as `{other.name}`"
            if _part(case) != _part(other):
                yield Finding(
                    case.name,
                    "error",
                    "duplicate",
                    f"{message}, but is in {_part(case)} and that in {_part(other)}",
                    "remove one of the two: a result on a case that was trained on means nothing",
                )
            else:
                hint = "remove one of the two, or give both the same `subject` so that no fold parts them"
                yield Finding(case.name, "warning", "duplicate", message, hint)


def _subjects(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    first: dict[str, Case] = {}
    for case in dataset.cases:
        other = first.setdefault(case.subject, case)
        if _part(case) != _part(other):
            yield Finding(
                case.name,
                "error",
                "subject",
                f"subject `{case.subject}` is in {_part(other)} (`{other.name}`)"
                f" and in {_part(case)} (`{case.name}`)",
                "put all cases of a subject into one split and one fold",
            )


def _sizes(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    read = [(of_case.case.name, of_case.shape, of_case.spacing) for of_case in facts if of_case.shape]
    if not read:
        return
    spacings = np.array([spacing for _, _, spacing in read])
    extents = spacings * np.array([shape for _, shape, _ in read])
    usual_spacing, usual_extent = np.median(spacings, axis=0), np.median(extents, axis=0)
    for (name, shape, _), spacing, extent in zip(read, spacings, extents, strict=True):
        small = min(shape) < SMALLEST
        if small:
            message = f"case `{name}` has fewer than {SMALLEST} voxels along an axis: {_by(shape)}"
            yield Finding(name, "warning", "size", message)
        if _times_off(spacing, usual_spacing) > 3:
            message = (
                f"case `{name}` has a spacing of {_by(spacing)} mm; the median is {_by(usual_spacing)} mm"
            )
            yield Finding(name, "warning", "spacing", message, "is the header right?")
        elif not small and _times_off(extent, usual_extent) > 5:
            message = f"case `{name}` is {_by(extent)} mm large; the median is {_by(usual_extent)} mm"
            yield Finding(name, "warning", "extent", message, "is it of the same region as the others?")


def _ct_units(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    for k, name in enumerate(dataset.channels):
        words = set(re.findall("[a-z]+", name.lower()))
        if not words & {"ct", "cbct", "cect", "ncct"} or words & {"mr", "mri", "pet"}:
            continue
        for case, channel in _of_channel(facts, k):
            found = (
                f"case `{case.name}` has intensities from {channel.low:.5g} to {channel.high:.5g} in `{name}`"
            )
            if channel.low < CT_LOWEST or channel.high > CT_HIGHEST:
                yield Finding(
                    case.name, "warning", "units", f"{found}: too far for HU", "was it rescaled twice?"
                )
            elif channel.minimum >= 0:
                hint = "is the intercept of -1024 missing? CT is windowed by HU"
                yield Finding(case.name, "warning", "units", f"{found}, none below 0: not HU", hint)


def _ranges(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    for k, name in enumerate(dataset.channels):
        ranges = [(case, channel.low, channel.high) for case, channel in _of_channel(facts, k)]
        if not ranges:
            continue
        widths = np.log10([max(high - low, 1e-12) for _, low, high in ranges])
        usual = float(np.median(widths))
        spread = 1.4826 * float(np.median(np.abs(widths - usual)))
        odd = np.flatnonzero(np.abs(widths - usual) > max(2.0, 6 * spread))
        hint = f"the others are about {10**usual:.3g} wide; MR, which has no units, is normalised"
        # one case in twenty or more is a scale of its own (another scanner), not an outlier
        if len(odd) > max(1, len(ranges) / 20):
            message = (
                f"{len(odd)} of {len(ranges)} cases have ranges over 100 times off the others in `{name}`"
            )
            yield Finding("", "warning", "range", message, hint)
            continue
        for case, low, high in (ranges[k] for k in odd):
            message = f"case `{case.name}` has intensities from {low:.5g} to {high:.5g} in `{name}`"
            yield Finding(case.name, "warning", "range", f"{message}, over 100 times off the others", hint)


def _of_channel(facts: Sequence[CaseFacts], k: int) -> list[tuple[Case, ChannelFacts]]:
    """The cases that have a channel k which is not constant: that is an error of its own."""
    with_channel = ((of_case.case, of_case.channels[k]) for of_case in facts if len(of_case.channels) > k)
    return [(case, channel) for case, channel in with_channel if channel.minimum < channel.maximum]


def _unused_classes(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    counts = [of_case.counts for of_case in facts if of_case.counts is not None]
    unused = [
        name for value, name in dataset.labels.items() if not any(value in of_case for of_case in counts)
    ]
    if counts and unused:
        some = ", ".join(f"`{name}`" for name in unused[:8]) + (
            f" and {len(unused) - 8} more" if len(unused) > 8 else ""
        )
        hint = "remove from `labels` what nobody has drawn: it would be trained as background"
        yield Finding("", "warning", "unused", f"no label has a voxel of: {some}", hint)


def _part(case: Case) -> str:
    return case.split if case.fold is None else f"{case.split} fold {case.fold}"


def _times_off(values: np.ndarray, usual: np.ndarray) -> float:
    return float(np.maximum(values / usual, usual / values).max())


def _by(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in values)


def _intervals(values: Iterable[int]) -> str:
    """Sorted numbers in few words.

    >>> _intervals([0, 1, 2, 3, 7])
    '0-3, 7'
    """
    ranges: list[list[int]] = []
    for value in sorted(values):
        if ranges and value == ranges[-1][1] + 1:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
