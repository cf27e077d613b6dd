"""What a network costs, as `info networks` and docs/networks.md say."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unetrkit.networks import build
from unetrkit.networks.cost import CLASSES, SIZE, _cost

DOCS = Path(__file__).resolve().parents[2] / "docs/networks.md"
ROWS = [re.sub(r"[`|,]", " ", line).split() for line in DOCS.read_text().splitlines() if "| `" in line[:4]]


def test_the_arithmetic_of_a_unetr_is_what_its_layers_say() -> None:
    voxels = [(96 // 2**level) ** 3 for level in range(5)]

    def block(level: int, before: int, after: int) -> int:
        return voxels[level] * (27 * (before * after + after * after) + before * after)

    def refined(level: int, width: int) -> int:  # no shortcut of its own
        return voxels[level] * 27 * 2 * width * width

    def doubled(level: int, before: int, after: int) -> int:  # to this level
        return voxels[level] * before * after

    products = 216 * 4096 * 768 + 12 * (216 * 768 * (4 * 768 + 2 * 3072) + 2 * 216 * 216 * 768)
    products += block(0, 1, 16)
    products += (
        doubled(3, 768, 32) + doubled(2, 32, 32) + refined(2, 32) + doubled(1, 32, 32) + refined(1, 32)
    )
    products += doubled(3, 768, 64) + doubled(2, 64, 64) + refined(2, 64) + doubled(3, 768, 128)
    for level, (before, after) in enumerate(((32, 16), (64, 32), (128, 64), (768, 128))):
        products += doubled(level, before, after) + block(level, 2 * after, after)
    products += voxels[0] * 16 * 14
    found = _cost("unetr", "segmentation", partial(build, "unetr", 1, CLASSES, SIZE, {}))
    assert found["flops"] == 2 * products


def kept(name: str, checkpointing: bool) -> float:
    """GiB that autograd keeps, on `meta`."""
    stored: dict[object, Tensor] = {}
    with torch.device("meta"):
        network = build(name, 1, CLASSES, SIZE, {"checkpointing": checkpointing})
        weights = {weight.untyped_storage()._cdata for weight in network.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            stored[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(torch.empty(1, 1, *SIZE))
    return sum(t.untyped_storage().nbytes() for key, t in stored.items() if key not in weights) / 2**30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_documentation_s_table_is_true(row: list[str]) -> None:
    name, *figures = row
    count = len(figures) - 5  # the parameters were split at their commas
    found = _cost(name, "segmentation", partial(build, name, 1, CLASSES, SIZE, {}))
    assert int("".join(figures[:count])) == found["parameters"]
    assert int(figures[count]) == round(found["flops"] / 1e9)
    whole, half, checkpointed, checkpointed_half = map(float, figures[count + 1 :])
    least = kept(name, checkpointing=True)
    assert checkpointed == pytest.approx(least, abs=0.006)
    # a CPU's attention keeps less than this; bf16 has some of its tensors in float32
    assert least < 0.5 * whole < 0.6 * kept(name, checkpointing=False)
    assert 0.45 * whole < half < 0.75 * whole
    assert 0.45 * checkpointed < checkpointed_half < 0.75 * checkpointed
