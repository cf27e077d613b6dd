"""Jobs by submitit: run by its local executor, and given to a Slurm that only writes down what it gets."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from unetrkit.data.phantom import write_phantom
from unetrkit.deployment import slurm
from unetrkit.deployment.slurm import SlurmSettings, scripts, stages, submit
from unetrkit.errors import UserError

submitit = pytest.importorskip("submitit", reason="needs the `slurm` extra")
CPU = SlurmSettings(gpus_per_node=0, minutes=3, grace_seconds=10)


def finish(jobs: list, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not all(job.done() for job in jobs) and time.monotonic() < end:
        time.sleep(0.1)
    for job in jobs:
        assert job.exception() is None, job.stderr()


def test_a_job_runs_the_command(tmp_path: Path):
    (job,) = submit(["info", "environment"], CPU, tmp_path / "logs", cluster="local")
    finish([job])
    assert "torch  " in job.stdout()


def test_a_command_that_fails_is_a_failed_job(tmp_path: Path):
    (job,) = submit(["info", "nonsense"], CPU, tmp_path / "logs", cluster="local")
    job.wait()
    assert "exit code 2" in str(job.exception())
    assert "error: `nonsense`" in job.stderr()


LIVES = """
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(0.5)
    log.write_text(log.read_text() + " saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
if log.exists():
    log.write_text(log.read_text() + " again: " + " ".join(sys.argv[2:]))
else:
    log.write_text("begun")
    time.sleep(60)
"""
# a module for the job's own process, where the command is the one above
PATCHED = """
import sys
from unetrkit.deployment import slurm
slurm.torchrun = lambda words, *_: [sys.executable, {script!r}, {log!r}, *words]
class Patched(slurm.Job): pass
"""


def test_a_job_saves_before_its_limit_and_goes_on(tmp_path: Path, monkeypatch):
    """Two lives: the first is asked to stop, as before a limit; the second has the same words."""
    script, log = tmp_path / "lives.py", tmp_path / "log"
    script.write_text(LIVES)
    (tmp_path / "patched_job.py").write_text(PATCHED.format(script=str(script), log=str(log)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(slurm, "torchrun", slurm.torchrun)  # what the module replaces comes back
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    executor.update_parameters(timeout_min=3)
    job = executor.submit(importlib.import_module("patched_job").Patched(["train", "x"], 1, 10))
    while not log.exists():
        time.sleep(0.05)
    controller = job._process.pid
    task = Path(f"/proc/{controller}/task/{controller}/children").read_text()
    os.kill(int(task), signal.SIGUSR2)
    finish([job], 60)
    assert log.read_text() == "begun saved again: train x"


def test_the_parts_of_an_array_make_the_store_of_one_job(tmp_path: Path, unetrkit):
    data = write_phantom(tmp_path / "data", training=4, validation=1, coarseness=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    plan = ["patch_size=32,32,32", "spacing=8,8,9", "--workers", "1"]
    assert unetrkit("prepare", data, whole, *plan).code == 0
    commands = [
        one for stage in stages(["prepare", str(data), str(parts), *plan], 2) for one in reversed(stage)
    ]
    done = [unetrkit(*words) for words in commands]
    assert [one.code for one in done] == [0] * 4, done
    assert [re.findall(r"\d cases? prepared", one.err) for one in done[1:3]] == [
        ["2 cases prepared"],
        ["3 cases prepared"],
    ]
    assert "0 prepared, 5 unchanged" in done[3].err
    files = sorted(f.relative_to(whole) for f in whole.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(parts) for f in parts.rglob("*") if f.is_file())
    assert all((whole / f).read_bytes() == (parts / f).read_bytes() for f in files)
    # a job that was lost: the last one does its part
    shutil.rmtree(parts / "cases" / os.listdir(parts / "cases")[0])
    assert "1 prepared, 4 unchanged" in unetrkit(*commands[-1]).err


def test_a_part_needs_the_plan(tmp_path: Path, unetrkit):
    data = write_phantom(tmp_path / "data", training=2, validation=0, coarseness=4)
    refused = unetrkit("prepare", data, tmp_path / "store", "--part", "1/2")
    assert refused.code == 2 and "plan.json" in refused.err
    for wrong in ("0/2", "3/2", "half"):
        refused = unetrkit("prepare", data, tmp_path / "store", "--part", wrong)
        assert refused.code == 2 and f"`{wrong}` is not a part" in refused.err


SBATCH = """#!/bin/sh
cat "$1" >> {log}
number=$(grep -c '^#!/bin/bash' {log})
echo "Submitted batch job 70$number"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch) -> Path:
    """A Slurm that accepts jobs and never runs them; the file of the scripts that it was given."""
    programs, log = tmp_path / "bin", tmp_path / "scripts"
    programs.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        (programs / name).write_text(SBATCH.format(log=log) if name == "sbatch" else "#!/bin/sh\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    return log


def test_slurm_is_asked_for_what_was_asked(cluster, tmp_path, unetrkit):
    words = ["--nodes", 2, "--gpus-per-node", 8, "--hours", 4, "--partition", "a100", "--account", "x"]
    words += ["--sbatch", "mem=200G", "--logs", tmp_path / "logs", "--", "train", "unetr", "data=s", "out=r"]
    asked = unetrkit("launch", "slurm", *words)
    assert asked.code == 0, asked.err
    assert asked.out.split() == ["701"]
    lines = set(cluster.read_text().splitlines())
    options = "nodes=2 gpus-per-node=8 ntasks-per-node=1 time=240 partition=a100 account=x mem=200G requeue"
    assert lines >= {f"#SBATCH --{one}" for one in [*options.split(), "signal=USR2@120", "cpus-per-task=8"]}
    assert any(line.startswith("srun ") and "submitit.core._submit" in line for line in lines)


def test_stages_wait_for_each_other(cluster, tmp_path, unetrkit):
    asked = unetrkit(
        *("launch", "slurm", "--gpus-per-node", 0, "--array", 3, "--logs", tmp_path / "logs"),
        *("--", "prepare", "d.json", "store"),
    )
    assert asked.out.split() == ["701", "702_0", "702_1", "702_2", "703"]
    assert "the logs of JOB, a line above, are" in asked.err and "#SBATCH --output=" in cluster.read_text()
    assert f"{tmp_path}/logs/%A_%a_%t_log.out" in cluster.read_text()  # 702_0_0_log.out
    found = re.findall(r"^#SBATCH --(?:dependency|array)=(.*)$", cluster.read_text(), re.MULTILINE)
    assert found == ["0-2%3", "afterany:701", "afterany:702"]


def test_a_dry_run_shows_what_is_submitted(cluster, tmp_path):
    words = ["predict", "d.json", "out", "--model", "run"]
    shown = scripts(words, CPU, tmp_path / "logs", 2)
    assert "unetrkit predict d.json out --model run --part 2/2\n" in shown
    submit(words, CPU, tmp_path / "logs", 2)

    def options(text: str) -> set[str]:
        return {line for line in text.splitlines() if line.startswith("#SBATCH")}

    assert options(shown) == options(cluster.read_text())


def test_a_machine_without_slurm_and_a_command_without_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no Slurm here"):
        submit(["info"], CPU, tmp_path)
    with pytest.raises(UserError, match="`train` cannot be cut into parts"):
        stages(["train", "x"], 4)


@pytest.mark.parametrize(
    ("options", "command", "message"),
    [
        (["--hours", "1e300"], "train", "--hours"),
        (["--hours", "nan"], "train", "--hours"),
        (["--array", "1000000"], "study", "--array"),
        (["--sbatch", "mem"], "train", "an option of sbatch is one line"),
        (["--sbatch", "=4G"], "train", "an option of sbatch is one line"),
        (["--sbatch", "mem=4G\n#SBATCH --uid=0"], "train", "an option of sbatch is one line"),
        (["--partition", "a\nb"], "train", "an option of sbatch is one line"),
        (["--array", 4], "predict --part 1/2", "--array sets `--part` itself"),
        (["--nodes", 2], "predict", "each of 2 nodes would do all of `predict`"),
        (["--nodes", 2, "--array", 4], "prepare", "each of 2 nodes would do all of `prepare`"),
    ],
)
def test_what_slurm_cannot_do_is_refused(unetrkit, options, command, message):
    refused = unetrkit("launch", "slurm", *options, "--dry-run", "--", *command.split(), "x")
    assert refused.code == 2 and message in refused.err, refused


def test_the_extra_is_named_where_submitit_is_missing(monkeypatch, unetrkit):
    monkeypatch.setitem(sys.modules, "submitit", None)
    refused = unetrkit("launch", "slurm", "--dry-run", "--", "info")
    assert refused.code == 2 and "hint: pip install 'unetrkit[slurm]'" in refused.err
