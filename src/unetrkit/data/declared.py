"""What a data set declares, in any of the ways people write it: cases, classes, channels."""

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
ENTRY = 'write an entry as {"image": "a.nii.gz", "label": "b.nii.gz"}; `subject` and `fold` may be added'


@dataclass(frozen=True)
class Entry:
    """One case as written. `where` names it in messages."""

    where: str
    images: tuple[Path, ...]
    label: Path | None
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


def declared_entry(where: str, item: object, split: Split, root: Path) -> Entry:
    """A case from a path or from {"image": path or [path, …], "label": …, "fold": …, "subject": …}."""
    fields = {"image": item} if isinstance(item, str) else item
    if not isinstance(fields, dict):
        raise _expected(where, "a path or an object with `image`", item)
    images, label, fold, subject = (fields.get(key) for key in ("image", "label", "fold", "subject"))
    images = [images] if isinstance(images, str) else images
    paths = images if isinstance(images, list) else []
    if not paths or not all(text and isinstance(text, str) for text in paths):
        raise _expected(f"{where}: `image`", "a path or a list of paths", fields.get("image"))
    if label is not None and not isinstance(label, str):
        raise _expected(f"{where}: `label`", "one path", label)
    if fold is not None and (type(fold) is not int or fold < 0):
        raise _expected(f"{where}: `fold`", "a whole number from 0", fold)
    if subject is not None and (type(subject) not in (str, int) or subject == ""):
        raise _expected(f"{where}: `subject`", "a text or a whole number", subject)
    subject = None if subject is None else str(subject)
    files = tuple(root / text for text in paths), root / label if label else None
    return Entry(where, *files, split, fold, subject)


def _expected(where: str, what: str, found: object) -> UserError:
    return UserError(f"{where} must be {what}, found {short(found)}", hint=ENTRY)


def declared_labels(declared: object, source: Path) -> dict[int, str]:
    """{id: name} from {"0": name}, {name: id} or [name, …]; a text about the labels declares no classes."""
    if isinstance(declared, list):
        declared = {str(k): name for k, name in enumerate(declared)}
    if not isinstance(declared, dict) or not declared:
        return {}
    by_id = all(str(key).isdecimal() and isinstance(name, str) for key, name in declared.items())
    hint = 'write `labels` as {"0": "background", "1": "liver"}: one id, from 0 to 65535, for each name'
    labels: dict[int, str] = {}
    for key, value in declared.items():
        label, name = (key, value) if by_id else (value, key)
        problem = ""
        if isinstance(label, list) or name == "ignore":
            problem = f"label `{name}` is a region or a value to ignore, which is not supported yet"
        elif type(label) not in (int, str) or not re.fullmatch(r"\d{1,5}", str(label)) or int(label) > 65535:
            problem = f"label `{name}` must have an id from 0 to 65535, found {short(label)}"
        elif int(label) in labels:
            problem = f"the labels `{labels[int(label)]}` and `{name}` have the same id {label}"
        if problem:
            raise UserError(f"`{source}`: {problem}", hint=hint)
        labels[int(label)] = name
    return dict(sorted({0: "background", **labels}.items()))


def declared_channels(declared: object, source: Path) -> tuple[str, ...]:
    """Channel names from {"0": "CT"}, ["CT"] or "CT", in the order of their numbers."""
    names = [declared] if isinstance(declared, str) else declared or []
    if isinstance(names, dict):
        numbers = [str(k) for k in range(len(names))]
        names = [names[k] for k in numbers] if names.keys() == set(numbers) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        message = f"`{source}`: the channels must be names, found {short(declared)}"
        raise UserError(message, hint='write `channel_names` as {"0": "CT"}')
    return tuple(names)


def is_ct(channel: str) -> bool | None:
    """Whether a channel's name says CT; None where it says nothing (`image_0`) or two things (`CT or MR`)."""
    words = set(re.findall("[a-z]+", channel.lower()))
    ct, other = words & {"ct", "cbct", "cta", "cect", "ncct"}, words & {"mr", "mri", "pet"}
    if words <= {"channel", "image"} or (ct and other):
        return None
    return bool(ct)


def short(value: object) -> str:
    """A wrong value for a message: short whatever it is, without walking through all of it."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} with {len(value)} entries"
    return f"`{str(value)[:60]}`"
