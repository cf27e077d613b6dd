"""The tasks of a cluster of two machines, one of which is lost in the middle."""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from unetrkit.data import prepare as preparation
from unetrkit.data.datalist import read_dataset
from unetrkit.data.files import read_json
from unetrkit.data.fingerprint import make_plan
from unetrkit.data.phantom import write_phantom
from unetrkit.data.plan import override_plan
from unetrkit.deployment.ray_tasks import ray_each
from unetrkit.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # ray warns about itself
CASES = 6


def test_tasks_are_done_once_and_errors_keep_their_kind(machines):
    each = ray_each(machines.address)
    assert dict(each(abs, range(-9, 0))) == {i: 9 - i for i in range(9)}
    with pytest.raises(UserError, match=r"case `b`: .*there is no file") as caught:
        list(each(read_json, [Path("/nowhere.json")], None, lambda _: "b"))
    assert caught.value.hint
    with pytest.raises(TypeError):
        list(each(abs, ["x"]))


def test_a_killed_machine_loses_nothing_and_nothing_is_done_twice(machines, tmp_path, unetrkit):
    """A file for each time that a case is begun, and for each time that it was finished."""
    data = write_phantom(tmp_path / "data", training=CASES - 1, validation=1, coarseness=4)
    dataset = read_dataset(data)
    plan = override_plan(make_plan(dataset, workers=1), ["patch_size=32,32,32", "spacing=8,8,9"])
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    preparation.prepare(dataset, plan, whole, workers=1)
    log.mkdir()
    from ray_counting import counted

    each = ray_each(machines.address)
    nodes = {node.node_id: node for node in machines.worker_nodes}

    def in_hand() -> list[str]:
        """The nodes that have begun a case and not finished it."""
        ended = {path.name.split()[3] for path in log.glob("finished *")}
        return [path.name.split()[1] for path in log.glob("begun *") if path.name.split()[3] not in ended]

    def kill() -> None:
        end = time.monotonic() + 200
        while len(list(log.glob("finished *"))) < 2 or not in_hand():
            assert time.monotonic() < end
            time.sleep(0.02)
        machines.remove_node(nodes[in_hand()[-1]], allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    seen = []
    summary = preparation.prepare(
        dataset,
        plan,
        out,
        progress=lambda done, total, note: seen.append((done, total)),
        each=lambda function, *rest: each(partial(counted, function, log=log), *rest),
    )
    killer.join()
    assert len(machines.worker_nodes) == 1
    begun = [path.name.split()[-1] for path in log.glob("begun *")]
    # a process may outlive its node by a moment and write its case: the second time it is found there
    finished = [path.name.split()[-2] for path in log.glob("finished * True")]
    assert sorted(finished) == sorted(case.name for case in dataset.cases), "each case written once"
    assert len(begun) == CASES + 1, "only what the machine had in hand was begun again"
    assert (summary.cases, seen[-1]) == (CASES, (CASES, CASES))
    files = [f.relative_to(whole) for f in whole.rglob("*") if f.is_file()]
    assert all((whole / f).read_bytes() == (out / f).read_bytes() for f in files)


def test_a_cluster_that_is_not_there(machines):
    import ray

    ray.shutdown()
    with pytest.raises(UserError, match=r"no Ray cluster answers at `127.0.0.1:1`"):
        ray_each("127.0.0.1:1")


def test_the_extra_is_named_where_ray_is_missing(monkeypatch, unetrkit, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    data = write_phantom(tmp_path / "data", training=1, validation=0, coarseness=4)
    refused = unetrkit("prepare", data, tmp_path / "store", "--on", "ray")
    assert refused.code == 2 and "hint: pip install 'unetrkit[ray]'" in refused.err
