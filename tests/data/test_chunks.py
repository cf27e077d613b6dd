"""Arrays in files of chunks: what is read is what was written, or an error."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from unetrkit.data.chunks import ChunkedArray, Damaged, write_chunks

RNG = np.random.default_rng(3)


def written(tmp_path: Path, array: np.ndarray, chunk: tuple[int, int, int] = (8, 8, 8)) -> ChunkedArray:
    path = tmp_path / "image.chunks"
    path.unlink(missing_ok=True)
    return ChunkedArray(path, write_chunks(path, array, chunk))


@pytest.mark.parametrize("shape", [(1, 17, 8, 23), (3, 1, 2, 3), (2, 16, 16, 16), (1, 0, 3, 1)])
@pytest.mark.parametrize("dtype", [np.float16, np.uint8, np.int32])
def test_the_whole_is_what_was_written(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    array = RNG.integers(0, 200, shape).astype(dtype)
    read = written(tmp_path, array).whole()
    assert read.dtype == dtype and np.array_equal(read, array)


def test_any_window_is_that_part_of_the_whole(tmp_path: Path) -> None:
    array = RNG.normal(size=(2, 33, 19, 40)).astype(np.float16)
    stored = written(tmp_path, array[:, ::-1])  # not contiguous
    array = array[:, ::-1]
    for _ in range(200):
        start = [int(RNG.integers(0, n)) for n in array.shape[1:]]
        size = [int(RNG.integers(0, n - a + 1)) for a, n in zip(start, array.shape[1:], strict=True)]
        window = array[:, *(slice(a, a + n) for a, n in zip(start, size, strict=True))]
        assert np.array_equal(stored.read(start, size), window)


@pytest.mark.parametrize(
    "window", [((-1, 0, 0), (2, 2, 2)), ((0, 0, 8), (1, 1, 3)), ((0, 0, 0), (11, 10, 10))]
)
def test_a_window_that_leaves_the_array_is_refused(tmp_path: Path, window: tuple) -> None:
    stored = written(tmp_path, np.zeros((1, 10, 10, 10), np.uint8))
    with pytest.raises(ValueError, match="not inside"):
        stored.read(*window)


def test_every_changed_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    stored = written(tmp_path, RNG.integers(0, 4, (1, 9, 9, 9)).astype(np.uint8))
    content = stored.path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << int(RNG.integers(8))
        stored.path.write_bytes(changed)
        with pytest.raises(Damaged, match=r"image.chunks` is damaged"):
            ChunkedArray(stored.path, stored.layout).whole()
    for other in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        stored.path.write_bytes(other)
        with pytest.raises(Damaged):
            ChunkedArray(stored.path, stored.layout).verify()
    stored.path.unlink()
    with pytest.raises(Damaged, match="No such file"):
        ChunkedArray(stored.path, stored.layout).whole()


def test_only_the_chunks_of_the_window_are_read(tmp_path: Path) -> None:
    stored = written(tmp_path, RNG.normal(size=(1, 32, 32, 32)).astype(np.float16))
    content = bytearray(stored.path.read_bytes())
    content[-1] ^= 1  # of the last chunk
    stored.path.write_bytes(content)
    stored.read((0, 0, 0), (32, 32, 24))
    with pytest.raises(Damaged, match="chunk 63"):
        stored.read((31, 31, 31), (1, 1, 1))


def test_a_pickled_array_reads_the_same(tmp_path: Path) -> None:
    array = RNG.normal(size=(1, 9, 9, 9)).astype(np.float16)
    stored = written(tmp_path, array)
    stored.whole()
    assert np.array_equal(pickle.loads(pickle.dumps(stored)).whole(), array)
