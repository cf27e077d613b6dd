"""The command `unetrkit`: each command reads its options and calls one function."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from unetrkit import __version__
from unetrkit.errors import ExitCode, Interrupted, UserError
from unetrkit.fetch_command import fetch
from unetrkit.memory import keep_freed_memory

app = typer.Typer(
    name="unetrkit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Transformer networks for 3D medical image segmentation, from scans to measured results.",
    epilog="Start with `unetrkit demo`, or with your own scans: check, prepare, train, predict, evaluate.",
)

app.command()(fetch)
DataArgument = Annotated[
    Path,
    typer.Argument(help="A data list (JSON, CSV), an nnU-Net folder, or a folder of image/label pairs."),
]
Workers = Annotated[int, typer.Option(min=1, max=512, help="Processes; all cores by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Outside = Annotated[
    bool, typer.Option("--allow-outside", help="Accept files outside the data list's folder.")
]
CORES = os.cpu_count() or 1


@app.callback()
def _version(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _show_version(asked))
    ] = False,
) -> None:
    """The options of `unetrkit` itself."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"unetrkit {__version__}")
        raise typer.Exit()


def say(text: str) -> None:
    """Everything that is not data goes to stderr."""
    print(text, file=sys.stderr)


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the demo's data, run and report.")] = Path("demo"),
) -> None:
    """The whole job on a generated abdomen with 13 organs: no download, a few minutes on a CPU.

    Example: unetrkit demo
    """
    from unetrkit.demo import run_demo

    run_demo(out, run=lambda command: app(command, standalone_mode=False))


@app.command()
def check(
    data: DataArgument, as_json: AsJson = False, allow_outside: Outside = False, workers: Workers = CORES
) -> None:
    """Look for everything in a data set that would make training fail or mislead.

    Exit code 2 if there are errors; warnings do not change it.

    Example: unetrkit check dataset.json
    """
    from unetrkit.data.check import check as check_dataset
    from unetrkit.data.check_report import print_report
    from unetrkit.data.datalist import read_dataset
    from unetrkit.progress import progress

    dataset = read_dataset(data, allow_outside=allow_outside)
    with progress("checking") as report_progress:
        report = check_dataset(dataset, workers=workers, progress=report_progress)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print_report(report)
    if report.errors:
        first, more = report.errors[0], len(report.errors) - 1
        also = f" (and {more} more errors, listed above)" if more else ""
        raise UserError(first.message + also, hint=first.hint)
    say(f"next: unetrkit prepare {_quoted(data)} STORE{_outside(allow_outside)}")


@app.command()
def prepare(
    data: DataArgument,
    out: Annotated[Path, typer.Argument(help="The store to make or to bring up to date.")],
    override: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Plan entries to override: spacing=1,1,2"),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Use this plan instead of computing one.")] = None,
    published: Annotated[str | None, typer.Option(help="Pin a published plan: btcv.")] = None,
    workers: Workers = CORES,
    allow_outside: Outside = False,
) -> None:
    """Compute the plan of a data set and write every case into a store that training reads in parts.

    Run it again after a change or an interruption: only what changed is done.

    Example: unetrkit prepare dataset.json store patch_size=96,96,96
    """
    from unetrkit.data.datalist import read_dataset
    from unetrkit.data.fingerprint import make_plan
    from unetrkit.data.plan import apply_published, override_plan, read_plan
    from unetrkit.data.prepare import prepare as prepare_store
    from unetrkit.progress import progress

    dataset = read_dataset(data, allow_outside=allow_outside)
    if plan is not None:
        chosen = read_plan(plan)
    else:
        with progress("planning") as report_progress:
            chosen = make_plan(dataset, workers=workers, progress=report_progress)
    if published is not None:
        chosen = apply_published(chosen, published)
    chosen = override_plan(chosen, override or [])
    with progress("preparing") as report_progress:
        summary = prepare_store(dataset, chosen, out, workers=workers, progress=report_progress)
    say(f"{summary}; the plan is {out / 'plan.json'}")
    say(f"next: unetrkit train swin_unetr_tiny data={_quoted(out)} out=RUN")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe, a YAML file, or RUN/config.yaml to repeat a run.")],
    override: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to override: optim.lr=1e-4")
    ] = None,
) -> None:
    """Train a network on a prepared store. The same command again goes on where it was stopped.

    Example: unetrkit train swin_unetr_tiny data=store out=run loop.steps=2000
    """
    from unetrkit.config import load_recipe
    from unetrkit.training.run import TrainSettings
    from unetrkit.training.run import train as train_network

    keep_freed_memory()
    train_network(load_recipe(TrainSettings, recipe, override or []))


@app.command()
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
) -> None:
    """Segment scans: one label map per case, on the case's own grid, with its affine and header.

    Example: unetrkit predict dataset.json predictions --model run --split validation
    """
    from unetrkit.config import apply_overrides
    from unetrkit.inference.predict import PredictSettings
    from unetrkit.inference.predict import predict as predict_cases
    from unetrkit.progress import progress

    keep_freed_memory()
    settings = apply_overrides(PredictSettings, override or [])
    with progress("predicting") as report_progress:
        labels = predict_cases(
            scans,
            out,
            model,
            settings,
            split=split,
            overwrite=overwrite,
            allow_outside=allow_outside,
            progress=report_progress,
        )
    say(f"wrote {len(labels)} label map{'s' * (len(labels) != 1)} in `{out}`")
    if scans.suffix in (".json", ".csv"):
        words = f"{_quoted(out)} {_quoted(scans)} REPORT --run {_quoted(model[0])}{_outside(allow_outside)}"
        say(f"next: unetrkit evaluate {words}")


@app.command()
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
    with progress("evaluating") as report_progress:
        summary = evaluate_cases(
            predictions,
            dataset,
            out,
            tolerance_mm=tolerance_mm,
            run=run,
            workers=workers,
            progress=report_progress,
        )
    print(summary.table())
    say(f"next: open {out / 'report.html'}")


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="recipes, environment, networks or weights.")] = "recipes",
    file: Annotated[Path | None, typer.Argument(help="Of weights: a file, bundle, run or model.")] = None,
    override: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="in_channels=4, classes=3, image_size=96,96,96, …"),
    ] = None,
    network: Annotated[str | None, typer.Option(help="Read weights into this one, not their own.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Let torch compile a TorchScript archive.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the recipes or the networks, say what this machine has, or audit a file of weights.

    Example: unetrkit info weights model_swinvit.pt
    """
    if what == "weights":
        from unetrkit.training.initial import inspect_weights

        if file is None:
            raise UserError("`info weights` needs a file", hint="as in `unetrkit info weights model.pt`")
        found = inspect_weights(file, network, override or [], trust=trust)
        print(json.dumps(found.to_dict(), indent=1) if as_json else found.table())
        say(f"next: {found.command}")
        return
    if file is not None or network is not None or trust:
        hint = "a file and its options belong to `unetrkit info weights`"
        raise UserError(f"`info {what}` takes no more words", hint=hint)
    if what == "networks":
        from unetrkit.networks.cost import cost_table, costs

        print(json.dumps(costs(), indent=1) if as_json else cost_table(costs()))
        return
    from unetrkit.info import describe

    rows = describe(what)
    lines = (f"{name:20} {text}" for name, text in rows.items())
    print(json.dumps(rows, indent=1) if as_json else "\n".join(lines))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _outside(allowed: bool) -> str:
    return " --allow-outside" if allowed else ""


def _lower(text: str) -> str:
    return (text[:1].lower() + text[1:]).rstrip(".")


def report_error(message: str, hint: str, code: ExitCode) -> NoReturn:
    say(f"error: {message}")
    if hint:
        say(f"\nhint: {hint}")
    sys.exit(code)


def main() -> None:
    """The one place where exceptions become messages and exit codes; a programming error keeps its trace."""
    usage_error = typer.BadParameter.__bases__[0]  # click's, which typer bundles without a public name
    try:
        words = sys.argv[1:] or ["--help"]
        sys.exit(app(words, prog_name="unetrkit", standalone_mode=False) or ExitCode.DONE)
    except UserError as error:
        report_error(error.message, error.hint, ExitCode.WRONG_USE)
    except usage_error as error:  # type: ignore[misc]
        command = error.ctx.command_path if error.ctx else "unetrkit"
        report_error(_lower(error.format_message()), f"see `{command} --help`", ExitCode.WRONG_USE)
    except Interrupted as stop:
        report_error(stop.message, stop.hint, ExitCode.INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        report_error("interrupted", "", ExitCode.INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.FAILED)
