"""One reader for every image and label, and one writer for labels: NIfTI, MGH, NRRD, MetaImage, DICOM series.

What cannot be trusted is refused before anything is computed from it: damaged compression (nibabel and
SimpleITK return wrong voxels), voxels that are not finite, an affine that is no grid, sizes beyond what the
file can hold.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unetrkit.data.dicom import open_series
from unetrkit.data.files import atomic_write
from unetrkit.data.geometry import same_grid
from unetrkit.data.itk import open_itk
from unetrkit.data.source import FORMATS, Header, Source, file_size, refused

NO_LABEL = "is it the image and not the label?"


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


def files_of(path: Path) -> tuple[Path, ...]:
    """Every file that an image or label is read from: header and voxels of a pair, the slices of a series.

    Raises UserError for everything that `read_header` refuses.
    """
    return open_source(path).files


def read_image(paths: Sequence[Path]) -> Volume:
    """An image as float32: one file (3D, or 4D with the channels last) or one file per channel on one grid.

    Raises UserError for everything `read_header` refuses, a damaged or truncated file, voxels that are not
    finite, and channels on different grids.
    """
    sources = [open_source(path) for path in paths]
    first = sources[0].header
    if len(paths) == 1:
        return Volume(_values(paths[0], sources[0]).transpose(0, 3, 2, 1), first.affine)
    for path, source in zip(paths, sources, strict=True):
        header = source.header
        if difference := same_grid(first.affine, first.shape, header.affine, header.shape):
            reason = f"is not on the grid of `{paths[0]}`: {difference}"
            raise refused(path, reason, "resample the channels to one grid before")
        if header.channels != 1:
            hint = "give one 4D file with all channels, or one 3D file per channel"
            raise refused(path, f"has {header.channels} channels, but is one of {len(paths)} files", hint)
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
        hint = "merge one mask per class into one file of label ids"
        raise refused(path, f"has {source.header.channels} channels; a label has one", hint)
    if source.header.dtype.kind == "f" or source.scaled:
        values = _values(path, source)
        stored = np.rint(values)
        odd = np.abs(values - stored) > 1e-3
        if odd.any():
            count, example = np.count_nonzero(odd), float(values[odd][0])
            reason = f"has {count} label voxels that are not whole numbers, such as {example:.6g}"
            raise refused(path, reason, f"resample labels with nearest neighbour; {NO_LABEL}")
    else:
        with _enough_memory(path, source):
            stored = source.stored()
    lowest, highest = int(stored.min()), int(stored.max())
    if lowest < 0:
        raise refused(path, f"has negative label values, down to {lowest}", NO_LABEL)
    if highest > np.iinfo(np.int32).max:
        raise refused(path, f"has label values up to {highest}, beyond int32", NO_LABEL)
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
        raise refused(path, "cannot be written", "labels are written as `.nii.gz` or `.nii`")
    header = read_header(like)
    if label.shape != header.shape:
        raise ValueError(f"a label of {label.shape} is not on the grid of `{like}`, {header.shape}")
    if label.min() < 0:
        raise ValueError(f"label ids are not negative, found {label.min()}")
    label = label.astype(_smallest(int(label.max())), copy=False)
    has_codes = like.is_file() and like.name.lower().endswith(nifti.NIFTI)
    template = nifti.template(like) if has_codes else nifti.new_template(header.affine)
    atomic_write(path, nifti.encode_label(label, template, names, path.name.lower().endswith(".gz")))


def write_image(path: Path, volume: Volume) -> None:
    """Writes an image of one channel as `.nii.gz`, atomically; as int16 where that changes no voxel.

    The affine is rounded to float32, as NIfTI stores it.
    """
    from unetrkit.data import nifti

    (values,) = volume.array
    whole = np.rint(values)
    fits = -(2**15) <= values.min() and values.max() < 2**15 and np.array_equal(whole, values)
    atomic_write(path, nifti.encode_image(whole.astype(np.int16) if fits else values, volume.affine))


def open_source(path: Path) -> Source:
    """Chooses the format by name and checks the header; the voxels are read by `Source.stored`."""
    from unetrkit.data import nifti  # nibabel takes a second to import

    if path.is_dir():
        return open_series(path)
    file_size(path)
    name = path.name.lower()
    if name.endswith(nifti.NIFTI):
        return nifti.open_nifti(path)
    if name.endswith((".mgz", ".mgh")):
        return nifti.open_mgh(path)
    if name.endswith((".nrrd", ".nhdr", ".mha", ".mhd")):
        return open_itk(path)
    if name.endswith((".dcm", ".ima")):
        hint = "give the folder that holds the slices of one series"
        raise refused(path, "is a single DICOM file", hint)
    raise refused(path, "is of an unknown format", f"readable are {FORMATS}")


@contextmanager
def _enough_memory(path: Path, source: Source) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        hint = "crop or resample it, or use a machine with more memory"
        raise refused(path, f"({source.header.count} voxels) does not fit into memory", hint) from error


def _values(path: Path, source: Source) -> np.ndarray:
    """The values (c, z, y, x), float32 and finite."""
    # infinities are counted below
    with _enough_memory(path, source), np.errstate(over="ignore", invalid="ignore"):
        stored = source.stored()
        if source.scaled:
            values = np.empty(stored.shape, dtype=np.float32)
            for index in np.ndindex(stored.shape[:2]):  # double precision, one slice at a time
                values[index] = stored[index] * np.float64(source.slope) + source.intercept
        else:
            values = stored.astype(np.float32, copy=False)
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        reason = f"has {bad} of {values.size} voxels that are not finite (NaN or infinite)"
        raise refused(path, reason, "replace them by the background value")
    return values


def _smallest(highest: int) -> type[np.integer]:
    return np.uint8 if highest < 2**8 else np.uint16 if highest < 2**16 else np.int32
