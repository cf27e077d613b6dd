"""The cases of a data set, from any of the layouts people have, read in place.

Layouts: a data list in JSON (Medical Segmentation Decathlon, https://arxiv.org/abs/2106.05735, as MONAI
reads it), an nnU-Net raw folder, a folder of image and label pairs, a CSV table. `layouts` reads what is
written; here it is checked.
"""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from unetrkit.data.declared import Entry, Listing
from unetrkit.data.folds import Split
from unetrkit.data.layouts import read_layout, stem
from unetrkit.errors import UserError, many

BIDS_SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)(?:_.*)?")
UNSAFE = re.compile(r'[/\\<>:"|?*\x00-\x1f\x7f]')


@dataclass(frozen=True)
class Case:
    """One scan: one image file, or one per channel, and its label if it has one. Paths are absolute.

    name: unique in the data set and safe as a file name; that of the image, with its folders in front where
    two cases would share one. subject: whose scan it is, to keep a person in one split.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    subject: str
    split: Split
    fold: int | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The images and the label."""
        return self.images if self.label is None else (*self.images, self.label)


@dataclass(frozen=True)
class Dataset:
    """Cases and what is declared about them. `labels` (id -> name) is empty where no classes are declared."""

    name: str
    root: Path
    cases: tuple[Case, ...]
    labels: dict[int, str]
    channels: tuple[str, ...]


def read_dataset(
    path: Path, *, allow_outside: bool = False, channels: int | None = None, unlabelled: bool = False
) -> Dataset:
    """The data set that a data list (JSON, CSV) or a folder (nnU-Net raw, pairs) describes; no voxel is read.

    Relative paths start at the folder of the list. A path that leaves that folder (absolute, `..`, a link)
    is refused unless `allow_outside`. The subject of a case is its entry's `subject`, else the `sub-…` of a
    BIDS path, else the case's name. Cases come in the order of the list: training, validation, test.
    channels: where a model asks for so many, X_0000, X_0001 … in a folder of unlabelled scans are one case X.
    unlabelled: labels and declared classes are left aside, as if there were none.

    Raises UserError, naming the entry: missing files, an image listed twice, a training case without a
    label in a data set with labels, anything that is not what the layout says.
    """
    listing = read_layout(path, channels)
    if unlabelled:
        images = tuple(replace(entry, label=None) for entry in listing.entries)
        listing = replace(listing, entries=images, labels={})
    if not listing.entries:
        raise UserError(f"`{path}` lists no cases", hint="add cases to `training`, `validation` or `test`")
    _require_files(listing, allow_outside)
    _require_labels(listing)
    _require_distinct(listing)
    cases = []
    for entry, name in zip(listing.entries, _names(listing), strict=True):
        subject = entry.subject or _bids_subject(entry.images[0], listing.root) or name
        cases.append(Case(name, entry.images, entry.label, subject, entry.split, entry.fold))
    return Dataset(listing.name, listing.root, tuple(cases), listing.labels, _channels(listing))


def cases_to_learn_from(dataset: Dataset) -> list[Case]:
    """The labelled cases for training and validation; where no class is declared and none has a label, all.

    Raises UserError where there are none.
    """
    cases = [case for case in dataset.cases if case.split != "test"]
    labelled = [case for case in cases if case.label is not None]
    if labelled or (cases and not dataset.labels):
        return labelled or cases
    hint = "add cases with an `image` and a `label` to `training`"
    hint = f"{hint}; `--unlabelled` prepares images alone, for pre-training" if cases else hint
    raise UserError(f"`{dataset.name}` has no labelled case to learn from", hint=hint)


def outside(path: Path, root: Path) -> bool:
    """Whether a path, its links followed, is not within a folder."""
    return not path.resolve().is_relative_to(root.resolve())


def _require_files(listing: Listing, allow_outside: bool) -> None:
    missing = []
    for entry, path in [(one, path) for one in listing.entries for path in (*one.images, one.label) if path]:
        try:
            str(path).encode()
            leaves, exists = outside(path, listing.root), path.exists()
        # bytes that are not UTF-8; too long; a NUL; before Python 3.13 a loop of links
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)[:100]
            name = path.name[:60]
            if isinstance(error, UnicodeError):
                name, reason = str(path), "it is not UTF-8"
            message = f"{entry.where}: {name!r} cannot be the name of a file: {reason}"
            raise UserError(message, hint="rename the file, or correct the path in the list") from error
        if leaves and not allow_outside:
            written = os.path.relpath(path, listing.root)
            hint = "move the file there, or pass --allow-outside if you trust this list"
            raise UserError(f"{entry.where}: `{written}` leads out of the folder `{listing.root}`", hint=hint)
        if not exists:
            missing.append(f"{entry.where}: there is no file `{path}`")
    if missing:
        others = f" (nor {many(len(missing) - 1, 'other')} of this list)" if len(missing) > 1 else ""
        raise UserError(missing[0] + others, hint=f"paths start at `{listing.root}`")


def _require_labels(listing: Listing) -> None:
    needed = [entry for entry in listing.entries if entry.split != "test"]
    without = [entry for entry in needed if entry.label is None]
    if without and len(without) < len(needed):
        raise UserError(
            f"{without[0].where} has no label ({many(len(without), 'such case')} of {len(needed)})",
            hint="give the label, move the case to `test`, or list what has no label in a file of its own; "
            "to pre-train, `prepare --unlabelled` takes every image",
        )


def _require_distinct(listing: Listing) -> None:
    seen: dict[Path, Entry] = {}
    for entry, path in [(one, path) for one in listing.entries for path in one.images]:
        real = path.resolve()
        if real in seen:
            message = f"{entry.where} and {seen[real].where} have the same image `{path}`"
            raise UserError(message, hint="remove one of the two entries")
        seen[real] = entry
        if entry.label and entry.label.resolve() == real:
            message = f"{entry.where}: `{entry.label}` is both image and label"
            raise UserError(message, hint="give the file of the label map as `label`")


def _channels(listing: Listing) -> tuple[str, ...]:
    first, declared = listing.entries[0], listing.channels
    count = len(first.images)
    for entry in listing.entries:
        if len(entry.images) != count:
            message = f"{entry.where} has {many(len(entry.images), 'image')}, but {first.where} has {count}"
            raise UserError(message, hint="give every case one file, or one file per channel")
    # one 4D file may hold all the declared channels
    if declared and count not in (1, len(declared)):
        message = f"{first.where} has {count} images, but {len(declared)} in `channel_names`"
        raise UserError(message, hint="declare as many channels as there are files for each case")
    return declared or (("image",) if count == 1 else tuple(f"image_{k}" for k in range(count)))


def _names(listing: Listing) -> list[str]:
    """A unique name for each case, safe as a file name."""
    names = [_safe(entry.name or stem(entry.images[0])) for entry in listing.entries]
    counts = Counter(map(_folded, names))
    owners: dict[str, Entry] = {}
    for k, entry in enumerate(listing.entries):
        if counts[_folded(names[k])] > 1:
            names[k] = _safe("_".join([*_folders(entry.images[0], listing.root), names[k]]))
        other = owners.setdefault(_folded(names[k]), entry)
        if other is not entry:
            message = f"{entry.where} and {other.where} would both be the case `{names[k]}`"
            raise UserError(message, hint="rename an image")
    return names


def _safe(name: str) -> str:
    return UNSAFE.sub("_", name).strip(". ") or "case"


def _folded(name: str) -> str:
    """What a Mac or Windows disk takes for one: names that differ in case or in Unicode form."""
    return unicodedata.normalize("NFC", name).casefold()


def _folders(image: Path, root: Path) -> tuple[str, ...]:
    return (image.relative_to(root) if image.is_relative_to(root) else image).parent.parts


def _bids_subject(image: Path, root: Path) -> str | None:
    matches = (BIDS_SUBJECT.fullmatch(part) for part in (*_folders(image, root), image.name))
    return next((match[1] for match in matches if match), None)
