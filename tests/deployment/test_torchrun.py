"""Commands in several processes: what is run, and how a signal reaches it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from unetrkit.deployment.torchrun import Nodes, run, torchrun

# counts the SIGTERMs that reach it, for a second after the first
COUNTING = """
import pathlib, signal, sys, time
file, seen = pathlib.Path(sys.argv[1]), []
signal.signal(signal.SIGTERM, lambda *_: seen.append("SIGTERM"))
signal.signal(signal.SIGINT, lambda *_: seen.append("SIGINT"))
file.write_text("ready")
while not seen:
    time.sleep(0.02)
time.sleep(1)
file.write_text(" ".join(seen))
sys.exit(130)
"""


def test_one_process_needs_no_torchrun():
    assert torchrun(["info"], 1) == [sys.executable, "-m", "unetrkit", "info"]


def test_nodes_meet_at_the_first():
    command = torchrun(["train", "x"], 8, Nodes(2, 1, "gpu-a:20007"), restarts=3)
    assert command[1:] == [
        *("-m", "unetrkit.deployment.torchrun", "--nproc-per-node=8", "--nnodes=2", "--node-rank=1"),
        *("--master-addr=gpu-a", "--master-port=20007", "--max-restarts=3", "-m", "unetrkit", "train", "x"),
    ]


def test_two_processes_of_this_machine_run_the_command():
    words = ["launch", "local", "--processes", "2", "--", "info", "environment"]
    done = subprocess.run(
        [sys.executable, "-m", "unetrkit", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch  ") == 2


def test_the_exit_code_is_the_commands(unetrkit):
    assert run([sys.executable, "-c", "raise SystemExit(7)"]) == 7
    assert unetrkit("launch", "local", "--", "info", "nonsense").code == 2


def test_a_users_error_in_several_processes_is_one_and_anothers_keeps_its_trace(capfd):
    assert run(torchrun(["info", "nonsense"], 2)) == 2
    printed = capfd.readouterr().err
    assert printed.count("error: ") == 1 and "Traceback" not in printed and "ChildFailedError" not in printed
    assert run([*torchrun([], 2)[:-1], "timeit", "raise ValueError"]) == 1
    assert "ChildFailedError" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_arrives_once_and_the_code_is_130(tmp_path: Path, number: signal.Signals):
    file = tmp_path / "seen"
    before = signal.getsignal(signal.SIGINT)  # a shell's background job begins with it ignored

    def ask() -> None:
        while not file.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    assert run([sys.executable, "-c", COUNTING, str(file)]) == 130
    assert file.read_text() == "SIGTERM"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_terminal_s_ctrl_c_reaches_the_processes_of_torchrun_once(tmp_path: Path):
    """Ctrl-C is sent to every process of the terminal's group."""
    script = tmp_path / "count.py"
    script.write_text(COUNTING.replace("sys.argv[1]", "sys.argv[1] + __import__('os').environ['RANK']"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(script), str(tmp_path / "seen")]
    main = f"import sys; from unetrkit.deployment.torchrun import run; sys.exit(run({command!r}))"
    launcher = subprocess.Popen(
        [sys.executable, "-c", main], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    files = [tmp_path / f"seen{rank}" for rank in (0, 1)]
    end = time.monotonic() + 60
    while not all(file.exists() for file in files) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGINT)
    _, printed = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, printed
    assert [file.read_text() for file in files] == ["SIGTERM", "SIGTERM"]


def test_a_dry_run_prints_a_line_that_a_shell_takes(unetrkit):
    shown = unetrkit("launch", "local", "--processes", 2, "--dry-run", "--", "train", "a b", "out=x")
    assert shlex.split(shown.out)[-3:] == ["train", "a b", "out=x"]
    assert shown.code == 0


def test_what_is_no_command_is_not_launched(unetrkit):
    refused = unetrkit("launch", "local", "--", "trian", "x")
    assert refused.code == 2 and refused.err.startswith("error: `trian` is not a command to launch")
