"""Files elsewhere: whole or not at all, tried three times, and every trouble in one line without a secret."""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from unetrkit.config import Settings, apply_overrides, to_yaml
from unetrkit.data import remote
from unetrkit.data.remote import Place, get, listing, placed, put, spelt, url_of
from unetrkit.errors import MissingExtra, UserError


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between tries, in no time."""
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("az://container/a", "az://container/a"),
        (
            "abfs://container@account.dfs.core.windows.net/a",
            "abfs://container@account.dfs.core.windows.net/a",
        ),
        ("file:///tmp/a", "file:///tmp/a"),
        ("memory://a/", "memory://a"),
        ("S3://Bucket/a", "s3://Bucket/a"),
        ("sftp://me@host/a", "sftp://me@host/a"),
        ("/tmp/a", None),
        ("runs/s3:b", None),
        ("C:/data", None),
        ("c:/data", None),
    ],
)
def test_a_url_is_told_from_a_path(written: str, url: str | None) -> None:
    assert url_of(Path(written)) == url


@pytest.mark.parametrize(
    "url",
    [
        "s3://me:secret@host/a",
        "S3://me:secret@host/a",
        "https://host/a?sig=secret",
        "https://secret@host/a",
        "sftp://me:secret@host",
        "s3://a\nb?sig=secret",
    ],
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UserError, match="holds a password or a key") as caught:
        url_of(Path(url))
    assert "secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("url", ["s3://", "S3:", "file:///", "file:///tmp/a/../../etc/x", "s3://a/.."])
def test_a_url_of_nothing_or_out_of_its_folder_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is no place"):
        url_of(Path(url))


class Places(Settings):
    data: Place
    out: Place | None = None


def test_settings_keep_a_url_as_it_was_written() -> None:
    settings = apply_overrides(Places, ["data=s3://bucket/store", "out=runs/a"])
    assert to_yaml(settings) == "data: s3://bucket/store\nout: runs/a\n"
    assert placed(settings.data) == settings.data and spelt(settings.data) == "s3://bucket/store"
    assert settings.out is not None and placed(settings.out) == Path.cwd() / "runs/a"


@pytest.mark.parametrize(("name", "message"), [("n" * 300, "File name too long"), ("a\0b", "null byte")])
def test_what_no_path_can_be_is_said(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        placed(tmp_path / name)
    (tmp_path / "file").touch()
    assert placed(tmp_path / "file" / "in") == tmp_path / "file" / "in"


def test_what_is_put_is_listed_and_got_until_it_changes(elsewhere: Path, tmp_path: Path) -> None:
    url, here = spelt(elsewhere / "folder"), tmp_path / "here"
    assert listing(url) == {}
    here.write_bytes(b"one")
    tokens = {name: put(here, url, name) for name in ("a", "deep/er/b")}
    here.write_bytes(b"other")
    put(here, spelt(elsewhere / "folder2"), "c")  # of another folder
    assert listing(url) == tokens
    assert listing(f"{url}/a") == {"": tokens["a"]}
    get(url, "deep/er/b", tmp_path / "got" / "b")
    assert (tmp_path / "got" / "b").read_bytes() == b"one"
    assert put(here, url, "a") != tokens["a"]
    assert listing(url)["deep/er/b"] == tokens["deep/er/b"] and listing(url)["a"] != tokens["a"]
    get(url, "a", tmp_path / "got" / "b")
    assert (tmp_path / "got" / "b").read_bytes() == b"other"
    assert [file.name for file in (tmp_path / "got").iterdir()] == ["b"]


def test_a_name_that_leaves_the_folder_is_not_seen() -> None:
    fs = fsspec.filesystem("memory")
    fs.store["/leaving/../../evil"] = fs.store["/leaving/good"] = fs.open("/leaving/good", "wb")
    try:
        assert list(listing("memory://leaving")) == ["good"]
    finally:
        fs.store.clear()


def test_what_fails_is_tried_three_times_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    url, here = f"file://{tmp_path}/there", tmp_path / "here"
    here.write_bytes(b"old")
    put(here, url, "a")
    here.write_bytes(b"new content")
    tries = []

    def half(fs: LocalFileSystem, path: str, to: str) -> None:
        tries.append(to)
        Path(to).write_bytes(Path(path).read_bytes()[:3])
        raise OSError("the line went dead\nand more")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"write .*: the line went dead$"):
        patch.setattr(LocalFileSystem, "put_file", half)
        put(here, url, "a")
    assert (len(tries), waited) == (3, [1.0, 5.0])
    assert (tmp_path / "there" / "a").read_bytes() == b"old" and list(listing(url)) == [".a.part", "a"]
    put(here, url, "a")
    assert (tmp_path / "there" / "a").read_bytes() == b"new content" and list(listing(url)) == ["a"]

    def broken(fs: LocalFileSystem, path: str, to: str) -> None:
        half(fs, path, to)

    monkeypatch.setattr(LocalFileSystem, "get_file", broken)
    with pytest.raises(UserError, match=r"read .*: the line went dead$"):
        get(url, "a", tmp_path / "got" / "a")
    assert list((tmp_path / "got").iterdir()) == []


def test_an_unknown_protocol_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot list `s4://bucket/a`: Protocol not known: s4"):
        listing("s4://bucket/a")
    monkeypatch.delitem(_registry, "s3", raising=False)  # another test may have opened one
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtra, match="`s3://bucket/a` needs the `remote` extra") as caught:
        listing("s3://bucket/a")
    assert "unetrkit[remote]" in caught.value.hint
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserError, match="a package is missing") as other:
        listing("az://container/a")
    assert "adlfs" in other.value.hint


@pytest.mark.parametrize("elsewhere", ["s3"], indirect=True)
def test_a_missing_bucket_missing_credentials_and_no_server_are_said_in_one_line(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    import s3fs

    here = tmp_path / "here"
    here.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write `s3://nobodys-bucket/run/a`: .*bucket does not exist"):
        put(here, "s3://nobodys-bucket/run", "a")
    assert listing(spelt(elsewhere)) == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"cannot list `s3://.*127\.0\.0\.1:9"):
        listing(spelt(elsewhere))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    waited.clear()
    with pytest.raises(UserError, match="Unable to locate credentials") as caught:
        listing(spelt(elsewhere))
    assert waited == [] and "environment" in caught.value.hint
    monkeypatch.undo()
    s3fs.S3FileSystem.clear_instance_cache()
