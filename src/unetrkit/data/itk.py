"""NRRD and MetaImage by SimpleITK (extra `io`), behind checks of our own.

SimpleITK reads a truncated file without an error and puts zeros for what is missing. ITK's space is LPS+
(left, posterior, superior); what leaves this module is RAS+.
"""

import re
from pathlib import Path

import numpy as np

from unetrkit.data.files import read_problems
from unetrkit.data.geometry import LPS_TO_RAS
from unetrkit.data.source import (
    CONVERT,
    GZIP,
    ZLIB,
    Source,
    checked_header,
    file_size,
    not_an_image,
    read_bytes,
    refused,
    require_length,
)
from unetrkit.errors import MissingExtra

LONGEST_TEXT = 2**16  # bytes of a text header
REWRITE = "write it as one `.nrrd` or `.mha` file, compressed or raw"
Data = tuple[Path, int, int]  # where the voxels are: file, first byte, and `wbits` of the compression


def open_itk(path: Path) -> Source:
    """Checks the header of a `.nrrd`, `.nhdr`, `.mha` or `.mhd` file, and that its data can be that long."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise MissingExtra(f"reading `{path}`", "io") from error
    with read_problems(path), open(path, "rb") as file:
        start = file.read(LONGEST_TEXT)
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    (data, begin, wbits), notes = _nrrd(path, start) if nrrd else (_meta_image(path, start), [])
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if nrrd else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise refused(path, f"has a damaged header: {_reason(error)}") from error
    size = reader.GetSize()
    if len(size) != 3:
        words = "x".join(map(str, size))
        raise refused(path, f"has {len(size)} dimensions: {words}", "write one file per channel, or NIfTI")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    dtype = _dtype(path, sitk.GetPixelIDValueAsString(reader.GetPixelIDValue()))
    dims = (*size, reader.GetNumberOfComponents())
    header = checked_header(path, dims, dtype, LPS_TO_RAS @ affine, notes)
    require_length(data, header, begin, wbits)

    def stored() -> np.ndarray:
        if wbits:  # ITK itself does not look at the checksum
            read_bytes(data, wbits, 0, header.count * dtype.itemsize, begin)
        try:
            array = sitk.GetArrayFromImage(reader.Execute())  # z y x [c]
        except RuntimeError as error:
            raise refused(path, f"cannot be read: {_reason(error)}") from error
        return np.ascontiguousarray(np.moveaxis(array, -1, 0)) if array.ndim == 4 else array[None]  # c z y x

    return Source(header, stored, tuple(dict.fromkeys((path, data))))


def _nrrd(path: Path, start: bytes) -> tuple[Data, list[str]]:
    """`key: value` lines up to an empty one, then the voxels (teem.sourceforge.net/nrrd/format.html)."""
    if not start.startswith(b"NRRD"):
        raise not_an_image(path, start, "an NRRD file")
    end = re.search(rb"\r?\n\r?\n|\Z", start)
    assert end is not None
    fields = _fields(start[: end.start()], ":")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise refused(path, f"has the encoding `{encoding}`", REWRITE)
    if "rgb" in fields.get("kinds", "").lower():
        raise refused(path, "holds colours (RGB)", CONVERT)
    for name in ("line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(name, "0") != "0":
            raise refused(path, f"has a damaged header: `{name}` is `{fields[name]}`", REWRITE)
    notes = [] if "space directions" in fields else ["the header has no orientation, only voxel sizes"]
    wbits = 0 if encoding == "raw" else GZIP
    detached = fields.get("data file", fields.get("datafile"))
    if detached is not None:
        return (_detached(path, detached), 0, wbits), notes
    if not end.group():
        raise refused(path, "is truncated: its header has no end")
    return (path, end.end(), wbits), notes


def _meta_image(path: Path, start: bytes) -> Data:
    """`key = value` lines, the last of which says where the voxels are (itk.org/Wiki/MetaIO)."""
    end = re.search(rb"ElementDataFile\s*=\s*([^\r\n]*)\r?\n?", start)
    if end is None:
        raise not_an_image(path, start, "a MetaImage file")
    fields = {name: value.lower() for name, value in _fields(start[: end.start()], "=").items()}
    if fields.get("binarydata", "true") not in ("true", "1"):
        raise refused(path, "stores its voxels as text", REWRITE)
    if fields.get("headersize", "0") != "0":
        raise refused(path, f"has a damaged header: `HeaderSize` is `{fields['headersize']}`", REWRITE)
    wbits = ZLIB if fields.get("compresseddata") in ("true", "1") else 0
    where = end.group(1).decode("latin-1").strip()
    return (path, end.end(), wbits) if where.upper() == "LOCAL" else (_detached(path, where), 0, wbits)


def _fields(text: bytes, separator: str) -> dict[str, str]:
    pairs = (line.partition(separator) for line in text.decode("latin-1").splitlines())
    return {name.strip().lower(): value.lstrip("=").strip() for name, _, value in pairs}


def _detached(path: Path, name: str) -> Path:
    """The data file beside a header: a plain name in the same folder, nothing that leads elsewhere."""
    if name.split()[:1] in (["LIST"], ["SKIPLIST"]) or "%" in name:
        raise refused(path, "spreads its voxels over several files", REWRITE)
    if not name or Path(name).name != name:
        raise refused(path, f"has its voxels in another folder: `{name}`", REWRITE)
    file_size(path.with_name(name))
    return path.with_name(name)


def _dtype(path: Path, name: str) -> np.dtype:
    """SimpleITK's words for a pixel type, such as `vector of 16-bit signed integer`, as a NumPy type."""
    bits = re.search(r"(\d+)-bit", name)
    if bits is None or "complex" in name or "label" in name:
        raise refused(path, f"holds values of the type `{name}`", CONVERT)
    kind = "f" if "float" in name else "u" if "unsigned" in name else "i"
    return np.dtype(f"{kind}{int(bits.group(1)) // 8}")


def _reason(error: RuntimeError) -> str:
    """The last line of ITK's report, which is the one that says something."""
    return re.sub(r"^ITK ERROR: \w+\(0x[0-9a-f]+\): ", "", str(error).strip().splitlines()[-1].strip())
