"""The loop: one for everything that is trained, its events in the order in which they happen.

An objective is an `nn.Module` from a batch to named losses, of which `loss` is descended and the rest logged.
A step is a function of the weights, the optimizer's state, the seed and its own number: a stopped or killed
run goes on from its last checkpoint to bitwise the same weights (on a CPU; a GPU's sums have no order).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from pydantic.dataclasses import dataclass as checked
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from unetrkit.config import Settings
from unetrkit.errors import Interrupted, UserError, many
from unetrkit.ranks import this_rank
from unetrkit.training import checkpoint, sharding
from unetrkit.training.distributed import anywhere, from_all, from_first
from unetrkit.training.guards import cases_of, check_space, explained, refuse_lost, slow, validation_line
from unetrkit.training.interruption import Interruption, Stop
from unetrkit.training.learner import Batch, Learner, NotFinite, build_learner, take_step
from unetrkit.training.log import Metrics, Progress, say
from unetrkit.training.optim import OptimSettings, learning_rate, scaled
from unetrkit.training.trackers import Mirror, Trackers, mirrored

# measures an objective after so many steps, telling its last argument how far it is
Validate = Callable[[nn.Module, int, Callable[[str], None]], dict[str, float]]
Count = Annotated[int, Field(ge=1)]
SAVE_SECONDS = 600  # a slow computer does not lose more either
RETREATS = 2  # how often a run goes back to its last checkpoint before it gives up


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
    # steps in a row that are left out because their loss or gradient is not finite, before the run goes back
    # to its last checkpoint and on at half the rate; that twice, and it ends. 0: it ends at the first
    skips: Annotated[int, Field(ge=0)] = 5
    # decay of the moving average of the weights, such as 0.999; null: none
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    # auto: bf16 on a GPU or CPU with matrix units for it, else off
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # full: each of several ranks keeps a part of weights, gradients and the optimizer's state, not a copy
    sharding: Literal["none", "full"] = "none"
    # processes that load data; the batches do not depend on it
    workers: Annotated[int, Field(ge=0, le=128)] = 2
    # where the records of metrics.jsonl go besides
    trackers: Trackers = ()


class Batches(Protocol):
    """Where batches come from: those of `start` to `stop` - 1, and the names of the cases in one of them."""

    @property
    def size(self) -> int: ...  # patches in a batch

    @property
    def lower(self) -> tuple[str, str]: ...  # settings to lower where they are too many, or too large

    def __call__(self, start: int, stop: int) -> Generator[Batch]: ...

    def cases(self, number: int) -> Sequence[str]: ...


@checked(config={"extra": "forbid"})
class State:
    """What a run knows of itself besides its tensors; saved in every checkpoint."""

    step: int = 0  # how many are done
    validated: int = 0  # after which step last
    best_step: int | None = None
    best: dict[str, float] = field(default_factory=dict)  # what was measured there
    sums: dict[str, float] = field(default_factory=dict)  # of the losses since the last record
    summed: int = 0
    skipped: int = 0  # steps in a row, up to the last
    halved: int = 0  # how often the run went back and its rate was halved

    def add(self, losses: dict[str, float]) -> None:
        self.summed += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take_means(self) -> dict[str, float]:
        means = {name: total / self.summed for name, total in self.sums.items()}  # none if all were skipped
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

    validate: measures an objective; the larger its value named `better`, the better; of "-loss" the smaller.
    export: called with the best objective so far. Several processes of torchrun train as one: rank 0 alone
    writes and speaks. Raises UserError where losses stay not finite or a file cannot be written, Interrupted,
    after saving, on Ctrl-C and SIGTERM.
    """
    optim = scaled(optim, settings.accumulate * this_rank().world)
    learner = build_learner(objective, settings, optim)
    course = Course(learner, State(), folder, settings, optim, validate, better, export, batches.cases)
    found = from_all(lambda: (course.resume(), course.state.step))
    if found != [found[0]] * len(found):
        raise UserError(f"ranks found different checkpoints in `{folder}`", hint="all must see one `out`")
    mark = found[0][0]
    if course.state.step == course.state.validated == settings.steps:
        say(f"`{folder}` has done its {settings.steps} steps already")
        return course.state
    refuse_lost(folder, mark)
    if mark:
        say(f"going on from step {course.state.step} of {settings.steps}")
    from_first(lambda: check_space(learner, folder))
    patches = batches.size * settings.accumulate * this_rank().world
    with (
        Progress(course.state.step, settings.steps, patches, slow(learner, batches)) as progress,
        mirrored(settings.trackers, folder) as mirror,
        Interruption() as interruption,
    ):
        while True:
            start, stop = (step * settings.accumulate for step in (course.state.step, settings.steps))
            with (
                course.metrics(mark, mirror) as metrics,
                explained(course.state, batches, settings, optim),
                interruption.shielding(batches(start, stop)) as stream,
            ):
                try:
                    course.follow(stream, metrics, progress, interruption)
                    return course.state
                except Retreat:
                    mark = course.go_back()


class Retreat(Exception):
    """Too many steps in a row were not finite: the run must go back to its last checkpoint."""


@dataclass
class Course:
    """A run under way: what it changes, how far it is, and what it does with both."""

    learner: Learner
    state: State
    folder: Path
    settings: LoopSettings
    optim: OptimSettings
    validate: Validate
    better: str
    export: Callable[[nn.Module, State], None]
    cases: Callable[[int], Sequence[str]]

    def follow(
        self, stream: Iterator[Batch], metrics: Metrics, progress: Progress, interruption: Interruption
    ) -> None:
        """Every event of the run in order, to its end. Raises Retreat where it must go back."""
        state, settings = self.state, self.settings
        unsaved = not (self.folder / "last").exists()  # a run that has a record then has had a checkpoint
        last_save, late = time.monotonic(), False
        try:
            while True:
                done = state.step == settings.steps
                began = time.monotonic()

                # ---- validate, and keep the best
                if state.step > state.validated and (done or state.step % settings.validate_every == 0):
                    with self.learner.subject() as subject:
                        with interruption.abandoning(progress.show) as show:
                            measured = self.validate(subject, state.step, show)
                        metrics.write(state.step, "validation", measured)
                        state.validated, unsaved = state.step, True
                        if state.best_step is None or self.score(measured) > self.score(state.best):
                            state.best_step, state.best = state.step, measured
                            self.keep_best(subject)
                    progress.say(validation_line(state, measured, self.better))

                # ---- save
                due = late or state.step % settings.save_every == 0
                if unsaved and (done or (due and not state.skipped)):  # to go back to what was good
                    self.save(metrics)
                    unsaved, last_save = False, time.monotonic()
                progress.pause(time.monotonic() - began)

                # ---- stop
                if done:
                    return
                late = time.monotonic() - last_save > SAVE_SECONDS
                asked, late = anywhere(interruption.asked, late, device=self.learner.device)
                if asked:
                    raise Stop

                # ---- one step
                rate = learning_rate(state.step, settings.steps, self.optim) / 2**state.halved
                try:
                    losses = take_step(self.learner, stream, state.step, rate, settings)
                    state.add(losses)
                    state.skipped = 0
                    progress.step(state.step + 1, losses["loss"])
                except NotFinite as what:
                    self.skip(what, progress)
                state.step += 1
                unsaved = True

                # ---- log
                if state.step % settings.log_every == 0 or state.step == settings.steps:
                    metrics.write(state.step, "training", state.take_means())
        except Stop:
            self.save(metrics)
            raise Interrupted(
                f"stopped after step {state.step} of {settings.steps}, which is saved in `{self.folder}`",
                hint="the same command goes on from there",
            ) from None

    def score(self, measured: dict[str, float]) -> float:
        """A value that is not defined (no organ anywhere) is worse than any other."""
        value = measured[self.better.removeprefix("-")]
        if not math.isfinite(value):
            return -math.inf
        return -value if self.better.startswith("-") else value

    def skip(self, what: NotFinite, progress: Progress) -> None:
        """Leaves a step out whose loss or gradient is not finite: no weight was touched.

        Raises Retreat where it is one too many, and NotFinite where going back did not help or is not wanted.
        """
        state = self.state
        if state.skipped == self.settings.skips:
            if state.halved == RETREATS or not self.settings.skips:
                raise what
            raise Retreat from what
        state.skipped += 1
        names = cases_of(state, self.settings, self.cases)
        progress.say(f"warning: the {what} is not finite at step {state.step}, left out: cases {names}")

    def go_back(self) -> dict[str, Any] | None:
        """To the last checkpoint, whose mark of the log it returns, and on from there at half the rate."""
        halved = self.state.halved + 1
        mark = self.resume()
        self.state.halved, self.state.skipped = halved, 0
        say(
            f"warning: {self.settings.skips} steps in a row were not finite: going back to step "
            f"{self.state.step}, at a rate of 1/{2**halved}"
        )
        return mark

    def resume(self) -> dict[str, Any] | None:
        """Takes over the last checkpoint, where there is one, and returns its mark of the log."""
        saved = checkpoint.load_last(self.folder, warn=say)
        if saved is None:
            return None
        try:
            state = State(**saved["state"])
            if state.step not in range(self.settings.steps + 1):
                raise ValueError(f"step {state.step} of {self.settings.steps}")
            mark = {"bytes": int(saved["log"]["bytes"]), "sha256": str(saved["log"]["sha256"])}
            self.learner.load_state_dict(saved)
        except (Exception, CheckpointException) as error:  # whatever foreign values make go wrong
            why = f"the checkpoint in `{self.folder}` is not of this run: {type(error).__name__} {error}"
            raise UserError(why.splitlines()[0], hint=checkpoint.ANOTHER_RUN) from error
        self.state = state
        before, now = saved.get("ranks", 1), this_rank().world
        if before != now:
            say(f"the checkpoint is of {many(before, 'rank')}, not of {now}: no longer bitwise the same")
        return mark

    def metrics(self, mark: dict[str, Any] | None, mirror: Mirror) -> Metrics:
        """The log, as far as the checkpoint knows it."""
        upto = {"training": self.state.step, "validation": self.state.validated}
        return Metrics(self.folder / "metrics.jsonl", upto, mark, mirror)

    def keep_best(self, subject: nn.Module) -> None:
        def keep() -> None:
            content = {"learner": {"best": subject.state_dict()}, "state": asdict(self.state)}
            checkpoint.save(self.folder / "best", content)
            self.export(subject, self.state)

        from_first(keep)

    def save(self, metrics: Metrics) -> None:
        content: dict[str, Any] = {"learner": self.learner.state_dict(), "state": asdict(self.state)}
        content |= {"log": metrics.sync(), "ranks": this_rank().world}
        if self.learner.unsharded:
            sharding.save_last(self.folder, content)
        elif this_rank().first:
            checkpoint.save_last(self.folder, content)
