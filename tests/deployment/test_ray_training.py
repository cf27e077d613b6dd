"""Training by Ray Train on two machines: the model of two ranks, also when one of them is lost."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.training.several import ranks, trained
from tests.training.volumes import SMALL, four_volumes

from command import CommandLine
from unetrkit.deployment import ray_training
from unetrkit.training.run import TrainSettings

# ray warns about itself, and takes minutes to start on a machine that others fill
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
FILES = ("model/weights.safetensors", "last", "best", "metrics.jsonl", "run.json")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_volumes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks make without Ray."""
    folder = tmp_path_factory.mktemp("runs")
    codes, said = ranks(2, folder / "log", trained, *SMALL, f"data={store}", f"out={folder / 'run'}")
    assert codes == [0, 0], said
    return folder / "run"


@pytest.fixture
def launch(machines: Any, tmp_path: Path, unetrkit: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains on both machines, by words relative to where it is called."""
    (tmp_path / "none.yaml").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    options = ["--address", machines.address, "--workers", 2, "--gpus-per-worker", 0]
    return lambda restarts, *words: unetrkit(
        *("launch", "ray", *options, "--restarts", restarts, "--", "train", "none.yaml", *SMALL, *words)
    )


def test_two_workers_train_the_model_of_two_ranks(launch, whole, store, tmp_path):
    done = launch(0, f"data={store}", "out=run")
    assert done.code == 0, done.err
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("what", ["worker", "machine"])
def test_what_is_lost_costs_the_steps_since_the_last_checkpoint(
    machines, launch, whole, store, tmp_path, monkeypatch, what
):
    from ray_losing import losing

    monkeypatch.setitem(ray_training.KINDS, "train", (TrainSettings, losing))
    note = tmp_path / f"lose-{what}"
    note.touch()

    def lose() -> None:
        end = time.monotonic() + 100
        while not note.read_text() and time.monotonic() < end:
            time.sleep(0.05)
        [lost] = [node for node in machines.worker_nodes if node.node_id == note.read_text()]
        machines.add_node(num_cpus=1)
        machines.remove_node(lost, allow_graceful=False)

    if what == "machine":
        threading.Thread(target=lose, daemon=True).start()
    done = launch(1, f"data={store}", "out=run")
    assert note.read_text() and done.code == 0, done.err
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


def test_what_a_worker_finds_wrong_is_an_error(launch):
    refused = launch(0, "data=nowhere", "out=run")
    assert refused.code == 2
    assert refused.err.count("error: there is no store in `nowhere`") == 1


def test_a_dry_run_starts_nothing(unetrkit, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs the `ray` extra")
    monkeypatch.chdir(tmp_path)
    words = ("--dry-run", "--workers", "4", "--", "train", "swin_unetr_tiny", "data=a b")
    shown = unetrkit("launch", "ray", *words)
    assert shown.code == 0
    assert shown.out == "4 workers, a GPU for each: unetrkit train swin_unetr_tiny 'data=a b'\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "x", "y"], "the processes `train` or `pretrain` a recipe"),
        (["train"], "the processes `train` or `pretrain` a recipe"),
        (["train", "swin_unetr_tiny", "dat=x"], "`dat` is not a setting"),
        (["pretrain", "swin_heads", "data=x", "--fast"], "`--fast` is not a setting"),
        (["train", "swin_unetr_tiny", "data=s3://u:secret@b/store"], "holds a password or a key"),
        (["train", "swin_unetr_tiny", "data=x", "out=s3://b/run?key=secret"], "holds a password or a key"),
        (["pretrain", "swin_heads", "data=x,s3://u:secret@b/y"], "holds a password or a key"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(unetrkit, words, message):
    for options in ([], ["--dry-run"]):
        refused = unetrkit("launch", "ray", *options, "--", *words)
        assert refused.code == 2 and message in refused.err and "secret" not in refused.out + refused.err


@pytest.mark.parametrize(("out", "records"), [("run", "run"), ("s3://b/run", "runs")])
def test_rays_records_are_in_a_local_folder(tmp_path, monkeypatch, out, records):
    pytest.importorskip("ray", reason="needs the `ray` extra")
    monkeypatch.chdir(tmp_path)
    words = ["train", "swin_unetr_tiny", "data=x", f"out={out}"]
    made = ray_training.trainer(words, 1, gpu=False, restarts=0)
    assert made.run_config.storage_path == str(tmp_path / records)


def test_a_cluster_that_is_not_there(unetrkit):
    pytest.importorskip("ray", reason="needs the `ray` extra")
    words = ("--address", "127.0.0.1:1", "--", "train", "swin_unetr_tiny", "data=x")
    refused = unetrkit("launch", "ray", *words)
    assert unetrkit("launch", "ray", "--workers", 10**20, *words[2:]).code == 2
    assert refused.code == 2 and "no Ray cluster answers at `127.0.0.1:1`" in refused.err


def test_the_extra_is_named_where_ray_is_missing(monkeypatch, unetrkit):
    monkeypatch.setitem(sys.modules, "ray.train", None)
    assert unetrkit("launch", "ray", "--dry-run", "--", "train", "swin_unetr_tiny", "data=x").code == 0
    refused = unetrkit("launch", "ray", "--", "train", "swin_unetr_tiny", "data=x")
    assert refused.code == 2 and "hint: pip install 'unetrkit[ray]'" in refused.err
