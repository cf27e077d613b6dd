"""What can go wrong in a run, in the words of the user's data and settings."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unetrkit.errors import UserError
from unetrkit.memory import peak_memory, was_too_small
from unetrkit.training.learner import Learner, NotFinite
from unetrkit.training.optim import OptimSettings, learning_rate

if TYPE_CHECKING:
    from unetrkit.training.loop import Batches, LoopSettings, State


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
        if not was_too_small(error):
            raise
        whose, used = memory_used(isinstance(error, torch.OutOfMemoryError))
        raise UserError(
            f"{whose} memory is too small for step {state.step}{used and f'; until then it took {used}'}",
            hint=_smaller(batches, settings.accumulate),
        ) from error


def memory_used(gpu: bool) -> tuple[str, str]:
    """Whose memory it is, and the most that this process had of it so far."""
    peak = torch.cuda.max_memory_allocated() if gpu and torch.cuda.is_initialized() else peak_memory()
    return f"the {'GPU' if gpu else 'computer'}'s", f"{peak / 1e9:.3g} GB" if peak else ""


def _smaller(batches: Batches, accumulate: int) -> str:
    """What to lower, and by how much: the same step in parts, else less to remember."""
    count, size = batches.lower
    less = f"a smaller `{size}` (two thirds along each axis need a third)"
    hint = f"`network_options.checkpointing=true`, or {less}"
    if batches.size == 1:
        return hint
    half = f"`{count}={batches.size // 2}` with `loop.accumulate={2 * accumulate}`"
    return f"{half}: the same step in halves; or {hint}"


def cases_of(state: State, settings: LoopSettings, cases: Callable[[int], Sequence[str]]) -> str:
    """The names of the cases in a step's batches."""
    numbers = range(state.step * settings.accumulate, (state.step + 1) * settings.accumulate)
    names = dict.fromkeys(name for number in numbers for name in cases(number))
    return ", ".join(f"`{name}`" for name in names)


def slow(learner: Learner, batches: Batches) -> str:
    """What to say where a run takes days."""
    on_cpu = learner.device.type == "cpu"
    return f"hint: there is no GPU; lower `loop.steps` or `{batches.lower[1]}`" if on_cpu else ""


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
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    needed = space_of(learner) - there
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"`{folder}` has {free / 1e9:.2f} GB free, and checkpoints need {needed / 1e9:.2f} GB",
            hint="free some space, or choose another `out`",
        )


def space_of(learner: Learner) -> int:
    """Bytes of the checkpoints of a run and of its model, at the moment when they are most."""
    weights = sum(p.numel() * p.element_size() for p in learner.objective.parameters())
    copies = 3 + (learner.average is not None)  # the weights, the two moments of Adam, the average
    return (3 * copies + 2) * weights  # last, previous, the new one; best and model


def validation_line(state: State, measured: dict[str, float], better: str) -> str:
    """What is said of a validation."""
    name = better.removeprefix("-")
    best = "the best so far" if state.best_step == state.step else f"the best is {state.best[name]:.4f}"
    return f"validation after step {state.step}: {name} {measured[name]:.4f}, {best}"
