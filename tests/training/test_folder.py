"""A run and its store on an object store are bitwise those of local folders, also from machine to machine."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from tests.training.several import ranks, trained
from tests.training.volumes import SMALL, four_volumes

from unetrkit.config import apply_overrides
from unetrkit.data import copies
from unetrkit.data.remote import listing, put, spelt
from unetrkit.errors import UserError
from unetrkit.evaluation.provenance import read_run
from unetrkit.inference.model import load_model
from unetrkit.pretraining.run import PretrainSettings, pretrain
from unetrkit.training import run as run_module
from unetrkit.training.run import TrainSettings, train

FILES = ("last", "best", "metrics.jsonl", "run.json", "model/model.json", "model/weights.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a run, `store` and `run`; the scans and labels that they were made from are gone."""
    folder = tmp_path_factory.mktemp("data")
    store = four_volumes(folder)
    for file in folder.glob("*.nii.gz"):
        file.unlink()
    train(settings(store, folder / "run"))
    return folder


def settings(store: Path, out: Path, *more: str) -> TrainSettings:
    return apply_overrides(TrainSettings, [f"data={spelt(store)}", f"out={spelt(out)}", *SMALL, *more])


def upload(folder: Path, url: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            put(file, spelt(url), file.relative_to(folder).as_posix())


def there(url: Path, into: Path) -> dict[str, bytes]:
    """The files of a run elsewhere, as somebody who knows nothing of it would read them."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(spelt(url))
    fs.get(path, str(into), recursive=True)
    return {name: (into / name).read_bytes() for name in FILES}


def local(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in FILES}


def test_a_run_elsewhere_is_the_local_run_and_goes_on_on_another_machine(
    data: Path, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(data / "store", elsewhere / "store")
    calls, batches = iter(range(100)), run_module.batches

    def ending(*where: object, **named: object):
        for batch in batches(*where, **named):
            if next(calls) == 2:
                raise UserError("the machine is taken away", hint="")
            yield batch

    where = settings(elsewhere / "store", elsewhere / "run", "loop.workers=2")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="taken away"):
        patch.setattr(run_module, "batches", ending)
        train(where)
    assert "last" in listing(spelt(elsewhere / "run"))
    monkeypatch.setenv("UNETRKIT_CACHE", str(tmp_path / "another"))
    train(where)
    assert there(elsewhere / "run", tmp_path / "got") == local(data / "run")
    config = yaml.safe_load((tmp_path / "got" / "config.yaml").read_text())
    assert config["data"] == spelt(elsewhere / "store") and config["out"] == spelt(elsewhere / "run")
    assert "cache" not in (tmp_path / "got" / "run.json").read_text()


@pytest.mark.parametrize("elsewhere", ["file", "memory"], indirect=True)
def test_what_follows_a_run_takes_it_from_there(
    data: Path, elsewhere: Path, tmp_path: Path, unetrkit
) -> None:
    upload(data / "run", elsewhere / "run")
    assert read_run(elsewhere / "run") == read_run(data / "run")
    weights = load_model(elsewhere / "run").network.state_dict()
    assert all((weights[k] == v).all() for k, v in load_model(data / "run").network.state_dict().items())
    words = ["loop.steps=1", "loop.validate_every=1"]
    train(settings(data / "store", tmp_path / "url" / "tuned", f"init={spelt(elsewhere / 'run')}", *words))
    train(settings(data / "store", tmp_path / "path" / "tuned", f"init={data / 'run'}", *words))
    assert local(tmp_path / "url" / "tuned") == local(tmp_path / "path" / "tuned")
    assert f"init: {spelt(elsewhere)}/run\n" in (tmp_path / "url" / "tuned" / "config.yaml").read_text()

    # another run is refused, as in a folder
    with pytest.raises(UserError, match=r"holds another run: its `optim\.lr` is"):
        train(settings(data / "store", elsewhere / "run", "optim.lr=1"))
    said = unetrkit("train", "unetr", f"data={spelt(elsewhere / 'none')}", f"out={tmp_path / 'none'}")
    assert said.code == 2 and f"error: there is no store in `{spelt(elsewhere / 'none')}`" in said.err


def taken_away(at: int, amid: bool, cache: str, *words: str) -> None:
    """Trains, and is killed when the `at`-th file is sent; amid: when half of it has been written there."""
    os.environ["UNETRKIT_CACHE"] = cache
    calls = iter(range(1000))

    def killed(file: Path, url: str, name: str) -> str:
        if next(calls) == at:
            if amid:
                part = Path(url.removeprefix("file://"), name)
                part = part.with_name(f".{part.name}.part")
                part.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return put(file, url, name)

    copies.put, copies.LOOK = killed, 0.001  # type: ignore[assignment]
    trained(*words)


@pytest.mark.parametrize(
    ("at", "amid"), [(1, True), (3, False), (4, True), (6, True), (9, False), (11, True), (12, False)]
)
def test_a_run_killed_as_it_sends_goes_on_bitwise_on_an_empty_machine(
    data: Path, tmp_path: Path, at: int, amid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / "store", tmp_path / "store")
    words = [f"data=file://{tmp_path}/store", f"out=file://{tmp_path}/run", *SMALL]
    code, _ = ranks(1, tmp_path / "log", taken_away, at, amid, str(tmp_path / "lost"), *words)
    assert code == [-signal.SIGKILL]
    monkeypatch.setenv("UNETRKIT_CACHE", str(tmp_path / "empty"))
    train(apply_overrides(TrainSettings, words))
    assert local(tmp_path / "run") == local(data / "run")


def test_two_ranks_share_the_copy_of_a_run(data: Path, tmp_path: Path) -> None:
    words = [*SMALL, "loop.steps=2"]
    os.environ["UNETRKIT_CACHE"] = str(tmp_path / "cache")
    try:
        one = [f"data={data / 'store'}", f"out={tmp_path / 'local' / 'run'}"]
        url = [f"data=file://{data / 'store'}", f"out=file://{tmp_path / 'there' / 'run'}"]
        for places in (one, url):
            assert ranks(2, tmp_path / "log", trained, *places, *words)[0] == [0, 0]
    finally:
        del os.environ["UNETRKIT_CACHE"]
    assert local(tmp_path / "there" / "run") == local(tmp_path / "local" / "run")


@pytest.mark.parametrize("elsewhere", ["file", "memory"], indirect=True)
def test_pre_training_is_sent_with_its_pictures_and_its_report(
    data: Path, elsewhere: Path, tmp_path: Path
) -> None:
    upload(data / "store", elsewhere / "store")
    words = ["objective=vit_autoencoder", "crops.patch_size=32,32,32", "watch.crops=4", "watch.pictures=1"]
    words += ["loop.steps=1", "loop.validate_every=1", "loop.workers=0", "loop.device=cpu"]
    words += [f"network_options.{one}" for one in ("depth=2", "width=24", "heads=2", "patch=8")]
    places = [f"data={spelt(elsewhere / 'store')}", f"out={spelt(elsewhere / 'run')}"]
    pretrain(apply_overrides(PretrainSettings, [*places, *words]))
    names = listing(spelt(elsewhere / "run"))
    assert {"report.html", "model/model.json", "last", "config.yaml"} <= {*names}
    assert any(name.startswith("pictures/") for name in names)


@pytest.mark.parametrize("elsewhere", ["file", "memory"], indirect=True)
def test_a_store_is_prepared_there(elsewhere: Path, tmp_path: Path, unetrkit) -> None:
    (tmp_path / "scans").mkdir()
    store = four_volumes(tmp_path / "scans")
    url = spelt(elsewhere / "store")
    words = ["patch_size=32,32,32", "spacing=2,2,2.5", "--workers", "1"]
    said = unetrkit("prepare", tmp_path / "scans/dataset.json", url, *words)
    assert said.code == 0 and f"next: unetrkit train swin_unetr_tiny data={url} out=RUN" in said.err
    files = {file.relative_to(store).as_posix() for file in store.rglob("*.*") if file.is_file()}
    assert {*listing(url)} == {name for name in files if not name.startswith(".")}
    assert "4 unchanged" in unetrkit("prepare", tmp_path / "scans/dataset.json", url, *words).err
    train(settings(elsewhere / "store", tmp_path / "a" / "run", "loop.steps=2"))
    train(settings(store, tmp_path / "b" / "run", "loop.steps=2"))
    assert local(tmp_path / "a" / "run") == local(tmp_path / "b" / "run")
    said = unetrkit("prepare", tmp_path / "scans/dataset.json", url, "--part", "plan")
    assert said.code == 2 and "several machines need a folder" in said.err
