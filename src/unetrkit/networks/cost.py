"""What each network costs: parameters, and the arithmetic of a forward pass, counted without computing it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unetrkit import networks

SIZE = (96, 96, 96)
CLASSES = 14


def costs() -> list[dict[str, Any]]:
    """Name, parameters and FLOPs of every network at 1 x 1 x 96 x 96 x 96 with 14 classes.

    A multiplication and the addition of its product are two FLOPs. Products of matrices and convolutions are
    counted, all else (norms, activations, softmax) is not. Tensors are on `meta`: nothing is computed.
    """
    whole = {name: partial(make, 1, CLASSES, SIZE) for name, make in networks.NETWORKS.items()}
    pretraining = {name: partial(make, 1, SIZE) for name, make in networks.PRETRAINING_NETWORKS.items()}
    tables = {"segmentation": whole, "pre-training": pretraining}
    return [_cost(name, kind, make) for kind, table in tables.items() for name, make in table.items()]


def _cost(name: str, kind: str, make: Callable[[], nn.Module]) -> dict[str, Any]:
    with torch.device("meta"), torch.no_grad():
        network = make().eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 1, *SIZE))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"network": name, "kind": kind, "parameters": parameters, "flops": counter.get_total_flops()}


def cost_table(rows: list[dict[str, Any]]) -> str:
    """The rows for people, figures to the right."""
    size = "x".join(map(str, SIZE))
    head = [("network", "parameters", "GFLOPs")]
    cells = head + [(r["network"], f"{r['parameters']:,}", f"{r['flops'] / 1e9:,.1f}") for r in rows]
    width = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = [f"{a:{width[0]}}  {b:>{width[1]}}  {c:>{width[2]}}" for a, b, c in cells]
    return "\n".join([*lines, f"one {size} image, 1 channel, {CLASSES} classes; FLOPs are 2 x multiply-adds"])
