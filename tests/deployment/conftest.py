"""A Ray cluster on this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """Two machines with one core each, and a head that only leads."""
    pytest.importorskip("ray", reason="needs the `ray` extra")
    from ray.cluster_utils import Cluster

    tests = Path(__file__).parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), str(tests), str(tests.parent)])
    os.environ["RAY_worker_niceness"] = "0"  # else whatever else runs here stops the test
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    import ray

    ray.shutdown()
    made.shutdown()
    for number, handler in before.items():
        signal.signal(number, handler)
