"""Broken scans, made from a good image and label: what failed downloads, exports and hands do to files."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

Break = Callable[[Path, Path], None]  # changes the image and/or the label file in place


def _edit(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    """Rewrite a NIfTI file with another array and affine."""
    image = nib.load(path)
    array, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.Nifti1Image(array, affine).to_filename(path)


def _header(path: Path, offset: int, form: str, *values: float) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)))


def _flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def _set(value: float) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def change(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        array = array.astype(np.float32)
        array[2:5, 3:6, 4:6] = value
        return array, affine

    return change


def _moved(by_mm: float) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def change(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        affine[0, 3] += by_mm
        return array, affine

    return change


def _affine(value: float) -> Callable[[Path], None]:
    """Write srow_x by hand: nibabel itself would refuse."""

    def write(path: Path) -> None:
        _header(path, 280, "<12f", *([value] * 12))
        _header(path, 252, "<2h", 0, 1)

    return write


def _structured(dtype: list[tuple[str, str]] | str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        image = nib.load(path)
        array = np.zeros(image.shape, np.dtype(dtype))
        nib.Nifti1Image(array, image.affine).to_filename(path)

    return write


def _bomb(path: Path) -> None:
    """A small file that inflates to 200 MB behind a header of 20x20x20 voxels."""
    image = nib.Nifti1Image(np.zeros((20, 20, 20), np.uint8), np.eye(4))
    path.write_bytes(gzip.compress(image.to_bytes() + bytes(200_000_000), compresslevel=9))


def _giant(path: Path) -> None:
    _header(path, 40, "<8h", 3, 32000, 32000, 32000, 1, 1, 1, 1)


def on_image(write: Callable[[Path], None]) -> Break:
    return lambda image, label: write(image)


def on_label(write: Callable[[Path], None]) -> Break:
    return lambda image, label: write(label)


def edit(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Callable[[Path], None]:
    return lambda path: _edit(path, change)


def _swap(image: Path, label: Path) -> None:
    first, second = image.read_bytes(), label.read_bytes()
    image.write_bytes(second)
    label.write_bytes(first)


def _as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


BAD_SCANS: dict[str, Break] = {
    "truncated gzip": on_image(lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size * 6 // 10])),
    "truncated label": on_label(lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size * 6 // 10])),
    "no bytes": on_image(lambda p: p.write_bytes(b"")),
    "web page": on_image(lambda p: p.write_bytes(b"<!DOCTYPE html><html>404</html>")),
    "gzip of text": on_image(lambda p: p.write_bytes(gzip.compress(b"hello " * 500))),
    "large-file pointer": on_image(
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x\n")
    ),
    "not gzip": on_image(lambda p: p.write_bytes(gzip.decompress(p.read_bytes()))),
    "one flipped byte": on_image(_flip_byte),
    "flipped byte in the label": on_label(_flip_byte),
    "missing image": on_image(Path.unlink),
    "missing label": on_label(Path.unlink),
    "directory for an image": on_image(_as_directory),
    "NaN voxels": on_image(edit(_set(np.nan))),
    "infinite voxels": on_image(edit(_set(np.inf))),
    "constant image": on_image(edit(lambda a, m: (np.zeros_like(a), m))),
    "another shape": on_label(edit(lambda a, m: (a[:, :, :-1], m))),
    "shifted 30 mm": on_label(edit(_moved(30))),
    "mirrored affine": on_label(edit(lambda a, m: (a, m @ np.diag([-1, 1, 1, 1])))),
    "singular affine": on_image(_affine(0.0)),
    "NaN affine": on_image(_affine(float("nan"))),
    "4D label": on_label(edit(lambda a, m: (np.stack([a, a], -1), m))),
    "one channel too many": on_image(edit(lambda a, m: (np.stack([a, a], -1), m))),
    "2D image": on_image(edit(lambda a, m: (a[:, :, 0], m))),
    "5D image": on_image(edit(lambda a, m: (np.stack([a[..., None]] * 2, -1), m))),
    "label out of range": on_label(edit(lambda a, m: (np.where(a == 6, 77, a).astype(np.uint8), m))),
    "negative label": on_label(edit(lambda a, m: (np.where(a == 6, -1, a.astype(np.int16)), m))),
    "fractional label": on_label(edit(_set(2.5))),
    "NaN label": on_label(edit(_set(np.nan))),
    "colour image": on_image(_structured([("R", "u1"), ("G", "u1"), ("B", "u1")])),
    "complex image": on_image(_structured("complex64")),
    "header of 32000^3 voxels": on_image(_giant),
    "decompression bomb": on_image(_bomb),
    "bad magic": on_image(lambda p: _header(p, 344, "<4s", b"xxxx")),
    "bad datatype": on_image(lambda p: _header(p, 70, "<h", 9999)),
    "bad dimensions": on_image(lambda p: _header(p, 40, "<8h", 3, -5, 20, 20, 1, 1, 1, 1)),
    "image and label swapped": _swap,
}
