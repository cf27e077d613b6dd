"""One function over many items, here and in other processes, with every way in which it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from unetrkit.data.files import read_json
from unetrkit.data.processes import cores, for_each
from unetrkit.errors import UserError


@pytest.mark.parametrize("workers", [1, 2, None])
def test_every_item_is_done_once(workers: int | None) -> None:
    results = dict(for_each(abs, range(-20, 0), workers, patience=0))
    assert results == {i: 20 - i for i in range(20)}
    assert cores() >= 1


def test_no_items_are_no_work() -> None:
    assert list(for_each(abs, [], 4)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_user_error_names_its_item(tmp_path: Path, workers: int) -> None:
    for i in range(6):
        (tmp_path / f"{i}.json").write_text("1" if i != 3 else "{")
    items = [tmp_path / f"{i}.json" for i in range(6)]
    with pytest.raises(UserError, match=r"case `amos_3`.*is not JSON"):
        list(for_each(read_json, items, workers, lambda path: f"amos_{path.stem}", patience=0))


def test_another_error_keeps_its_kind() -> None:
    with pytest.raises(TypeError):
        list(for_each(abs, [1, 2, "x", 4], 2, patience=0))


def test_a_killed_worker_is_told_from_an_error() -> None:
    with pytest.raises(UserError, match=r"killed while it worked on one of .*`os._exit") as caught:
        list(
            for_each(partial(_call), [partial(abs, 1)] * 2 + [partial(os._exit, 9)] * 2, 2, _text, patience=0)
        )
    assert "memory" in caught.value.hint


def _text(job: partial) -> str:
    return f"{job.func.__module__.replace('posix', 'os')}.{job.func.__name__}"


_call = partial.__call__


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from unetrkit.data.processes import for_each\n"
        "if __name__ == '__main__':\n"
        "    jobs = ['0', '0', '__import__(\"os\").getpid()', '__import__(\"os\").getpid()']\n"
        "    for position, pid in for_each(eval, jobs, 2, patience=0):\n"
        "        if position > 1:\n"
        "            print(pid, flush=True)\n"
        "        if position == 3:\n"
        "            os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    workers = {int(line) for line in done.stdout.split()}
    assert done.returncode == -9 and workers
    end = time.monotonic() + 10
    while any(map(_alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(_alive, workers))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
