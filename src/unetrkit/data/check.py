"""Whether a data set can be trained on: every case is read once, then compared with the others."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from unetrkit.data.datalist import Case, Dataset, outside
from unetrkit.data.declared import is_ct
from unetrkit.data.inspection import CaseFacts, ChannelFacts, Finding, inspect_case
from unetrkit.data.processes import map_cases
from unetrkit.errors import many
from unetrkit.progress import Progress

SMALLEST = 8  # voxels along an axis
# HU of the percentiles 0.5 and 99.5: padding is not below, and above is only metal, which is small
CT_LOWEST, CT_HIGHEST = -4096, 6000


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

    Errors: nothing to train or to validate on; what cannot be read; a label off its image's grid; undeclared
    label values; a constant channel; a wrong number of channels; the same voxels or subject in two splits or
    declared folds. Warnings: empty labels, odd headers, outlying sizes, spacings and intensities, the same
    voxels twice in one split, classes that nobody has drawn, files outside of the data set's folder, no case
    with a label.

    workers: processes, each with one case in memory; None means one for each core. Raises UserError where a
    process is killed, as for want of memory.
    """
    inspected = map_cases(inspect_case, dataset.cases, workers, progress)
    facts = [of_case for of_case, _ in inspected]
    findings = [finding for _, of_case in inspected for finding in of_case]
    for rule in RULES:
        findings += rule(dataset, facts)
    return Report(dataset, tuple(facts), tuple(findings))


def _outside(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    for case in dataset.cases:
        if paths := [path for path in case.files if outside(path, dataset.root)]:
            more = f" (nor {many(len(paths) - 1, 'other file')} of the case)" if len(paths) > 1 else ""
            message = f"`{paths[0]}` is not in the folder of the data set, `{dataset.root}`{more}"
            yield Finding(case.name, "warning", "outside", message, "the list works on this machine only")


def _split(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    some, kind = [case for case in dataset.cases if case.split != "test"], "labelled cases"
    if dataset.labels or any(case.label for case in some):
        some = [case for case in some if case.label]
    elif some:
        kind = "cases"
        only = "this can be pre-trained on, with `unetrkit pretrain`, but not trained on"
        yield Finding("", "warning", "split", f"no case has a label: {only}")
    training = [case for case in some if case.split == "training"]
    folds = any(case.fold is not None for case in training)
    parts = {case.fold if folds else case.subject for case in training}
    message, hint = "", f"add {kind} to `training`; scans to predict need no check"
    if not some:
        message = "no case has a label: there is nothing to train on"
    elif not training:
        message = f"all {kind} are for validation: none is left to train on"
    elif training == some and len(parts) < 2:
        part, hint = ("fold" if folds else "subject"), f"add {kind} of other subjects"
        message = f"all {kind} are of one {part}: none is left to validate on"
    if message:
        yield Finding("", "error", "split", message, hint)


def _channels(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    expected = len(dataset.channels)
    hint = f"the data set has: {', '.join(dataset.channels)}; name the channels in `channel_names`"
    for of_case in facts:
        if of_case.channels and len(of_case.channels) != expected:
            name = of_case.case.name
            message = f"case `{name}` has {many(len(of_case.channels), 'channel')}, not {expected}"
            yield Finding(name, "error", "channels", message, hint)


def _values(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    hint = f"declared are {_intervals(dataset.labels)}; add to `labels`, or correct the file"
    for of_case in facts if dataset.labels else ():
        counts = of_case.counts or {}
        unknown = [f"{value} ({n} voxels)" for value, n in counts.items() if value not in dataset.labels]
        if unknown:
            message = f"label `{of_case.case.label}` has values that are not declared: {_some(unknown)}"
            yield Finding(of_case.case.name, "error", "values", message, hint)


def _duplicates(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    first: dict[str, Case] = {}
    for of_case in facts:
        case = of_case.case
        # many constant images would be copies of each other
        if not of_case.digest or all(c.minimum == c.maximum for c in of_case.channels):
            continue
        other = first.setdefault(of_case.digest, case)
        message = f"case `{case.name}` has the same voxels as `{other.name}`"
        if _part(case) != _part(other):
            message += f", but is in {_part(case)} and that in {_part(other)}"
            hint = "remove one of the two: a result on a case that was trained on means nothing"
            yield Finding(case.name, "error", "duplicate", message, hint)
        elif other is not case:
            hint = "remove one of the two, or give both the same `subject` so that no fold parts them"
            yield Finding(case.name, "warning", "duplicate", message, hint)


def _subjects(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    first: dict[str, Case] = {}
    for case in dataset.cases:
        other = first.setdefault(case.subject, case)
        if _part(case) != _part(other):
            parts = " and in ".join(f"{_part(one)} (`{one.name}`)" for one in (other, case))
            hint = "put all cases of a subject into one split and one fold"
            yield Finding(case.name, "error", "subject", f"subject `{case.subject}` is in {parts}", hint)


def _sizes(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    read = [of_case for of_case in facts if of_case.shape and of_case.spacing]
    if not read:
        return
    shapes, spacings = np.array([one.shape for one in read]), np.array([one.spacing for one in read])
    extents = spacings * shapes
    usual_spacing, usual_extent = np.median(spacings, axis=0), np.median(extents, axis=0)
    for of_case, shape, spacing, extent in zip(read, shapes, spacings, extents, strict=True):
        name = of_case.case.name
        small = shape.min() < SMALLEST
        if small:
            message = f"case `{name}` has fewer than {SMALLEST} voxels along an axis: {by(shape)}"
            yield Finding(name, "warning", "size", message)
        if _times_off(spacing, usual_spacing) > 3:
            message = f"case `{name}` has a spacing of {by(spacing)} mm; the median is {by(usual_spacing)} mm"
            yield Finding(name, "warning", "spacing", message, "is the header right?")
        elif not small and _times_off(extent, usual_extent) > 5:
            message = f"case `{name}` is {by(extent)} mm large; the median is {by(usual_extent)} mm"
            yield Finding(name, "warning", "extent", message, "is it of the same region as the others?")


def _ct_units(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    for k, channel in enumerate(dataset.channels):
        for name, values in _of_channel(facts, k) if is_ct(channel) else ():
            found = _range(name, values, channel)
            if values.low < CT_LOWEST or values.high > CT_HIGHEST:
                message, hint = f"{found}: too far for HU", "was it rescaled twice?"
                yield Finding(name, "warning", "units", message, hint)
            elif values.minimum >= 0:
                hint = "is the intercept of -1024 missing? CT is windowed by HU"
                yield Finding(name, "warning", "units", f"{found}, none below 0: not HU", hint)


def _ranges(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    for k, channel in enumerate(dataset.channels):
        cases = _of_channel(facts, k)
        if not cases:
            continue
        widths = np.log10([max(values.high - values.low, 1e-12) for _, values in cases])
        usual = float(np.median(widths))
        spread = 1.4826 * float(np.median(np.abs(widths - usual)))
        odd = np.flatnonzero(np.abs(widths - usual) > max(2.0, 6 * spread))
        hint = f"the others are about {10**usual:.3g} wide; MR, which has no units, is normalised"
        # one case in twenty or more is a scale of its own (another scanner), not an outlier
        if len(odd) > max(1, len(cases) / 20):
            some = f"{len(odd)} of {len(cases)} cases have ranges"
            found = f"{some} over 100 times off the others in `{channel}`"
            yield Finding("", "warning", "range", found, hint)
            continue
        for name, values in (cases[k] for k in odd):
            found = f"{_range(name, values, channel)}, over 100 times off the others"
            yield Finding(name, "warning", "range", found, hint)


def _unused_classes(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterator[Finding]:
    drawn = set().union(*(of_case.counts or () for of_case in facts))
    unused = [f"`{name}`" for value, name in dataset.labels.items() if value not in drawn]
    if drawn and unused:
        hint = "remove from `labels` what nobody has drawn: it would be trained as background"
        yield Finding("", "warning", "unused", f"no label has a voxel of: {_some(unused)}", hint)


RULES = (
    _outside, _split, _channels, _values, _duplicates, _subjects, _sizes, _ct_units, _ranges, _unused_classes
)  # fmt: skip


def _of_channel(facts: Sequence[CaseFacts], k: int) -> list[tuple[str, ChannelFacts]]:
    """The cases that have a channel k which is not constant: that is an error of its own."""
    found = [(one.case.name, one.channels[k]) for one in facts if len(one.channels) > k]
    return [(name, values) for name, values in found if values.minimum < values.maximum]


def _range(name: str, values: ChannelFacts, channel: str) -> str:
    return f"case `{name}` has intensities from {values.low:.5g} to {values.high:.5g} in `{channel}`"


def _part(case: Case) -> str:
    return case.split if case.fold is None else f"{case.split} fold {case.fold}"


def _times_off(values: np.ndarray, usual: np.ndarray) -> float:
    return float(np.maximum(values / usual, usual / values).max())


def by(values: Iterable[float]) -> str:
    """Sizes along the axes in words."""
    return " x ".join(f"{value:.4g}" for value in values)


def _some(words: Sequence[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _intervals(values: Iterable[int]) -> str:
    """Numbers in few words.

    >>> _intervals([0, 1, 2, 3, 7])
    '0-3, 7'
    """
    # within an interval a number and its position grow alike
    grouped = groupby(enumerate(sorted(values)), key=lambda pair: pair[1] - pair[0])
    runs = [[value for _, value in run] for _, run in grouped]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
