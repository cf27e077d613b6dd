"""The commands that train."""

from __future__ import annotations

from typing import Annotated

import typer

from unetrkit.memory import keep_freed_memory


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
