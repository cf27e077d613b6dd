"""From a data set and a plan to a store: each case by itself, again only where something changed."""

import hashlib
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from unetrkit.data.datalist import Case, Dataset, cases_to_learn_from
from unetrkit.data.files import alone, atomic_write, remove, sha256_file, write_problems
from unetrkit.data.geometry import off_grid, reorient
from unetrkit.data.parts import Part
from unetrkit.data.plan import Plan, plan_bytes, read_plan
from unetrkit.data.preprocess import preprocess, preprocess_label
from unetrkit.data.processes import Each, for_each, map_cases
from unetrkit.data.store import (
    ARRAYS,
    CaseRecord,
    case_folder,
    preprocessing_hash,
    remove_folder,
    write_case,
    write_index,
)  # fmt: skip
from unetrkit.data.volume import Volume, files_of, read_image, read_label
from unetrkit.errors import UserError, many
from unetrkit.progress import Progress

LOCK = ".prepare.lock"
FILES = {"plan.json", "store.json", LOCK}
CASE_FILES = {"case.json", *(f"{name}.chunks" for name in ARRAYS)}


@dataclass(frozen=True)
class Summary:
    """What `prepare` did. As text: one line for people."""

    path: Path
    cases: int
    redone: int
    removed: int
    size: int  # bytes
    seconds: float

    def __str__(self) -> str:
        kept = f", {self.cases - self.redone} unchanged" if self.cases > self.redone else ""
        removed = f", {self.removed} removed" if self.removed else ""
        return (
            f"{many(self.cases, 'case')} in `{self.path}`, {self.size / 2**20:.1f} MB: "
            f"{self.redone} prepared{kept}{removed} in {self.seconds:.0f} s"
        )


def prepare(
    dataset: Dataset,
    plan: Plan,
    out: Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    each: Each = for_each,
) -> Summary:
    """Writes the training and validation cases, preprocessed by `plan`, into the store `out`.

    A case whose files and plan are those of an earlier run, and of which every stored byte is right, is left
    as it is; so the same call again goes on after an interruption, repairs damage and follows changes. Cases
    that are not in the data set any more are removed at the end. At most `workers` cases are in memory.
    Without labels the store's plan has no classes, and all its voxels are of class index 0.

    Raises UserError, naming the case, for files that cannot be used; also where `out` holds anything but a
    store (nothing is touched then), and where another process prepares the same store.
    """
    begin = time.monotonic()
    cases, plan = _checked(dataset, plan, out)
    with alone(out / LOCK, f"another process is preparing `{out}`"):
        _begin_plan(out, plan)
        redone = sum(map_cases(partial(prepare_case, plan=plan, out=out), cases, workers, progress, each))
        write_index(out, dataset.name, cases)
        removed = _remove_others(out, {case.name for case in cases})
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Summary(out, len(cases), redone, removed, size, time.monotonic() - begin)


def prepare_plan(dataset: Dataset, plan: Plan, out: Path) -> None:
    """Begins a store of which the parts are prepared by others. Raises UserError as `prepare` does."""
    _, plan = _checked(dataset, plan, out)
    with alone(out / LOCK, f"another process is preparing `{out}`"):
        _begin_plan(out, plan)


def prepare_part(
    dataset: Dataset, out: Path, part: Part, *, workers: int | None = None, progress: Progress | None = None
) -> int:
    """Writes one part of the cases into a store that has its plan; the number of those that were not there.

    Parts may run at the same time, on any machines that see `out`. `prepare` with the store's own plan
    finishes the store: it does what a lost part left, checks every case and writes the index.
    """
    cases, plan = _checked(dataset, read_plan(out / "plan.json"), out)
    with alone(out / LOCK, f"another process is preparing the whole of `{out}`", shared=True):
        work = partial(prepare_case, plan=plan, out=out)
        return sum(map_cases(work, part.of(cases), workers, progress))


def _checked(dataset: Dataset, plan: Plan, out: Path) -> tuple[list[Case], Plan]:
    """The cases that go into the store `out`, whose folder is made if there is none, and their plan."""
    cases = cases_to_learn_from(dataset)
    if cases[0].label is None:
        plan = plan.model_copy(update={"classes": (), "mirror_pairs": ()})
    elif not plan.classes:
        hint = "`--unlabelled` leaves the labels aside; without `--plan` a plan with classes is computed"
        raise UserError(f"the plan has no classes, but `{dataset.name}` has labels", hint=hint)
    for case in cases:  # a name that cannot be a folder's is refused first
        case_folder(out, case.name)
    _require_ours(out)
    with write_problems(out):
        (out / "cases").mkdir(parents=True, exist_ok=True)
    return cases, plan


def prepare_case(case: Case, plan: Plan, out: Path) -> bool:
    """Brings one case of the store up to date; False where it was."""
    folder, preprocessing = case_folder(out, case.name), preprocessing_hash(plan)
    source = source_hash(case, preprocessing)
    if _is_intact(folder, source):
        return False
    image, label = read_case(case)
    array, grid = preprocess(image, plan, f"`{case.images[0]}`")
    # one value takes no space and lets everything that reads cases read these
    indices = np.zeros(grid.size, np.uint8) if label is None else preprocess_label(label, grid, plan)
    classes = max(len(plan.classes), 1)
    write_case(
        folder,
        array,
        indices,
        grid,
        classes=classes,
        source=source,
        preprocessing=preprocessing,
        truth=label,
    )
    return True


def read_case(case: Case) -> tuple[Volume, np.ndarray | None]:
    """The image of a case, and its label (1, x, y, z) in the image's order of axes, if it has one.

    Raises UserError where the two do not lie on the same grid.
    """
    image = read_image(case.images)
    if case.label is None:
        return image, None
    label = reorient(read_label(case.label), image.affine)
    if difference := off_grid(image, label):
        message = f"case `{case.name}`: `{case.label}` is not on the grid of `{case.images[0]}`: {difference}"
        raise UserError(message, hint="`unetrkit check` finds every such case")
    return image, label.array


def source_hash(case: Case, preprocessing: str) -> str:
    """The hash of everything that a stored case is computed from."""
    files = [sha256_file(file) for path in case.files for file in files_of(path)]
    return hashlib.sha256(json.dumps([preprocessing, *files]).encode()).hexdigest()


def _is_intact(folder: Path, source: str) -> bool:
    try:
        record = CaseRecord.read(folder)
        if record.source != source:
            return False
        for array in record.arrays(folder).values():
            array.verify()
    except UserError:  # absent or damaged in any way: it is prepared again, from the files it came from
        return False
    return True


def _require_ours(out: Path) -> None:
    """Raises UserError unless `out` is absent, empty, or holds what a store holds and nothing else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"`{out}` is a file, a store is a folder", hint="choose another folder for the store")
    found = {entry.name for entry in out.iterdir() if not entry.name.endswith(".tmp")}
    strange = found - {*FILES, "cases"} or (found if found == {"cases"} else set())
    if strange:
        message = f"`{out}` holds something that is not a store: `{min(strange)}`"
        raise UserError(message, hint="choose another folder for the store")


def _begin_plan(out: Path, plan: Plan) -> None:
    """Puts the plan in its place and clears what interrupted runs left."""
    content, file = plan_bytes(plan), out / "plan.json"
    with write_problems(out):
        for left in [*out.glob(".*.tmp"), *(out / "cases").glob(".*.tmp")]:
            remove(left)
        if not file.is_file() or file.read_bytes() != content:
            # the index is of the plan that was: from here on and until the end the store is not finished
            (out / "store.json").unlink(missing_ok=True)
    atomic_write(file, content)


def _remove_others(out: Path, names: set[str]) -> int:
    """Removes the cases that have gone from the data set; anything that is not a case stays."""
    with write_problems(out):
        others = [one for one in (out / "cases").iterdir() if one.name not in names and one.is_dir()]
        gone = [one for one in others if {entry.name for entry in one.iterdir()} <= CASE_FILES]
        for folder in gone:
            remove_folder(folder)
    return len(gone)
