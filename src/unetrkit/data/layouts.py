"""What each layout says, before anything is believed: JSON, nnU-Net raw folder, folder of pairs, CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unetrkit.data.declared import declared_channels, declared_labels, short
from unetrkit.data.files import LARGEST_JSON, read_json, read_problems
from unetrkit.data.folds import Split
from unetrkit.errors import UserError, nearest

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr")
SPLITS: dict[str, Split] = {
    "training": "training", "train": "training",
    "validation": "validation", "val": "validation", "valid": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
IMAGE_FOLDERS = ("images", "image", "imagesTr")
LABEL_FOLDERS = ("labels", "label", "labelsTr", "masks", "segmentations")
IMAGE_SUFFIX = re.compile(r"_(image|img)$", re.IGNORECASE)
LABEL_SUFFIX = re.compile(r"_(label|labels|seg|mask)$", re.IGNORECASE)
CHANNEL_SUFFIX = re.compile(r"_(\d{4})$")


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


def stem(path: Path | str) -> str:
    """The name of a file without the ending of an image format: dots in the rest stay.

    >>> stem("scans/sub-01.v2.nii.gz")
    'sub-01.v2'
    """
    name = Path(path).name
    ending = next((e for e in ENDINGS if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)] or name


def read_layout(path: Path) -> Listing:
    """Recognises the layout of a file or folder and reads it. Raises UserError for anything else."""
    # links in a list's folder are followed once, here; the list itself may be a link into another folder
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    if path.is_dir():
        data_list = path / "dataset.json"
        declared = _mapping(read_json(data_list), data_list) if data_list.is_file() else {}
        if SPLITS.keys() & declared.keys():
            return _read_json_list(data_list, declared)
        images = path / "imagesTr"
        if images.is_dir() and (
            declared or any(CHANNEL_SUFFIX.search(stem(file)) for file in _images_in(images))
        ):
            return _read_nnunet(path, declared)
        return _read_pairs(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_table(path)
    declared = _mapping(read_json(path), path)
    if not SPLITS.keys() & declared.keys() and (path.parent / "imagesTr").is_dir():
        return _read_nnunet(path.parent, declared)
    return _read_json_list(path, declared)


def _read_json_list(path: Path, declared: Mapping[str, object]) -> Listing:
    keys = [key for key in SPLITS if key in declared]
    if not keys:
        raise UserError(
            f"`{path}` lists no cases: it has none of the keys `training`, `validation`, `test`",
            hint=nearest("training", [str(key) for key in declared]) if declared else "",
        )
    entries: list[Entry] = []
    for key in keys:
        listed = declared[key]
        if not isinstance(listed, list):
            raise UserError(f"`{path}`: `{key}` must be a list of cases, found {short(listed)}")
        entries += [
            _json_entry(f"`{path.name}` {key}[{k}]", item, SPLITS[key]) for k, item in enumerate(listed)
        ]
    return _listing(path.parent, entries, declared, path)


def _json_entry(where: str, item: object, split: Split) -> Entry:
    fields = {"image": item} if isinstance(item, str) else item
    if not isinstance(fields, dict):
        raise UserError(f"{where} must be a path or an object with `image`, found {short(item)}")
    images = fields.get("image")
    images = [images] if isinstance(images, str) else images
    if (
        not isinstance(images, list)
        or not images
        or not all(isinstance(text, str) and text for text in images)
    ):
        raise UserError(
            f"{where}: `image` must be a path or a list of paths, found {short(fields.get('image'))}"
        )
    label, fold, subject = fields.get("label"), fields.get("fold"), fields.get("subject")
    if label is not None and not isinstance(label, str):
        raise UserError(f"{where}: `label` must be one path, found {short(label)}")
    if fold is not None and (type(fold) is not int or fold < 0):
        raise UserError(f"{where}: `fold` must be a whole number from 0, found {short(fold)}")
    if subject is not None and (type(subject) not in (str, int) or subject == ""):
        raise UserError(f"{where}: `subject` must be a text or a whole number, found {short(subject)}")
    return Entry(where, tuple(images), label or None, split, fold, None if subject is None else str(subject))


def _read_nnunet(root: Path, declared: Mapping[str, object]) -> Listing:
    ending = declared.get("file_ending", "")
    if not isinstance(ending, str):
        raise UserError(f"`{root / 'dataset.json'}`: `file_ending` must be a text, found {short(ending)}")
    folds = _nnunet_folds(root / "splits_final.json")
    entries: list[Entry] = []
    splits: tuple[tuple[str, str, Split], ...] = (
        ("imagesTr", "labelsTr", "training"),
        ("imagesTs", "labelsTs", "test"),
    )
    for images, labels, split in splits:
        by_case: dict[str, list[Path]] = {}
        for file in _images_in(root / images, ending):
            by_case.setdefault(CHANNEL_SUFFIX.sub("", stem(file)), []).append(file)
        label_of = {stem(file): file for file in _images_in(root / labels, ending)}
        for name in sorted(label_of.keys() - by_case.keys()):
            raise UserError(f"`{label_of[name]}` has no image `{name}_0000` in `{root / images}`")
        for name, files in sorted(by_case.items()):
            where = f"case `{name}` of `{images}`"
            if [stem(file) for file in files] != [f"{name}_{k:04d}" for k in range(len(files))]:
                found = ", ".join(file.name for file in files)
                raise UserError(f"{where}: channels must be numbered from _0000 on, found {found}")
            label = f"{labels}/{label_of[name].name}" if name in label_of else None
            fold = folds.get(name) if split == "training" else None
            entries.append(
                Entry(where, tuple(f"{images}/{file.name}" for file in files), label, split, fold, name=name)
            )
    for name in sorted(folds.keys() - {entry.name for entry in entries}):
        raise UserError(f"`{root / 'splits_final.json'}` names the case `{name}`, which has no image")
    return _listing(root, entries, declared, root / "dataset.json")


def _nnunet_folds(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    splits = read_json(path)
    folds: dict[str, int] = {}
    for k, split in enumerate(splits if isinstance(splits, list) else [None]):
        names = split.get("val") if isinstance(split, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"`{path}` must be a list of {{`train`: [names], `val`: [names]}}: split {k} is not"
            )
        for name in names:
            if name in folds:
                raise UserError(f"`{path}`: case `{name}` is validated in the splits {folds[name]} and {k}")
            folds[name] = k
    return folds


def _read_pairs(root: Path) -> Listing:
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    if images:
        labels = next((root / name for name in LABEL_FOLDERS if (root / name).is_dir()), None)
        image_files, label_files = _images_in(images), _images_in(labels) if labels else []
    else:
        files = _images_in(root)
        label_files = [file for file in files if LABEL_SUFFIX.search(stem(file))]
        image_files = [file for file in files if not LABEL_SUFFIX.search(stem(file))]
    if not image_files:
        raise UserError(
            f"`{root}` holds no data set that is known here",
            hint="give a data list (.json, .csv), an nnU-Net raw folder, one with `images` and `labels`, "
            "or one with X.nii.gz and X_label.nii.gz",
        )
    # a label `X`, or else `X_seg`, `X_label` … belongs to the image `X` or `X_image`
    by_key = {IMAGE_SUFFIX.sub("", stem(file)): file for file in image_files}
    label_of: dict[Path, Path] = {}
    for label in label_files:
        image = by_key.get(stem(label)) or by_key.get(LABEL_SUFFIX.sub("", stem(label)))
        if image is None:
            raise UserError(
                f"`{label}` has no image of the same name",
                hint=f"images are looked for in `{images or root}`",
            )
        if image in label_of:
            raise UserError(f"`{image}` has two labels: `{label_of[image].name}` and `{label.name}`")
        label_of[image] = label
    entries = [
        Entry(
            f"`{file.relative_to(root)}`",
            (str(file.relative_to(root)),),
            str(label_of[file].relative_to(root)) if file in label_of else None,
            "training",
        )
        for file in image_files
    ]
    data_list = root / "dataset.json"
    declared = _mapping(read_json(data_list), data_list) if data_list.is_file() else {}
    return _listing(root, entries, declared, data_list)


def _read_table(path: Path) -> Listing:
    with read_problems(path), open(path, "rb") as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise UserError(f"`{path}` is larger than {LARGEST_JSON // 2**20} MB: this is not a table of cases")
    try:
        text = content.decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"`{path}` is not a table in UTF-8: {error}") from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    images = [k for k, name in enumerate(header) if re.fullmatch(r"image(_\d+)?", name)]
    if not images:
        raise UserError(
            f"`{path}` has no column `image` in its first line",
            hint="a header such as image,label,subject,split,fold",
        )
    images.sort(key=lambda k: int(header[k][6:] or 0))
    entries = [
        _table_entry(f"`{path.name}` line {number}", header, images, row)
        for number, row in enumerate(rows[1:], start=2)
        if any(cell.strip() for cell in row)
    ]
    return _listing(path.parent, entries, {}, path)


def _table_entry(where: str, header: Sequence[str], images: Sequence[int], row: Sequence[str]) -> Entry:
    if len(row) != len(header):
        raise UserError(f"{where} has {len(row)} cells, but the header has {len(header)}")
    cells = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
    paths = [row[k].strip() for k in images]
    if len(paths) == 1:
        paths = [text.strip() for text in paths[0].split(";")]
    if not all(paths):
        raise UserError(f"{where} has no image")
    written, fold = cells.get("split") or "training", cells.get("fold", "")
    if written.lower() not in SPLITS:
        raise UserError(f"{where}: `{written}` is not a split", hint="training, validation or test")
    if fold and not re.fullmatch(r"[0-9]{1,4}", fold):
        raise UserError(f"{where}: `fold` must be a whole number from 0, found `{fold}`")
    return Entry(
        where,
        tuple(paths),
        cells.get("label") or None,
        SPLITS[written.lower()],
        int(fold) if fold else None,
        cells.get("subject") or None,
    )


def _listing(root: Path, entries: Iterable[Entry], declared: Mapping[str, object], source: Path) -> Listing:
    name = declared.get("name")
    return Listing(
        name if isinstance(name, str) and name else root.name,
        root,
        tuple(sorted(entries, key=lambda entry: list(dict.fromkeys(SPLITS.values())).index(entry.split))),
        declared_labels(declared.get("labels"), source),
        declared_channels(declared.get("channel_names", declared.get("modality")), source),
    )


def _images_in(folder: Path, ending: str = "") -> list[Path]:
    if not folder.is_dir():
        return []
    with read_problems(folder):
        files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    wanted = (ending.lower(),) if ending else ENDINGS
    return [file for file in files if file.name.lower().endswith(wanted)]


def _mapping(content: object, path: Path) -> dict[str, object]:
    if not isinstance(content, dict):
        raise UserError(
            f"`{path}` must hold an object with `training`, `validation` or `test`, found {short(content)}"
        )
    return content
