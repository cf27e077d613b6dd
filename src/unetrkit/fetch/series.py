"""Collections of TCIA: each DICOM series by NBIA's REST calls, checked, converted, one NIfTI a series.

NBIA's public calls need no client: `tcia-utils` brings pandas, IPython and DuckDB for two GETs, skips a
series whose folder exists even if half of it is missing, and verifies nothing.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

from unetrkit.data.files import read_json, write_problems
from unetrkit.data.volume import read_image, write_image
from unetrkit.errors import MissingExtra, UserError, many
from unetrkit.fetch.catalogue import Published
from unetrkit.fetch.download import get_json, get_zip, write_json
from unetrkit.fetch.unpack import unpack
from unetrkit.progress import Progress

REFUSED = "refused.json"  # series that are no volume, and why: localizers, missing slices, tilted gantries
FEW = 10  # slices; what has fewer is a localizer


@dataclass(frozen=True)
class Series:
    """One DICOM series. slices: gives the folder of its files, which is there only within the `with`."""

    subject: str
    uid: str
    slices: Callable[[Path], Iterator[Path]]

    @property
    def name(self) -> str:
        """Of its file: the subject, and what tells its series apart."""
        subject = re.sub(r"[^\w-]", "_", self.subject) or "subject"
        return f"{subject}_{hashlib.sha256(self.uid.encode()).hexdigest()[:8]}"


def series_of(data: Published, host: str, downloads: Path) -> list[Series]:
    """The series of a collection: those that the user put into `downloads`, else those that NBIA lists.

    Raises UserError where NBIA lists none: the collection is given on request.
    """
    by_hand = [_by_hand(folder) for folder in sorted({file.parent for file in downloads.rglob("*.dcm")})]
    if by_hand:
        return [one for one in by_hand if one is not None]
    found = []
    for collection, modality in data.what:
        query = urlencode({"Collection": collection, "Modality": modality})
        rows = get_json(f"{host}getSeries?{query}", f"the series of {collection}")
        try:
            large = [row for row in rows if int(row.get("ImageCount") or 0) >= FEW]
            listed = [(str(row["PatientID"]), str(row["SeriesInstanceUID"])) for row in large]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            hint = f"look at {data.page}"
            raise UserError(f"the answer about {collection} is no list of series", hint=hint) from error
        found += [Series(subject, uid, partial(_downloaded, host, uid)) for subject, uid in listed]
    if not found:
        hint = data.first or f"look at {data.page}"
        raise UserError(f"TCIA lists no series of `{data.name}`", hint=hint)
    return sorted(found, key=lambda one: (one.subject, one.uid))


def convert_series(found: list[Series], out: Path, progress: Progress) -> list[Series]:
    """Writes `out`/images/NAME.nii.gz for each series that is not there; gives those that are volumes."""
    images, refused_path = out / "images", out / REFUSED
    known = read_json(refused_path) if refused_path.exists() else {}
    refused = known if isinstance(known, dict) else {}
    with write_problems(images):
        images.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(found):
        path = images / f"{one.name}.nii.gz"
        progress(number, len(found), one.name)
        if path.exists() or one.uid in refused:
            continue
        with contextmanager(one.slices)(out) as folder:
            try:
                volume = read_image([folder])
            except MissingExtra:
                raise
            except UserError as why:
                refused[one.uid] = why.message.replace(str(folder), "the series")
                write_json(refused_path, refused)
                continue
        write_image(path, volume)
    progress(len(found), len(found), f"{many(len(refused), 'series')} refused" if refused else "")
    kept = [one for one in found if one.uid not in refused]
    if not kept:
        first = next(iter(refused.values()))
        raise UserError(f"none of the {len(found)} series is a volume: {first}", hint=f"see `{refused_path}`")
    return kept


def _downloaded(host: str, uid: str, out: Path) -> Iterator[Path]:
    """The files of one series, verified against the MD5 sums that come with them."""
    work = out / ".series"
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    with write_problems(work):
        work.mkdir(parents=True)
    try:
        archive = work / "series.zip"
        query = urlencode({"SeriesInstanceUID": uid})
        get_zip(f"{host}getImageWithMD5Hash?{query}", archive, f"the series {uid}")
        names = unpack(archive, work / "files", lambda path: path.name)
        sums = [work / "files" / name for name in names if name.lower().startswith("md5")]
        slices = [work / "files" / name for name in names if name.lower().endswith(".dcm")]
        stated = re.findall(r"\b[0-9a-f]{32}\b", " ".join(one.read_text("latin-1").lower() for one in sums))
        there = [hashlib.md5(one.read_bytes(), usedforsecurity=False).hexdigest() for one in slices]
        if not stated or sorted(stated) != sorted(there):
            raise UserError(
                f"the series {uid} arrived with {many(len(there), 'slice')} that are not the "
                f"{len(stated)} that TCIA sent",
                hint="run the command again: it goes on with this series",
            )
        for name in names:  # sums and licence are no slices
            if not name.lower().endswith(".dcm"):
                (work / "files" / name).unlink()
        yield work / "files"
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _by_hand(folder: Path) -> Series | None:
    """A series that the NBIA Data Retriever put into a folder of its own; None for what is no CT."""
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtra(f"reading the DICOM series `{folder}`", "io") from error

    def slices(out: Path) -> Iterator[Path]:
        yield folder

    first = min(folder.glob("*.dcm"))
    try:
        tags = ["PatientID", "SeriesInstanceUID", "Modality"]
        values = pydicom.dcmread(first, stop_before_pixels=True, specific_tags=tags)
        subject, uid, modality = (str(values.get(tag) or "") for tag in tags)
    except Exception as error:  # on damaged files pydicom raises nearly anything
        hint = "download its series again"
        raise UserError(f"`{first}` is not a readable DICOM file", hint=hint) from error
    return Series(subject, uid, slices) if modality == "CT" else None
