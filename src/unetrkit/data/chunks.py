"""One array in one file: compressed chunks that are read by themselves, each under a checksum.

A file is a table of (length, CRC-32) for each chunk, then the chunks (Blosc2, https://www.blosc.org). The
table's own CRC-32 is in the `Layout`, which whoever wrote the file keeps. CRC-32 finds every changed byte.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import blosc2
import numpy as np

from unetrkit.data.files import write_problems
from unetrkit.errors import UserError

Triple = tuple[int, int, int]

# Measured on a float16 CT of 199 x 199 x 159 (12.6 MB), 96 x 96 x 96 voxels a read, one thread: LZ4HC-5 1.7
# ms and 3.5 MB, LZ4-5 2.2 ms and 4.1 MB, ZSTD-1 4.9 ms and 3.2 MB; chunks of 64 voxels, LZ4HC-5: 1.9 ms. On
# noise of that size: LZ4HC-5 2.0 ms and 12.4 MB (64 voxels: 2.7 ms), LZ4-5 1.7 ms, ZSTD-1 4.5 ms and 10.5 MB.
# blosc2's own array file (LZ4-5, chunks of 64 voxels in blocks of 32): 1.7 ms on the CT, and unverified.
CHUNK: Triple = (32, 32, 32)
COMPRESSION = {
    "codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "filters_meta": [0],
    "nthreads": 1,
}  # fmt: skip


AGAIN = "run `unetrkit prepare` again: it redoes only this case"


class Damaged(UserError):
    """A file of a store is not as it was written."""

    def __init__(self, message: str, *, hint: str = AGAIN) -> None:
        super().__init__(message, hint=hint)


@dataclass(frozen=True)
class Layout:
    """What must be known to read a file of chunks; JSON-able."""

    shape: tuple[int, int, int, int]  # c x y z
    dtype: str
    chunk: Triple
    table: int  # CRC-32 of the table

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        c, x, y, z = values["shape"]
        i, j, k = values["chunk"]
        return cls((c, x, y, z), str(values["dtype"]), (i, j, k), values["table"])

    @cached_property
    def grid(self) -> Triple:
        """Number of chunks along each axis; the last chunk of an axis may be smaller."""
        x, y, z = (-(-n // step) for n, step in zip(self.shape[1:], self.chunk, strict=True))
        return x, y, z


def write_chunks(path: Path, array: np.ndarray, chunk: Triple = CHUNK) -> Layout:
    """Writes an array (c, x, y, z) to a new file, to the disk itself. Raises UserError where it cannot."""
    dtype = array.dtype.newbyteorder("<")
    layout = Layout(array.shape, dtype.str, chunk, 0)
    table = np.zeros((prod(layout.grid), 2), "<u4")
    with write_problems(path), open(path, "xb") as file:
        file.seek(table.nbytes)
        for n, place in enumerate(itertools.product(*map(range, layout.grid))):
            box = [slice(i * step, (i + 1) * step) for i, step in zip(place, chunk, strict=True)]
            voxels = np.ascontiguousarray(array[:, *box], dtype)
            packed = blosc2.compress2(voxels, typesize=dtype.itemsize, **COMPRESSION)
            table[n] = len(packed), zlib.crc32(packed)
            file.write(packed)
        file.seek(0)
        file.write(table.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return Layout(layout.shape, layout.dtype, chunk, zlib.crc32(table.tobytes()))


@dataclass(frozen=True)
class ChunkedArray:
    """An array (c, x, y, z) in a file of `write_chunks`. Nothing is kept open, no voxels are kept.

    A chunk's checksum is verified when this object first reads it: every time would cost 15 to 45 %.
    """

    path: Path
    layout: Layout
    _seen: bytearray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_seen", bytearray(prod(self.layout.grid)))

    def read(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """The window (c, *size) from voxel `start` on. Raises Damaged; ValueError outside the array."""
        layout = self.layout
        stop = [a + n for a, n in zip(start, size, strict=True)]
        if any(not 0 <= a <= b <= n for a, b, n in zip(start, stop, layout.shape[1:], strict=True)):
            raise ValueError(f"window {list(start)} + {list(size)} is not inside {list(layout.shape[1:])}")
        window = np.empty((layout.shape[0], *size), layout.dtype)
        buffer = np.empty(layout.shape[0] * prod(layout.chunk), layout.dtype)
        with self._open() as file:
            for place in itertools.product(*map(_range, start, stop, layout.chunk)):
                first = [i * step for i, step in zip(place, layout.chunk, strict=True)]
                last = [
                    min(a + step, n) for a, step, n in zip(first, layout.chunk, layout.shape[1:], strict=True)
                ]
                shape = (layout.shape[0], *(b - a for a, b in zip(first, last, strict=True)))
                voxels = buffer[: prod(shape)].reshape(shape)
                blosc2.decompress2(self._packed(file, place), voxels, nthreads=1)
                low, high = list(map(max, first, start)), list(map(min, last, stop))
                window[:, *map(_slice, low, high, start)] = voxels[:, *map(_slice, low, high, first)]
        return window

    def whole(self) -> np.ndarray:
        """The array."""
        return self.read((0, 0, 0), self.layout.shape[1:])

    def verify(self) -> None:
        """Reads every byte. Raises Damaged where one is not as it was written."""
        with self._open() as file:
            for place in np.ndindex(self.layout.grid):
                self._packed(file, place)

    def _packed(self, file: BinaryIO, place: tuple[int, ...]) -> bytes:
        """The chunk at a place of the grid of chunks, as it is compressed."""
        offsets, checksums = self._table
        n = (place[0] * self.layout.grid[1] + place[1]) * self.layout.grid[2] + place[2]
        file.seek(offsets[n])
        packed = file.read(offsets[n + 1] - offsets[n])
        if not self._seen[n]:
            if zlib.crc32(packed) != checksums[n]:
                raise Damaged(f"`{self.path}` is damaged: chunk {n} is not what was written")
            self._seen[n] = 1
        return packed

    @cached_property
    def _table(self) -> tuple[list[int], list[int]]:
        """Where each chunk begins, and where the last ends; their checksums."""
        count = len(self._seen)
        with self._open() as file:
            size, table = os.fstat(file.fileno()).st_size, file.read(8 * count)
        if zlib.crc32(table) != self.layout.table:
            raise Damaged(f"`{self.path}` is damaged: its table is not what was written")
        lengths, checksums = np.frombuffer(table, "<u4").reshape(count, 2).T
        offsets = list(itertools.accumulate(lengths.tolist(), initial=8 * count))
        if offsets[-1] != size:
            raise Damaged(f"`{self.path}` is damaged: it has {size} bytes, {offsets[-1]} were written")
        return offsets, checksums.tolist()

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        try:
            with open(self.path, "rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise Damaged(f"cannot read `{self.path}`: {error.strerror or error}") from error


def _range(start: int, stop: int, step: int) -> range:
    """The chunks that a window touches along one axis."""
    return range(start // step, -(-stop // step))


def _slice(low: int, high: int, origin: int) -> slice:
    return slice(low - origin, high - origin)
