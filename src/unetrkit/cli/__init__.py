"""The command `unetrkit`: each command reads its options and calls one function."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from unetrkit.cli.about import demo, info
from unetrkit.cli.app import app, say
from unetrkit.cli.data import check, prepare
from unetrkit.cli.fetch import fetch
from unetrkit.cli.launch import launch
from unetrkit.cli.learn import pretrain, train
from unetrkit.cli.results import evaluate, predict
from unetrkit.cli.study import study
from unetrkit.errors import ExitCode, Interrupted, UserError
from unetrkit.ranks import first_to_say

# in the order in which `--help` lists them
COMMANDS = (demo, fetch, check, prepare, pretrain, train, predict, evaluate, study, info)
for command in COMMANDS:
    app.command()(command)
app.add_typer(launch)


def _lower(text: str) -> str:
    return (text[:1].lower() + text[1:]).rstrip(".")


def report_error(message: str, hint: str, code: ExitCode) -> NoReturn:
    if first_to_say(message):
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
