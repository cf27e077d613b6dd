"""NRRD and MetaImage by SimpleITK (extra `io`), behind checks of our own.

SimpleITK reads a truncated file without an error and puts zeros for what is missing. ITK's space is LPS+
(left, posterior, superior); what leaves this module is RAS+.
"""

from __future__ import annotations

import bz2
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from unetrkit.data.files import read_problems
from unetrkit.data.geometry import LPS_TO_RAS
from unetrkit.data.source import (
    CHUNK,
    DEFLATE_LIMIT,
    RENEW,
    SLACK,
    Source,
    bad_header,
    checked_header,
    damaged,
    file_size,
    gather,
    inflate,
    not_an_image,
)
from unetrkit.errors import MissingExtra, UserError

LONGEST_TEXT = 2**16  # bytes of a text header


@dataclass(frozen=True)
class _Data:
    """Where the voxels of a file are: `offset` None means at the very end."""

    path: Path
    offset: int | None
    encoding: str  # raw, gzip, zlib, bzip2
    notes: tuple[str, ...] = ()


def open_itk(path: Path) -> Source:
    """Checks the header of a `.nrrd`, `.nhdr`, `.mha` or `.mhd` file, and that its data can be that long."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise MissingExtra(f"reading `{path}`", "io") from error
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    data = _nrrd_data(path) if nrrd else _meta_data(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise bad_header(path, _reason(error)) from error
    size, dimension = reader.GetSize(), reader.GetDimension()
    dtype = _dtype(path, sitk.GetPixelIDValueAsString(reader.GetPixelIDValue()))
    if dimension != 3:
        raise UserError(
            f"`{path}` has {dimension} dimensions: {'x'.join(map(str, size))}",
            hint="write one file per channel, or NIfTI with the channels as its fourth dimension",
        )
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    channels = reader.GetNumberOfComponents()
    header = checked_header(path, (*size, channels), dtype, LPS_TO_RAS @ affine, data.notes)
    wanted = header.count * dtype.itemsize
    on_disk = file_size(data.path) - (data.offset or 0)
    # bzip2 can reach 10^5 times and more, so only its stream can tell
    possible = {"raw": on_disk, "bzip2": wanted}.get(data.encoding, on_disk * DEFLATE_LIMIT + SLACK)
    if wanted > possible:
        raise UserError(
            f"`{data.path}` is truncated: {wanted} bytes of voxels are declared, the file has {on_disk}",
            hint=RENEW,
        )

    def stored() -> np.ndarray:
        if data.encoding != "raw":
            _verify(data, wanted)
        try:
            image = reader.Execute()
        except RuntimeError as error:
            raise UserError(f"`{path}` cannot be read: {_reason(error)}", hint=RENEW) from error
        array = sitk.GetArrayFromImage(image)  # z y x [c]
        return np.ascontiguousarray(np.moveaxis(array, -1, 0)) if array.ndim == 4 else array[None]  # c z y x

    return Source(header, stored)


def _verify(data: _Data, wanted: int) -> None:
    """Reads a compressed stream to its end: `wanted` bytes and the checksum must be there."""
    with read_problems(data.path), open(data.path, "rb") as file:
        file.seek(data.offset or 0)
        pieces = (
            _bunzip(file)
            if data.encoding == "bzip2"
            else inflate(file, 31 if data.encoding == "gzip" else 15)
        )
        try:
            gather(data.path, pieces, 0, wanted, keep=False)
        except (zlib.error, EOFError, OSError) as error:
            raise damaged(data.path, error) from error


def _bunzip(file: BinaryIO) -> Iterator[bytes]:
    stream = bz2.BZ2Decompressor()
    while not stream.eof:
        chunk = file.read(CHUNK) if stream.needs_input else b""
        if stream.needs_input and not chunk:
            raise EOFError
        yield stream.decompress(chunk, CHUNK)


def _nrrd_data(path: Path) -> _Data:
    """`key: value` lines up to an empty one, then the voxels (teem.sourceforge.net/nrrd/format.html)."""
    start = _start(path, b"NRRD", "an NRRD file")
    end = re.search(rb"\r?\n\r?\n", start)
    text = start[: end.start()] if end else start
    fields: dict[str, str] = {}
    for line in text.decode("latin-1").splitlines()[1:]:
        key, colon, value = line.partition(":")
        if colon and not line.startswith("#"):
            fields[key.strip().lower()] = value.lstrip("=").strip()
    encoding = {"gz": "gzip", "bz2": "bzip2"}.get(
        fields.get("encoding", "").lower(), fields.get("encoding", "").lower()
    )
    if encoding not in ("raw", "gzip", "bzip2"):
        raise UserError(
            f"`{path}` has the encoding `{encoding}`", hint="write it with the encoding gzip or raw"
        )
    if "rgb" in fields.get("kinds", "").lower():
        raise UserError(
            f"`{path}` holds colours (RGB)",
            hint="convert it to one number per voxel, or to one file per channel",
        )
    notes = (
        ()
        if "space directions" in fields
        else ("the header has no orientation: only the voxel sizes are known",)
    )
    detached = fields.get("data file", fields.get("datafile"))
    if detached is None and not end:
        raise UserError(f"`{path}` is truncated: its header has no end", hint=RENEW)
    skip = _whole(path, fields, "byte skip", "byteskip")
    if _whole(path, fields, "line skip", "lineskip") or (skip and encoding != "raw"):
        raise UserError(
            f"`{path}` skips lines or bytes before its voxels", hint="write it as one `.nrrd` file"
        )
    begin = 0 if detached is not None or end is None else end.end()
    data = path if detached is None else _detached(path, detached)
    return _Data(data, None if skip == -1 else begin + skip, encoding, notes)


def _meta_data(path: Path) -> _Data:
    """`key = value` lines, the last of which says where the voxels are (itk.org/Wiki/MetaIO)."""
    start = _start(path, b"", "a MetaImage file")
    end = re.search(rb"ElementDataFile\s*=\s*([^\r\n]*)\r?\n?", start)
    if end is None:
        raise not_an_image(path, start, "a MetaImage file")
    fields: dict[str, str] = {}
    for line in start[: end.start()].decode("latin-1").splitlines():
        key, _, value = line.partition("=")
        fields[key.strip().lower()] = value.strip().lower()
    if fields.get("binarydata", "true") not in ("true", "1"):
        raise UserError(f"`{path}` stores its voxels as text", hint="write it with binary, compressed data")
    where = end.group(1).decode("latin-1").strip()
    local = where.upper() == "LOCAL"
    encoding = "zlib" if fields.get("compresseddata") in ("true", "1") else "raw"
    skip = _whole(path, fields, "headersize")
    offset = None if skip == -1 else (end.end() if local else 0) + skip
    return _Data(path if local else _detached(path, where), offset, encoding)


def _detached(path: Path, name: str) -> Path:
    """The data file beside a header: a plain name in the same folder, nothing that leads elsewhere."""
    if name.split()[:1] in (["LIST"], ["SKIPLIST"]) or "%" in name:
        raise UserError(
            f"`{path}` spreads its voxels over several files", hint="write it as one `.nrrd` or `.mha` file"
        )
    if not name or Path(name).name != name:
        raise UserError(
            f"`{path}` has its voxels in another folder: `{name}`",
            hint="write it as one `.nrrd` or `.mha` file",
        )
    file_size(path.with_name(name))
    return path.with_name(name)


def _whole(path: Path, fields: dict[str, str], *keys: str) -> int:
    """A number of bytes or lines to skip; -1 means that the data is at the very end."""
    text = next((fields[key] for key in keys if key in fields), "0")
    if not re.fullmatch(r"-1|\d{1,9}", text):
        raise bad_header(path, f"`{keys[0]}` is `{text}`")
    return int(text)


def _start(path: Path, magic: bytes, expected: str) -> bytes:
    with read_problems(path), open(path, "rb") as file:
        start = file.read(LONGEST_TEXT)
    if not start or not start.startswith(magic):
        raise not_an_image(path, start, expected)
    return start


def _dtype(path: Path, name: str) -> np.dtype:
    """SimpleITK's words for a pixel type, such as `vector of 16-bit signed integer`, as a NumPy type."""
    bits = re.search(r"(\d+)-bit", name)
    if bits is None or "complex" in name or "label" in name:
        raise UserError(
            f"`{path}` holds values of the type `{name}`", hint="convert it to one number per voxel"
        )
    kind = "f" if "float" in name else "u" if "unsigned" in name else "i"
    return np.dtype(f"{kind}{int(bits.group(1)) // 8}")


def _reason(error: RuntimeError) -> str:
    """The last line of ITK's report, which is the one that says something."""
    return re.sub(r"^ITK ERROR: \w+\(0x[0-9a-f]+\): ", "", str(error).strip().splitlines()[-1].strip())
