"""Checkpoints: what is torn, foreign or hostile is refused, and the one before is taken."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from unetrkit.errors import UserError
from unetrkit.training.checkpoint import FORMAT, HEADER, load, load_last, save, save_last


def state(step: int, size: int = 10) -> dict[str, object]:
    return {"step": step, "weights": {"a": torch.arange(size) * step}, "best": None, "names": ["é"]}


def refuse_to_warn(message: str) -> None:
    raise AssertionError(message)


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "last", state(3))
    found = load(tmp_path / "last")
    assert torch.equal(found["weights"]["a"], torch.arange(10) * 3)
    assert (found["step"], found["best"], found["names"]) == (3, None, ["é"])
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_the_header_is_one_line_of_json_with_the_hash_of_the_rest(tmp_path: Path) -> None:
    save(tmp_path / "last", state(3))
    line, rest = (tmp_path / "last").read_bytes().split(b"\n", 1)
    assert json.loads(line) == {"format": FORMAT, "sha256": hashlib.sha256(rest).hexdigest()}


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    save(tmp_path / "last", state(3))
    good = (tmp_path / "last").read_bytes()
    padding = range(len(json.dumps({"format": FORMAT, "sha256": "0" * 64})), HEADER)  # only spaces
    for position in (p for p in range(0, len(good), 7) if p not in padding):
        flipped = bytearray(good)
        flipped[position] ^= 1
        (tmp_path / "last").write_bytes(flipped)
        with pytest.raises(UserError):
            load(tmp_path / "last")
    for length in range(0, len(good), 53):
        (tmp_path / "last").write_bytes(good[:length])
        with pytest.raises(UserError):
            load(tmp_path / "last")


def test_a_torn_last_falls_back_to_the_previous_with_a_notice(tmp_path: Path) -> None:
    assert load_last(tmp_path, refuse_to_warn) is None
    for step in (1, 2, 3):
        save_last(tmp_path, state(step))
    assert load_last(tmp_path, refuse_to_warn)["step"] == 3
    (tmp_path / "last").write_bytes((tmp_path / "last").read_bytes()[:-1])
    said: list[str] = []
    assert load_last(tmp_path, said.append)["step"] == 2
    assert "is damaged" in said[0] and "previous" in said[0]
    (tmp_path / "last").unlink()
    assert load_last(tmp_path, refuse_to_warn)["step"] == 2
    (tmp_path / "previous").write_bytes(b"")
    with pytest.raises(UserError, match="is not a checkpoint") as caught:
        load_last(tmp_path, said.append)
    assert "a backup" in caught.value.hint


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("disguise", ["pickle", "torch", "torch with our header"])
def test_nothing_in_a_hostile_file_is_executed(tmp_path: Path, disguise: str) -> None:
    canary = Canary(tmp_path / "executed")
    content = io.BytesIO()
    if disguise == "pickle":
        pickle.dump(canary, content)
    else:
        torch.save({"step": canary}, content)
    header = b""
    if disguise == "torch with our header":
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        header = json.dumps({"format": FORMAT, "sha256": digest}).encode().ljust(HEADER - 1) + b"\n"
    (tmp_path / "last").write_bytes(header + content.getvalue())
    with pytest.raises(UserError):
        load(tmp_path / "last")
    assert not (tmp_path / "executed").exists()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_leaves_the_good_ones(tmp_path: Path) -> None:
    for step in (1, 2):
        save_last(tmp_path, state(step))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_up_to(100_000), pytest.raises(UserError, match="cannot write"):
        save_last(tmp_path, state(3, size=100_000))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


PARTS = {"a.safetensors": hashlib.sha256(b"a").hexdigest()}


@pytest.mark.parametrize(
    "shards",
    [
        None,
        [1, 2],
        {},
        PARTS | {"b.safetensors": "0"},
        {"../a": PARTS["a.safetensors"]},
        {"a.safetensors": 0},
    ],
)
def test_a_folder_whose_parts_are_not_those_it_names_is_damaged(tmp_path: Path, shards: object) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "a.safetensors").write_bytes(b"a")
    (tmp_path / "a").write_bytes(b"a")
    save(tmp_path / "last" / "state", state(3) | {"shards": PARTS})
    assert load(tmp_path / "last")["step"] == 3
    save(tmp_path / "last" / "state", state(3) | ({} if shards is None else {"shards": shards}))
    with pytest.raises(UserError, match=r"/last` is damaged"):
        load(tmp_path / "last")
    save(tmp_path / "previous", state(2))
    warned: list[str] = []
    assert load_last(tmp_path, warned.append)["step"] == 2 and "is damaged" in warned[0]


def test_a_pipe_and_what_is_no_state_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last")
    with pytest.raises(UserError, match="is a pipe or a device"):
        load(tmp_path / "last")
    save(tmp_path / "list", [1])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not the checkpoint of a run"):
        load(tmp_path / "list")
