"""The commands that run other commands elsewhere: launch local, slurm, azureml, ray."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from unetrkit.cli.app import app, quoted, say
from unetrkit.errors import ExitCode, Interrupted, UserError, many

launch = typer.Typer(
    name="launch",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Run a command in several processes, on a Slurm or a Ray cluster, or on Azure ML.",
    epilog="Example: unetrkit launch local --processes 2 -- train swin_unetr_base data=store out=run",
)

Words = Annotated[
    list[str], typer.Argument(metavar="-- COMMAND …", help="A command of unetrkit with all of its words.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be run, and run nothing.")]


def _command(words: list[str]) -> list[str]:
    """The words of a command that exists and may be launched."""
    known = {one.name or getattr(one.callback, "__name__", "") for one in app.registered_commands}
    if words[0] not in known:
        raise UserError(
            f"`{words[0]}` is not a command to launch", hint="as in `unetrkit launch local -- train …`"
        )
    return words


@launch.command()
def local(
    words: Words,
    processes: Annotated[int, typer.Option(min=1, max=512, help="One for each GPU.")] = 1,
    restarts: Annotated[int, typer.Option(min=0, help="Begin again so often when a process died.")] = 0,
    dry_run: DryRun = False,
) -> None:
    """Run a command in several processes of this machine, by torchrun.

    Ctrl-C and SIGTERM reach each process once: training saves, and the same command goes on.

    Example: unetrkit launch local --processes 4 -- train swin_unetr_base data=store out=run
    """
    from unetrkit.deployment.torchrun import run, torchrun

    command = torchrun(_command(words), processes, restarts=restarts)
    if dry_run:
        print(shlex.join(command))
        return
    code = run(command)
    if code == ExitCode.INTERRUPTED:
        raise Interrupted("stopped", hint="the same command goes on")
    sys.exit(code)


@launch.command()
def slurm(
    words: Words,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="And so many processes on each node.")] = 1,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="Cores of each node.")] = 8,
    hours: Annotated[float, typer.Option(min=0.05, max=10_000, help="The limit of one job.")] = 24,
    requeues: Annotated[int, typer.Option(min=0, help="Go on so often after that limit.")] = 100,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other option: --sbatch mem=200G")
    ] = None,
    array: Annotated[
        int | None, typer.Option(min=2, max=10_000, help="Jobs for the work of prepare, predict, study.")
    ] = None,
    logs: Annotated[Path, typer.Option(help="Folder for the logs; all nodes must see it.")] = Path("slurm"),
    dry_run: DryRun = False,
) -> None:
    """Submit a command to a Slurm cluster; needs the `slurm` extra.

    Before its limit a job saves, is queued again and goes on. Run this on a login node.

    Example: unetrkit launch slurm --array 16 --gpus-per-node 0 -- prepare dataset.json store
    """
    from unetrkit.deployment.slurm import SlurmSettings, scripts, submit

    given = sbatch or []
    pairs = dict(one.split("=", 1) for one in given if "=" in one.strip("="))
    if len(pairs) < len(given) or not f"{partition}{account}{''.join(given)}".isprintable():
        raise UserError("an option of sbatch is one line, and given once", hint="--sbatch NAME=VALUE")
    settings = SlurmSettings(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        minutes=max(3, round(60 * hours)),
        requeues=requeues,
        partition=partition,
        account=account,
        sbatch=pairs,
    )
    if dry_run:
        print(scripts(_command(words), settings, logs, array))
        return
    jobs = submit(_command(words), settings, logs, array)
    print("\n".join(job.job_id for job in jobs))
    say(f"next: squeue --me; the logs of JOB, a line above, are {quoted(logs)}/JOB_0_log.out")


@launch.command()
def ray(
    words: Words,
    address: Annotated[
        str | None, typer.Option(help="HOST:6379; else RAY_ADDRESS, or the cluster of this machine.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=10_000, help="Processes that train as one.")] = 1,
    gpus_per_worker: Annotated[int, typer.Option(min=0, max=1)] = 1,
    restarts: Annotated[int, typer.Option(min=0, help="Go on so often when a worker was lost.")] = 3,
    dry_run: DryRun = False,
) -> None:
    """Train on a Ray cluster, by Ray Train; needs the `ray` extra.

    After a lost worker all go on from the last checkpoint. All machines must see the same paths.

    Example: unetrkit launch ray --workers 4 -- train swin_unetr_base data=store out=run
    """
    from unetrkit.deployment.ray_training import run, trainer
    from unetrkit.deployment.training import read

    if dry_run:
        read(words)
        own = "GPU" if gpus_per_worker else "core"
        print(f"{many(workers, 'worker')}, a {own} for each: unetrkit {shlex.join(words)}")
    else:
        run(trainer(words, workers, gpu=gpus_per_worker > 0, restarts=restarts), address)


@launch.command()
def azureml(
    words: Words,
    config: Annotated[Path, typer.Option(help="Workspace, compute, datastore, machines: docs/launch.md.")],
    dry_run: DryRun = False,
) -> None:
    """Submit a pipeline of fetch, prepare and train to Azure ML; needs the `azureml` extra.

    Example: unetrkit launch azureml --config config.yaml -- train swin_unetr_base loop.trackers=mlflow
    """
    from unetrkit.config import load_recipe
    from unetrkit.deployment.azureml import AzureSettings, pipeline, submit

    settings = load_recipe(AzureSettings, config)
    if dry_run:
        print(pipeline(settings, _command(words)))
        return
    job = submit(settings, _command(words))
    print(job.name)
    say(f"next: open {job.studio_url}")
