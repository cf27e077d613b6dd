"""Copies of what is elsewhere: a store comes by the case, a run goes there so that it can always go on."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.data.small_store import SHAPE, small_store

from unetrkit.data import copies, remote
from unetrkit.data.copies import bring, copy_of, send, sending
from unetrkit.data.remote import listing, put, spelt
from unetrkit.data.store import Store
from unetrkit.errors import UserError


def made(folder: Path, cases: int) -> Path:
    folder.mkdir()
    return small_store(folder, cases)


def upload(folder: Path, url: Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            put(file, spelt(url), file.relative_to(folder).as_posix())


@pytest.fixture
def got(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were fetched."""
    names: list[str] = []

    def counting(url: str, name: str, to: Path) -> None:
        names.append(name)
        get(url, name, to)

    get = remote.get
    monkeypatch.setattr(copies, "get", counting)
    return names


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were sent."""
    names: list[str] = []

    def counting(file: Path, url: str, name: str) -> str:
        names.append(name)
        return put(file, url, name)

    monkeypatch.setattr(copies, "put", counting)
    return names


def test_a_store_comes_by_the_case_and_reads_as_it_does_where_it_lies(
    elsewhere: Path, tmp_path: Path, got: list[str]
) -> None:
    local, url = made(tmp_path / "store", 3), elsewhere / "store"
    with pytest.raises(UserError, match=f"there is no store in `{spelt(url)}`"):
        Store.open(url)
    upload(local, url)
    opened, before = Store.open(url), Store.open(local)
    index = {"plan.json", "store.json", *(f"cases/case{n}/case.json" for n in range(3))}
    assert set(got) == index and len(got) == len(index)
    assert opened.plan_hash == before.plan_hash and [c.record for c in opened.cases] == [
        c.record for c in before.cases
    ]
    for ours, theirs in list(zip(opened.cases, before.cases, strict=True))[:2]:
        assert np.array_equal(ours.image((1, 2, 3), (9, 9, 9)), theirs.image((1, 2, 3), (9, 9, 9)))
        assert np.array_equal(ours.label((0, 0, 0), SHAPE), theirs.label((0, 0, 0), SHAPE))
        assert np.array_equal(ours.centres(2), theirs.centres(2))
    fetched = set(got) - index
    assert {name.split("/")[1] for name in fetched} == {"case0", "case1"} and len(fetched) == 6
    # the copy is a store by itself: loaders open it, and another reading fetches nothing
    again = Store.open(opened.path)
    again.cases[0].whole_image()
    Store.open(url).cases[1].whole_image()
    assert len(got) == len(index) + 6
    again.cases[2].whole_image()
    assert len(got) == len(index) + 9


def test_a_changed_object_is_fetched_anew_and_no_other(
    elsewhere: Path, tmp_path: Path, got: list[str]
) -> None:
    local, url = made(tmp_path / "store", 2), elsewhere / "store"
    upload(local, url)
    for case in Store.open(url).cases:
        case.whole_image()
    got.clear()
    time.sleep(0.02)  # of a file's time of change
    image = local / "cases/case1/image.chunks"
    other = bytearray(image.read_bytes())
    other[-1] ^= 1
    image.write_bytes(other)
    put(image, spelt(url), "cases/case1/image.chunks")
    opened = Store.open(url)
    opened.cases[0].whole_image()
    assert got == []
    with pytest.raises(UserError, match=r"image\.chunks` is damaged"):
        opened.cases[1].whole_image()
    assert got == ["cases/case1/image.chunks"]


def read_all(url: Path, number: int, into: Path) -> None:
    cases = Store.open(url).cases
    total = sum(float(case.whole_image().sum()) for case in cases[number:] + cases[:number])
    (into / str(number)).write_text(f"{total:.3f} {os.getpid()}")


@pytest.mark.parametrize("elsewhere", ["file", "s3"], indirect=True)
def test_processes_that_read_at_once_share_one_copy(elsewhere: Path, tmp_path: Path) -> None:
    local, url = made(tmp_path / "store", 4), elsewhere / "store"
    upload(local, url)
    listing(spelt(url))  # connections of the parent are no use to its children
    context = multiprocessing.get_context("fork")
    into = tmp_path / "sums"
    into.mkdir()
    processes = [context.Process(target=read_all, args=(url, n, into)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    expected = sum(float(case.whole_image().sum()) for case in Store.open(local).cases)
    assert {(into / str(n)).read_text().split()[0] for n in range(4)} == {f"{expected:.3f}"}


def test_a_copy_is_for_its_owner_alone(elsewhere: Path, tmp_path: Path) -> None:
    upload(made(tmp_path / "store", 1), elsewhere / "store")
    assert Store.open(elsewhere / "store").path.parent.stat().st_mode & 0o777 == 0o700


def test_of_a_run_only_the_model_is_fetched_and_of_a_file_the_file(
    elsewhere: Path, tmp_path: Path, got: list[str]
) -> None:
    for name in ("config.yaml", "last", "model/model.json", "model/weights.safetensors"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(name)
    upload(tmp_path / "run", elsewhere / "run")
    copy = copy_of(elsewhere / "run", "models")
    assert sorted(got) == ["model/model.json", "model/weights.safetensors"] and copy.name == "run"
    assert copy_of(elsewhere / "run/model/model.json", "models").read_text() == "model/model.json"
    assert sorted(file.name for file in copy_of(elsewhere / "run/model", "models").iterdir()) == [
        "model.json", "weights.safetensors",
    ]  # fmt: skip
    with pytest.raises(UserError, match=f"there is nothing at `{spelt(elsewhere / 'none')}`"):
        copy_of(elsewhere / "none", "models")
    assert copy_of(tmp_path / "run", "models") == tmp_path / "run"


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("UNETRKIT_CACHE", str(tmp_path / name))


def saved(copy: Path, step: int) -> None:
    """What a run writes at a step, a checkpoint being the last."""
    copy.mkdir(exist_ok=True)
    for name in ("config.yaml", "run.json"):
        if not (copy / name).exists():
            (copy / name).write_text(name)
    for name in ("best", "model/weights.safetensors", "model/model.json", "metrics.jsonl", ".hidden", "last"):
        (copy / name).parent.mkdir(exist_ok=True)
        new = copy / f".{step}.tmp"
        new.write_text(f"{name} of step {step}")
        new.replace(copy / name)


def test_a_run_is_sent_in_an_order_in_which_it_can_go_on_and_nothing_twice(
    elsewhere: Path, tmp_path: Path, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copy_of(elsewhere / "run", "runs")
    saved(copy, 1)
    send(copy)
    assert sent == [
        "best", "config.yaml", "model/weights.safetensors", "run.json", "model/model.json", "metrics.jsonl",
        "last",
    ]  # fmt: skip
    sent.clear()
    send(copy)
    assert sent == []
    saved(copy, 2)
    send(copy)
    assert set(sent) == {
        "best", "model/weights.safetensors", "model/model.json", "metrics.jsonl", "last"
    }  # fmt: skip
    another_machine(monkeypatch, tmp_path, "other")
    other = copy_of(elsewhere / "run", "runs")
    assert other != copy and (other / "last").read_text() == "last of step 2"
    assert not (other / ".hidden").exists()
    sent.clear()
    send(other)
    assert sent == []


def run_copy_with(url: Path, step: int) -> Path:
    copy = copy_of(url, "runs")
    saved(copy, step)
    return copy


@pytest.mark.parametrize("failing", range(5))
def test_where_sending_ends_nothing_there_is_newer_than_what_it_tells_of(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNETRKIT_CACHE", str(tmp_path / "cache"))
    url = Path(f"file://{tmp_path}/run")
    copy = copy_of(url, "runs")
    saved(copy, 1)
    send(copy)
    time.sleep(0.02)
    saved(copy, 2)
    calls = iter(range(5))

    def ending(file: Path, url: str, name: str) -> str:
        if next(calls) == failing:
            raise KeyboardInterrupt
        return put(file, url, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(copies, "put", ending)
        send(copy)
    another = [
        (tmp_path / "run" / name).read_text() for name in ("last", "metrics.jsonl", "model/model.json")
    ]
    steps = [int(text[-1]) for text in another]
    assert steps == sorted(steps) and steps[0] == 1
    assert (
        copy_of(url, "runs") == copy and (copy / "last").read_text() == "last of step 2"
    )  # nothing is lost here
    send(copy)
    assert (tmp_path / "run" / "last").read_text() == "last of step 2"


def test_a_checkpoint_that_is_written_amid_the_sending_waits_for_the_next(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, steps = run_copy_with(elsewhere / "run", 1), iter((2, 3, 4, 5, 6, 7, 8))

    def amid(file: Path, url: str, name: str) -> str:
        saved(copy, next(steps))
        return put(file, url, name)

    with monkeypatch.context() as patch:
        patch.setattr(copies, "put", amid)
        send(copy)
    another_machine(monkeypatch, tmp_path, "other")
    there = copy_of(elsewhere / "run", "runs")
    told = [int((there / name).read_text()[-1]) for name in ("best", "metrics.jsonl", "last")]
    assert told[-1] == 1 <= min(told)
    another_machine(monkeypatch, tmp_path, "cache")
    send(copy)
    another_machine(monkeypatch, tmp_path, "other")
    assert (copy_of(elsewhere / "run", "runs") / "last").read_text() == "last of step 8"


def test_what_another_machine_has_sent_is_taken_and_what_was_not_sent_is_kept(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = elsewhere / "run"
    first = copy_of(url, "runs")
    saved(first, 1)
    send(first)
    another_machine(monkeypatch, tmp_path, "other")
    other = copy_of(url, "runs")
    time.sleep(0.02)
    saved(other, 2)
    send(other)
    another_machine(monkeypatch, tmp_path, "cache")
    assert copy_of(url, "runs") == first and (first / "last").read_text() == "last of step 2"
    assert capsys.readouterr().err == ""
    saved(first, 3)  # not sent
    another_machine(monkeypatch, tmp_path, "other")
    time.sleep(0.02)
    saved(other, 4)
    send(other)
    another_machine(monkeypatch, tmp_path, "cache")
    with pytest.raises(UserError, match=r"another machine has changed `best` of `.*run`"):
        send(first)
    assert (copy_of(url, "runs") / "last").read_text() == "last of step 4"
    assert "was changed elsewhere; what was not sent from here stays in" in capsys.readouterr().err
    assert (first.with_name("run.1") / "last").read_text() == "last of step 3"


def test_a_place_that_is_no_run_or_has_become_empty_is_refused(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("of somebody")
    put(tmp_path / "notes", spelt(elsewhere / "run"), "notes")
    with pytest.raises(UserError, match="holds something that is not a run"):
        copy_of(elsewhere / "run", "runs")
    copy = copy_of(elsewhere / "run2", "runs")
    saved(copy, 1)
    send(copy)
    import fsspec

    fs, path = fsspec.core.url_to_fs(spelt(elsewhere / "run2"))
    fs.rm(path, recursive=True)
    with pytest.raises(UserError, match="is empty now, and its run is in") as caught:
        copy_of(elsewhere / "run2", "runs")
    assert str(copy) in caught.value.message and (copy / "last").exists()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_checkpoint_that_cannot_be_sent_is_sent_with_the_next(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(copies, "LOOK", 0.01)
    copy, broken, said = copy_of(elsewhere / "run", "runs"), [], []

    def put_or_fail(file: Path, url: str, name: str) -> str:
        if broken:
            raise UserError("cannot write: the line is dead", hint="wait")
        return put(file, url, name)

    monkeypatch.setattr(copies, "put", put_or_fail)
    monkeypatch.setattr(copies, "say", said.append)

    def there() -> str | None:
        return listing(spelt(elsewhere / "run")).get("last")

    saved(copy, 1)
    with sending(copy):
        one = there()
        assert one
        broken.append(True)
        time.sleep(0.02)
        saved(copy, 2)
        until(lambda: bool(said))
        assert "the line is dead; training goes on" in said[0] and there() == one
        broken.clear()
        time.sleep(0.02)
        saved(copy, 3)
        until(lambda: there() not in (None, one))
    assert len(said) == 1
    with pytest.raises(UserError, match="the whole run is in") as caught, sending(copy):
        broken.append(True)
        saved(copy, 4)
    assert str(copy) in caught.value.message and "the same command" in caught.value.hint
    broken.clear()
    with sending(copy_of(elsewhere / "run", "runs")):
        pass
    copy.joinpath("last").unlink()
    bring(copy, [copy / "last"])
    assert (copy / "last").read_text() == "last of step 4"


def test_a_beginning_that_cannot_be_sent_is_an_error_and_a_local_run_is_none_of_its_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: list[str]
) -> None:
    with sending(tmp_path / "local"):
        saved(tmp_path / "local", 1)
    assert sent == []
    monkeypatch.setenv("UNETRKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS", ())
    (tmp_path / "file").write_text("")
    copy = copy_of(Path(f"file://{tmp_path}/file/run"), "runs")
    saved(copy, 1)
    with pytest.raises(UserError, match="cannot write"), sending(copy):
        raise AssertionError("nothing is trained that could be lost")
