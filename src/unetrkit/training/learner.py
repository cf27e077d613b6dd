"""What a step of training changes, and the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from unetrkit.data.sampling import generator_for
from unetrkit.errors import UserError
from unetrkit.ranks import local_rank, this_rank
from unetrkit.training.distributed import means as means_over_ranks
from unetrkit.training.ema import average_of
from unetrkit.training.optim import OptimSettings, build_optimizer, set_rate
from unetrkit.training.sharding import complete, gathered, shard, whole

if TYPE_CHECKING:
    from unetrkit.training.loop import LoopSettings

Batch = dict[str, Tensor]
LOWEST_SCALE = 2.0**-14  # a loss that still overflows float16 at this scale will not stop doing so


class NotFinite(Exception):
    """The loss or the gradient is NaN or infinite; no weight was changed."""


@dataclass
class Learner:
    """The objective (on its device) and everything with tensors that goes with it."""

    objective: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    parallel: nn.Module  # what a batch goes through: the objective, or DDP around it
    average: AveragedModel | None
    precision: torch.dtype | None  # what autocast computes in; None: float32
    unsharded: nn.Module | None  # where the objective is in parts: on the CPU, what they are gathered in

    @property
    def device(self) -> torch.device:
        return next(self.objective.parameters()).device

    @contextmanager
    def subject(self) -> Iterator[nn.Module]:
        """What is validated and exported, whole, on every rank: the averaged objective where there is one."""
        own = self.average.module if self.average else self.objective
        subject = gathered(own, self.unsharded.to(self.device)) if self.unsharded else own
        subject.eval()
        try:
            yield subject
        finally:
            subject.train()
            if self.unsharded:
                self.unsharded.cpu()

    def _stateful(self) -> dict[str, Any]:
        own = {"objective": self.objective, "optimizer": self.optimizer, "scaler": self.scaler}
        return own | ({"average": self.average} if self.average else {})

    def state_dict(self) -> dict[str, Any]:
        return {name: one.state_dict() for name, one in self._stateful().items()}

    def load_state_dict(self, saved: dict) -> None:
        """Of a checkpoint, whether it is in parts or not."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        like = self.state_dict() | {"optimizer": {"state": dict(enumerate(params))}}
        state = complete(saved, {"learner": like})["learner"]
        for name, one in self._stateful().items():
            one.load_state_dict(state[name])


def build_learner(objective: nn.Module, settings: LoopSettings, optim: OptimSettings) -> Learner:
    """A learner that has not learnt yet. Raises UserError for a GPU that is not there."""
    device = device_of(settings.device)
    precision = precision_of(settings.amp, device)
    sharded = settings.sharding == "full" and torch.distributed.is_initialized()
    unsharded = objective.cpu() if sharded else None
    objective = (deepcopy(objective) if sharded else objective.to(device)).train()
    average = None if settings.ema is None else average_of(objective, settings.ema)
    if sharded:
        for part in (objective, average.module) if average else (objective,):
            shard(part, device)
    return Learner(
        objective,
        build_optimizer(objective, optim),
        GradScaler(device.type, enabled=precision == torch.float16),
        objective if sharded else _in_parallel(objective, device),
        average,
        precision,
        unsharded,
    )


def take_step(
    learner: Learner, stream: Iterator[Batch], step: int, rate: float, settings: LoopSettings
) -> dict[str, float]:
    """One step of the optimizer at `rate` on the next `settings.accumulate` batches; the mean losses.

    Raises NotFinite before any weight is touched.
    """
    set_rate(learner.optimizer, step, rate)
    learner.optimizer.zero_grad()
    means = _accumulate_gradients(learner, stream, step, settings)
    learner.scaler.unscale_(learner.optimizer)
    weights = [p for p in learner.objective.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]))
    # the one place of a step that waits for the device
    *values, grad_norm = means_over_ranks(torch.stack([*means.values(), norm])).tolist()
    losses = dict(zip(means, values, strict=True))
    _refuse_what_is_not_finite(losses["loss"], grad_norm, learner.scaler)
    if settings.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(weights, settings.clip, norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    if learner.average:
        learner.average.update_parameters(learner.objective)
    return losses | {"lr": rate, "grad_norm": grad_norm}


def _accumulate_gradients(
    learner: Learner, stream: Iterator[Batch], step: int, settings: LoopSettings
) -> dict[str, Tensor]:
    device, rank = learner.device, this_rank().rank
    means: dict[str, Tensor] = {}
    numbers = range(step * settings.accumulate, (step + 1) * settings.accumulate)
    for number in numbers:
        batch = {name: part.to(device, non_blocking=True) for name, part in next(stream).items()}
        # dropout and drop path are a function of the batch's number: a resumed run needs no generator's state
        # (the zeros keep this stream apart from those of the patches, which have fewer counters)
        torch.manual_seed(generator_for(settings.seed, number, rank, 0, 0).initial_seed())
        with _gradients_shared(learner.parallel, number == numbers[-1]):
            with torch.autocast(device.type, learner.precision, enabled=learner.precision is not None):
                losses = learner.parallel(batch)
            learner.scaler.scale(losses["loss"] / settings.accumulate).backward()
        for name, value in losses.items():
            share = value.detach().float() / settings.accumulate
            means[name] = means[name] + share if name in means else share
    return means


def _in_parallel(objective: nn.Module, device: torch.device) -> nn.Module:
    """DDP where there are several ranks: it begins them with the weights of rank 0."""
    if not torch.distributed.is_initialized():
        return objective
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=ids, broadcast_buffers=False)


def _gradients_shared(parallel: nn.Module, shared: bool) -> AbstractContextManager[None]:
    """Gradients that are summed over batches are shared with the other ranks once, with the last of them."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(shared)
    if shared or not isinstance(parallel, DistributedDataParallel):
        return nullcontext()
    return parallel.no_sync()


def _refuse_what_is_not_finite(loss: float, grad_norm: float, scaler: GradScaler) -> None:
    overflow_is_usual = scaler.is_enabled() and scaler.get_scale() > LOWEST_SCALE
    what = "" if math.isfinite(loss) else "loss"
    # the scaler skips a step whose gradient overflows float16 and halves its scale; without it nothing would
    if not what and not math.isfinite(grad_norm) and not overflow_is_usual:
        what = "gradient"
    if what:
        if scaler.is_enabled():
            scaler.update(scaler.get_scale())  # it forgets the gradient, and nothing else
        raise NotFinite(what)


def device_of(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that a setting names. Raises UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("`loop.device` is cuda, but torch finds no GPU", hint="`loop.device=auto` needs none")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank() >= (found := torch.cuda.device_count()):
        raise UserError(f"torch finds {found} GPUs, too few", hint=f"`--nproc-per-node={found}`, or fewer")
    return torch.device("cuda", local_rank())


def precision_of(amp: Literal["auto", "off", "bf16", "fp16"], device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None for float32. `auto` is bf16 where there are matrix units for it."""
    if amp == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_amx()
        amp = "bf16" if fast else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def _cpu_has_amx() -> bool:
    """Whether the processor has matrix units for bf16: with them Swin UNETR trains 1.7 times as fast as in
    float32 (LOG.md); without them a Zen 4 gains too, but on an Intel Xeon float32 is faster."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
