"""What each layout says, before anything is believed: JSON, nnU-Net raw folder, folder of pairs, CSV."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from unetrkit.data.declared import (
    SPLITS,
    Entry,
    Listing,
    declared_channels,
    declared_entry,
    declared_labels,
    short,
)
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
LIST = 'a data list is {"labels": {…}, "training": [{"image": "a.nii.gz", "label": "b.nii.gz"}, …]}'


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
    is_folder = path.is_dir()
    root = path.resolve() if is_folder else path.parent.resolve()
    source = root / ("dataset.json" if is_folder else path.name)
    if source.suffix.lower() in (".csv", ".tsv"):
        entries, source = read_table(source), root / "dataset.json"
        declared = _read_object(source) if source.is_file() else {}
    else:
        declared = _read_object(source) if source.is_file() or not is_folder else {}
        entries = _read_entries(root, source, declared, is_folder, channels)
    name = declared.get("name")
    return Listing(
        name if isinstance(name, str) and name else root.name,
        root,
        tuple(sorted(entries, key=lambda entry: get_args(Split).index(entry.split))),
        declared_labels(declared.get("labels"), source),
        declared_channels(declared.get("channel_names", declared.get("modality")), source),
    )


def _read_object(path: Path) -> dict[str, object]:
    content = read_json(path)
    if not isinstance(content, dict):
        message = f"`{path}` must hold an object with `training`, `validation` or `test`"
        raise UserError(f"{message}, found {short(content)}", hint=LIST)
    return content


def _read_entries(
    root: Path, source: Path, declared: Mapping[str, object], is_folder: bool, channels: int | None
) -> list[Entry]:
    if SPLITS.keys() & declared.keys():
        return _read_list(root, source, declared)
    of_nnunet = "file_ending" in declared or {"channel_names", "numTraining"} <= declared.keys()
    images = root / "imagesTr"
    numbered = is_folder and any(CHANNEL_SUFFIX.search(stem(file)) for file in _images_in(images))
    if images.is_dir() and (of_nnunet or numbered):
        return _read_nnunet(root, str(declared.get("file_ending", "")))
    if is_folder:
        return _read_pairs(root, channels)
    message = f"`{source}` lists no cases: it has none of the keys `training`, `validation`, `test`"
    raise UserError(message, hint=LIST)


def _read_list(root: Path, source: Path, declared: Mapping[str, object]) -> list[Entry]:
    entries: list[Entry] = []
    for key in (key for key in SPLITS if key in declared):
        listed = declared[key]
        if not isinstance(listed, list):
            message = f"`{source}`: `{key}` must be a list of cases, found {short(listed)}"
            raise UserError(message, hint=LIST)
        for k, item in enumerate(listed):
            entries.append(declared_entry(f"`{source.name}` {key}[{k}]", item, SPLITS[key], root))
    return entries


def _read_nnunet(root: Path, ending: str) -> list[Entry]:
    splits = root / "splits_final.json"
    folds = _nnunet_folds(splits) if splits.is_file() else {}
    entries: list[Entry] = []
    tasks: tuple[tuple[str, Split], ...] = (("Tr", "training"), ("Ts", "test"))
    for task, split in tasks:
        images, labels = root / f"images{task}", root / f"labels{task}"
        by_case = _by_case(_images_in(images, ending))
        label_of = {stem(file): file for file in _images_in(labels, ending)}
        for name in sorted(label_of.keys() - by_case.keys()):
            message = f"`{label_of[name]}` has no image `{name}_0000` in `{images}`"
            raise UserError(message, hint="add the image, or move the label away")
        for name, files in sorted(by_case.items()):
            fold = folds.get(name) if split == "training" else None
            entries.append(_numbered_entry(name, files, label_of.get(name), split, fold))
    for name in sorted(folds.keys() - {entry.name for entry in entries}):
        message = f"`{splits}` names the case `{name}`, which has no image"
        raise UserError(message, hint="add the image, or remove the file: folds are made without it")
    return entries


def _by_case(files: Iterable[Path]) -> dict[str, list[Path]]:
    """The files X_0000, X_0001 … of each case X."""
    cases: dict[str, list[Path]] = {}
    for file in files:
        cases.setdefault(CHANNEL_SUFFIX.sub("", stem(file)), []).append(file)
    return cases


def _numbered_entry(
    name: str, files: Sequence[Path], label: Path | None, split: Split, fold: int | None = None
) -> Entry:
    if [stem(file) for file in files] != [f"{name}_{k:04d}" for k in range(len(files))]:
        found = ", ".join(file.name for file in files)
        message = f"case `{name}`: channels must be numbered from _0000 on, found {found}"
        raise UserError(message, hint=f"name the files of its channels `{name}_0000`, `{name}_0001` …")
    where = f"case `{name}` of `{files[0].parent.name}`"
    return Entry(where, tuple(files), label, split, fold, name=name)


def _nnunet_folds(path: Path) -> dict[str, int]:
    splits = read_json(path)
    hint = "correct it, or remove it: folds are made without it"
    folds: dict[str, int] = {}
    for k, split in enumerate(splits if isinstance(splits, list) else [None]):
        names = split.get("val") if isinstance(split, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            message = f"`{path}` must be a list of {{`train`: [names], `val`: [names]}}: split {k} is not"
            raise UserError(message, hint=hint)
        for name in names:
            if folds.setdefault(name, k) != k:
                message = f"`{path}`: case `{name}` is validated in the splits {folds[name]} and {k}"
                raise UserError(message, hint=hint)
    return folds


def _read_pairs(root: Path, channels: int | None) -> list[Entry]:
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), root)
    labels = next((root / name for name in LABEL_FOLDERS if (root / name).is_dir()), None)
    image_files, label_files = _images_in(images), _images_in(labels) if labels else []
    if images == root:
        label_files = [file for file in image_files if LABEL_SUFFIX.search(stem(file))]
        image_files = [file for file in image_files if file not in label_files]
    if not image_files:
        raise UserError(
            f"`{root}` holds no data set that is known here",
            hint="give a data list (.json, .csv), an nnU-Net raw folder, one with `images` and `labels`, "
            "or one with X.nii.gz and X_label.nii.gz",
        )
    if not label_files and channels and _are_channels(image_files, channels):
        return [_numbered_entry(name, files, None, "test") for name, files in _by_case(image_files).items()]
    # a label `X`, or else `X_seg`, `X_label` … belongs to the image `X` or `X_image`
    by_key = {IMAGE_SUFFIX.sub("", stem(file)): file for file in image_files}
    label_of: dict[Path, Path] = {}
    for label in label_files:
        image = by_key.get(stem(label)) or by_key.get(LABEL_SUFFIX.sub("", stem(label)))
        if image is None:
            message = f"`{label}` has no image of the same name"
            raise UserError(message, hint=f"images are looked for in `{images}`")
        if label_of.setdefault(image, label) != label:
            message = f"`{image}` has two labels: `{label_of[image].name}` and `{label.name}`"
            raise UserError(message, hint="move one of them away, or name the right one in a data list")
    named = ((f"`{file.relative_to(root)}`", file) for file in image_files)
    return [Entry(where, (file,), label_of.get(file), "training") for where, file in named]


def _are_channels(files: Sequence[Path], channels: int) -> bool:
    """Whether files are X_0000, X_0001 … of cases X: `case_0007` is one scan, and may hold all channels."""
    numbers = [CHANNEL_SUFFIX.search(stem(file)) for file in files]
    if not all(number and int(number[1]) < channels for number in numbers):
        return False
    return channels == 1 or len(_by_case(files)) < len(files)


def _images_in(folder: Path, ending: str = "") -> list[Path]:
    if not folder.is_dir():
        return []
    with read_problems(folder):
        files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    wanted = (ending.lower(),) if ending else ENDINGS
    return [file for file in files if file.name.lower().endswith(wanted)]
