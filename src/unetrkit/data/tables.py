"""A data set as a table of cases, CSV or TSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from unetrkit.data.declared import SPLITS, Entry
from unetrkit.data.files import LARGEST_JSON, read_problems
from unetrkit.errors import UserError


def read_table(path: Path) -> list[Entry]:
    """The cases of a table with a header; several images are several columns, or parted by `;`."""
    with read_problems(path), open(path, "rb") as file:
        content = file.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise UserError(
            f"`{path}` is larger than {LARGEST_JSON // 2**20} MB: this is not a table of cases",
            hint="give the table, not an image or an archive",
        )
    try:
        text = content.decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"`{path}` is not a table in UTF-8: {error}", hint="save it as CSV in UTF-8"
        ) from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    images = [k for k, name in enumerate(header) if re.fullmatch(r"image(_\d+)?", name)]
    if not images:
        raise UserError(
            f"`{path}` has no column `image` in its first line",
            hint="a header such as image,label,subject,split,fold",
        )
    images.sort(key=lambda k: int(header[k][6:] or 0))
    return [
        _entry(f"`{path.name}` line {number}", header, images, row)
        for number, row in enumerate(rows[1:], start=2)
        if any(cell.strip() for cell in row)
    ]


def _entry(where: str, header: Sequence[str], images: Sequence[int], row: Sequence[str]) -> Entry:
    if len(row) != len(header):
        raise UserError(
            f"{where} has {len(row)} cells, but the header has {len(header)}",
            hint="put quotes around a cell that holds a comma",
        )
    cells = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
    paths = [row[k].strip() for k in images]
    if len(paths) == 1:
        paths = [text.strip() for text in paths[0].split(";")]
    if not all(paths):
        raise UserError(f"{where} has no image", hint="fill in its column `image`, or remove the line")
    written, fold = cells.get("split") or "training", cells.get("fold", "")
    if written.lower() not in SPLITS:
        raise UserError(f"{where}: `{written}` is not a split", hint="training, validation or test")
    if fold and not re.fullmatch(r"[0-9]{1,4}", fold):
        raise UserError(
            f"{where}: `fold` must be a whole number from 0, found `{fold}`",
            hint="leave it empty to have folds made",
        )
    return Entry(
        where,
        tuple(paths),
        cells.get("label") or None,
        SPLITS[written.lower()],
        int(fold) if fold else None,
        cells.get("subject") or None,
    )
