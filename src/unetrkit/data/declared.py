"""What a data set declares, in any of the ways people write it: cases, classes, channels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from unetrkit.data.folds import Split
from unetrkit.errors import UserError

SPLITS: dict[str, Split] = {
    "training": "training", "train": "training",
    "validation": "validation", "val": "validation", "valid": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One case as written: paths are text that starts at the listing's root. `where` names it in messages."""

    where: str
    images: tuple[str, ...]
    label: str | None
    split: Split
    fold: int | None = None
    subject: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Listing:
    """A data set as written. `channels` and `labels` are empty where none are declared."""

    name: str
    root: Path
    entries: tuple[Entry, ...]
    labels: dict[int, str]
    channels: tuple[str, ...]


def declared_labels(declared: object, source: Path) -> dict[int, str]:
    """{id: name} from {"0": name}, {name: id} or [name, …]; a text about the labels declares no classes."""
    if isinstance(declared, list):
        declared = {str(k): name for k, name in enumerate(declared)}
    if not isinstance(declared, dict) or not declared:
        return {}
    by_id = all(str(key).isdecimal() and isinstance(name, str) for key, name in declared.items())
    pairs = [(key, value) if by_id else (value, key) for key, value in declared.items()]
    labels: dict[int, str] = {}
    for value, name in pairs:
        if isinstance(value, list) or name == "ignore":
            raise UserError(
                f"`{source}`: label `{name}` is a region or a value to ignore, which is not supported yet",
                hint="give every voxel one class id, and name those ids in `labels`",
            )
        if type(value) not in (int, str) or not re.fullmatch(r"[0-9]{1,5}", str(value)) or int(value) > 65535:
            raise UserError(
                f"`{source}`: label `{name}` must have an id from 0 to 65535, found {short(value)}",
                hint='write `labels` as {"0": "background", "1": "liver"}',
            )
        if int(value) in labels:
            raise UserError(
                f"`{source}`: the labels `{labels[int(value)]}` and `{name}` have the same id {value}",
                hint="give each label an id of its own",
            )
        labels[int(value)] = name
    return dict(sorted({0: "background", **labels}.items()))


def declared_channels(declared: object, source: Path) -> tuple[str, ...]:
    """Channel names from {"0": "CT"}, ["CT"] or "CT", in the order of their numbers."""
    if not declared:
        return ()
    if isinstance(declared, str):
        return (declared,)
    names = declared
    if isinstance(declared, dict):
        numbered = {str(key): name for key, name in declared.items()}
        if numbered.keys() == {str(k) for k in range(len(numbered))}:
            names = [numbered[str(k)] for k in range(len(numbered))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"`{source}`: the channels must be names, found {short(declared)}",
            hint='write `channel_names` as {"0": "CT"}',
        )
    return tuple(names)


def short(value: object) -> str:
    """A wrong value for a message: short whatever it is, without walking through all of it."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} with {len(value)} entries"
    return f"`{str(value)[:60]}`"
