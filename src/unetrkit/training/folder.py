"""The folder of a run: new, or that of the same run, which then goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import nn

import unetrkit
from unetrkit.config import Settings, flatten, load_recipe, to_yaml
from unetrkit.data.copies import MARK, sending
from unetrkit.data.files import alone, atomic_write, read_json, write_problems
from unetrkit.errors import UserError
from unetrkit.ranks import this_rank
from unetrkit.training import checkpoint
from unetrkit.training.distributed import from_first, together
from unetrkit.training.guards import explained, memory_used, space_of
from unetrkit.training.learner import build_learner, device_of, take_step
from unetrkit.training.log import duration, say
from unetrkit.training.loop import Batches, LoopSettings, State, Validate, fit
from unetrkit.training.optim import OptimSettings, learning_rate
from unetrkit.training.trackers import require_packages

# what may change when a run goes on: where things are and how fast, not what is computed
FREE = {"data", "out", "loop.device", "loop.sharding", "loop.workers", "loop.save_every", "loop.log_every"}
FREE |= {"init_minimum", "init_trust", "loop.trackers"}
# else a run that met a broken case could not go on without it
FREE |= {"sampling.skip_broken", "crops.skip_broken"}

LOCK = ".train.lock"
TRIED = 3  # steps of a rehearsal


@dataclass(frozen=True)
class Job:
    """What a run trains, how it is measured, what it leaves, and where: in the folder `out`.

    * validate, better, export: see `loop.fit`; load: reads what `export` wrote, or raises UserError
    * settings: all of them, for `config.yaml`; loop and optim are two of their sections
    * made_of: what must be the same where the run goes on, for `run.json`; about and after: said around it
    """

    settings: Settings
    out: Path
    loop: LoopSettings
    optim: OptimSettings
    objective: nn.Module
    batches: Batches
    validate: Validate
    better: str
    export: Callable[[nn.Module, State], None]
    load: Callable[[Path], object]
    made_of: Mapping[str, object]
    about: tuple[str, ...]
    after: str


def carry_out(job: Job) -> State:
    """Begins the run, or goes on with it, to its end; what it exported is then there, and sound.

    Raises UserError where `out` holds something else, and what `loop.fit` raises.
    """
    out = job.out
    with ExitStack() as stack:

        def begin() -> None:
            if this_rank().world > 1 and job.loop.sharding == "full" and (out.parent / MARK).exists():
                message = "`loop.sharding=full` writes checkpoints of many files, which are not sent to URLs"
                raise UserError(message, hint="name a folder that all ranks see as `out`")
            require_packages(job.loop.trackers)
            _make_folder(out)
            stack.enter_context(alone(out / LOCK, f"another process is training in `{out}`"))
            _open(out, job)
            stack.enter_context(sending(out))
            for line in job.about:
                say(line)

        with together(device_of(job.loop.device)):
            from_first(begin)
            state = fit(
                job.objective,
                job.batches,
                out,
                job.loop,
                job.optim,
                validate=job.validate,
                better=job.better,
                export=job.export,
            )
        if this_rank().first:
            _require_export(job, out, state)
    name = job.better.removeprefix("-")
    best = f"{name} {state.best[name]:.4f}"
    say(f"finished {state.step} steps; the best, {best}, is of step {state.best_step}")
    return state


def rehearse(job: Job) -> None:
    """Says what the run would take, from three steps; nothing is written."""
    loop, stream, seconds = job.loop, job.batches(0, TRIED * job.loop.accumulate), []
    with together(device_of(loop.device)), explained(State(), job.batches, loop, job.optim):
        learner = build_learner(job.objective, loop, job.optim)
        for step in range(TRIED):
            began = time.perf_counter()
            take_step(learner, stream, step, learning_rate(step, loop.steps, job.optim), loop)
            seconds.append(time.perf_counter() - began)
    stream.close()
    each, validations = median(seconds), -(-loop.steps // loop.validate_every)
    whose, used = memory_used(learner.device.type == "cuda")
    say(job.about[0])
    say(f"time: {each:.3g} s a step, {duration(each * loop.steps)} in all, and {validations} validations")
    say(f"memory: {used or 'unknown'} of {whose}; disk: {space_of(learner) / 1e9:.3g} GB")


def _require_export(job: Job, out: Path, state: State) -> None:
    """What was exported is read again; where it is damaged it is written again."""
    try:
        job.load(out / "model")
    except UserError as problem:
        weights = checkpoint.load(out / "best")["learner"].get("best")
        if weights is None:  # of an earlier version
            raise
        say(f"{problem.message}; writing it again from `{out / 'best'}`")
        job.objective.load_state_dict(weights)
        job.export(job.objective, state)


def _make_folder(out: Path) -> None:
    """Raises UserError where something else than a run is there already."""
    if out.exists() and not (out / "config.yaml").exists():
        if not out.is_dir() or any(not file.name.startswith(".") for file in out.iterdir()):
            raise UserError(f"`{out}` holds something that is not a run", hint="name a new folder as `out`")
    with write_problems(out):
        out.mkdir(parents=True, exist_ok=True)


def _open(out: Path, job: Job) -> None:
    """Begins a new run, or goes on with the same. Raises UserError for any other."""
    config, record = out / "config.yaml", out / "run.json"
    if config.exists():
        same_run(load_recipe(type(job.settings), config), job.settings, job.loop, job.optim, out)
        if not record.exists() and any((out / name).exists() for name in ("last", "previous")):
            raise UserError(
                f"`{record}`, which says what the run was trained on, is missing",
                hint="restore it, or begin a new run with another `out`",
            )
        began = read_json(record) if record.exists() else {**job.made_of}
        if not isinstance(began, dict):
            raise UserError(f"`{record}` is not what a run wrote", hint="restore it, or name another `out`")
        for name, value in json.loads(json.dumps({**job.made_of})).items():
            if began.get(name) != value:
                what = {"plan": "another plan", "sources": "other images or labels"}.get(name)
                message = f"the data has {what or f'other {name} cases'} than when the run in `{out}` began"
                if name == "init":
                    message = f"the run in `{out}` began with other weights than `init` names"
                raise UserError(message, hint="another `out` begins a new run")
    atomic_write(config, to_yaml(job.settings).encode())
    atomic_write(record, json.dumps({**job.made_of, "unetrkit": unetrkit.__version__}, indent=1).encode())


def same_run(before: Settings, now: Settings, loop: LoopSettings, optim: OptimSettings, out: Path) -> None:
    """Settings that change what is computed must be the same; a longer run must begin with the same rates."""
    old, new = (flatten(settings.model_dump(mode="json")) for settings in (before, now))
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name) and name not in FREE]
    if differing == ["loop.steps"]:
        steps, more = int(str(old["loop.steps"])), loop.steps
        same = (learning_rate(s, steps, optim) == learning_rate(s, more, optim) for s in range(steps))
        if more > steps and all(same):
            return
        raise UserError(
            f"`{out}` holds a run of {steps} steps, not of {more}",
            hint="it can go on for longer if its `optim.schedule` is constant; else choose another `out`",
        )
    if differing:
        name = differing[0]
        was, wanted = (json.dumps(values.get(name), ensure_ascii=False) for values in (old, new))
        raise UserError(
            f"`{out}` holds another run: its `{name}` is {was}, not {wanted}",
            hint="another `out` begins a new run; with its own settings this one goes on",
        )
