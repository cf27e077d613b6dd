"""A linear segmentation probe: what a linear map can tell of the organs from frozen features.

Alain and Bengio 2016, https://arxiv.org/abs/1610.01644; solved in closed form: nothing to tune.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unetrkit.data.augment import AugmentSettings
from unetrkit.data.folds import split_cases
from unetrkit.data.loader import Batch, batches
from unetrkit.data.sampling import SamplingSettings
from unetrkit.data.store import Store

VOXELS = 20_000  # of a patch that the probe looks at, on a regular grid
RIDGE = 1e-3  # of the mean square of a feature
SEED = 960


@dataclass(frozen=True)
class Probe:
    """Patches of a labelled store, half of the cases to fit on and the validation cases to measure on."""

    fit: tuple[Batch, ...]
    measure: tuple[Batch, ...]
    classes: int

    @classmethod
    def of(cls, store: Path, size: tuple[int, int, int], patches: int) -> Probe:
        """`patches` patches of `size` voxels of the training cases, as many of the validation cases.

        Raises UserError for a store that is none, or has no cases for one of the two.
        """
        opened = Store.open(store)
        sampling = SamplingSettings(patch_size=size, batch_size=1, foreground=1.0, class_balanced=True)

        def drawn(names: Sequence[str]) -> tuple[Batch, ...]:
            plain, steps = AugmentSettings(set="none"), range(patches)
            return tuple(batches(store, names, sampling, plain, seed=SEED, steps=steps, workers=0))

        training, validation = (
            tuple(case.name for case in cases) for cases in split_cases(opened.cases, None)
        )
        return cls(drawn(training), drawn(validation), len(opened.plan.classes))

    @torch.no_grad()
    def dice(self, encoder: nn.Module, device: torch.device) -> float:
        """Mean Dice of the classes without background over the voxels of all patches to measure on.

        A class that neither is there nor is predicted counts for nothing. Features: every map of the encoder,
        interpolated to the voxels. Ridge regression to the one-hot labels, classes weighted by the inverse
        square root of their frequency, argmax.
        """
        counts = sum(torch.bincount(y, minlength=self.classes) for _, y in self._points(None, self.fit))
        assert isinstance(counts, Tensor)
        weight = counts.clamp_min(1).double().rsqrt()
        products: Tensor | float = 0.0
        targets: Tensor | float = 0.0
        for x, y in self._points(encoder, self.fit, device):
            weighted = x * weight[y, None]
            products = products + weighted.T @ x
            targets = targets + weighted.T @ F.one_hot(y, self.classes).double()
        assert isinstance(products, Tensor) and isinstance(targets, Tensor)
        ridge = RIDGE * products.diagonal().mean().clamp_min(1e-12)
        solution = torch.linalg.solve(products + ridge * torch.eye(len(products)), targets)
        overlap, size = torch.zeros(self.classes), torch.zeros(self.classes)
        for x, y in self._points(encoder, self.measure, device):
            found = (x @ solution).argmax(1)
            overlap += torch.bincount(y[found == y], minlength=self.classes)
            size += torch.bincount(y, minlength=self.classes) + torch.bincount(found, minlength=self.classes)
        there = size[1:] > 0
        return float((2 * overlap[1:][there] / size[1:][there]).mean())

    def _points(
        self, encoder: nn.Module | None, patches: Sequence[Batch], device: torch.device | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each patch the features (n, channels + 1) float64, a constant last, and the classes (n,)."""
        for batch in patches:
            label = batch["label"][0]
            step = max(1, round((label.numel() / VOXELS) ** (1 / 3)))
            label = label[::step, ::step, ::step]
            if encoder is None:
                yield torch.empty(0), label.flatten().long()
                continue
            maps = encoder(batch["image"].to(device))
            size = label.shape
            # interpolated to the grid of the chosen voxels, half a step off at most: maps are smooth
            fine = [F.interpolate(m.float(), size, mode="trilinear").flatten(2)[0].T for m in maps]
            x = torch.cat(fine, dim=1).cpu().double()
            yield F.pad(x, (0, 1), value=1.0), label.flatten().long()
