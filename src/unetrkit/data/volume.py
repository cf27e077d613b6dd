"""One reader for every image and label, and one writer for labels: NIfTI, MGH, NRRD, MetaImage, DICOM series.

What cannot be trusted is refused before anything is computed from it: damaged compression (nibabel and
SimpleITK return wrong voxels), voxels that are not finite, an affine that is no grid, sizes beyond what the
file can hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unetrkit.data.files import atomic_write, read_problems
from unetrkit.data.geometry import same_grid
from unetrkit.data.source import FORMATS, Header, Source, file_size
from unetrkit.errors import UserError

__all__ = ["Header", "Volume", "read_header", "read_image", "read_label", "write_label"]


@dataclass(frozen=True)
class Volume:
    """An array (c, x, y, z) and the affine (4, 4) from voxel indices (x, y, z) to RAS+ millimetres.

    The array may be stored in any memory order.
    """

    array: np.ndarray
    affine: np.ndarray


def read_header(path: Path) -> Header:
    """Shape, channels, affine and type of an image or label; no voxel is read.

    Raises UserError for a file that is missing, no image, 2D, RGB, complex, too large or without a geometry.
    """
    return open_source(path).header


def read_image(paths: Sequence[Path]) -> Volume:
    """An image as float32: one file (3D, or 4D with the channels last) or one file per channel on one grid.

    Raises UserError for everything `read_header` refuses, a damaged or truncated file, voxels that are not
    finite, and channels on different grids.
    """
    sources = [open_source(path) for path in paths]
    first = sources[0].header
    for path, source in zip(paths[1:], sources[1:], strict=True):
        difference = same_grid(first.affine, first.shape, source.header.affine, source.header.shape)
        if difference:
            raise UserError(
                f"`{path}` is not on the grid of `{paths[0]}`: {difference}",
                hint="resample the channels to one grid before",
            )
    if len(paths) > 1:
        for path, source in zip(paths, sources, strict=True):
            if source.header.channels != 1:
                raise UserError(
                    f"`{path}` has {source.header.channels} channels, but is one of {len(paths)} files",
                    hint="give one 4D file with all channels, or one 3D file per channel",
                )
    if len(paths) == 1:
        stored = _values(paths[0], sources[0])
    else:
        stored = np.empty((len(paths), *first.shape[::-1]), dtype=np.float32)
        for channel, path, source in zip(stored, paths, sources, strict=True):
            channel[...] = _values(path, source)[0]
    return Volume(stored.transpose(0, 3, 2, 1), first.affine)


def read_label(path: Path) -> Volume:
    """A label map (1, x, y, z) in the smallest of uint8, uint16 and int32.

    Values within 1e-3 of a whole number are rounded. Raises UserError for everything `read_image` refuses,
    several channels, negative values and fractions.
    """
    source = open_source(path)
    if source.header.channels != 1:
        raise UserError(
            f"`{path}` has {source.header.channels} channels; a label has one",
            hint="merge one mask per class into one file of label ids",
        )
    with _enough_memory(path, source.header):
        stored = source.stored()
        if stored.dtype.kind == "f" or (source.slope, source.intercept) != (1.0, 0.0):
            stored = _whole_numbers(path, stored, source)
    lowest, highest = int(stored.min()), int(stored.max())
    if lowest < 0:
        raise UserError(
            f"`{path}` has negative label values, down to {lowest}", hint="is it the image and not the label?"
        )
    if highest > np.iinfo(np.int32).max:
        raise UserError(
            f"`{path}` has label values up to {highest}, beyond int32",
            hint="is it the image and not the label?",
        )
    label = stored.astype(_smallest(highest), copy=False)
    return Volume(label.transpose(0, 3, 2, 1), source.header.affine)


def write_label(path: Path, label: np.ndarray, like: Path, names: Mapping[int, str]) -> None:
    """Writes a label (x, y, z) on the grid of `like`, `.nii` or `.nii.gz`, atomically, in the smallest type.

    Affine, sform and qform (with their codes), units and description of a NIfTI `like` stay as they are,
    bit for bit; from any other format the affine is rounded to float32. The names go into a header
    extension: a comment (code 6) with the JSON object {"labels": {id: name}}.
    """
    from unetrkit.data import nifti

    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"`{path}` cannot be written", hint="labels are written as `.nii.gz` or `.nii`")
    header = read_header(like)
    if label.shape != header.shape:
        raise ValueError(f"a label of {label.shape} is not on the grid of `{like}`, {header.shape}")
    if label.min() < 0:
        raise ValueError(f"label ids are not negative, found {label.min()}")
    label = label.astype(_smallest(int(label.max())), copy=False)
    has_codes = like.is_file() and like.name.lower().endswith(nifti.NIFTI)
    template = nifti.template(like) if has_codes else nifti.new_template(header.affine)
    atomic_write(
        path, nifti.encode_label(label, template, names, compressed=path.name.lower().endswith(".gz"))
    )


def open_source(path: Path) -> Source:
    """Chooses the format by name and checks the header; the voxels are read by `Source.stored`."""
    # the formats' libraries take a second to import
    if path.is_dir():
        from unetrkit.data.dicom import open_series

        return open_series(path)
    name = path.name.lower()
    size = file_size(path)
    if name.endswith((".nii", ".nii.gz", ".hdr", ".img")):
        from unetrkit.data.nifti import open_nifti

        return open_nifti(path)
    if name.endswith((".mgz", ".mgh")):
        from unetrkit.data.nifti import open_mgh

        return open_mgh(path)
    if name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
        from unetrkit.data.itk import open_itk

        return open_itk(path)
    with read_problems(path), open(path, "rb") as file:
        start = file.read(min(size, 132))
    if start[128:] == b"DICM":
        raise UserError(
            f"`{path}` is a single DICOM file", hint="give the folder that holds the slices of one series"
        )
    raise UserError(f"`{path}` is of an unknown format", hint=f"readable are {FORMATS}")


@contextmanager
def _enough_memory(path: Path, header: Header) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"`{path}` ({header.count} voxels) does not fit into memory",
            hint="crop or resample it, or use a machine with more memory",
        ) from error


def _values(path: Path, source: Source) -> np.ndarray:
    """The image's values (c, z, y, x), float32 and finite."""
    with _enough_memory(path, source.header):
        stored = source.stored()
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are counted below
            if (source.slope, source.intercept) == (1.0, 0.0):
                values = stored.astype(np.float32, copy=False)
            else:
                values = np.empty(stored.shape, dtype=np.float32)
                for index in np.ndindex(stored.shape[:2]):  # double precision, one slice at a time
                    values[index] = stored[index] * np.float64(source.slope) + source.intercept
        bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise UserError(
            f"`{path}` has {bad} of {values.size} voxels that are not finite (NaN or infinite)",
            hint="replace them by the background value",
        )
    return values


def _whole_numbers(path: Path, stored: np.ndarray, source: Source) -> np.ndarray:
    """Label values (1, z, y, x) that a file stores as fractions or with a scale, as int32."""
    whole = np.empty(stored.shape, dtype=np.int32)
    infinite = fractions = 0
    example = 0.0
    for out, voxels in zip(whole[0], stored[0], strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            values = voxels * np.float64(source.slope) + source.intercept
            finite = np.abs(values) < 2**31  # false for NaN
            infinite += int(values.size - np.count_nonzero(finite))
            values = np.where(finite, values, 0)
            rounded = np.rint(values)
            odd = np.abs(values - rounded) > 1e-3
        if odd.any():
            fractions += int(np.count_nonzero(odd))
            example = float(values[odd][0])
        out[...] = rounded
    if infinite:
        raise UserError(
            f"`{path}` has {infinite} label voxels that are NaN, infinite or beyond int32",
            hint="draw or resample the label again with whole numbers; is it the image and not the label?",
        )
    if fractions:
        raise UserError(
            f"`{path}` has {fractions} label voxels that are not whole numbers, such as {example:.6g}",
            hint="resample labels with nearest neighbour; is it the image and not the label?",
        )
    return whole


def _smallest(highest: int) -> type[np.integer]:
    return np.uint8 if highest < 2**8 else np.uint16 if highest < 2**16 else np.int32
