"""One DICOM series as a volume (extra `io`): geometry from the headers by pydicom, pixels by SimpleITK.

The usual readers average the spacing over a missing slice and shear a tilted gantry straight. Here the slices
must form a grid: one orientation, one size, equal steps along the slices' normal.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unetrkit.data.files import read_problems
from unetrkit.data.geometry import LPS_TO_RAS
from unetrkit.data.source import Source, checked_header, file_size, refused
from unetrkit.errors import MissingExtra, UserError, many

# files that lie beside slices; everything else must be DICOM, or a damaged slice would just be missing
OTHER_FILES = ".txt .json .xml .csv .md .pdf .html .png .jpg .gz .nii .nrrd .mha .db .ini .log .zip".split()
# objects that belong to a series but hold no slices of it
OTHER_OBJECTS = "RTSTRUCT RTPLAN RTDOSE RTRECORD SEG SR PR KO REG FID DOC".split()
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
NUMBERS = {"Rows": 0, "Columns": 0, "BitsAllocated": 0, "PixelRepresentation": 0, "SamplesPerPixel": 1}
TOLERANCE = 0.1  # of a slice step, or of a pixel
CONVERT = "convert it to NIfTI, with dcm2niix for example"


@dataclass(frozen=True)
class _Slice:
    path: Path
    series: str  # modality and UID
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
    affine = np.eye(4)  # LPS
    affine[:3, 0] = first.directions[0] * first.spacing[0]
    affine[:3, 1] = first.directions[1] * first.spacing[1]
    affine[:3, 2] = _step(folder, slices, normal)
    affine[:3, 3] = slices[0].position
    dtype = np.result_type(*(one.stored for one in slices))
    header = checked_header(folder, (*first.size, len(slices)), dtype, LPS_TO_RAS @ affine)

    def stored() -> np.ndarray:
        values = np.empty((1, len(slices), first.size[1], first.size[0]), dtype=np.float32)  # c z y x
        for out, one in zip(values[0], slices, strict=True):
            out[...] = _pixels(one)
        return values

    return Source(header, stored, tuple(one.path for one in slices))


def _slices(folder: Path) -> list[_Slice]:
    with read_problems(folder):
        entries = sorted(folder.iterdir())
    files = [entry for entry in entries if not entry.is_dir() and not entry.name.startswith(".")]
    files = [f for f in files if f.suffix.lower() not in OTHER_FILES and f.name.upper() != "DICOMDIR"]
    slices = [one for path in files if (one := _read_slice(path)) is not None]
    if not slices:
        folders = ", ".join([entry.name for entry in entries if entry.is_dir()][:5])
        hint = f"give one of its folders: {folders}" if folders else "give the folder that holds the slices"
        raise refused(folder, "holds no DICOM slices of an image", hint)
    series = Counter(one.series for one in slices)
    if len(series) > 1:
        found = "; ".join(f"{name} ({count} files)" for name, count in series.most_common(10))
        hint = "put each series into a folder of its own"
        raise refused(folder, f"holds {len(series)} DICOM series: {found}", hint)
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
            numbers = (int(values.get(name) or default) for name, default in NUMBERS.items())
            rows, columns, bits, signed, samples = numbers
            frames = int(values.get("NumberOfFrames") or 1)
            place = [values.get(name) for name in PLACE]
            thickness = values.get("SpacingBetweenSlices") or values.get("SliceThickness") or 0
            names = (str(values.get(name) or "") for name in ("Modality", "SeriesInstanceUID"))
            modality, uid = (re.sub(r"[^\w.]", "?", name) for name in names)  # printable, on one line
    except UserError:
        raise
    except Exception as error:  # on damaged files pydicom raises nearly anything
        hint = "the folder of a series holds nothing but its slices"
        # without pydicom's own words, which may quote what is in the file about a patient
        raise refused(path, "is not a readable DICOM file", hint) from error
    if modality in OTHER_OBJECTS:
        return None
    if not (rows and columns and bits):
        raise refused(path, "is truncated or holds no image: it has no Rows")
    if frames > 1:
        raise refused(path, "is a multi-frame DICOM file", CONVERT)
    if samples != 1:
        raise refused(path, f"holds colours ({samples} samples per pixel)", "give CT, MR or PET slices")
    for name, value in zip(PLACE, place, strict=True):
        if not value:
            reason = f"has no {name}: its place in space is not known"
            raise refused(path, reason, "give CT, MR or PET slices")
    if not encoded and size - pixels_at < rows * columns * bits // 8:  # else the decoder notices: `_pixels`
        there = max(0, size - pixels_at)
        reason = f"is truncated: {there} of {rows * columns * bits // 8} bytes of pixels are there"
        raise refused(path, reason)
    try:
        position, directions, (between_rows, between_columns) = (np.array(v, dtype=float) for v in place)
        directions = directions.reshape(2, 3)
        stored = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
        thickness = float(thickness)
    except (TypeError, ValueError) as error:
        raise refused(path, f"has a damaged DICOM header: {error}") from error
    orthonormal = np.allclose(directions @ directions.T, np.eye(2), atol=1e-3)
    if position.shape != (3,) or not np.isfinite(position).all() or not orthonormal:
        raise refused(path, "has a damaged DICOM header: its position or its directions are no geometry")
    spacing = float(between_columns), float(between_rows)
    series = f"{modality or '?'} {uid or '(no UID)'}"
    return _Slice(path, series, (columns, rows), position, directions, spacing, thickness, stored)


def _check_alike(folder: Path, slices: list[_Slice]) -> None:
    first = slices[0]
    for one in slices[1:]:
        for what, same in (
            ("size", one.size == first.size),
            ("pixel spacing", np.allclose(one.spacing, first.spacing, rtol=1e-3)),
            ("orientation", np.allclose(one.directions, first.directions, atol=1e-3)),
        ):
            if not same:
                names = f"`{one.path.name}` has another {what} than `{first.path.name}`"
                raise refused(folder, f"is not one volume: {names}", "is a localizer among the slices?")


def _step(folder: Path, slices: list[_Slice], normal: np.ndarray) -> np.ndarray:
    """The vector (LPS mm) from each slice to the next; raises UserError where there is no such vector."""
    if len(slices) == 1:
        if slices[0].thickness <= 0:
            hint = "give the folder of a whole series"
            raise refused(folder, "holds a single slice without thickness", hint)
        return normal * slices[0].thickness
    positions = np.array([one.position for one in slices])
    along = positions @ normal
    gaps = np.diff(along)
    usual = float(np.median(gaps))

    def between(at: int) -> str:
        return f"`{slices[at].path.name}` and `{slices[at + 1].path.name}`"

    if gaps.min() < TOLERANCE * usual or usual <= 0:
        hint = "separate the echoes, phases or copies into folders of their own"
        raise refused(folder, f"has two slices at one position: {between(int(gaps.argmin()))}", hint)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    drift = positions - positions[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(drift, axis=1).max() > TOLERANCE * min(slices[0].spacing):
        degrees = np.degrees(np.arctan2(np.linalg.norm(step - (step @ normal) * normal), abs(step @ normal)))
        raise refused(
            folder,
            f"was taken with a tilted gantry: its slices are stacked {degrees:.3g} degrees off their normal",
            "resample it to an upright grid and save it as NIfTI, with dcm2niix for example",
        )
    # scanners that round positions to 0.1 mm make gaps that differ by 0.1 mm
    if np.abs(gaps - usual).max() > max(TOLERANCE * usual, min(0.11, 0.4 * usual)):
        at = int(np.abs(gaps - usual).argmax())
        missing = round(gaps[at] / usual) - 1
        what = f"misses {many(missing, 'slice')}" if missing > 0 else "has unevenly spaced slices"
        reason = f"{what}: {gaps[at]:.4g} mm instead of {usual:.4g} mm between {between(at)}"
        raise refused(folder, reason, "copy the whole series, or resample it to even steps")
    return step


def _pixels(one: _Slice) -> np.ndarray:
    """The values (y, x) of a slice, rescaled."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise MissingExtra(f"reading the DICOM slice `{one.path}`", "io") from error
    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(one.path), sitk.sitkFloat64, "GDCMImageIO"))
    except RuntimeError as error:
        reason = "cannot be decoded: its pixels are truncated, damaged or in an unknown compression"
        raise refused(one.path, reason, f"copy it again, or {CONVERT}") from error
    if array.shape != (1, one.size[1], one.size[0]):
        reason = f"decodes to {array.shape} pixels instead of the {one.size} of its header"
        raise refused(one.path, reason, CONVERT)
    return array[0]
