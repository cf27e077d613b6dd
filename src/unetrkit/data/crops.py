"""Batches of crops without labels, from one or several stores, as a function of (seed, step)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from unetrkit.data.augment import Probability
from unetrkit.data.augment_spatial import apply_orientation, draw_orientation
from unetrkit.data.chunks import Triple
from unetrkit.data.loader import ALONE, Batch, Rank, StepBatches, Unread, in_order, open_cases, read_one
from unetrkit.data.plan import Extent, Plan, Settings
from unetrkit.data.sampling import case_at, corner_around, generator_for, read_image_patch
from unetrkit.data.store import StoredCase
from unetrkit.errors import UserError, many


class CropSettings(Settings):
    """How a batch of crops is drawn from scans.

    >>> CropSettings(batch_size=8, crops_per_case=2).centre
    'body'
    """

    # None: that of the first store's plan
    patch_size: tuple[Extent, Extent, Extent] | None = None
    # crops in a batch, on each rank
    batch_size: Annotated[int, Field(ge=1)] = 2
    # consecutive crops that come from one case: two in the published recipes
    crops_per_case: Annotated[int, Field(ge=1)] = 2
    # body: around a voxel that is not air; anywhere: every place alike, as published
    centre: Literal["body", "anywhere"] = "body"
    # of each axis; two flips are half a turn, which an objective that is asked for turns cannot tell from one
    p_flip: Probability = 0.0
    # a case that cannot be read: the next takes its place, which is said, instead of an error
    skip_broken: bool = False


@dataclass(frozen=True)
class Source:
    """Cases of one store. Its share of all crops is `weight` of the sum; None: the number of its cases."""

    store: Path
    cases: tuple[str, ...]
    weight: float | None = None

    @property
    def share(self) -> Fraction:
        return Fraction(len(self.cases) if self.weight is None else self.weight)


def crop_batches(
    sources: Sequence[Source],
    settings: CropSettings,
    *,
    seed: int,
    steps: range,
    workers: int,
    rank: Rank = ALONE,
) -> Iterator[Batch]:
    """Yields the batches of these steps, in order.

    A batch is {"image": float32 (b, c, x, y, z), "case": int64 (b,), "modality": int64 (b,)}. `case` counts
    through the cases of all sources; `modality` through the different channels of their plans, in the order
    of the sources: their names, and whether they are windowed or z-scores. Crop i of rank r is crop r·b + i
    of the step, as in `loader.batches`.

    Raises UserError: what `loader.batches` raises, no sources, a weight that is not above 0, stores with
    different numbers of channels.
    """
    made = Crops(tuple(sources), settings, seed, rank)
    _ = made.opened
    return in_order(made, steps, workers)


@dataclass(frozen=True)
class Opened:
    """A source whose store is open; its first case has the number `first`."""

    plan: Plan
    cases: list[StoredCase]
    first: int
    modality: int


@dataclass(frozen=True)
class Crops(StepBatches):
    """The crops of every step."""

    sources: tuple[Source, ...]
    settings: CropSettings
    seed: int
    rank: Rank = ALONE

    @cached_property
    def opened(self) -> list[Opened]:
        if not self.sources:
            raise UserError("no store was given to learn from", hint="name one that `unetrkit prepare` made")
        opened: list[Opened] = []
        modalities: list[object] = []
        for source in self.sources:
            weight = source.weight
            if weight is not None and not (weight > 0 and math.isfinite(weight)):
                raise UserError(f"the weight of `{source.store}` is {weight}", hint="give a number above 0")
            plan, cases = open_cases(source.store, source.cases)
            channels, expected = len(plan.channels), opened[0].plan.channels if opened else plan.channels
            if channels != len(expected):
                raise UserError(
                    f"`{source.store}` has {many(channels, 'channel')}, "
                    f"`{self.sources[0].store}` has {len(expected)}",
                    hint="a network has one number of channels: learn from these stores one after the other",
                )
            modality = [name.casefold() for name in plan.channels], [one.kind for one in plan.intensity]
            modalities += [modality] if modality not in modalities else []
            first = opened[-1].first + len(opened[-1].cases) if opened else 0
            opened.append(Opened(plan, cases, first, modalities.index(modality)))
        return opened

    def cases(self, step: int) -> list[str]:
        """The cases of a step's batches on all ranks, for messages."""
        indices = range(self.settings.batch_size * self.rank.world)
        places = dict.fromkeys(self._place(step, index) for index in indices)
        return [f"{self.sources[k].cases[n]} of {self.sources[k].store}" for k, n in places]

    def _batch(self, step: int, unread: Unread) -> Batch:
        settings, plan = self.settings, self.opened[0].plan
        size, count = settings.patch_size or plan.patch_size, settings.batch_size
        batch = {
            "image": torch.empty(count, len(plan.channels), *size),  # b c x y z
            "case": torch.empty(count, dtype=torch.int64),
            "modality": torch.empty(count, dtype=torch.int64),
        }
        for i in range(count):
            index = self.rank.rank * count + i
            k, first = self._place(step, index)
            source = self.opened[k]

            def read(n: int, index: int = index, source: Opened = source) -> tuple[int, Generator, Tensor]:
                generator = generator_for(self.seed, step, index)
                corner = draw_crop(generator, source.cases[n], size, settings.centre)
                image = read_image_patch(source.cases[n], corner, size, source.plan.intensity)
                return n, generator, image

            n, generator, image = read_one(source.cases, first, read, settings.skip_broken, unread)
            orientation = draw_orientation(generator, settings.p_flip, 0.0, size)
            batch["image"][i] = apply_orientation(orientation, image)
            batch["case"][i], batch["modality"][i] = source.first + n, source.modality
        return batch

    def _place(self, step: int, index: int) -> tuple[int, int]:
        """Source and case of a crop, counted over the ranks of a step."""
        crop = step * self.rank.world * self.settings.batch_size + index
        position = crop // self.settings.crops_per_case
        # shuffled, so that the pattern in which sources take turns does not meet that of batches and ranks
        scans = sum(len(source.cases) for source in self.sources)
        position += case_at(self.seed, position, scans) - position % scans
        k, position = source_at(position, [source.share for source in self.sources])
        return k, case_at(self.seed, position, len(self.sources[k].cases))


def source_at(position: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Which source is used at a position of the endless sequence, and how often it was used before.

    Up to every position each source was used as often as its share says, rounded: with shares as the
    numbers of cases, a pass through all sources uses every case once.

    >>> [source_at(position, [Fraction(3), Fraction(1)]) for position in range(4)]
    [(1, 0), (0, 0), (0, 1), (0, 2)]
    """
    rest = sum(shares, Fraction(0))
    for k, share in enumerate(shares[:-1]):
        before, after = position * share // rest, (position + 1) * share // rest
        if after > before:
            return k, before
        position, rest = position - before, rest - share
    return len(shares) - 1, position


def draw_crop(
    generator: torch.Generator, case: StoredCase, size: Triple, centre: Literal["body", "anywhere"]
) -> Triple:
    """First voxel of a crop: around one of the case's centres (`StoredCase.centres`), or anywhere inside.

    In a store with labels the class of the centre is that of a voxel of the whole case. Along an axis shorter
    than the crop the volume is centred in it, as in `draw_corner`.
    """
    if centre == "anywhere":
        free = [max(n - s, 0) for s, n in zip(size, case.shape, strict=True)]
        starts = [int(torch.randint(n + 1, (1,), generator=generator)) for n in free]
        return corner_around([a + s // 2 for a, s in zip(starts, size, strict=True)], size, case.shape)
    counts = torch.tensor(case.counts, dtype=torch.float64)
    centres = case.centres(int(torch.multinomial(counts, 1, generator=generator)))
    n = int(torch.randint(len(centres), (1,), generator=generator))
    return corner_around(centres[n], size, case.shape)
