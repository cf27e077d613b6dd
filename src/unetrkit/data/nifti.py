"""NIfTI-1, NIfTI-2 and FreeSurfer MGH: nibabel reads the headers, and every compressed byte is checked here.

nibabel stops at the last voxel and never sees the gzip checksum behind it: one flipped byte gave wrong values
in half of a volume, without an error. Here the stream is read to its end.
"""

import gzip
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.nifti1 import Nifti1Extension, Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from unetrkit.data.geometry import same_grid
from unetrkit.data.source import (
    GEOMETRY,
    GZIP,
    Header,
    Source,
    checked_header,
    file_size,
    not_an_image,
    pieces,
    read_bytes,
    refused,
    require_length,
)

NIFTI = (".nii", ".nii.gz", ".hdr", ".img")
AnyHeader = Nifti1Header | Nifti2Header
LARGEST_OFFSET = 2**26  # bytes of header extensions in front of the voxels
SILENT = logging.getLogger("unetrkit.nifti")  # nibabel tells its logger what it mends in a header
SILENT.addHandler(logging.NullHandler())
SILENT.propagate = False


def open_nifti(path: Path) -> Source:
    """Checks the header of a NIfTI file or pair (`.hdr` with `.img`, either may be named)."""
    header = template(path)
    pair = path.suffix.lower() in (".hdr", ".img")
    offset = float(header["vox_offset"])
    dimensions = int(header["dim"][0])
    if not 1 <= dimensions <= 7:
        raise refused(path, f"has a damaged header: it declares {dimensions} dimensions")
    if not 0 <= offset <= LARGEST_OFFSET:
        raise refused(path, f"has a damaged header: its voxels begin at byte {offset:.6g}")
    if not pair:  # 0 stands for "right behind the header" in files of some writers
        offset = max(offset, 544 if isinstance(header, Nifti2Header) else 352)
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as error:
        raise refused(path, f"has a damaged header: {error}") from error
    dims = header["dim"][1 : 1 + dimensions].tolist()
    checked = checked_header(path, dims, header.get_data_dtype(), *_affine(path, header))
    scale = (1.0, 0.0) if slope is None else (slope, intercept)
    files = (_sibling(path, ".hdr"), _sibling(path, ".img")) if pair else (path,)
    return _source(files, checked, int(offset), *scale)


def open_mgh(path: Path) -> Source:
    """Checks the header of a FreeSurfer volume, `.mgh` or `.mgz`."""
    block = _first_bytes(path, 284)
    if len(block) < 284 or int.from_bytes(block[:4], "big") != 1:
        raise not_an_image(path, block, "a FreeSurfer MGH file")
    header = MGHHeader(block, check=False)
    missing = "the header has no orientation: FreeSurfer's default is assumed"
    notes = [] if header["goodRASFlag"] else [missing]
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            dtype, affine = header.get_data_dtype(), header.get_affine()
    except (HeaderDataError, KeyError, ValueError) as error:
        raise refused(path, f"has a damaged header: {error}") from error
    return _source((path,), checked_header(path, header["dims"].tolist(), dtype, affine, notes), 284)


def template(path: Path) -> AnyHeader:
    """The header of a NIfTI file or pair as nibabel's object, mended as nibabel does, without extensions."""
    path = _sibling(path, ".hdr") if path.suffix.lower() == ".img" else path
    block = _first_bytes(path, 540)
    kinds = {348: Nifti1Header, 540: Nifti2Header}
    sizes = {order: int.from_bytes(block[:4], order) for order in ("little", "big")}
    found = next((order for order, size in sizes.items() if size in kinds), None)
    if found is None or len(block) < sizes[found]:
        raise not_an_image(path, block, "a NIfTI file")
    header = kinds[sizes[found]](block[: sizes[found]], endianness=found, check=False)
    steps = header["pixdim"][1 : 1 + min(3, max(1, int(header["dim"][0])))]
    if not (np.isfinite(steps).all() and (steps != 0).all()):
        words = "x".join(f"{step:g}" for step in steps)
        raise refused(path, f"has a voxel size of {words} in its header (pixdim)", GEOMETRY)
    if header["magic"].item() == b"" and path.suffix.lower() == ".hdr":
        raise refused(path, "is an Analyze 7.5 file: its left and right are not known", "convert it to NIfTI")
    try:
        header.check_fix(logger=SILENT, error_level=40)
    except HeaderDataError as error:
        raise refused(path, f"has a damaged header: {error}") from error
    return header


def new_template(affine: np.ndarray) -> Nifti1Header:
    """A NIfTI-1 header for an affine in millimetres; its codes say scanner coordinates."""
    header = Nifti1Header()
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner", strip_shears=True)
    header.set_xyzt_units("mm")
    return header


def encode_label(label: np.ndarray, header: AnyHeader, names: Mapping[int, str], compressed: bool) -> bytes:
    """A NIfTI file of label ids (x, y, z) with the geometry, codes, units and description of `header`."""
    header = header.as_byteswapped("<")
    kind = nib.Nifti2Image if isinstance(header, Nifti2Header) else nib.Nifti1Image
    header["magic"], header["vox_offset"] = kind.header_class.single_magic, 0  # `header` may be of a pair
    header["cal_min"] = header["cal_max"] = 0
    header.set_data_dtype(label.dtype)
    header.set_intent("label", (), "labels")
    text = json.dumps({"labels": {str(value): name for value, name in sorted(names.items())}})
    header.extensions.append(Nifti1Extension("comment", text.encode()))
    content = kind(label, None, header).to_bytes()  # no affine: that of the header stays, bit for bit
    return gzip.compress(content, compresslevel=4, mtime=0) if compressed else content


def encode_image(image: np.ndarray, affine: np.ndarray) -> bytes:
    """A compressed NIfTI file of an image (x, y, z) on a grid in millimetres."""
    header = new_template(affine)
    header.set_data_dtype(image.dtype)
    content = nib.Nifti1Image(image, None, header).to_bytes()
    return gzip.compress(content, compresslevel=4, mtime=0)


def _wbits(path: Path) -> int:
    return GZIP if path.name.lower().endswith((".gz", ".mgz")) else 0


def _source(
    files: tuple[Path, ...], header: Header, offset: int, slope: float = 1.0, intercept: float = 0.0
) -> Source:
    path = files[-1]
    require_length(path, header, offset, _wbits(path))

    def stored() -> np.ndarray:
        content = read_bytes(path, _wbits(path), offset, header.count * header.dtype.itemsize)
        return content.view(header.dtype).reshape(header.channels, *header.shape[::-1])  # c z y x

    return Source(header, stored, files, slope, intercept)


def _first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file, decompressed where its name says that it is compressed."""
    file_size(path)
    block = b""
    for piece in pieces(path, _wbits(path)):
        block += piece
        if len(block) >= count:
            break
    return block[:count]


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # the result is checked afterwards
def _affine(path: Path, header: AnyHeader) -> tuple[np.ndarray, list[str]]:
    """The sform, else the qform, else the voxel sizes alone; and what is to be said about them."""
    notes = []
    unit = int(header["xyzt_units"]) & 7
    if unit in (1, 3):
        name = "metre" if unit == 1 else "micrometre"
        notes.append(f"the header's unit of length is the {name}; it is read as millimetres")
    sform = header.get_sform() if header["sform_code"] > 0 else None
    qform = None
    if header["qform_code"] > 0:
        try:
            qform = header.get_qform()
        except (ValueError, HeaderDataError) as error:
            if sform is None:
                raise refused(path, f"has a damaged header: its qform is no rotation ({error})") from error
            notes.append("the qform is no rotation; the sform is used")
    if sform is not None and qform is not None and np.isfinite(sform).all():
        shape = [int(n) for n in header["dim"][1:4]]
        difference = same_grid(sform, shape, qform, shape, tolerance_voxels=0.1)
        if difference:
            notes.append(f"the qform is not the geometry of the sform ({difference}); the sform is used")
    if sform is not None:
        return sform, notes
    if qform is not None:
        return qform, notes
    notes.append("the header has no orientation (sform and qform codes are 0), only voxel sizes")
    return header.get_base_affine(), notes


def _sibling(path: Path, suffix: str) -> Path:
    return path if path.suffix.lower() == suffix else path.with_suffix(suffix)
