"""One DICOM series as a volume (extra `io`): geometry from the headers by pydicom, pixels by SimpleITK.

The usual readers average the spacing over a missing slice and shear a tilted gantry straight. Here the slices
must form a grid: one orientation, one size, equal steps along the slices' normal.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unetrkit.data.files import read_problems
from unetrkit.data.geometry import LPS_TO_RAS
from unetrkit.data.source import Source, checked_header, file_size
from unetrkit.errors import MissingExtra, UserError

# files that lie beside slices; everything else must be DICOM, or a damaged slice would just be missing
OTHER_FILES = frozenset(
    ".txt .json .xml .csv .md .pdf .html .png .jpg .gz .nii .nrrd .mha .db .ini .log .zip".split()
)
# objects that belong to a series but hold no slices of it
OTHER_OBJECTS = frozenset("RTSTRUCT RTPLAN RTDOSE RTRECORD SEG SR PR KO REG FID DOC".split())
TAGS = (
    "SeriesInstanceUID Modality Rows Columns SamplesPerPixel NumberOfFrames BitsAllocated "
    "PixelRepresentation ImagePositionPatient ImageOrientationPatient PixelSpacing "
    "SliceThickness SpacingBetweenSlices"
).split()
WHOLE = {
    "Rows": 0,
    "Columns": 0,
    "BitsAllocated": 0,
    "PixelRepresentation": 0,
    "SamplesPerPixel": 1,
    "NumberOfFrames": 1,
}
TEXT = ("SeriesInstanceUID", "Modality")
TOLERANCE = 0.1  # of a slice step, or of a pixel


@dataclass(frozen=True)
class _Slice:
    path: Path
    series: str
    modality: str
    size: tuple[int, int]  # columns (x), rows (y)
    position: np.ndarray  # 3, LPS mm
    directions: np.ndarray  # 2 3: along x, along y
    spacing: tuple[float, float]  # x, y
    thickness: float
    stored: np.dtype


def open_series(folder: Path) -> Source:
    """Checks the headers of the one series in a folder, of files without `.dcm` too; not of subfolders.

    Raises UserError for several series, missing, repeated or unevenly spaced slices, a tilted gantry, slices
    of different size or orientation, colour and multi-frame files.
    """
    slices = _slices(folder)
    first = slices[0]
    normal = np.cross(*first.directions)
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    _check_alike(folder, slices)
    step = _step(folder, slices, normal)
    affine = np.eye(4)  # LPS
    affine[:3, 0] = first.directions[0] * first.spacing[0]
    affine[:3, 1] = first.directions[1] * first.spacing[1]
    affine[:3, 2] = step
    affine[:3, 3] = slices[0].position
    dtype = np.result_type(*(one.stored for one in slices))
    header = checked_header(folder, (*first.size, len(slices)), dtype, LPS_TO_RAS @ affine)

    def stored() -> np.ndarray:
        values = np.empty((1, len(slices), first.size[1], first.size[0]), dtype=np.float32)  # c z y x
        for out, one in zip(values[0], slices, strict=True):
            out[...] = _pixels(one)
        return values

    return Source(header, stored)


def _slices(folder: Path) -> list[_Slice]:
    slices = []
    with read_problems(folder):
        entries = sorted(folder.iterdir())
    for path in entries:
        if (
            path.is_dir()
            or path.name.startswith(".")
            or path.name.upper() == "DICOMDIR"
            or path.suffix.lower() in OTHER_FILES
        ):
            continue
        one = _read_slice(path)
        if one is not None:
            slices.append(one)
    if not slices:
        folders = [entry.name for entry in entries if entry.is_dir()]
        hint = (
            f"give one of its folders: {', '.join(folders[:5])}"
            if folders
            else "give the folder that holds the slices"
        )
        raise UserError(f"`{folder}` holds no DICOM slices of an image", hint=hint)
    series = Counter((one.series, one.modality) for one in slices)
    if len(series) > 1:
        found = "; ".join(
            f"{kind} {uid or '(no UID)'} ({count} files)" for (uid, kind), count in series.most_common(10)
        )
        raise UserError(
            f"`{folder}` holds {len(series)} DICOM series: {found}",
            hint="put each series into a folder of its own",
        )
    return slices


def _read_slice(path: Path) -> _Slice | None:
    """The geometry of one file; None for an object that is no slice (a structure set, a report)."""
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtra(f"reading the DICOM series `{path.parent}`", "io") from error
    size = file_size(path)
    try:
        # the file is open so that we can see how long the pixels are that pydicom stops before
        with read_problems(path), open(path, "rb") as file, pydicom.config.disable_value_validation():
            values = pydicom.dcmread(file, stop_before_pixels=True)
            file.seek(12, 1)  # the tag and length of the pixels
            pixels_at = file.tell()
            syntax = values.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian)
            encoded = syntax.is_encapsulated or syntax.is_deflated
            if not encoded and syntax.is_implicit_VR:
                pixels_at -= 4  # its lengths are without a type
            found = {name: values.get(name) for name in TAGS}
            found |= {name: int(found[name] or default) for name, default in WHOLE.items()}
            # printable, on one line
            found |= {name: re.sub(r"[^\w.]", "?", str(found[name] or "")) for name in TEXT}
    except UserError:
        raise
    except Exception as error:  # on damaged files pydicom raises nearly anything
        raise UserError(  # without pydicom's own words, which may quote what is in the file about a patient
            f"`{path}` is not a readable DICOM file",
            hint="the folder of a series holds nothing but its slices",
        ) from error
    if found["Modality"] in OTHER_OBJECTS:
        return None
    if not (found["Rows"] and found["Columns"] and found["BitsAllocated"]):
        raise UserError(f"`{path}` is truncated or holds no image: it has no Rows", hint="copy it again")
    _check_kind(path, found)
    if not encoded:  # else the decoder notices, see `_pixels`
        wanted = found["Rows"] * found["Columns"] * found["BitsAllocated"] // 8
        there = size - pixels_at
        if there < wanted:
            raise UserError(
                f"`{path}` is truncated: {max(0, there)} of {wanted} bytes of pixels are there",
                hint="copy it again",
            )
    return _slice(path, found)


def _check_kind(path: Path, found: dict[str, Any]) -> None:
    if found["NumberOfFrames"] > 1:
        raise UserError(
            f"`{path}` is a multi-frame DICOM file", hint="convert it to NIfTI, with dcm2niix for example"
        )
    if found["SamplesPerPixel"] != 1:
        raise UserError(
            f"`{path}` holds colours ({found['SamplesPerPixel']} samples per pixel)",
            hint="CT, MR or PET slices are expected",
        )
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        if not found[name]:
            raise UserError(
                f"`{path}` has no {name}: its place in space is not known",
                hint="CT, MR or PET slices are expected",
            )


def _slice(path: Path, found: dict[str, Any]) -> _Slice:
    try:
        position = np.array([float(value) for value in found["ImagePositionPatient"]])
        directions = np.array([float(value) for value in found["ImageOrientationPatient"]]).reshape(2, 3)
        between_rows, between_columns = (float(value) for value in found["PixelSpacing"])
        thickness = float(found["SpacingBetweenSlices"] or found["SliceThickness"] or 0)
        stored = np.dtype(f"{'i' if found['PixelRepresentation'] else 'u'}{found['BitsAllocated'] // 8}")
    except (TypeError, ValueError) as error:
        raise UserError(f"`{path}` has a damaged DICOM header: {error}", hint="copy it again") from error
    orthonormal = np.allclose(directions @ directions.T, np.eye(2), atol=1e-3)
    if position.shape != (3,) or not np.isfinite(position).all() or not orthonormal:
        raise UserError(
            f"`{path}` has a damaged DICOM header: its position or its directions are no geometry",
            hint="copy it again",
        )
    return _Slice(
        path,
        found["SeriesInstanceUID"],
        found["Modality"] or "?",
        (found["Columns"], found["Rows"]),
        position,
        directions,
        (between_columns, between_rows),
        thickness,
        stored,
    )


def _check_alike(folder: Path, slices: list[_Slice]) -> None:
    first = slices[0]
    for one in slices[1:]:
        for what, same in (
            ("size", one.size == first.size),
            ("pixel spacing", np.allclose(one.spacing, first.spacing, rtol=1e-3)),
            ("orientation", np.allclose(one.directions, first.directions, atol=1e-3)),
        ):
            if not same:
                raise UserError(
                    f"`{folder}` is not one volume: "
                    f"`{one.path.name}` has another {what} than `{first.path.name}`",
                    hint="is a localizer among the slices?",
                )


def _step(folder: Path, slices: list[_Slice], normal: np.ndarray) -> np.ndarray:
    """The vector (LPS mm) from each slice to the next; raises UserError where there is no such vector."""
    if len(slices) == 1:
        if slices[0].thickness <= 0:
            raise UserError(
                f"`{folder}` holds a single slice without thickness", hint="give the folder of a whole series"
            )
        return normal * slices[0].thickness
    positions = np.array([one.position for one in slices])
    along = positions @ normal
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if gaps.min() < TOLERANCE * usual or usual <= 0:
        at = int(gaps.argmin())
        raise UserError(
            f"`{folder}` has two slices at one position: "
            f"`{slices[at].path.name}` and `{slices[at + 1].path.name}`",
            hint="separate the echoes, phases or copies into folders of their own",
        )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    drift = positions - positions[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(drift, axis=1).max() > TOLERANCE * min(slices[0].spacing):
        degrees = np.degrees(np.arctan2(np.linalg.norm(step - (step @ normal) * normal), abs(step @ normal)))
        raise UserError(
            f"`{folder}` was taken with a tilted gantry: "
            f"its slices are stacked {degrees:.3g} degrees away from their normal",
            hint="resample it to an upright grid and save it as NIfTI, with dcm2niix for example",
        )
    # scanners that round positions to 0.1 mm make gaps that differ by 0.1 mm
    if np.abs(gaps - usual).max() > max(TOLERANCE * usual, min(0.11, 0.4 * usual)):
        at = int(np.abs(gaps - usual).argmax())
        missing = round(gaps[at] / usual) - 1
        what = (
            f"misses {missing} slice{'s' if missing > 1 else ''}"
            if missing > 0
            else "has unevenly spaced slices"
        )
        raise UserError(
            f"`{folder}` {what}: {gaps[at]:.4g} mm instead of {usual:.4g} mm between "
            f"`{slices[at].path.name}` and `{slices[at + 1].path.name}`",
            hint="copy the whole series, or resample it to even steps",
        )
    return step


def _pixels(one: _Slice) -> np.ndarray:
    """The values (y, x) of a slice, rescaled."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise MissingExtra(f"reading the DICOM slice `{one.path}`", "io") from error
    try:
        image = sitk.ReadImage(str(one.path), sitk.sitkFloat64, "GDCMImageIO")
    except RuntimeError as error:
        raise UserError(
            f"the pixels of `{one.path}` cannot be decoded: truncated, damaged or in an unknown compression",
            hint="copy it again, or convert the series to NIfTI, with dcm2niix for example",
        ) from error
    array = sitk.GetArrayViewFromImage(image)
    if array.shape != (1, one.size[1], one.size[0]):
        raise UserError(
            f"`{one.path}` decodes to {array.shape} pixels instead of the {one.size} of its header",
            hint="export the series again, or convert it to NIfTI, with dcm2niix for example",
        )
    return array[0].copy()
