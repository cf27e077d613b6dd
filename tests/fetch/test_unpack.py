"""What comes out of an archive, and what an archive may not do."""

from __future__ import annotations

import gzip
import io
import random
import stat
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from fetch.archive_server import tar_of, zip_of
from unetrkit.errors import UserError
from unetrkit.fetch import unpack as module
from unetrkit.fetch.unpack import unpack

GOOD = {"Task/imagesTr/a.nii.gz": b"image", "Task/labelsTr/a.nii.gz": b"label", "Task/._a": b"litter"}


def unpacked(content: bytes, tmp_path: Path) -> list[str]:
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    return unpack(archive, tmp_path / "out" / "inner", str)


@pytest.mark.parametrize(
    "content", [tar_of(GOOD), tar_of(GOOD, "w:gz"), zip_of(GOOD)], ids=("tar", "tgz", "zip")
)
def test_plain_files_come_out(tmp_path, content):
    assert unpacked(content, tmp_path) == ["Task/imagesTr/a.nii.gz", "Task/labelsTr/a.nii.gz"]
    inner = tmp_path / "out" / "inner"
    assert (inner / "Task/labelsTr/a.nii.gz").read_bytes() == b"label"
    assert sorted(p.name for p in inner.rglob("*") if p.is_file()) == ["a.nii.gz", "a.nii.gz"]
    before = (inner / "Task/labelsTr/a.nii.gz").stat().st_mtime_ns
    unpacked(content, tmp_path)
    assert (inner / "Task/labelsTr/a.nii.gz").stat().st_mtime_ns == before


def special(kind: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("device")
        entry.type, entry.linkname = kind, "good"
        archive.addfile(entry)
    return out.getvalue()


def zip_link() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc")
    return out.getvalue()


def zip_of_names(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name.replace("\0", "@"), name)
    return out.getvalue().replace(b"@", b"\0")


def long_header() -> bytes:
    """A tar archive whose first header declares a name of 8 MB, which reading it would take into memory."""
    entry = tarfile.TarInfo("name")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 8 * 2**20
    return gzip.compress(entry.tobuf() + bytes(9 * 2**20))


def negative_size() -> bytes:
    entry = tarfile.TarInfo("name")
    content = bytearray(entry.tobuf())
    content[124:136] = b"\xff" * 11 + b"\x00"  # -256 in base 256
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    return bytes(content) + bytes(1024)


BAD = {
    "absolute": tar_of({"/tmp/evil": b"x"}),
    "parent": tar_of({"../evil": b"x"}),
    "parent inside": zip_of({"a/../../../evil": b"x"}),
    "backslash": zip_of({"a\\..\\..\\evil": b"x"}),
    "drive": tar_of({"C:evil": b"x"}),
    "symbolic link": tar_of({}, links={"out": "/etc"}),
    "link in a zip": zip_link(),
    "hard link": special(tarfile.LNKTYPE),
    "device": special(tarfile.CHRTYPE),
    "pipe": special(tarfile.FIFOTYPE),
    "twice": tar_of({"a": b"x", "A": b"y"}),
    "twice, otherwise composed": tar_of({"\u00e9": b"x", "e\u0301": b"y"}),
    "a file for a folder": tar_of({"b": b"x", "a": b"x", "A/b": b"y"}),
    "control characters": tar_of({"a\x1b[2J": b"x"}),
    "no characters": tar_of({"a\udcff": b"x"}),
    "cut by NUL": zip_of_names("../evil\0.nii.gz"),
    "a long header": long_header(),
    "a negative size": negative_size(),
    "no archive": b"<html>not found</html>" * 100,
    "cut": tar_of(GOOD)[:700],
    "cut zip": zip_of(GOOD)[:-30],
}


@pytest.mark.parametrize("fault", BAD)
def test_an_archive_with_a_fault_is_refused_before_anything_is_written(tmp_path, fault):
    with pytest.raises(UserError) as caught:
        unpacked(BAD[fault], tmp_path)
    assert str(tmp_path / "archive") in caught.value.message and caught.value.hint
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / "archive"]


@pytest.mark.parametrize(
    "content",
    [tar_of(GOOD), tar_of(GOOD, "w:gz"), tar_of(GOOD, "w:bz2"), tar_of(GOOD, "w:xz"), zip_of(GOOD)],
    ids=("tar", "tgz", "bz2", "xz", "zip"),
)
def test_damaged_bytes_are_refused_or_do_no_harm(tmp_path, content):
    chance = random.Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 3, 30))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        with suppress(UserError):
            unpacked(
                bytes(damaged[: chance.choice((len(damaged), chance.randrange(len(damaged))))]), tmp_path
            )
    assert {path.name for path in tmp_path.iterdir()} <= {"archive", "out"}
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"inner"}
    assert not list(tmp_path.rglob("*.part"))


def test_killed_before_a_file_is_whole_it_has_no_name_and_comes_again(tmp_path):
    (tmp_path / "archive").write_bytes(zip_of({"a": b"first", "b": b"second"}))
    code = f"""
    import os, signal
    from pathlib import Path
    from unetrkit.fetch import unpack
    left = [True]  # the first is finished, the second is written but not yet renamed
    die = lambda file: left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)
    unpack.os = type("os", (), vars(os) | {{"fsync": die}})
    unpack.unpack(Path({str(tmp_path / "archive")!r}), Path({str(tmp_path / "out")!r}), str)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".b.part", "a"]
    unpack(tmp_path / "archive", tmp_path / "out", str)
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"a": b"first", "b": b"second"}


def test_a_full_disk_leaves_nothing(tmp_path):
    (tmp_path / "archive").write_bytes(zip_of({"a": b"small", "b": bytes(300_000)}))
    code = f"""
    import resource
    from pathlib import Path
    from unetrkit.errors import UserError
    from unetrkit.fetch.unpack import unpack
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    folder = Path({str(tmp_path)!r})
    try:
        unpack(folder / "archive", folder / "out", str)
    except UserError as error:
        print(error.message)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "cannot write" in run.stdout and "File too large" in run.stdout and not run.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.parametrize("make", [zip_of, lambda files: gzip.compress(tar_of(files))], ids=("zip", "tgz"))
def test_a_bomb_is_refused_by_what_it_declares(tmp_path, monkeypatch, make):
    monkeypatch.setattr(module, "SMALL", 1000)
    with pytest.raises(UserError, match="unpacks to more than"):
        unpacked(make({"a": bytes(10_000_000)}), tmp_path)
    monkeypatch.setattr(module, "MEMBERS", 3)
    with pytest.raises(UserError, match="3 files"):
        unpacked(make({str(k): b"" for k in range(5)}), tmp_path)


def test_a_zip_that_holds_more_than_it_declares_is_refused(tmp_path):
    content = bytearray(zip_of({"a": bytes(5000)}))
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.index(signature) + at
        content[start : start + 4] = (10).to_bytes(4, "little")
    with pytest.raises(UserError):
        unpacked(bytes(content), tmp_path)
    assert not (tmp_path / "out" / "inner" / "a").exists()
