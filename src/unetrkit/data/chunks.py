"""One array in one file: compressed chunks that are read by themselves, each under a checksum.

A file is a table of (length, CRC-32) for each chunk, then the chunks (Blosc2, https://www.blosc.org). The
table's own CRC-32 is in the `Layout`, which whoever wrote the file keeps. CRC-32 finds every changed byte.
"""

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import blosc2
import numpy as np

from unetrkit.data.files import write_problems
from unetrkit.errors import UserError

Triple = tuple[int, int, int]

# Measured on four float16 CTs of 14 to 16 MB, windows of 96 x 96 x 96 voxels, one thread. Image, chunks of
# 32 x 32 x 64: LZ4-5 0.7 to 1.1 ms and 46 to 65 % of the size; LZ4HC-5 SHUFFLE 1.3 to 1.5 ms, 32 to 45 %;
# LZ4-5 BITSHUFFLE 1.7 to 2.2 ms, 42 to 52 %. Chunks of 32 voxels take 1.2 times as long, of 48 twice.
# Label, LZ4HC-5, 0.05 MB in any case: chunks of 64 in blocks of 32 KB 0.3 ms, in Blosc2's own blocks 0.6 ms,
# of 32 voxels 0.5 ms; asking for SHUFFLE, which does nothing to bytes: 1.5 ms. On centres it saves 27 %.
IMAGE_CHUNK: Triple = (32, 32, 64)
LABEL_CHUNK: Triple = (64, 64, 64)
NOISE = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.NOFILTER]}
RUNS = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.NOFILTER], "blocksize": 2**15}
COUNTS = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE]}
COMPRESSION = {"f": NOISE, "u": RUNS, "i": COUNTS}  # by the kind of number

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
    table: int = 0  # CRC-32 of the table

    @cached_property
    def grid(self) -> Triple:
        """Number of chunks along each axis; the last chunk of an axis may be smaller."""
        _, x, y, z = self.shape
        i, j, k = self.chunk
        return -(-x // i), -(-y // j), -(-z // k)


def write_chunks(path: Path, array: np.ndarray, chunk: Triple = IMAGE_CHUNK) -> Layout:
    """Writes an array (c, x, y, z) to a new file, to the disk itself. Raises UserError where it cannot."""
    dtype = array.dtype.newbyteorder("<")
    layout = Layout(array.shape, dtype.str, chunk)
    compression = COMPRESSION[dtype.kind] | {"filters_meta": [0], "nthreads": 1}
    table = np.zeros((prod(layout.grid), 2), "<u4")
    with write_problems(path), open(path, "xb") as file:
        file.seek(table.nbytes)
        for n, place in enumerate(np.ndindex(layout.grid)):
            box = [slice(i * step, (i + 1) * step) for i, step in zip(place, chunk, strict=True)]
            voxels = np.ascontiguousarray(array[:, *box], dtype)
            packed = blosc2.compress2(voxels, typesize=dtype.itemsize, **compression)
            table[n] = len(packed), zlib.crc32(packed)
            file.write(packed)
        file.seek(0)
        file.write(table.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return replace(layout, table=zlib.crc32(table.tobytes()))


@dataclass(frozen=True)
class ChunkedArray:
    """An array (c, x, y, z) in a file of `write_chunks`. Nothing is kept open, no voxels are kept.

    A chunk's checksum is verified when this object first reads it: every time would
    make reading an image take twice as long.
    """

    path: Path
    layout: Layout

    def read(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """The window (c, *size) from voxel `start` on. Raises Damaged; ValueError outside the array."""
        c, *shape = self.layout.shape
        stop = [a + n for a, n in zip(start, size, strict=True)]
        if any(not 0 <= a <= b <= n for a, b, n in zip(start, stop, shape, strict=True)):
            raise ValueError(f"window {list(start)} + {list(size)} is not inside {shape}")
        window = np.empty((c, *size), self.layout.dtype)
        if window.size == 0:
            return window
        buffer = np.empty(c * prod(self.layout.chunk), window.dtype)
        along_x, along_y, along_z = map(_pieces, start, stop, self.layout.chunk, shape)
        with self._open() as file:
            for x, y in itertools.product(along_x, along_y):
                row = (x.place * self.layout.grid[1] + y.place) * self.layout.grid[2]
                packed = self._packed(file, row + along_z[0].place, row + along_z[-1].place + 1)
                for z, chunk in zip(along_z, packed, strict=True):
                    voxels = buffer[: c * x.size * y.size * z.size].reshape(c, x.size, y.size, z.size)
                    blosc2.decompress2(chunk, voxels, nthreads=1)
                    window[:, x.target, y.target, z.target] = voxels[:, x.source, y.source, z.source]
        return window

    def whole(self) -> np.ndarray:
        """The array."""
        return self.read((0, 0, 0), self.layout.shape[1:])

    def verify(self) -> None:
        """Reads every byte. Raises Damaged where one is not as it was written."""
        _ = self._table
        with self._open() as file:
            for n in range(len(self._seen)):
                self._packed(file, n, n + 1)

    def _packed(self, file: BinaryIO, first: int, stop: int) -> list[memoryview]:
        """Chunks `first` to `stop` - 1, which lie side by side, as they are compressed."""
        offsets, checksums = self._table
        file.seek(offsets[first])
        # not a memory map: an error of the disk would end the process
        content = memoryview(file.read(offsets[stop] - offsets[first]))
        ends = [offset - offsets[first] for offset in offsets[first : stop + 1]]
        chunks = [content[a:b] for a, b in itertools.pairwise(ends)]
        for n, chunk in enumerate(chunks, first):
            if not self._seen[n]:
                if zlib.crc32(chunk) != checksums[n]:
                    raise Damaged(f"`{self.path}` is damaged: chunk {n} is not what was written")
                self._seen[n] = 1
        return chunks

    @cached_property
    def _seen(self) -> bytearray:
        """For each chunk, whether its checksum was verified."""
        return bytearray(prod(self.layout.grid))

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


class _Piece(NamedTuple):
    """Where a window and a chunk meet, along one axis."""

    place: int  # of the chunk
    size: int  # of the chunk; the last one may be smaller
    target: slice  # of the window
    source: slice  # of the chunk


def _pieces(start: int, stop: int, step: int, end: int) -> list[_Piece]:
    pieces = []
    for first in range(start - start % step, stop, step):
        last = min(first + step, end)
        low, high = max(first, start), min(last, stop)
        target, source = slice(low - start, high - start), slice(low - first, high - first)
        pieces.append(_Piece(first // step, last - first, target, source))
    return pieces
