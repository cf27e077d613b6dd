"""The store: preprocessed cases in compressed chunks, every byte of them under a checksum.

STORE/plan.json                 the plan that the cases were prepared with
STORE/store.json                the index; written last: without it the store is not finished
STORE/cases/NAME/case.json      grid, shape, counts, and how the arrays lie in their files
STORE/cases/NAME/*.chunks       image (c, x, y, z) float16, label (x, y, z) class indices, centres, truth
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import TypeAdapter

from unetrkit.data.chunks import AGAIN, LABEL_CHUNK, ChunkedArray, Damaged, Layout, Triple, write_chunks
from unetrkit.data.copies import bring, copy_of
from unetrkit.data.files import atomic_write, read_json, sha256_file, sync_folder, write_problems
from unetrkit.data.geometry import Grid
from unetrkit.data.plan import Plan, plan_hash, read_plan
from unetrkit.data.remote import spelt
from unetrkit.errors import UserError

FORMAT = 3  # another number and every case is prepared again
CENTRES = 20_000  # voxels kept for each class of a case
ARRAYS = ("image", "label", "centres", "truth")


@dataclass(frozen=True)
class CaseRecord:
    """What case.json says: about the voxels, not about the data set.

    source: the hash of all that the voxels were computed from; preprocessing: that of the plan's part in it.
    counts: voxels of each class index in `label`; centres: how many of them are kept as centres.
    """

    source: str
    preprocessing: str
    grid: Grid
    counts: tuple[int, ...]
    centres: tuple[int, ...]
    layouts: dict[str, Layout]

    @staticmethod
    def read(folder: Path) -> "CaseRecord":
        """Raises Damaged where case.json is not as it was written."""
        return RECORD.validate_python(unseal(folder / "case.json"))

    def arrays(self, folder: Path) -> dict[str, ChunkedArray]:
        return {name: ChunkedArray(folder / f"{name}.chunks", one) for name, one in self.layouts.items()}


RECORD = TypeAdapter(CaseRecord)


@dataclass(frozen=True)
class StoredCase:
    """One case. `images` and `label_file` are the files that it was made from, `path` is its folder.

    source: the hash of the content of those files and of what was done with it.
    """

    name: str
    subject: str
    split: Literal["training", "validation", "test"]
    fold: int | None
    images: tuple[Path, ...]
    label_file: Path | None
    source: str
    path: Path
    record: CaseRecord

    @property
    def grid(self) -> Grid:
        return self.record.grid

    @property
    def shape(self) -> Triple:
        return self.record.grid.size

    @property
    def counts(self) -> tuple[int, ...]:
        """Voxels of each class index."""
        return self.record.counts

    @cached_property
    def arrays(self) -> dict[str, ChunkedArray]:
        bring(self.path.parents[1], (self.path / f"{name}.chunks" for name in self.record.layouts))
        return self.record.arrays(self.path)

    def image(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """The window (c, *size) float16 of the image that begins at voxel `start`, which must lie inside it.

        This and all other reading raises `Damaged`, a UserError, where a byte is not as it was written.
        """
        return self.arrays["image"].read(start, size)

    def label(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """The window (*size) of class indices that begins at voxel `start`."""
        return self.arrays["label"].read(start, size)[0]

    def centres(self, k: int) -> np.ndarray:
        """Voxel coordinates (n, 3) int32 of class index `k`: all, or 20,000 drawn without preference.

        Of the background those whose image lies above its minimum in some channel, if there are any: the air
        around a patient teaches nothing (as MONAI's RandCropByPosNegLabel does with `image_threshold`).
        """
        first = sum(self.record.centres[:k])
        rows = self.arrays["centres"].read((first, 0, 0), (self.record.centres[k], 3, 1))
        return rows[0, :, :, 0].astype(np.int32)

    def whole_image(self) -> np.ndarray:
        """The image (c, x, y, z) float32."""
        return self.arrays["image"].whole().astype(np.float32)


@dataclass(frozen=True)
class Store:
    """A prepared data set. Opening reads the index and each case's record, no voxels.

    >>> Store.open(Path("there/is/none"))
    Traceback (most recent call last):
    unetrkit.errors.UserError: there is no store in `there/is/none`
    """

    path: Path
    name: str
    plan: Plan
    plan_hash: str
    cases: tuple[StoredCase, ...]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises UserError for a store that is missing, unfinished, damaged, or whose plan was changed."""
        where, path = spelt(path), copy_of(path, "stores")
        if not (path / "store.json").is_file():
            if (path / "plan.json").is_file():
                hint = "run `unetrkit prepare` again: it goes on where it was"
                raise UserError(f"the store in `{where}` is not finished", hint=hint)
            raise UserError(f"there is no store in `{where}`", hint="run `unetrkit prepare` first")
        index = unseal(path / "store.json")
        plan = read_plan(path / "plan.json")
        if sha256_file(path / "plan.json") != index["plan"]:
            message = f"the store in `{where}` was prepared with another plan than its `plan.json` is now"
            hint = "give a changed plan to `unetrkit prepare --plan`; what it changes is redone"
            raise UserError(message, hint=hint)
        preprocessing = preprocessing_hash(plan)
        cases = tuple(_case(path, entry) for entry in index["cases"])
        for case in cases:
            if case.record.preprocessing != preprocessing:
                raise UserError(f"case `{case.name}` in `{path}` was prepared with another plan", hint=AGAIN)
            if case.record.source != case.source:
                message = f"case `{case.name}` in `{path}` is not the one that `store.json` lists"
                raise Damaged(f"{message}: the last `prepare` has not finished, or its folder was exchanged")
        return cls(path, index["name"], plan, plan_hash(plan), cases)


def _case(path: Path, entry: Mapping[str, Any]) -> StoredCase:
    folder = case_folder(path, entry["name"])
    label = None if entry["label_file"] is None else Path(entry["label_file"])
    files = {"images": tuple(map(Path, entry["images"])), "label_file": label}
    return StoredCase(**{**entry, **files}, path=folder, record=CaseRecord.read(folder))


def case_folder(store: Path, name: str) -> Path:
    """Where a case lies. Raises UserError for a name that would leave the store."""
    if not name or name.startswith(".") or any(c in name for c in "/\\\0"):
        message = f"`{name}` cannot be the name of a case"
        raise UserError(message, hint="rename the image: the name of a case comes from its file name")
    return store / "cases" / name


def preprocessing_hash(plan: Plan) -> str:
    """The hash of what decides the stored voxels: another patch size or class name redoes no case."""
    names = {"dataset", "statistics", "patch_size", "mirror_pairs", "channels", "classes"}
    content = [FORMAT, len(plan.channels), [c.id for c in plan.classes], plan_hash(plan, without=names)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write_case(
    folder: Path,
    image: np.ndarray,
    label: np.ndarray,
    grid: Grid,
    *,
    classes: int,
    source: str,
    preprocessing: str,
    truth: np.ndarray | None = None,
) -> None:
    """Writes one case: image (c, x, y, z), label (x, y, z) of class indices. It is there whole or not at all.

    truth: the label ids (1, x, y, z) on the case's own grid: another machine does not have their file.

    Raises UserError where the image is not finite as float16 or the disk is full.
    """
    with np.errstate(over="ignore"):
        small = image.astype(np.float16)
    if not np.isfinite(small).all():
        message = f"the prepared image holds {np.abs(image).max()}, which is too large to be stored"
        hint = "check the image for wrong intensities: `unetrkit check` shows their range"
        raise UserError(message, hint=hint)
    coordinates, kept, counts = pick_centres(small, label, classes)
    rows = coordinates[None, :, :, None]  # 1 n 3 1
    temporary = folder.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with write_problems(folder):
            temporary.mkdir(parents=True)
        layouts = {
            "image": write_chunks(temporary / "image.chunks", small),
            "label": write_chunks(temporary / "label.chunks", label[None], LABEL_CHUNK),
            "centres": write_chunks(temporary / "centres.chunks", rows, (CENTRES, 3, 1)),
        }
        if truth is not None:
            ids = truth.astype(np.min_scalar_type(truth.max())) if truth.min() >= 0 else truth
            layouts["truth"] = write_chunks(temporary / "truth.chunks", ids, LABEL_CHUNK)
        record = CaseRecord(source, preprocessing, grid, counts, kept, layouts)
        atomic_write(temporary / "case.json", seal({"format": FORMAT} | asdict(record)))
        with write_problems(folder):
            remove_folder(folder)
            temporary.rename(folder)
            sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Removes a case; where this is interrupted, what is left is not taken for a case."""
    if folder.exists():
        doomed = folder.rename(folder.with_name(f".{secrets.token_hex(8)}.tmp"))
        shutil.rmtree(doomed)


def pick_centres(
    image: np.ndarray, label: np.ndarray, classes: int
) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """Voxels to centre a patch on, (n, 3) int16 or int32, class after class; how many; of how many.

    At most `CENTRES` of a class, drawn with a fixed seed, in the array's order. See `StoredCase.centres`.
    """
    # numpy sorts small integers stably in linear time: one pass for all classes, not one for each
    order, counts = np.argsort(label, axis=None, kind="stable"), np.bincount(label.ravel(), minlength=classes)
    if len(counts) > classes:
        raise ValueError(f"class index {len(counts) - 1} in a label of {classes} classes")
    something = (image > image.min(axis=(1, 2, 3), keepdims=True)).any(axis=0).ravel()
    chosen = []
    for k, voxels in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        if k == 0 and something[voxels].any():
            voxels = voxels[something[voxels]]
        if len(voxels) > CENTRES:
            drawn = np.random.default_rng(k).choice(len(voxels), CENTRES, replace=False, shuffle=False)
            voxels = voxels[np.sort(drawn)]
        chosen.append(voxels)
    rows = np.stack(np.unravel_index(np.concatenate(chosen), label.shape), axis=1)  # n 3
    small = max(label.shape) <= np.iinfo(np.int16).max
    return rows.astype(np.int16 if small else np.int32), tuple(map(len, chosen)), tuple(counts.tolist())


def write_index(path: Path, name: str, cases: Sequence[Any]) -> None:
    """Finishes a store whose cases and plan.json are there. `cases` are a data set's (`datalist.Case`)."""
    entries = []
    for case in cases:
        about = {key: getattr(case, key) for key in ("name", "subject", "split", "fold")}
        about["source"] = CaseRecord.read(case_folder(path, case.name)).source
        label = None if case.label is None else str(case.label)
        entries.append(about | {"images": [str(image) for image in case.images], "label_file": label})
    content = {"format": FORMAT, "name": name, "plan": sha256_file(path / "plan.json"), "cases": entries}
    atomic_write(path / "store.json", seal(content))


def seal(content: Mapping[str, Any]) -> bytes:
    """A JSON file that begins with the checksum of the rest."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({"sha256": digest, **content}, indent=1) + "\n").encode()


def unseal(path: Path) -> dict[str, Any]:
    """What `seal` wrote. Raises Damaged where any byte differs."""
    try:
        values = read_json(path)
    except UserError as error:
        raise Damaged(error.message) from error
    content = {k: v for k, v in values.items() if k != "sha256"} if isinstance(values, dict) else {}
    if path.read_bytes() != seal(content):
        raise Damaged(f"`{path}` is damaged: it is not what was written")
    if content.get("format") != FORMAT:
        message = f"`{path}` has the store format {content.get('format')}, this version reads {FORMAT}"
        raise UserError(message, hint="run `unetrkit prepare` again: it redoes every case")
    return content
