"""The commands that train."""

from typing import Annotated

import typer

from unetrkit.memory import keep_freed_memory

DryRun = Annotated[bool, typer.Option("--dry-run", help="Try three steps, and say what the run would take.")]


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe, a YAML file, or RUN/config.yaml to repeat a run.")],
    override: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to override: optim.lr=1e-4")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Train a network on a prepared store. The same command again goes on where it was stopped.

    Example: unetrkit train swin_unetr_tiny data=store out=run loop.steps=2000
    """
    from unetrkit.config import load_recipe
    from unetrkit.training.folder import rehearse
    from unetrkit.training.run import TrainSettings, job_of
    from unetrkit.training.run import train as train_network

    keep_freed_memory()
    settings = load_recipe(TrainSettings, recipe, override or [])
    if dry_run:
        rehearse(job_of(settings))
    else:
        train_network(settings)


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe (swin_heads, …), a YAML file, or RUN/config.yaml.")],
    override: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings: data=STORE, loop.steps=5000")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Pre-train a network on scans without labels. The same command again goes on where it was stopped.

    Example: unetrkit pretrain swin_heads data=store out=pretrained watch.probe=labelled_store
    """
    from unetrkit.config import load_recipe
    from unetrkit.pretraining.run import PretrainSettings, job_of
    from unetrkit.pretraining.run import pretrain as pretrain_network
    from unetrkit.training.folder import rehearse

    keep_freed_memory()
    settings = load_recipe(PretrainSettings, recipe, override or [])
    if dry_run:
        rehearse(job_of(settings))
    else:
        pretrain_network(settings)
