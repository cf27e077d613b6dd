"""What every format gives: a checked header, and voxels read when asked for, from checked streams."""

from __future__ import annotations

import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from unetrkit.data.files import read_problems
from unetrkit.data.geometry import Triple, spacing_of
from unetrkit.errors import UserError

LARGEST = 2**30  # voxels of all channels together: 512 x 512 x 4096, 4 GB as float32
FORMATS = ".nii, .nii.gz, .hdr with .img, .mgz, .mgh, .nrrd, .mha, .mhd, or a folder with one DICOM series"
CHUNK = 2**20  # bytes
DEFLATE_LIMIT = 1032  # a byte of deflate makes at most that many
RENEW = "copy it again from where it comes from, or export it again"
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

    A voxel's value is slope * stored + intercept.
    """

    header: Header
    stored: Callable[[], np.ndarray]
    slope: float = 1.0
    intercept: float = 0.0


def file_size(path: Path) -> int:
    """Bytes of a regular file; raises UserError for anything else (a pipe or a device may never end)."""
    with read_problems(path):
        try:
            status = path.stat()
        except ValueError as error:  # a NUL in the name
            raise UserError(f"{str(path)!r} is not a file name", hint="correct the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"`{path}` is not a regular file", hint="give an image file, or the folder of one DICOM series"
        )
    return status.st_size


def bad_header(path: Path, reason: object) -> UserError:
    """The error for a header that contradicts itself or its format."""
    return UserError(f"`{path}` has a damaged header: {reason}", hint=RENEW)


def not_an_image(path: Path, start: bytes, expected: str) -> UserError:
    """The error for a file that is not of the format of its name; its first bytes show what it is."""
    if not start:
        return UserError(f"`{path}` is empty (0 bytes)", hint=RENEW)
    if start.startswith(b"version https://git-lfs"):
        return UserError(f"`{path}` is a Git LFS pointer, not the file itself", hint="git lfs pull")
    if start.lstrip()[:1] == b"<":
        return UserError(
            f"`{path}` is a web page, not {expected}",
            hint="the download failed: open it in a text editor to see why",
        )
    if start[128:132] == b"DICM":
        return UserError(
            f"`{path}` is a DICOM file, not {expected}",
            hint="give the folder that holds the slices of one series",
        )
    return UserError(
        f"`{path}` is not {expected}: it begins with {start[:8]!r}", hint=f"readable are {FORMATS}"
    )


def checked_header(
    path: Path, dims: Sequence[int], dtype: np.dtype, affine: np.ndarray, notes: Sequence[str] = ()
) -> Header:
    """The header of a file with the axes (x, y, z[, channels]); raises UserError where it cannot be used."""
    dims = [int(n) for n in dims]
    words = "x".join(map(str, dims))
    if len(dims) < 3:
        raise UserError(
            f"`{path}` is not a volume: its shape is {words}", hint="a single slice is stored as (x, y, 1)"
        )
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    if len(dims) > 4:
        raise UserError(
            f"`{path}` has {len(dims)} dimensions: {words}",
            hint="three, or four with the channels last, can be read",
        )
    if min(dims) < 1:
        raise UserError(f"`{path}` has no voxels: its shape is {words}", hint=RENEW)
    if dtype.kind not in "iufb":
        what = {"c": "complex numbers", "V": "colours (RGB)"}.get(dtype.kind, f"values of type {dtype}")
        raise UserError(
            f"`{path}` holds {what}", hint="convert it to one number per voxel, or to one file per channel"
        )
    affine = np.array(affine, dtype=np.float64)
    header = Header(
        (dims[0], dims[1], dims[2]), dims[3] if len(dims) == 4 else 1, affine, dtype, tuple(notes)
    )
    if header.count > LARGEST:
        raise UserError(
            f"`{path}` declares {words} voxels, {header.count * dtype.itemsize / 2**30:.3g} GB",
            hint=f"at most {LARGEST:.2g} voxels are read; is the header damaged?",
        )
    if not (np.isfinite(affine).all() and np.abs(affine).max() < 1e9):
        raise UserError(
            f"`{path}` has an affine with values that are not finite, or huge",
            hint="write the geometry of the original image into it",
        )
    spacing = spacing_of(affine)
    if not all(1e-4 < step < 1e4 for step in spacing):
        raise UserError(
            f"`{path}` has a spacing of {spacing} mm", hint="write the geometry of the original image into it"
        )
    if abs(np.linalg.det(affine[:3, :3] / np.asarray(spacing))) < 1e-3:
        raise UserError(
            f"`{path}` has a singular affine: two of its axes are parallel",
            hint="write the geometry of the original image into it",
        )
    return header


def inflate(file: BinaryIO, wbits: int) -> Iterator[bytes]:
    """The decompressed pieces of a gzip (wbits 31) or zlib (15) stream, 1 MB each, verified to its end.

    Raises zlib.error where the stream is damaged (the checksum included) and EOFError where it is cut.
    """
    stream = zlib.decompressobj(wbits)
    data = file.read(CHUNK)
    while data:
        yield stream.decompress(data, CHUNK)
        if not stream.eof:
            data = stream.unconsumed_tail or file.read(CHUNK)
        elif wbits == 31 and (data := (stream.unused_data or file.read(CHUNK)).lstrip(b"\0")):
            stream = zlib.decompressobj(wbits)  # gzip files may be several in a row; zeros are padding
        else:
            return
    yield stream.flush()
    if not stream.eof:
        raise EOFError


def gather(path: Path, pieces: Iterable[bytes], offset: int, size: int, *, keep: bool = True) -> np.ndarray:
    """`size` bytes from `offset` on, as uint8 (empty unless `keep`).

    Reads to the end, so that checksums are seen, but not more than `SLACK` beyond the declared size.
    """
    content = np.empty(size if keep else 0, dtype=np.uint8)
    position = -offset
    for piece in pieces:
        begin, end = max(0, -position), min(len(piece), size - position)
        if keep and begin < end:
            content[position + begin : position + end] = np.frombuffer(piece, np.uint8)[begin:end]
        position += len(piece)
        if position > size + SLACK:
            raise UserError(
                f"`{path}` holds more than the {size} bytes of voxels its header declares",
                hint=RENEW,
            )
    if position < size:
        raise UserError(
            f"`{path}` is truncated: {max(0, position)} of {size} bytes of voxels are there",
            hint=RENEW,
        )
    return content


def damaged(path: Path, error: Exception) -> UserError:
    """The error for a compressed stream that cannot be read to its end."""
    if isinstance(error, EOFError):
        return UserError(f"`{path}` is truncated: its compressed data ends early", hint=RENEW)
    reason = str(error).partition(": ")[2] or str(error)
    return UserError(
        f"`{path}` is damaged: its compressed data is not readable ({reason})",
        hint=RENEW,
    )
