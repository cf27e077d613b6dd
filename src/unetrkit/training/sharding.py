"""Weights, gradients and the optimizer's state in parts, one on each rank, and a file of each part (FSDP2).

Zhao et al. 2023, https://arxiv.org/abs/2304.11277. A unit is whole while it is computed: each member of a
`ModuleList` (a block, a stage, a level of the decoder) is one, and what is left of the objective is the last.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unetrkit.data.files import remove, sha256_file, write_problems
from unetrkit.training import checkpoint
from unetrkit.training.distributed import from_all, from_first, share


def shard(module: nn.Module, device: torch.device) -> None:
    """Leaves of `module` to each rank its part of every tensor, along the first axis, on its `device`."""
    # no MixedPrecisionPolicy: autocast casts as without parts, and with bf16 weights the gradient of Swin
    # UNETR was 1e12 times too large on a CPU, whose attention and norms compute with float32 ones
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    units = [unit for part in module.modules() if isinstance(part, nn.ModuleList) for unit in part]
    for unit in [*reversed(units), module]:  # the inner ones first
        if next(unit.parameters(), None) is not None:
            fully_shard(unit, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; all ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(module: nn.Module, into: nn.Module) -> nn.Module:
    """`into`, which is `module` but not in parts, with the weights of that; all ranks must ask."""
    present = module.state_dict()
    for name, tensor in into.state_dict().items():
        tensor.copy_(whole(present[name]))
    return into


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """`checkpoint.save_last` where tensors are in parts, by all ranks: a folder of safetensors, one of each
    rank, and of `state`, which has all else and their hashes."""
    new, shards = folder / "last.new", dict[str, Any]()
    rest = _without(state, shards)
    from_first(lambda: remove(new))
    with write_problems(folder / "last"):
        try:  # not in torch's own format, which it reads with pickle
            dcp.save(shards, storage_writer=dcp.HuggingFaceStorageWriter(str(new), save_distributed=True))
        except CheckpointException as error:
            from_first(lambda: remove(new))
            raise next(iter(error.failures.values()))[0] from error
    hashes = from_all(lambda: {f.name: sha256_file(f) for f in share(sorted(new.glob("*.safetensors")))})
    rest["shards"] = {name: digest for part in hashes for name, digest in part.items()}
    from_first(lambda: checkpoint.save_last(folder, rest, parts=True))


def complete(saved: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """What `checkpoint.load` found, its tensors in parts where those of `like` are, whoever wrote them."""
    shards: dict[str, Tensor] = {}
    found: dict[str, Any] = _arranged(saved, like, shards)
    if shards:
        with warnings.catch_warnings():  # that each rank reads for itself
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(shards, storage_reader=dcp.HuggingFaceStorageReader(saved["folder"]), no_dist=True)
    return found


def _without(state: dict[str, Any], shards: dict[str, Any], above: str = "") -> dict[str, Any]:
    """`state` with mere shapes of what is in parts; the parts go into `shards`, by their path."""
    rest: dict[str, Any] = {}
    for name, value in state.items():
        path = f"{above}/{name}"
        if isinstance(value, DTensor):
            shards[path] = value
            value = torch.empty(value.shape, dtype=value.dtype, device="meta")
        rest[name] = _without(value, shards, path) if isinstance(value, dict) else value
    return rest


def _arranged(saved: Any, like: Any, shards: dict[str, Any], path: str = "") -> Any:
    """`saved` arranged as `like`, where a parameter stands for all that the optimizer knows of it; of what is
    a mere shape goes what is to be read into `shards`."""
    if isinstance(saved, dict):
        below = like if isinstance(like, dict) else dict.fromkeys(saved, like)
        return {key: _arranged(one, below.get(key), shards, f"{path}/{key}") for key, one in saved.items()}
    if not isinstance(saved, Tensor):
        return saved
    parted = isinstance(like, DTensor) and like.shape == saved.shape
    if saved.is_meta:
        saved = shards[path] = torch.empty_like(like) if parted else torch.empty_like(saved, device="cpu")
    elif parted:
        saved = distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None)
    return saved
