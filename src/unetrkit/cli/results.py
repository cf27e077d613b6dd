"""The commands about results: predict, evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from unetrkit.cli.app import CORES, DataArgument, On, Outside, Workers, each_on, outside, quoted, say
from unetrkit.errors import many
from unetrkit.memory import keep_freed_memory
from unetrkit.ranks import this_rank


def predict(
    scans: Annotated[Path, typer.Argument(help="A scan, a folder of scans, a DICOM series, or a datalist.")],
    out: Annotated[Path, typer.Argument(help="Folder for the label maps, one per case.")],
    model: Annotated[list[Path], typer.Option(help="A run or model folder; repeat it to average several.")],
    override: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="overlap=0.5, mirrors=true, device=cpu, …")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a datalist: training, validation, test or all.")] = "all",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing label maps.")] = False,
    allow_outside: Outside = False,
    part: Annotated[str | None, typer.Option(help="For arrays of jobs: 1/16 to 16/16.")] = None,
    on: On = None,
) -> None:
    """Segment scans: one label map per case, on the case's own grid, with its affine and header.

    The same command again goes on where it was stopped: what these models wrote stays.

    Example: unetrkit predict dataset.json predictions --model run --split validation
    """
    from unetrkit.config import apply_overrides
    from unetrkit.data.parts import Part
    from unetrkit.inference.cases import Choice
    from unetrkit.inference.predict import PredictSettings
    from unetrkit.inference.predict import predict as predict_cases
    from unetrkit.progress import progress

    keep_freed_memory()
    rank = this_rank()
    if part is None and rank.world > 1:  # what torchrun starts several of
        part = f"{rank.rank + 1}/{rank.world}"
    settings = apply_overrides(PredictSettings, override or [])
    choice = Choice(split, Part.read(part) if part else None, allow_outside)
    with progress("predicting") as report:
        each = None if on is None else each_on(on, gpu=settings.device != "cpu")
        labels = predict_cases(
            scans, out, model, settings, choice, overwrite=overwrite, progress=report, each=each
        )
    which = f", part {part}" if part else ""
    say(f"wrote {many(len(labels), 'label map')} in `{out}`{which}")
    if rank.first and scans.suffix in (".json", ".csv"):
        words = f"{quoted(out)} {quoted(scans)} REPORT --run {quoted(model[0])}{outside(allow_outside)}"
        say(f"next: unetrkit evaluate {words}")


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of predicted label maps.")],
    data: DataArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the metrics and the report.")],
    run: Annotated[Path | None, typer.Option(help="The run that predicted, for its curves.")] = None,
    tolerance_mm: Annotated[float, typer.Option(min=0.0, help="Of the normalised surface distance.")] = 2.0,
    workers: Workers = CORES,
    allow_outside: Outside = False,
) -> None:
    """Measure predictions against labels, per organ and case, in millimetres on the original grid.

    Example: unetrkit evaluate predictions dataset.json report --run run
    """
    from unetrkit.data.datalist import read_dataset
    from unetrkit.evaluation.evaluate import evaluate as evaluate_cases
    from unetrkit.progress import progress

    dataset = read_dataset(data, allow_outside=allow_outside)
    with progress("evaluating") as report:
        summary = evaluate_cases(
            predictions, dataset, out, tolerance_mm=tolerance_mm, run=run, workers=workers, progress=report
        )
    print(summary.table())
    say(f"next: open {out / 'report.html'}")
