"""The loop: one for everything that is trained, its events in the order in which they happen.

An objective is an `nn.Module` from a batch to named losses, of which `loss` is descended and the rest logged.
A step is a function of the weights, the optimizer's state, the seed and its own number: a stopped or killed
run goes on from its last checkpoint to bitwise the same weights (on a CPU; a GPU's sums have no order).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import nn

from unetrkit.config import Settings
from unetrkit.errors import Interrupted, UserError
from unetrkit.training import checkpoint
from unetrkit.training.interruption import Interruption, Stop
from unetrkit.training.learner import Batch, Learner, NotFinite, build_learner, take_step
from unetrkit.training.log import Metrics, Progress, say
from unetrkit.training.optim import OptimSettings, learning_rate
from unetrkit.training.trackers import Trackers, mirrored

# measures an objective, telling its second argument how far it is
Validate = Callable[[nn.Module, Callable[[str], None]], dict[str, float]]
Count = Annotated[int, Field(ge=1)]
SAVE_SECONDS = 600  # a slow computer does not lose more either
CHECKPOINTS = 4  # in a run folder while one is written: last, previous, best, the new one


class LoopSettings(Settings):
    """How long, how often, in which precision."""

    steps: Annotated[int, Field(ge=1, le=10**9)] = 50_000
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    validate_every: Count = 1_000
    save_every: Count = 500
    # a record in metrics.jsonl is the mean over this many steps
    log_every: Count = 50
    # batches whose gradients make one step
    accumulate: Count = 1
    # largest norm of the gradient; none was published
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    # decay of the moving average of the weights, such as 0.999; null: none
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    # auto: bf16 on a GPU or CPU with matrix units for it, else off
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # processes that load data; the batches do not depend on it
    workers: Annotated[int, Field(ge=0, le=128)] = 2
    # where the records of metrics.jsonl go besides
    trackers: Trackers = ()


class Batches(Protocol):
    """Where batches come from: those of `start` to `stop` - 1, and the names of the cases in one of them."""

    @property
    def size(self) -> int:
        """Patches in a batch."""

    def __call__(self, start: int, stop: int) -> Generator[Batch]: ...

    def cases(self, number: int) -> Sequence[str]: ...


@dataclass
class State:
    """What a run knows of itself besides its tensors; saved in every checkpoint."""

    step: int = 0  # how many are done
    validated: int = 0  # after which step last
    best_step: int | None = None
    best: dict[str, float] = field(default_factory=dict)  # what was measured there
    sums: dict[str, float] = field(default_factory=dict)  # of the losses since the last record
    summed: int = 0

    def add(self, losses: dict[str, float]) -> None:
        self.summed += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take_means(self) -> dict[str, float]:
        means = {name: total / self.summed for name, total in self.sums.items()}
        self.sums, self.summed = {}, 0
        return means


def fit(
    objective: nn.Module,
    batches: Batches,
    folder: Path,
    settings: LoopSettings,
    optim: OptimSettings,
    *,
    validate: Validate,
    better: str,
    export: Callable[[nn.Module, State], None],
) -> State:
    """Trains `objective` up to `settings.steps` in `folder`, going on from the checkpoint that is there.

    validate: measures an objective; the larger its value named `better`, the better. export: called with the
    best objective so far. Raises UserError where a loss is not finite or a file cannot be written, and
    Interrupted, after saving, on Ctrl-C and SIGTERM.
    """
    learner = build_learner(objective, settings, optim)
    state = State()
    if saved := checkpoint.load_last(folder, warn=say):
        learner.load_state_dict(saved["learner"])
        state = State(**saved["state"])
    if state.step == state.validated == settings.steps:
        say(f"`{folder}` has done its {settings.steps} steps already")
        return state
    if saved is None and any(
        f.exists() and f.stat().st_size for f in (folder / "metrics.jsonl", folder / "best")
    ):
        raise UserError(
            f"`{folder}` holds a run that has lost its checkpoints, `last` and `previous`",
            hint="restore one of them, or begin again with another `out`",
        )
    if saved:
        say(f"going on from step {state.step} of {settings.steps}")
    _check_space(learner, folder)
    last = settings.steps * settings.accumulate
    on_cpu = next(learner.objective.parameters()).device.type == "cpu"
    slow = "hint: there is no GPU; lower `loop.steps` or `sampling.patch_size`" if on_cpu else ""
    upto = {"training": state.step, "validation": state.validated}
    with (
        mirrored(settings.trackers, folder) as mirror,
        Metrics(folder / "metrics.jsonl", upto, saved and saved["log"], mirror) as metrics,
        Progress(state.step, settings.steps, batches.size * settings.accumulate, slow) as progress,
        Interruption() as interruption,
        _explained(state, batches, settings, optim),
        interruption.shielding(batches(state.step * settings.accumulate, last)) as stream,
    ):
        unsaved = saved is None  # a run that has a record then has had a checkpoint
        last_save = time.monotonic()
        try:
            while True:
                done = state.step == settings.steps
                began = time.monotonic()

                # ---- validate, and keep the best
                if state.step > state.validated and (done or state.step % settings.validate_every == 0):
                    with interruption.abandoning():
                        measured = _validate(learner, validate, progress.show)
                    metrics.write(state.step, "validation", measured)
                    state.validated, unsaved = state.step, True
                    if state.best_step is None or _score(measured, better) > _score(state.best, better):
                        state.best_step, state.best = state.step, measured
                        checkpoint.save(folder / "best", _content(learner, state))
                        export(learner.subject, state)
                    progress.say(_validation_line(state, measured, better))

                # ---- save
                due = state.step % settings.save_every == 0 or began - last_save > SAVE_SECONDS
                if unsaved and (done or due):
                    checkpoint.save_last(folder, _content(learner, state) | {"log": metrics.sync()})
                    unsaved, last_save = False, time.monotonic()
                progress.pause(time.monotonic() - began)

                # ---- stop
                if done:
                    return state
                if interruption.asked:
                    raise Stop

                # ---- one step
                rate = learning_rate(state.step, settings.steps, optim)
                losses = take_step(learner, stream, state.step, rate, settings)
                state.step += 1
                unsaved = True
                progress.step(state.step, losses["loss"])

                # ---- log
                state.add(losses)
                if state.step % settings.log_every == 0 or state.step == settings.steps:
                    metrics.write(state.step, "training", state.take_means())
        except Stop:
            checkpoint.save_last(folder, _content(learner, state) | {"log": metrics.sync()})
            raise Interrupted(
                f"stopped after step {state.step} of {settings.steps}, which is saved in `{folder}`",
                hint="the same command goes on from there",
            ) from None


def _content(learner: Learner, state: State) -> dict[str, object]:
    return {"learner": learner.state_dict(), "state": asdict(state)}


def _validate(learner: Learner, validate: Validate, show: Callable[[str], None]) -> dict[str, float]:
    learner.subject.eval()
    try:
        return validate(learner.subject, show)
    finally:
        learner.subject.train()


def _score(measured: dict[str, float], better: str) -> float:
    """A value that is not defined (no organ anywhere) is worse than any other."""
    value = measured[better]
    return value if math.isfinite(value) else -math.inf


def _validation_line(state: State, measured: dict[str, float], better: str) -> str:
    best = "the best so far" if state.best_step == state.step else f"the best is {state.best[better]:.4f}"
    return f"validation after step {state.step}: {better} {measured[better]:.4f}, {best}"


@contextmanager
def _explained(
    state: State, batches: Batches, settings: LoopSettings, optim: OptimSettings
) -> Iterator[None]:
    """What can go wrong in a step, in the words of the user's data and settings."""
    try:
        yield
    except NotFinite as what:
        numbers = range(state.step * settings.accumulate, (state.step + 1) * settings.accumulate)
        cases = (name for number in numbers for name in batches.cases(number))
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(cases))
        rate = learning_rate(state.step, settings.steps, optim)
        raise UserError(
            f"the {what} is not finite at step {state.step}: rate {rate:.3g}, cases {names}",
            hint="look at these cases; else a lower `optim.lr`, `loop.clip=1` or `loop.amp=off`, and another "
            "`out`. What was saved is from before this step, and good",
        ) from what
    except (MemoryError, RuntimeError) as error:  # torch raises the latter on a CPU
        gpu = isinstance(error, torch.OutOfMemoryError)
        if not (gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise UserError(
            f"the {'GPU' if gpu else 'computer'}'s memory is too small for step {state.step}",
            hint="a smaller `sampling.batch_size` with a larger `loop.accumulate`, a smaller "
            "`sampling.patch_size`, or `network_options.checkpointing=true`",
        ) from error


def _check_space(learner: Learner, folder: Path) -> None:
    """A full disk is better found before the first step than at the first checkpoint."""
    weights = sum(p.numel() * p.element_size() for p in learner.objective.parameters())
    copies = 3 + (learner.average is not None)  # the weights, the two moments of Adam, the average
    there = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    needed = CHECKPOINTS * copies * weights - there
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"`{folder}` has {free / 1e9:.2f} GB free, and checkpoints need {needed / 1e9:.2f} GB",
            hint="free some space, or choose another `out`",
        )
