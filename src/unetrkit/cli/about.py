"""The commands that show: demo, info."""

import json
from pathlib import Path
from typing import Annotated

import typer

from unetrkit.cli.app import AsJson, app, say
from unetrkit.errors import UserError, printable


def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the demo's data, run and report.")] = Path("demo"),
) -> None:
    """The whole job on a generated abdomen with 13 organs: no download, a few minutes on a CPU.

    Example: unetrkit demo
    """
    from unetrkit.demo import run_demo

    run_demo(out, run=lambda command: app(command, standalone_mode=False))


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
        print(json.dumps(found.to_dict(), indent=1) if as_json else printable(found.table()))
        if found.command:
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
    width = max(map(len, rows), default=0)
    lines = (f"{name:{width}}  {text}" for name, text in rows.items())
    print(json.dumps(rows, indent=1) if as_json else "\n".join(lines))
