"""What comes out of an archive, and what an archive may not do."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
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
