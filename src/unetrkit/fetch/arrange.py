"""Data lists with the published splits: who trains, who validates, the first N of the low-data studies."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path, PurePosixPath

from unetrkit.data.phantom import ORGANS as BTCV_ORGANS
from unetrkit.errors import UserError
from unetrkit.fetch.catalogue import Published
from unetrkit.fetch.download import write_json
from unetrkit.fetch.series import Series

DATALIST = "dataset.json"
FIRST = (3, 5, 6, 7, 12)  # scans of BTCV that the low-data studies train on
Entries = list[dict[str, object]]

# those of BTCV but the portal and splenic veins, and three more
AMOS_ORGANS = (*BTCV_ORGANS[:10], *BTCV_ORGANS[11:], "duodenum", "bladder", "prostate or uterus")
UNLABELLED: dict[str, object] = {"modality": {"0": "CT"}}


def place(data: Published, path: PurePosixPath) -> str | None:
    """Where a file of an archive goes; None for what is not part of the data set."""
    name = path.name
    if data.arrangement == "btcv":
        folder = {"Training/img": "imagesTr", "Training/label": "labelsTr", "Testing/img": "imagesTs"}
        where = folder.get("/".join(path.parts[-3:-1]))
        return f"{where}/{name}" if where and re.fullmatch(r"(img|label)\d{4}\.nii\.gz", name) else None
    if data.arrangement in ("decathlon", "amos"):
        inner = "/".join(path.parts[-2:]) if path.parent.name[:6] in ("images", "labels") else name
        wanted = inner == DATALIST or ("/" in inner and name.endswith(".nii.gz"))
        return inner if wanted and (data.arrangement == "decathlon" or "/" in inner) else None
    if data.arrangement == "luna16":
        subset = path.parent.name
        return f"images/{subset}/{name}" if re.fullmatch(r"subset\d", subset) else None
    return f"images/{name}" if name.endswith(".nii.gz") else None


def arrange(data: Published, out: Path, series: Sequence[Series] = ()) -> Path:
    """Writes the data list, and those of the low-data studies; gives its path.

    Raises UserError where the files are not the published number.
    """
    lists: dict[str, dict[str, object]] = {}
    if data.arrangement == "btcv":
        numbers = (*range(1, 11), *range(21, 41))
        pairs = [_pair("imagesTr/img", "labelsTr/label", f"{k:04d}") for k in numbers]
        training, validation = pairs[:24], pairs[24:]
        test = [f"imagesTs/img{k:04d}.nii.gz" for k in range(61, 81)]
        for count in (len(training), *FIRST):
            name = DATALIST if count == len(training) else f"dataset_first{count}.json"
            split = {"training": training[:count], "validation": validation, "test": test}
            lists[name] = _named(BTCV_ORGANS, "CT") | split
    elif data.arrangement == "amos":
        for name, wanted in ((DATALIST, ("CT",)), ("dataset_mr.json", ("MR",))):
            split = {
                key: [_pair(f"images{short}/", f"labels{short}/", file) for file in _amos(out, short, wanted)]
                for key, short in (("training", "Tr"), ("validation", "Va"))
            }
            test = [f"imagesTs/{file}.nii.gz" for file in _amos(out, "Ts", wanted)]
            lists[name] = _named(AMOS_ORGANS, wanted[0]) | split | {"test": test}
    elif data.arrangement == "luna16":
        # ten subsets for ten folds
        entries: Entries = [
            {"image": _relative(file, out), "subject": file.stem, "fold": int(file.parent.name[-1])}
            for file in sorted((out / "images").glob("subset?/*.mhd"))
        ]
        lists[DATALIST] = UNLABELLED | {"training": entries}
    elif data.arrangement == "tcia-covid19":
        lists[DATALIST] = _covid(data, out)
    elif data.arrangement == "subjects":
        lists[DATALIST] = _by_subject(series)
    for name, content in lists.items():
        _require(content, out)
        write_json(out / name, {"name": data.name, "licence": data.licence, "reference": data.page} | content)
    return out / DATALIST


def _covid(data: Published, out: Path) -> dict[str, object]:
    """The split 600/171 of the ViT pre-training, by the files' names, wherever in the folder they are."""
    listed = (resources.files("unetrkit.fetch") / "tcia_covid19_validation.txt").read_text(encoding="utf-8")
    held_out = {f"volume-covid19-A-{name}.nii.gz" for name in listed.split()}
    files = sorted(out.rglob("volume-covid19-A-*.nii.gz"))
    split: dict[str, list] = {"training": [], "validation": []}
    for file in files:
        entry = {"image": _relative(file, out), "subject": file.name[len("volume-covid19-A-") :][:4]}
        split["validation" if file.name in held_out else "training"].append(entry)
    counts = len(split["training"]), len(split["validation"])
    if counts != (600, 171):
        message = f"`{out}` holds {counts[0]} + {counts[1]} scans of `{data.name}`, not 600 + 171"
        raise UserError(message, hint=data.first)
    return UNLABELLED | split


def _by_subject(series: Sequence[Series]) -> dict[str, object]:
    """Nine in ten subjects train; none was published whose names can be found again."""
    subjects = sorted({one.subject for one in series})
    held_out = set(subjects[9::10])
    split: dict[str, Entries] = {"training": [], "validation": []}
    for one in series:
        entry: dict[str, object] = {"image": f"images/{one.name}.nii.gz", "subject": one.subject}
        split["validation" if one.subject in held_out else "training"].append(entry)
    return UNLABELLED | split


def _amos(out: Path, short: str, modalities: Sequence[str]) -> list[str]:
    """The names of AMOS: numbers up to 500 are CT, the others MR."""
    files = (out / f"images{short}").glob("amos_*.nii.gz")
    names = sorted(file.name.removesuffix(".nii.gz") for file in files)
    return [name for name in names if ("CT" if int(name[-4:]) <= 500 else "MR") in modalities]


def _pair(images: str, labels: str, name: str) -> dict[str, object]:
    return {"image": f"{images}{name}.nii.gz", "label": f"{labels}{name}.nii.gz"}


def _named(organs: Sequence[str], modality: str) -> dict[str, object]:
    return {"modality": {"0": modality}, "labels": {str(k): name for k, name in enumerate(organs)}}


def _relative(file: Path, out: Path) -> str:
    return file.relative_to(out).as_posix()


def _require(content: dict[str, object], out: Path) -> None:
    """Every file of a list is there: an archive that holds less than was published is noticed here."""
    for key in ("training", "validation", "test"):
        entries = content.get(key, [])
        assert isinstance(entries, list)
        for entry in entries:
            for file in [entry] if isinstance(entry, str) else [entry["image"], entry.get("label")]:
                if file and not (out / str(file)).exists():
                    hint = "remove `.fetched.json` in the folder, and run the command again"
                    raise UserError(f"`{out / str(file)}` is missing", hint=hint)
