"""Ranks without torchrun, forked from one process that has imported torch: each of them starts at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.training.tiny import OPTIM, Cubes, measure, objective
from torch import Tensor, nn

from unetrkit.cli import report_error
from unetrkit.config import apply_overrides
from unetrkit.data.store import Store
from unetrkit.errors import ExitCode, Interrupted, UserError
from unetrkit.networks import build
from unetrkit.pretraining.run import PretrainSettings, pretrain
from unetrkit.ranks import this_rank
from unetrkit.training import checkpoint
from unetrkit.training.distributed import anywhere, from_all, means, together
from unetrkit.training.learner import Learner, build_learner, take_step
from unetrkit.training.loop import LoopSettings, fit
from unetrkit.training.optim import OptimSettings
from unetrkit.training.run import Patches, TrainSettings, train
from unetrkit.training.segmentation import Segmentation
from unetrkit.training.sharding import save_last, whole

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "unetrkit.pretraining.run", "tests.training.several"])


def started(world: int, log: Path, work: Callable[..., object], *arguments: Any) -> list[Any]:
    """`world` processes that do `work(*arguments)`; what they say is in `log`, a file for each rank."""
    log.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, world, port, log, work, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def ranks(world: int, log: Path, work: Callable[..., object], *arguments: Any) -> tuple[list[int], list[str]]:
    """The exit codes of the processes that `started` starts, and what each of them said."""
    processes = started(world, log, work, *arguments)
    try:
        for process in processes:
            process.join(900)  # on a machine that others fill
        return [process.exitcode for process in processes], said(log, world)
    finally:
        for process in processes:
            process.kill()


def said(log: Path, world: int) -> list[str]:
    return [(log / f"rank{rank}").read_text() for rank in range(world)]


def _rank(
    rank: int, world: int, port: int, log: Path, work: Callable[..., object], arguments: Sequence[Any]
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with open(log / f"rank{rank}", "w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        work(*arguments)
    except UserError as error:
        report_error(error.message, error.hint, ExitCode.WRONG_USE)
    except Interrupted as stop:
        report_error(stop.message, stop.hint, ExitCode.INTERRUPTED)


class Dealt(Cubes):
    """Every rank has cubes of its own. `before` is told the step."""

    def __call__(self, start: int, stop: int) -> Generator[dict[str, Tensor]]:
        rank = this_rank()
        for number in range(start, stop):
            self.before(number)
            one = number * rank.world + rank.rank
            yield next(Cubes(self.size)(one, one + 1))


def cubes(
    folder: Path,
    settings: LoopSettings,
    before: Callable[[int], None] = lambda step: None,
    amid: Callable[[], None] = lambda: None,
    optim: OptimSettings = OPTIM,
) -> None:
    """Trains the tiny network; each rank leaves the weights that it validated as `weights-RANK`.

    before(step) is called before a step, amid() amid a validation, in which each rank looks at two things.
    """

    def validate(trained: nn.Module, step: int, show: Callable[[str], None]) -> dict[str, float]:
        def measured() -> dict[str, float]:
            show("the first")
            amid()
            show("the second")
            return measure(trained)

        torch.save(trained.state_dict(), folder / f"weights-{this_rank().rank}")
        return from_all(measured)[0]

    folder.mkdir(parents=True, exist_ok=True)
    with together(torch.device("cpu")):
        fit(
            objective(),
            Dealt(before=before),
            folder,
            settings,
            optim,
            validate=validate,
            better="score",
            export=lambda best, state: (folder / "exported").write_text(f"{state.best_step}"),
        )


def trained(*words: str) -> None:
    """`unetrkit train`, of settings alone."""
    train(apply_overrides(TrainSettings, words))


def pretrained(*words: str) -> None:
    """`unetrkit pretrain`, of settings alone."""
    pretrain(apply_overrides(PretrainSettings, words))


def first_gradient(store: Path, file: Path, batch: int, *more: str) -> None:
    """Leaves the gradient of the first step, on so many patches on each rank, in float64, as `file`-RANK."""
    words = [f"data={store}", "network=swin_unetr_tiny", "loop.device=cpu", "loop.amp=off", "loop.workers=0"]
    settings = apply_overrides(TrainSettings, [*words, f"sampling.batch_size={batch}", *more])
    names = tuple(case.name for case in Store.open(store).cases)
    sharded = settings.loop.sharding == "full"
    torch.manual_seed(0 if sharded else this_rank().rank)  # DDP begins all with the weights of rank 0
    network = build("swin_unetr_tiny", 1, 3, (32, 32, 32), {})
    with together(torch.device("cpu")):
        double = Segmentation(network, settings.loss).double()
        learner = build_learner(double, settings.loop, settings.optim)
        patches = Patches(store, names, settings)(0, 1)
        stream = ({"image": one["image"].double(), "label": one["label"]} for one in patches)
        take_step(learner, stream, 0, 1e-4, settings.loop)
        gradients = (whole(p.grad) for p in learner.objective.parameters() if p.grad is not None)
        gradient = torch.cat([one.flatten() for one in gradients])
        torch.save(gradient, file.with_name(f"{file.name}-{this_rank().rank}"))


def saved_again(folder: Path, other: Path, settings: LoopSettings) -> None:
    """Takes over the last checkpoint of `folder` and writes it into `other`, as these ranks would."""
    with together(torch.device("cpu")):
        learner = build_learner(objective(), settings, OPTIM)
        learner.load_state_dict(checkpoint.load(folder / "last"))
        if learner.unsharded:
            save_last(other, {"learner": learner.state_dict()})
        elif this_rank().first:
            checkpoint.save_last(other, {"learner": learner.state_dict()})


class Squares(nn.Module):
    """The mean square of all that a network says, as an objective."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.network(batch["image"])
        parts = found.values() if isinstance(found, dict) else [found]
        return {"loss": torch.stack([part.square().mean() for part in parts]).sum()}


def step_of_each_network(file: Path) -> None:
    """Leaves what a step of each network says, without parts and in parts, as `file`-RANK."""
    from tests.networks.test_proofs import distinct, image, small

    def learnt(name: str, settings: LoopSettings) -> tuple[Learner, dict[str, float]]:
        learner = build_learner(Squares(small(name)), settings, OPTIM)
        return learner, take_step(learner, iter([{"image": image()}]), 0, 1e-3, settings)

    settings = LoopSettings(device="cpu", amp="off", sharding="full")  # of no effect in one process
    alone = {name: learnt(name, settings)[1] for name in distinct()}
    found: dict[str, tuple[dict[str, float], dict[str, float], float]] = {}
    with together(torch.device("cpu")):
        for name in distinct():
            learner, values = learnt(name, settings)
            local = sum(p.to_local().numel() for p in learner.objective.parameters())  # type: ignore[attr-defined]
            share = local / sum(p.numel() for p in learner.objective.parameters())
            found[name] = (alone[name], values, share)
    torch.save(found, f"{file}-{this_rank().rank}")


def mean_and_any(file: Path) -> None:
    """Leaves what the ranks make of numbers and flags that differ between them, as `file`-RANK."""
    cpu, rank = torch.device("cpu"), this_rank().rank
    with together(cpu):
        flags = anywhere(False, rank == 1, device=cpu)
        torch.save([*means(torch.tensor([3.0 * rank, 5.0])).tolist(), *flags], f"{file}-{rank}")
