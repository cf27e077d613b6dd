"""A network that trains in milliseconds, for the tests of the loop."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unetrkit.data.sampling import generator_for
from unetrkit.training.loop import LoopSettings, State, fit
from unetrkit.training.losses import LossSettings
from unetrkit.training.optim import OptimSettings
from unetrkit.training.segmentation import Segmentation

OPTIM = OptimSettings(lr=1e-2, warmup=2)


@dataclass
class Cubes:
    """A bright cube in noise, and where it is. `before(number)` is called before a batch is made."""

    size: int = 2
    before: Callable[[int], None] = lambda number: None
    lower: tuple[str, str] = ("sampling.batch_size", "sampling.patch_size")

    def __call__(self, start: int, stop: int) -> Generator[dict[str, Tensor]]:
        for number in range(start, stop):
            self.before(number)
            generator = generator_for(5, number)
            image = torch.randn(self.size, 1, 8, 8, 8, generator=generator)
            label = torch.zeros(self.size, 8, 8, 8, dtype=torch.uint8)
            x = int(torch.randint(0, 4, (1,), generator=generator))
            label[:, x : x + 4, 2:6, 2:6] = 1
            yield {"image": image + 3 * label[:, None], "label": label}

    def cases(self, number: int) -> list[str]:
        return [f"case{number}"]


def objective(dropout: float = 0.2) -> Segmentation:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Dropout(dropout), nn.Conv3d(4, 2, 1))
    return Segmentation(network, LossSettings())


def measure(trained: nn.Module) -> dict[str, float]:
    assert not trained.training
    with torch.no_grad():
        losses = trained(next(Cubes()(1000, 1001)))
    return {"score": -float(losses["loss"])}


def run(
    folder: Path,
    settings: LoopSettings,
    batches: Cubes | None = None,
    validate: Callable[[nn.Module], dict[str, float]] = measure,
    dropout: float = 0.2,
) -> State:
    folder.mkdir(exist_ok=True)
    return fit(
        objective(dropout),
        batches or Cubes(),
        folder,
        settings,
        OPTIM,
        validate=lambda trained, step, show: validate(trained),
        better="score",
        export=lambda best, state: (folder / "exported").write_text(f"{state.best_step}"),
    )
