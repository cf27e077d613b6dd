"""The commands about scans: check, prepare."""

import json
from pathlib import Path
from typing import Annotated

import typer

from unetrkit.cli.app import CORES, AsJson, DataArgument, On, Outside, Workers, each_on, outside, quoted, say
from unetrkit.errors import UserError, many


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
    say(f"next: unetrkit prepare {quoted(data)} STORE{outside(allow_outside)}")


def prepare(
    data: DataArgument,
    out: Annotated[Path, typer.Argument(help="The store to make or to bring up to date.")],
    override: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Plan entries to override: spacing=1,1,2"),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Use this plan instead of computing one.")] = None,
    published: Annotated[
        str | None, typer.Option(help="Pin a published plan: btcv, swin_ssl, vit_ssl, dae.")
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Leave labels aside: for pre-training.")
    ] = False,
    workers: Workers = CORES,
    allow_outside: Outside = False,
    part: Annotated[
        str | None, typer.Option(help="For arrays of jobs: `plan`, then 1/16 to 16/16 at once, then `index`.")
    ] = None,
    on: On = None,
) -> None:
    """Compute the plan of a data set and write every case into a store that training reads in parts.

    Run it again after a change or an interruption: only what changed is done.

    Example: unetrkit prepare dataset.json store patch_size=96,96,96
    """
    from unetrkit.data.copies import copy_of, send
    from unetrkit.data.datalist import cases_to_learn_from, read_dataset
    from unetrkit.data.fingerprint import make_plan
    from unetrkit.data.parts import Part
    from unetrkit.data.plan import apply_published, override_plan, read_plan
    from unetrkit.data.prepare import prepare as prepare_store
    from unetrkit.data.prepare import prepare_part, prepare_plan
    from unetrkit.data.remote import spelt, url_of
    from unetrkit.progress import progress

    if url_of(out) and (part or on):
        hint = "prepare in one, and copy it with the object store's own tool"
        raise UserError("several machines need a folder that all of them see", hint=hint)
    place, out = out, copy_of(out, "prepared")
    dataset = read_dataset(data, allow_outside=allow_outside, unlabelled=unlabelled)
    if part not in (None, "plan", "index"):
        with progress("preparing") as report_progress:
            done = prepare_part(dataset, out, Part.read(part), workers=workers, progress=report_progress)
        say(f"part {part}: {many(done, 'case')} prepared in `{out}`; when all are: --part index")
        return
    each = each_on(on)
    if plan is not None or part == "index":
        chosen = read_plan(plan or out / "plan.json")
    else:
        with progress("planning") as report_progress:
            chosen = make_plan(dataset, workers=workers, progress=report_progress, each=each)
    if published is not None:
        chosen = apply_published(chosen, published)
    chosen = override_plan(chosen, override or [])
    if part == "plan":
        prepare_plan(dataset, chosen, out)
        say(f"the plan is {out / 'plan.json'}")
        return
    with progress("preparing") as report_progress:
        summary = prepare_store(dataset, chosen, out, workers=workers, progress=report_progress, each=each)
    send(out)
    say(f"{summary}; the plan is {spelt(place / 'plan.json')}")
    what = "train swin_unetr_tiny" if cases_to_learn_from(dataset)[0].label else "pretrain swin_heads"
    say(f"next: unetrkit {what} data={quoted(place)} out=RUN")
