"""What every command shares: the application, options that several have, where words go."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unetrkit import __version__
from unetrkit.errors import printable

if TYPE_CHECKING:
    from unetrkit.data.processes import Each

app = typer.Typer(
    name="unetrkit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Transformer networks for 3D medical image segmentation, from scans to measured results.",
    epilog="Start with `unetrkit demo`, or with your own scans: check, prepare, train, predict, evaluate.",
)

DataArgument = Annotated[
    Path,
    typer.Argument(help="A data list (JSON, CSV), an nnU-Net folder, or a folder of image/label pairs."),
]
Workers = Annotated[int, typer.Option(min=1, max=512, help="Processes; all cores by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Outside = Annotated[
    bool, typer.Option("--allow-outside", help="Accept files outside the data list's folder.")
]
On = Annotated[
    str | None,
    typer.Option("--on", help="Hand out one case a task on a Ray cluster: `ray`, or its address."),
]
# those that this process may use: a job of a cluster has some of the machine's
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _show_version(asked: bool) -> None:
    if asked:
        print(f"unetrkit {__version__}")
        raise typer.Exit()


@app.callback()
def _version(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version)] = False,
) -> None:
    """The options of `unetrkit` itself."""


def say(text: str) -> None:
    """Everything that is not data goes to stderr."""
    print(printable(text), file=sys.stderr)


def each_on(address: str | None, *, gpu: bool = False) -> Each:
    """What hands out the cases: the cores of this machine, or a Ray cluster."""
    from unetrkit.data.processes import for_each

    if address is None:
        return for_each
    from unetrkit.deployment.ray_tasks import ray_each

    return ray_each(None if address == "ray" else address, gpu=gpu)


def quoted(path: Path) -> str:
    """A path as a shell takes it."""
    from unetrkit.data.remote import spelt

    return shlex.quote(spelt(path))


def outside(allowed: bool) -> str:
    """The option that a next command needs as well."""
    return " --allow-outside" if allowed else ""
