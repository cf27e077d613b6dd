"""Jobs of a Slurm cluster, by submitit: they save before their time is over, and go on where they were."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from unetrkit.config import Settings
from unetrkit.deployment.torchrun import Nodes, forwarding, started, torchrun
from unetrkit.errors import MissingExtra, UserError

# the signal that submitit has Slurm send is SIGUSR2, unless its user chose another
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# the jobs before and after the array of a command that can be cut into parts
STAGES = {"prepare": ("plan", "index"), "predict": ("", ""), "study": ("", "table")}
# what works in several processes at once
DISTRIBUTED = ("train", "pretrain")


class SlurmSettings(Settings):
    """What a job asks of the cluster."""

    nodes: int = Field(default=1, ge=1)
    # processes on each node are as many; 0 is one process without a GPU
    gpus_per_node: int = Field(default=1, ge=0)
    cpus_per_task: int = Field(default=8, ge=1)
    # minutes after which Slurm ends the job; it is queued again, and goes on, as often as `requeues` says
    minutes: int = Field(default=24 * 60, ge=3)
    requeues: int = Field(default=100, ge=0)
    # seconds before that for saving
    grace_seconds: int = Field(default=120, ge=10)
    partition: str | None = None
    account: str | None = None
    # any other option of sbatch: {"constraint": "a100", "mem": "200G"}
    sbatch: dict[str, str] = Field(default_factory=dict)


@dataclass
class Job:
    """`unetrkit WORDS` on every node of a job: what submitit stores, and calls there."""

    words: Sequence[str]
    processes: int
    grace_seconds: int
    child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self) -> None:
        import submitit

        job = submitit.JobEnvironment()
        # a port that other jobs on the node are not likely to take, and all nodes of this one agree on
        port = 20_000 + int("".join(filter(str.isdigit, job.job_id)) or 0) % 20_000
        nodes = Nodes(job.num_nodes, job.node, f"{job.hostnames[0]}:{port}")
        command = torchrun(self.words, self.processes, nodes)
        with started(command, self.grace_seconds) as self.child, forwarding(self.child, SIGNALS) as asked:
            code = self.child.wait()
        self.child = None
        # the other nodes of a job end quietly, so that the first one can still queue it again
        if code and not asked:
            raise RuntimeError(f"`{shlex.join(command)}` ended with exit code {code}: see its messages above")

    def checkpoint(self) -> Any:
        """What is to run when the job is queued again: submitit asks on the first node, amid the signal."""
        import submitit

        if self.child is not None:
            with suppress(ChildProcessError):  # not collected: the interrupted `wait` holds a lock for that
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(replace(self, child=None))


def submit(
    words: Sequence[str],
    settings: SlurmSettings,
    folder: Path,
    array: int | None = None,
    cluster: str = "slurm",
) -> list[Any]:
    """Submits `unetrkit WORDS`, its logs in `folder`; in `array` parts if that is given. submitit's jobs.

    cluster: `slurm`, or `local` for this machine, where nothing waits for what was submitted before it.
    Raises UserError without submitit or Slurm, and for what cannot be as it was asked for.
    """
    submitit = _submitit()
    jobs: list[Any] = []
    for stage in stages(words, array):
        try:
            executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=settings.requeues)
        except RuntimeError as error:  # there is no `srun`
            hint = "submit on a login node of the cluster; --dry-run shows the scripts anywhere"
            raise UserError(f"there is no Slurm here: {error}", hint=hint) from error
        after = jobs[-1].job_id.partition("_")[0] if jobs else None
        executor.update_parameters(**_asked(words, settings, after))
        work = [Job(one, _processes(one, settings), settings.grace_seconds) for one in stage]
        jobs += executor.submit_array(work) if len(work) > 1 else [executor.submit(work[0])]
    return jobs


def scripts(words: Sequence[str], settings: SlurmSettings, folder: Path, array: int | None = None) -> str:
    """What `submit` would give to sbatch, with the command of each job above its script."""
    slurm = getattr(_submitit(), "slurm", None)
    write = getattr(getattr(slurm, "slurm", None), "_make_sbatch_string", None)
    if write is None:  # it is a private name
        raise UserError("this submitit does not show its scripts", hint="pip install submitit==1.5.4")
    texts, after = [], None
    for stage in stages(words, array):
        names = {"name": "job_name", "timeout_min": "time", "tasks_per_node": "ntasks_per_node"}
        asked = _asked(words, settings, after).items()
        parameters = {names.get(name, name.removeprefix("slurm_")): value for name, value in asked}
        parameters["map_count"] = len(stage) if len(stage) > 1 else None
        nodes = Nodes(settings.nodes, 0, "FIRST_NODE:PORT")
        commands = [shlex.join(torchrun(one, _processes(one, settings), nodes)) for one in stage]
        runs = f"python -u -m submitit.core._submit {shlex.quote(str(folder.absolute()))}"
        script = write(command=runs, folder=folder.absolute(), **parameters)
        texts.append("".join(f"# {line}\n" for line in commands) + script)
        after = "JOB_BEFORE"
    return "\n".join(texts)


def stages(words: Sequence[str], array: int | None) -> list[list[list[str]]]:
    """The commands of each job or array, one after the other.

    >>> stages(["prepare", "data.json", "store"], 2)[0]
    [['prepare', 'data.json', 'store', '--part', 'plan']]
    >>> [command[-1] for stage in stages(["prepare", "data.json", "store"], 2) for command in stage]
    ['plan', '1/2', '2/2', 'index']
    """
    if array is None:
        return [[list(words)]]
    if words[0] not in STAGES:
        known = ", ".join(f"`{name}`" for name in STAGES)
        raise UserError(f"`{words[0]}` cannot be cut into parts", hint=f"--array is for {known}")
    if any(word.startswith("--part") for word in words):
        raise UserError("--array sets `--part` itself", hint="leave out one of them")
    before, after = STAGES[words[0]]
    parts = [f"{k + 1}/{array}" for k in range(array)]
    return [[[*words, "--part", one] for one in stage] for stage in ([before], parts, [after]) if any(stage)]


def _asked(words: Sequence[str], settings: SlurmSettings, after: str | None) -> dict[str, Any]:
    """For submitit. A job begins when the one before has ended, even badly: it does what is left."""
    if settings.nodes > 1 and words[0] not in DISTRIBUTED:
        hint = "one node; --array cuts the work into jobs"
        raise UserError(f"each of {settings.nodes} nodes would do all of `{words[0]}`", hint=hint)
    found = {
        "name": f"unetrkit-{words[0]}",
        "nodes": settings.nodes,
        "tasks_per_node": 1,
        "cpus_per_task": settings.cpus_per_task,
        "gpus_per_node": settings.gpus_per_node,
        "timeout_min": settings.minutes,
        "slurm_partition": settings.partition,
        "slurm_account": settings.account,
        "slurm_dependency": f"afterany:{after}" if after else None,
        "slurm_signal_delay_s": settings.grace_seconds,
        "slurm_additional_parameters": {"requeue": True, **settings.sbatch},
    }
    return {name: value for name, value in found.items() if value is not None}


def _processes(words: Sequence[str], settings: SlurmSettings) -> int:
    return max(1, settings.gpus_per_node) if words[0] in DISTRIBUTED else 1


def _submitit() -> Any:
    try:
        import submitit
        import submitit.slurm.slurm
    except ImportError as error:
        raise MissingExtra("`unetrkit launch slurm`", "slurm") from error
    return submitit
