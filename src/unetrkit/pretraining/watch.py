"""How a pre-training is watched: the same crops, corrupted alike, at every validation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from unetrkit.config import Settings
from unetrkit.data.remote import Place
from unetrkit.data.sampling import generator_for
from unetrkit.pretraining.features import Geometry, collapse, geometry, pooled
from unetrkit.pretraining.pictures import write_picture
from unetrkit.pretraining.probes import Probe
from unetrkit.training.distributed import from_first
from unetrkit.training.learner import Batch
from unetrkit.training.log import say

SEED = 2022  # of the corruptions of the fixed crops, whatever the run's own


class WatchSettings(Settings):
    """What is looked at every `loop.validate_every` steps."""

    # fixed crops of the validation cases: their loss chooses the best weights, of them are the figures of the
    # features (spread, effective rank, alignment, uniformity)
    crops: Annotated[int, Field(ge=4, le=512)] = 32
    # how many of them are drawn into RUN/pictures
    pictures: Annotated[int, Field(ge=0, le=8)] = 4
    # a labelled store, for a linear segmentation probe on the frozen features; null: none
    probe: Place | None = None
    # patches that the probe is fitted on, and as many that it is measured on
    probe_patches: Annotated[int, Field(ge=1, le=256)] = 24


@dataclass(frozen=True)
class Watch:
    """Measures an objective on fixed batches. `folder`: where pictures go; before: the untrained features."""

    batches: tuple[Batch, ...]
    folder: Path
    pictures: int
    probe: Probe | None
    before: Geometry
    untrained: dict[str, float]  # the figures of the features before training

    def __call__(self, objective: nn.Module, step: int, show: Callable[[str], None]) -> dict[str, float]:
        """Mean losses by name, the figures of the features, `probe_dice` where there is a probe.

        `collapsed` is 1 where the features are of no use any more, which is also said, else 0. Rank 0
        measures for all: the best must not hang on last digits that two GPUs do not share.
        """
        return from_first(lambda: self._figures(objective, step, show))

    def _figures(self, objective: nn.Module, step: int, show: Callable[[str], None]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for number, batch in enumerate(_seeded(self.batches, objective)):
            show(f"validating: crops {number + 1} of {len(self.batches)} batches")
            for name, value in objective(batch).items():
                totals[name] = totals.get(name, 0.0) + float(value) / len(self.batches)
        now = measure_features(objective, self.batches)
        reason = collapse(now, self.before)
        if reason:
            say(f"warning: at step {step} the features have collapsed: {reason}")
            say("hint: a lower `optim.lr`, a longer `optim.warmup`, more crops in a batch, another objective")
        figures = totals | now._asdict() | {"collapsed": float(bool(reason))}
        show("validating: the linear probe")
        figures |= probed(self.probe, objective)
        if self.pictures:
            self._draw(objective, step, totals["loss"])
        return figures

    def _draw(self, objective: nn.Module, step: int, loss: float) -> None:
        parts: list[dict[str, Tensor]] = []
        shown = 0
        for batch in _seeded(self.batches, objective):
            restored = objective.restore(batch)  # type: ignore[operator]
            parts.append({name: image.cpu() for name, image in restored.items()})
            shown += len(batch["image"])
            if shown >= self.pictures:
                break
        some = {name: torch.cat([part[name] for part in parts])[: self.pictures] for name in parts[0]}
        path = self.folder / "pictures" / f"step-{step:07}.png"
        write_picture(path, some, f"step {step}, validation loss {loss:.4f}")


def probed(probe: Probe | None, objective: nn.Module) -> dict[str, float]:
    """`probe_dice`, where there is a probe."""
    if probe is None:
        return {}
    return {"probe_dice": probe.dice(objective.get_submodule("network.encoder"), _device(objective))}


def measure_features(objective: nn.Module, batches: Sequence[Batch]) -> Geometry:
    """How the features of two corrupted views of each crop lie."""
    encoder = objective.get_submodule("network.encoder")
    views: list[list[Tensor]] = [[], []]
    for view, found in enumerate(views):
        for batch in _seeded(batches, objective, view):
            corrupted = objective.restore(batch)["corrupted"]  # type: ignore[operator]
            found.append(pooled(encoder, corrupted).cpu())
    return geometry(torch.cat(views[0]), torch.cat(views[1]))


def _seeded(batches: Sequence[Batch], objective: nn.Module, view: int = 0) -> Iterator[Batch]:
    """Each batch on the objective's device, while torch's random state is a function of its number alone."""
    device = _device(objective)
    gpus = [device] if device.type == "cuda" else []
    for number, batch in enumerate(batches):
        # no trace is left in the random state of the training
        with torch.no_grad(), torch.random.fork_rng(gpus):
            torch.manual_seed(generator_for(SEED, number, view).initial_seed())
            yield {name: part.to(device) for name, part in batch.items()}


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
