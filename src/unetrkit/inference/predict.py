"""Label maps for scans: a prepared image, a volume, or files and whole data sets, on each case's own grid."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import nn

from unetrkit.data.datalist import Case
from unetrkit.data.files import write_problems
from unetrkit.data.geometry import Grid
from unetrkit.data.plan import Extent, Plan, Settings
from unetrkit.data.preprocess import preprocess
from unetrkit.data.processes import Each
from unetrkit.data.remote import url_of
from unetrkit.data.volume import Volume, read_image, write_label
from unetrkit.errors import UserError, many
from unetrkit.inference.cases import Choice, choose_cases, doubts_about, require_free, require_one_plan
from unetrkit.inference.model import Model, load_model
from unetrkit.inference.record import Record, draft
from unetrkit.inference.restore import restore
from unetrkit.inference.sliding_window import Blending, Triple, scores_of, sliding_window
from unetrkit.memory import peak_memory, was_too_small
from unetrkit.progress import say
from unetrkit.ranks import local_rank

AXES = ("x", "y", "z")
ALL = Choice()


class PredictSettings(Settings):
    """How a network is applied to a whole volume.

    `mirrors: true` averages over the mirror images along x, y and z (8 times the work).

    >>> PredictSettings(mirrors=True).mirrors
    ('x', 'y', 'z')
    """

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    blending: Blending = "gaussian"
    mirrors: tuple[Literal["x", "y", "z"], ...] = ()
    # None: the patch that the model was trained on; another is seen at the same scale
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
    return _labels(networks, image, grid, models[0].plan, settings.window or models[0].window, settings)


def predict(
    inputs: Path,
    out: Path,
    models: Sequence[Path],
    settings: PredictSettings,
    choice: Choice = ALL,
    *,
    overwrite: bool = False,
    progress: Callable[..., None] | None = None,
    each: Each | None = None,
) -> list[Path]:
    """Writes OUT/<case>.nii.gz for every case of `inputs`; OUT/predictions.json says how each was made.

    `inputs` is one scan (a file or the folder of a DICOM series), a folder of scans, or a data list, of which
    `choice` is taken; validation cases are those of the models' own fold. Parts may be done at the same time.
    `progress(done, total, note)` counts cases, the current one by the share of its windows that are done.
    The next case is read and prepared while the network works on this one; `each` (as `for_each`) does the
    cases elsewhere, one at a time and place. Returns the files written.

    The same call again goes on after an interruption: a label map that is still as these models wrote it,
    from the same images with the same settings, stays. Raises UserError before any work for models that
    differ in more than their weights, for other outputs that exist (`overwrite` replaces those that
    OUT/predictions.json lists), and for an `out` that holds inputs. A case that cannot be used does not stop
    the others: a UserError after the last one names it.
    """
    loaded = [load_model(path, _device("cpu" if each else settings.device)) for path in models]
    require_one_plan(loaded, models)
    cases = choose_cases(inputs, choice, loaded)
    record = Record(out, shared=choice.part is not None)
    weights = [
        {"path": url_of(path) or str(path.absolute()), "sha256": model.description["sha256"]}
        for path, model in zip(models, loaded, strict=True)
    ]
    made = {"models": weights, "settings": settings.model_dump(mode="json")}
    todo = [case for case in cases if overwrite or not record.holds(case, made)]
    require_free(out, todo, overwrite, record.cases)
    with write_problems(out):
        out.mkdir(parents=True, exist_ok=True)
    if len(todo) < len(cases):
        say(f"{many(len(cases) - len(todo), 'label map')} in `{out}` made before by the same models")
    if each:
        work = partial(_segment_here, models=tuple(models), settings=settings, out=out)
        outcomes = each(work, todo, None, attrgetter("name"))
    else:
        outcomes = _segment_all(todo, loaded, settings, out, progress)
    written: list[Path] = []
    failed: dict[str, UserError] = {}
    for done, (index, outcome) in enumerate(outcomes, 1):
        case = todo[index]
        if each and progress:
            progress(done, len(todo), case.name)
        if isinstance(outcome, UserError):
            failed[case.name] = outcome
            record.drop(case)  # of another model: nobody may take it for this one's
        else:
            written.append(out / f"{case.name}.nii.gz")
            record.add(case, made | outcome)
    if failed and len(cases) == 1:
        raise next(iter(failed.values()))
    if failed:
        listed = "; ".join(f"`{name}`: {error.message}" for name, error in list(failed.items())[:10])
        message = f"{len(failed)} of {len(cases)} cases could not be segmented: {listed}"
        raise UserError(message, hint="the label maps of the others are written")
    return written


Prepared = tuple[np.ndarray, Grid, list[str]]  # image on the plan's grid, doubts that it is of its kind
Outcome = dict[str, Any] | UserError  # what the work took, or why it could not be done


def _segment_all(
    cases: Sequence[Case],
    models: Sequence[Model],
    settings: PredictSettings,
    out: Path,
    progress: Callable[..., None] | None,
) -> Iterator[tuple[int, Outcome]]:
    """Every case in this process."""
    for index, (case, prepared) in enumerate(_prepared(cases, models[0].plan)):

        def report(done: int, total: int, index: int = index, case: Case = case) -> None:
            if progress:
                note = f"case {index + 1}/{len(cases)} {case.name}, window {done}/{total}"
                progress(index + done / total, len(cases), note)

        yield index, _segment(case, prepared.result, models, settings, out, report)


def _segment_here(case: Case, models: tuple[Path, ...], settings: PredictSettings, out: Path) -> Outcome:
    """One case in a process that does others too, and keeps the models between them."""
    loaded = _kept_models(models, settings.device)
    return _segment(case, lambda: _prepare(case, loaded[0].plan), loaded, settings, out)


@lru_cache(1)
def _kept_models(paths: tuple[Path, ...], device: str) -> list[Model]:
    return [load_model(path, _device(device)) for path in paths]


def _segment(
    case: Case,
    prepared: Callable[[], Prepared],
    models: Sequence[Model],
    settings: PredictSettings,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Writes the label map of a case as its draft."""
    start, plan = time.monotonic(), models[0].plan
    try:
        image, grid, doubts = prepared()
        for doubt in doubts:
            say(f"warning: `{case.name}`: {doubt}")
        networks = [model.network for model in models]
        label = _labels(networks, image, grid, plan, settings.window or models[0].window, settings, progress)
        names = {one.id: one.name for one in plan.classes}
        write_label(draft(out, case), label, case.images[0], names)
    except UserError as error:
        return error
    peak = peak_memory()
    return {"seconds": round(time.monotonic() - start, 3), "peak_memory_mb": peak and peak // 2**20}


def _prepare(case: Case, plan: Plan) -> Prepared:
    volume = read_image(case.images)
    return *preprocess(volume, plan, f"`{case.images[0]}`"), doubts_about(volume.array, plan)


def _prepared(cases: Sequence[Case], plan: Plan) -> Iterator[tuple[Case, Future[Prepared]]]:
    """Every case with its image, prepared one case ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(_prepare, case, plan) for case in cases[:1]]
        for index, case in enumerate(cases):
            prepared = ahead.pop()
            ahead = [pool.submit(_prepare, one, plan) for one in cases[index + 1 : index + 2]]
            yield case, prepared


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
        if not was_too_small(error):
            raise
        message = f"not enough memory for windows of {window} voxels"
        raise UserError(message, hint="`amp=bf16` needs less, `device=cpu` uses the main memory") from error
    finally:
        for network, mode in zip(networks, training, strict=True):
            network.train(mode)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"`device` is `{name}`", hint="known: auto, cpu, cuda, cuda:0") from error
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"`device` is `{name}`, but torch finds {found} GPUs", hint="device=auto")
    return device
