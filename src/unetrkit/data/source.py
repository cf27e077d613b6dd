"""What every format gives: a checked header, and voxels read when asked for, from checked streams."""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unetrkit.data.files import read_problems
from unetrkit.data.geometry import Triple, spacing_of
from unetrkit.errors import UserError

LARGEST = 2**30  # voxels of all channels together: 512 x 512 x 4096, 4 GB as float32
FORMATS = ".nii, .nii.gz, .hdr with .img, .mgz, .mgh, .nrrd, .mha, .mhd, or a folder with one DICOM series"
CHUNK = 2**20  # bytes
DEFLATE_LIMIT = 1032  # a byte of deflate makes at most that many
RENEW = "copy it again from where it comes from, or export it again"
GEOMETRY = "write the geometry of the original image into it"
CONVERT = "convert it to one number per voxel, or to one file per channel"
GZIP, ZLIB = 31, 15  # zlib's `wbits`; 0 stands for no compression
SLACK = 2**24  # bytes allowed behind the voxels: FreeSurfer's tags, padding


@dataclass(frozen=True)
class Header:
    """What a file says about itself before a voxel is read.

    `dtype` is the stored type; `notes` are remarks about a geometry that may not be what was meant.
    """

    shape: Triple
    channels: int
    affine: np.ndarray
    dtype: np.dtype
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Voxels of all channels."""
        return int(np.prod((self.channels, *self.shape), dtype=object))


@dataclass(frozen=True)
class Source:
    """A file whose header has been checked, and `stored()`, which reads its voxels (c, z, y, x).

    A voxel's value is slope * stored + intercept. `files` are all that it is read from.
    """

    header: Header
    stored: Callable[[], np.ndarray]
    files: tuple[Path, ...]
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def scaled(self) -> bool:
        return (self.slope, self.intercept) != (1.0, 0.0)


def refused(path: Path, reason: object, hint: str = RENEW) -> UserError:
    """The error for a file that cannot be used."""
    return UserError(f"`{path}` {reason}", hint=hint)


def not_an_image(path: Path, start: bytes, expected: str) -> UserError:
    """The error for a file that is not of the format of its name; its first bytes show what it is."""
    if not start:
        return refused(path, "is empty (0 bytes)")
    if start.startswith(b"version https://git-lfs"):
        return refused(path, "is a Git LFS pointer, not the file itself", "git lfs pull")
    if start.lstrip()[:1] == b"<":
        return refused(path, "is a web page, no image", "the download failed: open it as text to see why")
    return refused(path, f"is not {expected}: it begins with {start[:8]!r}", f"readable are {FORMATS}")


def file_size(path: Path) -> int:
    """Bytes of a regular file; raises UserError for anything else (a pipe or a device may never end)."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise refused(path, "is not a regular file", "give an image file, or the folder of one DICOM series")
    with read_problems(path):
        try:
            return path.stat().st_size
        except ValueError as error:  # a NUL in the name
            raise UserError(f"{str(path)!r} is not a file name", hint="correct the path") from error


def checked_header(
    path: Path, dims: Sequence[int], dtype: np.dtype, affine: np.ndarray, notes: Sequence[str] = ()
) -> Header:
    """The header of a file with the axes (x, y, z[, channels]); raises UserError where it cannot be used."""
    dims = [int(n) for n in dims]
    words = "x".join(map(str, dims))
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if len(dims) < 3:
        raise refused(path, f"is not a volume: its shape is {words}", "a single slice is stored as (x, y, 1)")
    if len(dims) > 4:
        hint = "three, or four with the channels last, can be read"
        raise refused(path, f"has {len(dims)} dimensions: {words}", hint)
    if min(dims) < 1:
        raise refused(path, f"has no voxels: its shape is {words}")
    if dtype.kind not in "iuf":
        what = {"c": "complex numbers", "V": "colours (RGB)"}.get(dtype.kind, f"values of type {dtype}")
        raise refused(path, f"holds {what}", CONVERT)
    channels = dims[3] if len(dims) == 4 else 1
    affine = np.array(affine, dtype=np.float64)
    header = Header((dims[0], dims[1], dims[2]), channels, affine, dtype, tuple(notes))
    if header.count > LARGEST:
        hint = f"at most {LARGEST:.2g} voxels are read; is the header damaged?"
        gigabytes = header.count * dtype.itemsize / 2**30
        raise refused(path, f"declares {words} voxels, {gigabytes:.3g} GB", hint)
    if not (np.isfinite(affine).all() and np.abs(affine).max() < 1e9):
        raise refused(path, "has an affine with values that are not finite, or huge", GEOMETRY)
    spacing = spacing_of(affine)
    if not all(1e-4 < step < 1e4 for step in spacing):
        raise refused(path, f"has a spacing of {spacing} mm", GEOMETRY)
    if abs(np.linalg.det(affine[:3, :3] / np.asarray(spacing))) < 1e-3:
        raise refused(path, "has a singular affine: two of its axes are parallel", GEOMETRY)
    return header


def require_length(path: Path, header: Header, start: int, wbits: int) -> None:
    """Raises UserError where the file is too short for its header, before room is made for the voxels."""
    wanted, on_disk = header.count * header.dtype.itemsize, file_size(path)
    if wanted + start > (on_disk * DEFLATE_LIMIT + SLACK if wbits else on_disk):
        reason = f"is truncated: its header declares {wanted + start} bytes, the file has {on_disk}"
        raise refused(path, reason)


def pieces(path: Path, wbits: int, start: int = 0) -> Iterator[bytes]:
    """What follows byte `start` of a file, 1 MB at a time; a compressed stream is verified to its end."""
    with read_problems(path), open(path, "rb") as file:
        file.seek(start)
        data = file.read(CHUNK)
        if wbits == GZIP and data[:2] != b"\x1f\x8b":
            raise not_an_image(path, data, "compressed")
        stream = zlib.decompressobj(wbits) if wbits else None
        try:
            while data:
                yield stream.decompress(data, CHUNK) if stream else data
                if not stream:
                    data = file.read(CHUNK)
                elif not stream.eof:
                    data = stream.unconsumed_tail or file.read(CHUNK)
                elif wbits == GZIP and (data := (stream.unused_data or file.read(CHUNK)).lstrip(b"\0")):
                    # gzip files may be several in a row; zeros are padding
                    stream = zlib.decompressobj(wbits)
                else:
                    return
            if stream:
                yield stream.flush()
        except zlib.error as error:
            reason = str(error).partition(": ")[2] or str(error)
            raise refused(path, f"is damaged: its compressed data is not readable ({reason})") from error
        if stream and not stream.eof:
            raise refused(path, "is truncated: its compressed data ends early")


def read_bytes(path: Path, wbits: int, offset: int, size: int, start: int = 0) -> np.ndarray:
    """`size` bytes from `offset` on, as uint8, of what follows byte `start` of a file.

    A compressed stream is read to its end, so that its checksum is seen, but not more than `SLACK` beyond.
    """
    content = np.empty(size, dtype=np.uint8)
    position = -offset
    for piece in pieces(path, wbits, start):
        begin, end = max(0, -position), min(len(piece), size - position)
        if begin < end:
            content[position + begin : position + end] = np.frombuffer(piece, np.uint8)[begin:end]
        position += len(piece)
        if not wbits and position >= size:
            break
        if position > size + SLACK:
            raise refused(path, f"holds more than the {size} bytes of voxels its header declares")
    if position < size:
        raise refused(path, f"is truncated: {max(0, position)} of {size} bytes of voxels are there")
    return content
