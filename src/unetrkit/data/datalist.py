"""The cases of a data set, from any of the layouts people have, read in place.

Layouts: a data list in JSON (Medical Segmentation Decathlon, https://arxiv.org/abs/2106.05735, as MONAI
reads it), an nnU-Net raw folder, a folder of image and label pairs, a CSV table. `layouts` reads what is
written; here it is checked.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unetrkit.data.declared import Entry, Listing
from unetrkit.data.folds import Split, assign_folds, split_cases
from unetrkit.data.layouts import read_layout, stem
from unetrkit.errors import UserError

__all__ = ["Case", "Dataset", "assign_folds", "outside", "read_dataset", "split_cases"]

BIDS_SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)(?:_.*)?")
UNSAFE = re.compile(r'[/\\<>:"|?*\x00-\x1f\x7f]')


@dataclass(frozen=True)
class Case:
    """One scan: one image file, or one per channel, and its label if it has one. Paths are absolute.

    name: unique in the data set and safe as a file name; from the image's file name, with the names of its
    folders in front where two cases would share it. subject: whose scan it is, to keep a person in one split.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None
    subject: str
    split: Split
    fold: int | None = None


@dataclass(frozen=True)
class Dataset:
    """Cases and what is declared about them. `labels` (id -> name) is empty where no classes are declared."""

    name: str
    root: Path
    cases: tuple[Case, ...]
    labels: dict[int, str]
    channels: tuple[str, ...]


def read_dataset(path: Path, *, allow_outside: bool = False, channels: int | None = None) -> Dataset:
    """The data set that a data list (JSON, CSV) or a folder (nnU-Net raw, pairs) describes; no voxel is read.

    Relative paths start at the folder of the list. A path that leaves that folder (absolute, `..`, a link)
    is refused unless `allow_outside`. The subject of a case is its entry's `subject`, else the `sub-…` of a
    BIDS path, else the case's name: nothing more is guessed. Cases keep the order of the list: training,
    validation, test. `channels`: where a model asks for so many, X_0000, X_0001 … in a folder of scans
    without labels are the channels of one case X.

    Raises UserError, naming the entry: missing files, an image listed twice, a training case without a
    label in a data set with labels, anything that is not what the layout says.
    """
    listing = read_layout(path, channels)
    if not listing.entries:
        raise UserError(f"`{path}` lists no cases", hint="add cases to `training`, `validation` or `test`")
    found = [_locate(entry, listing.root, allow_outside) for entry in listing.entries]
    _require_files(listing, found)
    _require_labels(listing)
    _require_distinct(listing, found)
    names = _names(listing, found)
    cases = tuple(
        Case(
            name,
            images,
            label,
            entry.subject or _bids_subject(images[0], listing.root) or name,
            entry.split,
            entry.fold,
        )
        for entry, (images, label), name in zip(listing.entries, found, names, strict=True)
    )
    return Dataset(listing.name, listing.root, cases, listing.labels, _channels(listing))


def outside(path: Path, root: Path) -> bool:
    """Whether a path, its links followed, is not within a folder."""
    return not path.resolve().is_relative_to(root.resolve())


def _locate(entry: Entry, root: Path, allow_outside: bool) -> tuple[tuple[Path, ...], Path | None]:
    written = [*entry.images, *([entry.label] if entry.label else [])]
    for text in written:
        if problem := _problem(root / text):
            raise UserError(
                f"{entry.where}: {text[:60]!r} cannot be the name of a file: {problem}",
                hint="correct the path in the list",
            )
        if not allow_outside and outside(root / text, root):
            raise UserError(
                f"{entry.where}: `{text}` leads out of the folder `{root}`",
                hint="move the file there, or pass --allow-outside if you trust this list",
            )
    paths = tuple(root / text for text in entry.images)
    return paths, root / entry.label if entry.label else None


def _problem(path: Path) -> str | None:
    """Why the operating system does not take a path; whether there is a file is another question."""
    try:
        path.resolve().exists()
    except OSError as error:
        return error.strerror
    # a NUL, half a surrogate pair; before Python 3.13 a loop of links
    except (ValueError, RuntimeError) as error:
        return str(error)[:100]
    return None


def _require_files(listing: Listing, found: list[tuple[tuple[Path, ...], Path | None]]) -> None:
    missing = [
        f"{entry.where}: there is no file `{path}`"
        for entry, (images, label) in zip(listing.entries, found, strict=True)
        for path in (*images, *([label] if label else []))
        if not path.exists()
    ]
    if missing:
        others = f" (nor {len(missing) - 1} others of this list)" if len(missing) > 1 else ""
        raise UserError(missing[0] + others, hint=f"paths start at `{listing.root}`")


def _require_labels(listing: Listing) -> None:
    needed = [entry for entry in listing.entries if entry.split != "test"]
    without = [entry for entry in needed if entry.label is None]
    if without and len(without) < len(needed):
        raise UserError(
            f"{without[0].where} has no label, nor have {len(without) - 1} others of {len(needed)} cases",
            hint="give the label, move the case to `test`, or list what has no label in a file of its own",
        )


def _require_distinct(listing: Listing, found: list[tuple[tuple[Path, ...], Path | None]]) -> None:
    seen: dict[Path, Entry] = {}
    for entry, (images, label) in zip(listing.entries, found, strict=True):
        for path in images:
            real = path.resolve()
            if real in seen:
                raise UserError(
                    f"{entry.where} and {seen[real].where} have the same image `{path}`",
                    hint="remove one of the two entries",
                )
            seen[real] = entry
        if label and label.resolve() in {path.resolve() for path in images}:
            raise UserError(
                f"{entry.where}: `{label}` is both image and label",
                hint="give the file of the label map as `label`",
            )


def _channels(listing: Listing) -> tuple[str, ...]:
    first = listing.entries[0]
    for entry in listing.entries:
        if len(entry.images) != len(first.images):
            raise UserError(
                f"{entry.where} has {len(entry.images)} images, but {first.where} has {len(first.images)}",
                hint="give every case one file, or one file per channel",
            )
    count = len(first.images)
    # one 4D file may hold all the declared channels
    if listing.channels and count not in (1, len(listing.channels)):
        raise UserError(
            f"{first.where} has {count} images, but {len(listing.channels)} channels are declared",
            hint="declare as many channels as there are files for each case",
        )
    return listing.channels or (("image",) if count == 1 else tuple(f"image_{k}" for k in range(count)))


def _names(listing: Listing, found: list[tuple[tuple[Path, ...], Path | None]]) -> list[str]:
    candidates = [
        list(_longer_names(entry, images[0], listing.root))
        for entry, (images, _) in zip(listing.entries, found, strict=True)
    ]
    names = [of_case[0] for of_case in candidates]
    for depth in range(1, max(len(of_case) for of_case in candidates)):
        # a Mac or Windows disk takes names that differ in case or in Unicode form for one
        counts = Counter(_folded(name) for name in names)
        names = [
            of_case[min(depth, len(of_case) - 1)] if counts[_folded(name)] > 1 else name
            for name, of_case in zip(names, candidates, strict=True)
        ]
    owners: dict[str, Entry] = {}
    for entry, name in zip(listing.entries, names, strict=True):
        other = owners.setdefault(_folded(name), entry)
        if other is not entry:
            raise UserError(
                f"{entry.where} and {other.where} would both be the case `{name}`", hint="rename an image"
            )
    return names


def _longer_names(entry: Entry, image: Path, root: Path) -> Iterator[str]:
    """Safe file names for a case, each with one folder more in front."""
    name = entry.name or stem(image)
    yield _safe(name)
    folders = image.relative_to(root).parent.parts if image.is_relative_to(root) else image.parent.parts
    for folder in reversed(folders):
        name = f"{folder}_{name}"
        yield _safe(name)


def _safe(name: str) -> str:
    return UNSAFE.sub("_", name).strip(". ") or "case"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _bids_subject(image: Path, root: Path) -> str | None:
    parts = image.relative_to(root).parts if image.is_relative_to(root) else image.parts
    matches = (BIDS_SUBJECT.fullmatch(part) for part in parts)
    return next((match[1] for match in matches if match), None)
