"""A data set as a table of cases, CSV or TSV."""

import csv
import io
import re
from pathlib import Path

from unetrkit.data.declared import SPLITS, Entry, declared_entry
from unetrkit.data.files import LARGEST_JSON, read_start
from unetrkit.errors import UserError

HINT = "give a table in UTF-8 with a header such as image,label,subject,split,fold"


def read_table(path: Path) -> list[Entry]:
    """The cases of a table with a header; several images are several columns, or parted by `;`."""
    content = read_start(path, LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        message = f"`{path}` is larger than {LARGEST_JSON // 2**20} MB: not a table of cases"
        raise UserError(message, hint=HINT)
    try:
        text = content.decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"`{path}` is not a table in UTF-8: {error}", hint=HINT) from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    images = [name for name in header if re.fullmatch(r"image(_\d+)?", name)]
    if not images:
        raise UserError(f"`{path}` has no column `image` in its first line", hint=HINT)
    images.sort(key=lambda name: int(name[6:] or 0))
    entries = []
    for number, row in enumerate(rows[1:], start=2):
        where = f"`{path.name}` line {number}"
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            message = f"{where} has {len(row)} cells, but the header has {len(header)}"
            raise UserError(message, hint="put quotes around a cell that holds a comma")
        # an empty cell says nothing
        cells = {name: cell.strip() for name, cell in zip(header, row, strict=True) if cell.strip()}
        paths = [cells.get(name, "") for name in images]
        paths = [text.strip() for text in paths[0].split(";")] if len(paths) == 1 else paths
        if not all(paths):
            raise UserError(f"{where} has no image", hint="fill in its column `image`, or remove the line")
        split, fold = cells.get("split", "training"), cells.get("fold", "")
        if split.lower() not in SPLITS:
            raise UserError(f"{where}: `{split}` is not a split", hint="training, validation or test")
        number_of_fold = int(fold) if re.fullmatch("[0-9]{1,4}", fold) else fold or None
        fields = cells | {"image": paths, "fold": number_of_fold}
        entries.append(declared_entry(where, fields, SPLITS[split.lower()], path.parent))
    return entries
