"""What each layout says, before anything is believed: JSON, nnU-Net raw folder, folder of pairs, CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from unetrkit.data.declared import SPLITS, Entry, Listing, declared_channels, declared_labels, short
from unetrkit.data.files import read_json, read_problems
from unetrkit.data.folds import Split
from unetrkit.data.tables import read_table
from unetrkit.errors import UserError

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".hdr")
IMAGE_FOLDERS = ("images", "image", "imagesTr")
LABEL_FOLDERS = ("labels", "label", "labelsTr", "masks", "segmentations")
IMAGE_SUFFIX = re.compile(r"_(image|img)$", re.IGNORECASE)
LABEL_SUFFIX = re.compile(r"_(label|labels|seg|mask)$", re.IGNORECASE)
CHANNEL_SUFFIX = re.compile(r"_(\d{4})$")
ENTRY = 'write an entry as {"image": "a.nii.gz", "label": "b.nii.gz"}; `subject` and `fold` may be added'


def stem(path: Path | str) -> str:
    """The name of a file without the ending of an image format: dots in the rest stay.

    >>> stem("scans/sub-01.v2.nii.gz")
    'sub-01.v2'
    """
    name = Path(path).name
    ending = next((e for e in ENDINGS if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)] or name


def read_layout(path: Path, channels: int | None = None) -> Listing:
    """Recognises the layout of a file or folder and reads it. Raises UserError for anything else.

    channels: how many files a case has where a plain folder holds X_0000, X_0001 …; None means one.
    """
    # links in a list's folder are followed once, here; the list itself may be a link into another folder
    path = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    if path.is_dir():
        data_list = path / "dataset.json"
        declared = _mapping(read_json(data_list), data_list) if data_list.is_file() else {}
        if SPLITS.keys() & declared.keys():
            return _read_json_list(data_list, declared)
        images = path / "imagesTr"
        if images.is_dir() and (
            _of_nnunet(declared) or any(CHANNEL_SUFFIX.search(stem(file)) for file in _images_in(images))
        ):
            return _read_nnunet(path, declared)
        return _read_pairs(path, channels)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _listing(path.parent, read_table(path), {}, path)
    declared = _mapping(read_json(path), path)
    if not SPLITS.keys() & declared.keys() and _of_nnunet(declared) and (path.parent / "imagesTr").is_dir():
        return _read_nnunet(path.parent, declared)
    return _read_json_list(path, declared)


def _of_nnunet(declared: Mapping[str, object]) -> bool:
    return "file_ending" in declared or {"channel_names", "numTraining"} <= declared.keys()


def _read_json_list(path: Path, declared: Mapping[str, object]) -> Listing:
    keys = [key for key in SPLITS if key in declared]
    if not keys:
        raise UserError(
            f"`{path}` lists no cases: it has none of the keys `training`, `validation`, `test`",
            hint='list the cases as "training": [{"image": "a.nii.gz", "label": "b.nii.gz"}, …]',
        )
    entries: list[Entry] = []
    for key in keys:
        listed = declared[key]
        if not isinstance(listed, list):
            raise _expected(f"`{path}`: `{key}`", "a list of cases", listed)
        entries += [
            _json_entry(f"`{path.name}` {key}[{k}]", item, SPLITS[key]) for k, item in enumerate(listed)
        ]
    return _listing(path.parent, entries, declared, path)


def _json_entry(where: str, item: object, split: Split) -> Entry:
    fields = {"image": item} if isinstance(item, str) else item
    if not isinstance(fields, dict):
        raise _expected(where, "a path or an object with `image`", item)
    images = fields.get("image")
    images = [images] if isinstance(images, str) else images
    if (
        not isinstance(images, list)
        or not images
        or not all(isinstance(text, str) and text for text in images)
    ):
        raise _expected(f"{where}: `image`", "a path or a list of paths", fields.get("image"))
    label, fold, subject = fields.get("label"), fields.get("fold"), fields.get("subject")
    if label is not None and not isinstance(label, str):
        raise _expected(f"{where}: `label`", "one path", label)
    if fold is not None and (type(fold) is not int or fold < 0):
        raise _expected(f"{where}: `fold`", "a whole number from 0", fold)
    if subject is not None and (type(subject) not in (str, int) or subject == ""):
        raise _expected(f"{where}: `subject`", "a text or a whole number", subject)
    return Entry(where, tuple(images), label or None, split, fold, None if subject is None else str(subject))


def _expected(where: str, what: str, found: object) -> UserError:
    return UserError(f"{where} must be {what}, found {short(found)}", hint=ENTRY)


def _read_nnunet(root: Path, declared: Mapping[str, object]) -> Listing:
    ending = declared.get("file_ending", "")
    if not isinstance(ending, str):
        raise UserError(
            f"`{root / 'dataset.json'}`: `file_ending` must be a text, found {short(ending)}",
            hint='write "file_ending": ".nii.gz"',
        )
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
            raise UserError(
                f"`{label_of[name]}` has no image `{name}_0000` in `{root / images}`",
                hint="add the image, or move the label away",
            )
        for name, files in sorted(by_case.items()):
            where = f"case `{name}` of `{images}`"
            _require_numbers(where, name, files)
            label = f"{labels}/{label_of[name].name}" if name in label_of else None
            fold = folds.get(name) if split == "training" else None
            entries.append(
                Entry(where, tuple(f"{images}/{file.name}" for file in files), label, split, fold, name=name)
            )
    for name in sorted(folds.keys() - {entry.name for entry in entries}):
        raise UserError(
            f"`{root / 'splits_final.json'}` names the case `{name}`, which has no image",
            hint="add the image, or remove the file: folds are made without it",
        )
    return _listing(root, entries, declared, root / "dataset.json")


def _require_numbers(where: str, name: str, files: Sequence[Path]) -> None:
    if [stem(file) for file in files] != [f"{name}_{k:04d}" for k in range(len(files))]:
        found = ", ".join(file.name for file in files)
        raise UserError(
            f"{where}: channels must be numbered from _0000 on, found {found}",
            hint=f"name the files of its channels `{name}_0000`, `{name}_0001` …",
        )


def _nnunet_folds(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    splits = read_json(path)
    folds: dict[str, int] = {}
    for k, split in enumerate(splits if isinstance(splits, list) else [None]):
        names = split.get("val") if isinstance(split, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(
                f"`{path}` must be a list of {{`train`: [names], `val`: [names]}}: split {k} is not",
                hint="correct it, or remove it: folds are made without it",
            )
        for name in names:
            if name in folds:
                raise UserError(
                    f"`{path}`: case `{name}` is validated in the splits {folds[name]} and {k}",
                    hint="put it into the `val` of one split, or remove the file",
                )
            folds[name] = k
    return folds


def _read_pairs(root: Path, channels: int | None) -> Listing:
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
    if not label_files and channels and (cases := _numbered(image_files, channels)):
        entries = [
            Entry(
                f"case `{name}`",
                tuple(str(file.relative_to(root)) for file in files),
                None,
                "test",
                name=name,
            )
            for name, files in cases.items()
        ]
        return _listing(root, entries, {}, root)
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
            raise UserError(
                f"`{image}` has two labels: `{label_of[image].name}` and `{label.name}`",
                hint="move one of them away, or name the right one in a data list",
            )
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


def _numbered(files: Iterable[Path], channels: int) -> dict[str, list[Path]]:
    """Cases of files X_0000, X_0001 …; {} where that is not how these are named: `case_0007` is one scan."""
    cases: dict[str, list[Path]] = {}
    for file in files:
        number = CHANNEL_SUFFIX.search(stem(file))
        if number is None or int(number[1]) >= channels:
            return {}
        cases.setdefault(stem(file)[: number.start()], []).append(file)
    if channels > 1 and all(len(of_case) == 1 for of_case in cases.values()):
        return {}  # files that hold all channels
    for name, of_case in cases.items():
        _require_numbers(f"case `{name}`", name, of_case)
    return cases


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
            f"`{path}` must hold an object with `training`, `validation` or `test`, found {short(content)}",
            hint='a data list is {"labels": {…}, "training": [{"image": …, "label": …}, …]}',
        )
    return content
