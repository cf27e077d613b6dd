"""What can go wrong in a run, in the words of the user's data and settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unetrkit.errors import UserError
from unetrkit.training.learner import Learner, NotFinite
from unetrkit.training.optim import OptimSettings, learning_rate

if TYPE_CHECKING:
    from unetrkit.training.loop import Batches, LoopSettings, State

CHECKPOINTS = 4  # in a run folder while one is written: last, previous, best, the new one


@contextmanager
def explained(state: State, batches: Batches, settings: LoopSettings, optim: OptimSettings) -> Iterator[None]:
    """NaN and full memory, in which a step ended, with what to do about them."""
    try:
        yield
    except NotFinite as what:
        names = cases_of(state, settings, batches.cases)
        rate = learning_rate(state.step, settings.steps, optim) / 2**state.halved
        again = f", after going back {state.halved} times to half the rate" if state.halved else ""
        raise UserError(
            f"the {what} is not finite at step {state.step}{again}: rate {rate:.3g}, cases {names}",
            hint="look at these cases; else a lower `optim.lr`, `loop.clip=1` or `loop.amp=off`, and another "
            "`out`. What was saved is from before this step, and good",
        ) from what
    except (MemoryError, RuntimeError) as error:  # torch raises the latter on a CPU
        gpu = isinstance(error, torch.OutOfMemoryError)
        if not (gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)):
            raise
        raise UserError(
            f"the {'GPU' if gpu else 'computer'}'s memory is too small for step {state.step}",
            hint=_smaller(batches.size, settings.accumulate),
        ) from error


def _smaller(size: int, accumulate: int) -> str:
    """What to lower, and by how much: the same step in parts, else less to remember."""
    less = "a smaller `sampling.patch_size` (two thirds along each axis need a third)"
    hint = f"`network_options.checkpointing=true`, or {less}"
    if size == 1:
        return hint
    half = f"`sampling.batch_size={size // 2}` with `loop.accumulate={2 * accumulate}`"
    return f"{half}: the same step in halves; or {hint}"


def cases_of(state: State, settings: LoopSettings, cases: Callable[[int], Sequence[str]]) -> str:
    """The names of the cases in a step's batches."""
    numbers = range(state.step * settings.accumulate, (state.step + 1) * settings.accumulate)
    names = dict.fromkeys(name for number in numbers for name in cases(number))
    return ", ".join(f"`{name}`" for name in names)


def slow(learner: Learner) -> str:
    """What to say where a run takes days."""
    on_cpu = learner.device.type == "cpu"
    return "hint: there is no GPU; lower `loop.steps` or `sampling.patch_size`" if on_cpu else ""


def refuse_lost(folder: Path, mark: dict[str, Any] | None) -> None:
    """Raises UserError for a run that was under way and has no checkpoint any more."""
    begun = (folder / "metrics.jsonl", folder / "best")
    if mark is None and any(file.exists() and file.stat().st_size for file in begun):
        raise UserError(
            f"`{folder}` holds a run that has lost its checkpoints, `last` and `previous`",
            hint="restore one of them, or begin again with another `out`",
        )


def check_space(learner: Learner, folder: Path) -> None:
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


def validation_line(state: State, measured: dict[str, float], better: str) -> str:
    """What is said of a validation."""
    name = better.removeprefix("-")
    best = "the best so far" if state.best_step == state.step else f"the best is {state.best[name]:.4f}"
    return f"validation after step {state.step}: {name} {measured[name]:.4f}, {best}"
