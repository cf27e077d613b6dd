"""A linear segmentation probe: what a linear map can tell of the organs from frozen features.

Alain and Bengio 2016, https://arxiv.org/abs/1610.01644; solved in closed form: nothing to tune.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.data.augment import AugmentSettings
from unetrkit.data.folds import split_cases
from unetrkit.data.loader import Batch, batches
from unetrkit.data.sampling import SamplingSettings
from unetrkit.data.store import Store

LARGEST = 10**8  # numbers that are in memory at a time, 0.8 GB
RIDGE = 0.1  # of the variance of a feature
SEED = 960


@dataclass(frozen=True)
class Probe:
    """Patches of a labelled store, half of the cases to fit on and the validation cases to measure on."""

    fit: tuple[Batch, ...]
    measure: tuple[Batch, ...]
    classes: int

    @classmethod
    def of(cls, store: Path, size: tuple[int, int, int], patches: int) -> Self:
        """`patches` patches of `size` voxels of the training cases, as many of the validation cases.

        Raises UserError for a store that is none, or has no cases for one of the two.
        """
        opened = Store.open(store)
        sampling = SamplingSettings(patch_size=size, batch_size=1, foreground=1.0, class_balanced=True)

        def drawn(names: Sequence[str]) -> tuple[Batch, ...]:
            plain, steps = AugmentSettings(set="none"), range(patches)
            return tuple(batches(opened.path, names, sampling, plain, seed=SEED, steps=steps, workers=0))

        sides = split_cases(opened.cases, None)
        training, validation = (tuple(case.name for case in cases) for cases in sides)
        return cls(drawn(training), drawn(validation), len(opened.plan.classes))

    @torch.no_grad()
    def dice(self, encoder: nn.Module, device: torch.device) -> float:
        """Mean Dice of the classes without background over the voxels of all patches to measure on.

        Features: every map of the encoder, interpolated to the voxels, standardised. Of each class a ridge
        regression of its indicator; what it predicts are the voxels above the score that gives its volume in
        the patches to fit on. A class that neither is there nor is predicted counts for nothing.
        """
        features, classes = self._voxels(encoder, self.fit, device)
        mean, deviation = features.mean(0), features.std(0) + 1e-6
        features = F.pad((features - mean) / deviation, (0, 1), value=1.0)
        products = features.T @ features / len(features) + RIDGE * torch.eye(features.shape[1]).double()
        targets = features.T @ F.one_hot(classes, self.classes).double() / len(features)
        solution = torch.linalg.solve(products, targets)
        scores = features @ solution
        measured, truth = self._voxels(encoder, self.measure, device)
        found = F.pad((measured - mean) / deviation, (0, 1), value=1.0) @ solution
        dice = []
        for k in range(1, self.classes):
            volume = int((classes == k).sum())
            least = scores[:, k].topk(volume).values[-1] if volume else torch.inf
            predicted, there = found[:, k] >= least, truth == k
            size = predicted.sum() + there.sum()
            dice += [float(2 * (predicted & there).sum() / size)] if size else []
        return fmean(dice) if dice else 0.0

    def _voxels(
        self, encoder: nn.Module, patches: Sequence[Batch], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Features (n, channels) float64 and classes (n,) of the voxels on a regular grid of all patches."""
        features: list[Tensor] = []
        classes: list[Tensor] = []
        for batch in patches:
            maps, label = encoder(batch["image"].to(device)), batch["label"][0]
            numbers = label.numel() * sum(m.shape[1] for m in maps) * len(patches)
            step = ceil((numbers / LARGEST) ** (1 / 3))
            label = label[::step, ::step, ::step]
            # interpolated to the grid of the chosen voxels, half a step off at most: maps are smooth
            fine = [F.interpolate(m.float(), label.shape, mode="trilinear").flatten(2)[0].T for m in maps]
            features.append(torch.cat(fine, dim=1).cpu().double())
            classes.append(label.flatten().long())
        return torch.cat(features), torch.cat(classes)
