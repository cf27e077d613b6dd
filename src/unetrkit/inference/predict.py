"""Label maps for scans: a prepared image, a volume, or files and whole data sets, on each case's own grid."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import nn

from unetrkit.data.datalist import Case
from unetrkit.data.files import atomic_write, read_json, write_problems
from unetrkit.data.geometry import Grid
from unetrkit.data.plan import Extent, Plan, Settings
from unetrkit.data.preprocess import preprocess
from unetrkit.data.volume import Volume, read_image, write_label
from unetrkit.errors import UserError
from unetrkit.inference.cases import choose_cases, doubts_about, require_free, require_one_plan
from unetrkit.inference.model import Model, load_model
from unetrkit.inference.restore import restore
from unetrkit.inference.sliding_window import Blending, Triple, scores_of, sliding_window
from unetrkit.progress import say

AXES = ("x", "y", "z")
RECORD = "predictions.json"
FORMAT = "unetrkit-predictions"


class PredictSettings(Settings):
    """How a network is applied to a whole volume.

    `mirrors: true` averages over the mirror images along x, y and z (8 times the work).

    >>> PredictSettings(mirrors=True).mirrors
    ('x', 'y', 'z')
    """

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    blending: Blending = "gaussian"
    mirrors: tuple[Literal["x", "y", "z"], ...] = ()
    # None: the size the model was trained on
    window: tuple[Extent, Extent, Extent] | None = None
    window_batch: Annotated[int, Field(ge=1)] = 1
    amp: Literal["off", "bf16"] = "off"
    device: str = "auto"

    @field_validator("mirrors", mode="before")
    @classmethod
    def _all_or_none(cls, value: object) -> object:
        return (AXES if value else ()) if isinstance(value, bool) else value


def predict_stored(
    network: nn.Module, image: np.ndarray, grid: Grid, plan: Plan, settings: PredictSettings
) -> np.ndarray:
    """Label ids (x, y, z) on the case's own grid, for an image (c, x, y, z) as `preprocess` makes it.

    The network stays on its device and gets its training mode back.
    """
    return _labels([network], image, grid, plan, settings.window or plan.patch_size, settings)


def predict_label(models: Sequence[Model], volume: Volume, settings: PredictSettings) -> np.ndarray:
    """Label ids (x, y, z) on the grid of `volume`, by one model or the mean of several of one plan.

    uint8, or uint16 when an id needs it; outside the foreground box 0. Peak memory, besides `volume` and what
    the network needs, with X Y Z voxels on the plan's grid, X' Y' Z' native ones, and windows w deep in x:

        4 channels X Y Z + 4 classes (w + 8) Y Z + 16 classes Y' Z' + 2 X' Y' Z' bytes

    The first is the prepared image, the second the scores that later windows can still touch.
    Raises UserError where the volume's channels are not the plan's.
    """
    image, grid = preprocess(volume, models[0].plan)
    networks = [model.network for model in models]
    return _labels(networks, image, grid, models[0].plan, _window(models, settings), settings)


def predict(
    inputs: Path,
    out: Path,
    models: Sequence[Path],
    settings: PredictSettings,
    *,
    split: str = "all",
    overwrite: bool = False,
    allow_outside: bool = False,
    progress: Callable[..., None] | None = None,
) -> list[Path]:
    """Writes OUT/<case>.nii.gz for every case of `inputs`; OUT/predictions.json says how each was made.

    `inputs` is one scan (a file or the folder of a DICOM series), a folder of scans, or a data list, of which
    `split` (training, validation, test, all) is taken; validation cases are those of the models' own fold.
    `progress(done, total, note)` counts cases, the current one by the share of its windows that are done.
    The next case is read and prepared while the network works on this one. Returns the files written.

    Raises UserError before any work for models that differ in more than their weights, for outputs that exist
    (`overwrite` replaces those that OUT/predictions.json lists), and for an `out` that holds inputs. A case
    that cannot be used does not stop the others: a UserError after the last one names it.
    """
    device = _device(settings.device)
    loaded = [load_model(path, device) for path in models]
    require_one_plan(loaded, models)
    plan = loaded[0].plan
    cases = choose_cases(inputs, split, loaded, allow_outside)
    record = _read_record(out / RECORD)
    require_free(out, cases, overwrite, record)
    with write_problems(out):
        out.mkdir(parents=True, exist_ok=True)
    weights = [
        {"path": str(path.absolute()), "sha256": model.description["sha256"]}
        for path, model in zip(models, loaded, strict=True)
    ]
    written: list[Path] = []
    failed: dict[str, UserError] = {}
    for index, (case, prepared) in enumerate(_prepared(cases, plan)):

        def report(done: int, total: int, index: int = index, case: Case = case) -> None:
            if progress:
                note = f"case {index + 1}/{len(cases)} {case.name}, window {done}/{total}"
                progress(index + done / total, len(cases), note)

        start = time.monotonic()
        path = out / f"{case.name}.nii.gz"
        try:
            image, grid, doubts = prepared.result()
            for doubt in doubts:
                say(f"warning: `{case.name}`: {doubt}")
            networks = [model.network for model in loaded]
            label = _labels(networks, image, grid, plan, _window(loaded, settings), settings, report)
            write_label(path, label, case.images[0], {one.id: one.name for one in plan.classes})
        except UserError as error:
            failed[case.name] = error
            if record.pop(case.name, None):  # of another model: nobody may take it for this one's
                path.unlink(missing_ok=True)
                _write_record(out / RECORD, record)
            continue
        written.append(path)
        record[case.name] = {
            "label": path.name,
            "images": [str(image) for image in case.images],
            "models": weights,
            "settings": settings.model_dump(mode="json"),
            "seconds": round(time.monotonic() - start, 3),
            "peak_memory_mb": _peak_memory_mb(),
        }
        _write_record(out / RECORD, record)
    if failed and len(cases) == 1:
        raise next(iter(failed.values()))
    if failed:
        listed = "; ".join(f"`{name}`: {error.message}" for name, error in list(failed.items())[:10])
        message = f"{len(failed)} of {len(cases)} cases could not be segmented: {listed}"
        raise UserError(message, hint="the label maps of the others are written")
    return written


Prepared = tuple[np.ndarray, Grid, list[str]]  # image on the plan's grid, doubts that it is of its kind


def _prepared(cases: Sequence[Case], plan: Plan) -> Iterator[tuple[Case, Future[Prepared]]]:
    """Every case with its image, prepared one case ahead in a thread."""

    def prepare(case: Case) -> Prepared:
        volume = read_image(case.images)
        return *preprocess(volume, plan, f"`{case.images[0]}`"), doubts_about(volume.array, plan)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(prepare, cases[0])
        for case, following in zip(cases, [*cases[1:], None], strict=True):
            prepared = ahead
            if following:
                ahead = pool.submit(prepare, following)
            yield case, prepared


def _window(models: Sequence[Model], settings: PredictSettings) -> Triple:
    return settings.window or tuple(models[0].description["image_size"])


def _labels(
    networks: Sequence[nn.Module],
    image: np.ndarray,
    grid: Grid,
    plan: Plan,
    window: Triple,
    settings: PredictSettings,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    mirrors = [AXES.index(axis) for axis in settings.mirrors]
    # padding is air, as it was in training (`sampling.read_patch`)
    air = zip(image, plan.intensity, strict=True)
    slabs = sliding_window(
        scores_of(networks, mirrors=mirrors, swap=plan.mirrored, bf16=settings.amp == "bf16"),
        torch.from_numpy(image),
        window,
        overlap=settings.overlap,
        blending=settings.blending,
        window_batch=settings.window_batch,
        fill=[0.0 if how.kind == "window" else float(channel.min()) for channel, how in air],
        progress=progress,
    )
    training = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        return restore(slabs, grid, [label_class.id for label_class in plan.classes])
    except (RuntimeError, MemoryError) as error:
        # torch's allocator of main memory has no exception of its own
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not re.search("not enough memory|can't allocate memory", str(error)):
            raise
        raise UserError(
            f"not enough memory for windows of {window} voxels",
            hint="`amp=bf16` needs less, `device=cpu` uses the main memory",
        ) from error
    finally:
        for network, mode in zip(networks, training, strict=True):
            network.train(mode)


def _read_record(path: Path) -> dict[str, Any]:
    """The cases of an earlier prediction into the same folder; {} without one."""
    content = read_json(path) if path.exists() else {"format": FORMAT, "cases": {}}
    if not isinstance(content, dict) or content.get("format") != FORMAT or "cases" not in content:
        raise UserError(f"`{path}` is not the record of a prediction", hint="choose another folder")
    return dict(content["cases"])


def _write_record(path: Path, record: dict[str, Any]) -> None:
    content = {"format": FORMAT, "version": 1, "cases": record}
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"`device` is `{name}`", hint="known: auto, cpu, cuda, cuda:0") from error
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"`device` is `{name}`, but torch finds {found} GPUs", hint="device=auto")
    return device


def _peak_memory_mb() -> int | None:
    """The most memory that this process has had so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
