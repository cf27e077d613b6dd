"""Archives from elsewhere: plain files under one folder come out of them, and nothing else."""

import lzma
import os
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

from unetrkit.data.files import sync_folder, write_problems
from unetrkit.errors import UserError
from unetrkit.fetch.download import check_space, write_all

MEMBERS = 500_000  # more files than any of the data sets
EXPANSION = 30  # times an archive's own size; CT slices shrink to a third at best
SMALL = 100 * 2**20  # bytes that any archive may grow to
LARGEST_HEADER = 2**20  # bytes; of a long name they are some hundreds
LITTER = ("__MACOSX", ".DS_Store", "Icon\r")

# what reading raises: each compression has errors of its own, and a damaged header any
DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    path: PurePosixPath
    size: int
    open: Callable[[], Any]


def unpack(archive: Path, target: Path, place: Callable[[PurePosixPath], str | None]) -> list[str]:
    """Writes an archive's files (zip, tar, compressed tar) under `target`, and says which.

    place: where a file of the archive goes under `target`, None for those that are not wanted. A file that
    is there with its size is not written again; each appears whole or not at all. Every member is looked at
    before the first is written: raises UserError for a path that leads out of the target, a link, a device,
    two members for one place, more members or bytes than a data set has, and a damaged archive.
    """
    written = []
    with _open(archive) as members:
        placed = {}
        for member in members:
            name = place(member.path)
            if name is None:
                continue
            _inside(archive, name)
            key = unicodedata.normalize("NFC", name).casefold()  # one file where a file system sees one name
            if key in placed:
                raise _refused(archive, f"holds `{name}` twice")
            placed[key] = (name, member)
        for key, (name, _) in placed.items():
            if any(str(folder) in placed for folder in PurePosixPath(key).parents):
                raise _refused(archive, f"holds a file where `{name}` needs a folder")
        with write_problems(target):
            target.mkdir(parents=True, exist_ok=True)
        check_space(target, sum(member.size for _, member in placed.values()))
        for name, member in placed.values():
            path = target / name
            if not (path.exists() and path.stat().st_size == member.size):
                _write(archive, member, path)
            written.append(name)
    return written


@contextmanager
def _open(archive: Path) -> Iterator[list[Member]]:
    limit = max(SMALL, EXPANSION * archive.stat().st_size)
    with _damage(archive):
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield _checked(archive, _zip_members(archive, file), limit)
        else:
            with tarfile.open(archive, tarinfo=_Header) as file:
                yield _checked(archive, _tar_members(archive, file, limit), limit)


def _checked(archive: Path, members: Iterator[Member], limit: int) -> list[Member]:
    found: list[Member] = []
    total = 0
    for member in members:
        total += member.size
        if len(found) >= MEMBERS or total > limit:
            raise _refused(archive, f"unpacks to more than {limit / 1e9:.1f} GB or {MEMBERS} files")
        if not any(part in LITTER or part.startswith("._") for part in member.path.parts):
            _inside(archive, str(member.path))
            found.append(member)
    return found


def _zip_members(archive: Path, file: zipfile.ZipFile) -> Iterator[Member]:
    for entry in file.infolist():
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.is_dir():
            continue
        if kind not in (0, stat.S_IFREG):
            raise _refused(archive, f"holds a link or a device, {entry.filename!r}")
        if entry.flag_bits & 1:
            raise _refused(archive, "is encrypted")
        yield Member(PurePosixPath(entry.filename), entry.file_size, partial(file.open, entry))


class _Header(tarfile.TarInfo):
    """A header of a tar archive: tarfile reads long names and extended headers into memory as a whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        entry = super().frombuf(buf, encoding, errors)
        if entry.size < 0 or (entry.size > LARGEST_HEADER and entry.type in b"xgXLK"):
            raise tarfile.ReadError(f"a header of {entry.size} bytes")
        return entry


def _tar_members(archive: Path, file: tarfile.TarFile, limit: int) -> Iterator[Member]:
    for entry in file:
        # to get here, everything before an entry of a compressed archive was expanded
        if entry.offset > limit:
            raise _refused(archive, f"unpacks to more than {limit / 1e9:.1f} GB")
        if entry.isdir():
            continue
        if not entry.isreg():
            raise _refused(archive, f"holds a link or a device, {entry.name!r}")
        yield Member(PurePosixPath(entry.name), entry.size, partial(file.extractfile, entry))


def _inside(archive: Path, name: str) -> None:
    """Raises UserError for a name that is not of a file under the target, on any system."""
    path = PurePosixPath(name)
    odd = any(character in name for character in "\\:") or not name.isprintable() or not path.parts
    if odd or path.is_absolute() or ".." in path.parts:
        raise _refused(archive, f"holds {name!r}, which leads out of the folder or is no plain name")


def _write(archive: Path, member: Member, path: Path) -> None:
    temporary = path.with_name(f".{path.name[:80]}.part")
    left = member.size
    with write_problems(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        out = open(temporary, "wb", buffering=0)
    try:
        with out, member.open() as content:
            while piece := content.read(min(2**20, left + 1)):
                left -= len(piece)
                if left < 0:
                    raise _refused(archive, f"holds more of `{member.path}` than it declares")
                write_all(out, piece, path)
            with write_problems(path):
                os.fsync(out.fileno())
        if left:
            raise _refused(archive, f"ends amid `{member.path}`")
        with write_problems(path):
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _damage(archive: Path) -> Iterator[None]:
    try:
        yield
    except NotImplementedError as error:  # Deflate64, which Windows writes
        hint = "unpack it with 7-Zip, and give the folder to `unetrkit check`"
        raise UserError(f"`{archive}` is compressed in a way that Python cannot read", hint=hint) from error
    except DAMAGE as error:
        raise _refused(archive, f"is damaged or no archive: {error}") from error


def _refused(archive: Path, why: str) -> UserError:
    return UserError(f"`{archive}` {why}", hint="nothing of it is used; remove it, and run the command again")
