"""report.html: one file that opens without a network, and says what was measured, on what, and how."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unetrkit.data.files import atomic_write
from unetrkit.evaluation import figures
from unetrkit.evaluation.provenance import Provenance, RunRecord
from unetrkit.evaluation.summary import Estimate, Summary
from unetrkit.evaluation.views import View

TEMPLATE = Path(__file__).with_name("report.html.j2")
STYLE = Path(__file__).with_name("report.css")
MOST_ROWS = 200  # of the table of cases
MOST_COLUMNS = 16  # organs in the table of cases


def write_report(
    path: Path, summary: Summary, provenance: Provenance, views: Sequence[View], record: RunRecord
) -> None:
    """Writes the report; all text is escaped, all pictures are inside."""
    cases = summary.worst_first()
    write_html(
        path,
        TEMPLATE,
        summary=summary,
        provenance=provenance,
        views=views,
        record=record,
        cases=cases[:MOST_ROWS],
        more_cases=max(0, len(cases) - MOST_ROWS),
        wide=len(summary.organs) <= MOST_COLUMNS,
        dice_picture=figures.dice_figure(summary),
        curves_picture=figures.curves_figure(record.curves),
        colours={"truth": figures.TRUTH, "prediction": figures.PREDICTION},
    )


def write_html(path: Path, template: Path, **values: Any) -> None:
    """Writes a page that holds all it needs; what is put into the template is escaped."""
    from jinja2 import Environment, StrictUndefined

    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"share": share, "measure": measure, "range": interval}
    page = jinja.from_string(template.read_text(encoding="utf-8"))
    atomic_write(path, page.render(style=STYLE.read_text(encoding="utf-8"), **values).encode())


def share(value: float | None) -> str:
    """A number from 0 to 1, or a dash where it is undefined.

    >>> share(0.87654), share(None)
    ('0.877', '–')
    """
    return "–" if value is None else f"{value:.3f}"


def measure(value: float | None) -> str:
    """Millimetres or millilitres to a figure that can be read.

    >>> measure(3.14159), measure(271.8), measure(None)
    ('3.14', '272', '–')
    """
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def interval(estimate: Estimate) -> str:
    """The confidence interval of a share.

    >>> interval(Estimate(0.5, 0.4, 0.625, 9)), interval(Estimate(0.5, None, None, 1))
    ('0.400–0.625', '–')
    """
    if estimate.low is None or estimate.high is None:
        return "–"
    return f"{estimate.low:.3f}–{estimate.high:.3f}"
