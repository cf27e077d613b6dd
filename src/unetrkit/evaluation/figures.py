"""The report's pictures, drawn without a display: Dice per organ, training curves, slices with outlines."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from unetrkit.evaluation.summary import Summary
from unetrkit.evaluation.surface import bounding_box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# told apart by people with any colour vision, on grey as on white
TRUTH, PREDICTION = "#22c1ee", "#ff9416"
INK, FAINT, ACCENT = "#1f2933", "#cbd2d9", "#2f6fb5"
MARGIN_MM = 60.0
# axis cut, axis across, axis up, letters at the left, right, bottom, top: the patient's right is on the left,
# as radiologists look at it
PLANES = {"axial": (2, 0, 1, "RLPA"), "coronal": (1, 0, 2, "RLIS"), "sagittal": (0, 1, 2, "APIS")}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unetrkit",
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def dice_figure(summary: Summary) -> str | None:
    """Dice of every case by organ: a box between the quartiles, the median, a point for each case.

    None where no organ has a Dice.
    """
    organs = [o for o in summary.organs if o.estimates["dice"].count]
    if not organs:
        return None
    with new_figure(9.6, 0.8 + 0.34 * len(organs)) as figure:
        axes = figure.add_subplot()
        for row, organ in enumerate(organs):
            k = summary.organs.index(organ)
            scores = np.array([s for case in summary.cases if (s := case.organs[k].dice) is not None])
            low, median, high = np.percentile(scores, [25, 50, 75])
            axes.barh(row, high - low, left=low, height=0.56, color="#dbe7f5", zorder=1)
            axes.plot([median, median], [row - 0.28, row + 0.28], color=ACCENT, linewidth=2, zorder=2)
            # points side by side, in an order that has nothing to do with the score
            offsets = (np.arange(len(scores)) * 0.618 % 1 - 0.5) * 0.4 if len(scores) > 1 else np.zeros(1)
            axes.plot(scores, row + offsets, "o", markersize=3, color=INK, alpha=0.55, mew=0, zorder=3)
        axes.set_yticks(range(len(organs)), [o.name for o in organs])
        axes.set_ylim(len(organs) - 0.5, -0.5)
        axes.set_xlim(-0.015, 1.015)
        axes.set_xlabel("Dice")
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        return _svg(figure)


def curves_figure(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss, learning rate and Dice by step, whichever the log has; None where it has none of them."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in _numbers(record) if isinstance(record.get("step"), int) else ():
            series.setdefault(name, []).append((record["step"], value))
    panels: list[tuple[str, dict[str, list[tuple[int, float]]]]] = []
    for word, title in (("loss", "Loss"), ("dice", "Dice"), ("lr", "Learning rate")):
        chosen = {name: series.pop(name) for name in list(series) if word in name.lower()}
        panels += [(title, chosen)] if chosen else []
    return panels_figure(panels)


def panels_figure(panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[int, float]]]]]) -> str | None:
    """Panels of curves by step, three in a row: (title, name -> points); None where there are none."""
    if not panels:
        return None
    rows = -(-len(panels) // 3)
    columns = min(3, len(panels))
    with new_figure(3.6 * columns, 2.5 * rows) as figure:
        for place, (title, chosen) in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, place)
            for name, points in list(chosen.items())[:6]:
                _curve(axes, name, np.array(points))
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("step")
            axes.grid(color=FAINT, linewidth=0.5)
            axes.tick_params(length=0)
            if len(chosen) > 1:
                axes.legend(frameon=False, fontsize=8)
        return _svg(figure)


def slices_figure(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    window: tuple[float, float] | None = None,
) -> list[str]:
    """Three planes through an organ, a picture each: truth solid, prediction dashed, on the image.

    All arrays are (x, y, z) in RAS+ axes, the masks boolean and not both empty; `spacing` in mm. `window` is
    the range of intensities from black to white; by default the 1st to 99th percentile of what is shown.
    """
    from matplotlib.lines import Line2D

    dashed: Any = (0, (2.2, 1.4))
    drawn: dict[str, tuple[np.ndarray, str, Any]] = {
        "truth": (truth, TRUTH, "-"),
        "prediction": (prediction, PREDICTION, dashed),
    }
    centre = organ_centre(truth if truth.any() else prediction)
    margins = [round(MARGIN_MM / step) for step in spacing]
    box = zip(bounding_box(truth | prediction), margins, image.shape, strict=True)
    reach = [(max(0, one.start - margin), min(size, one.stop + margin)) for one, margin, size in box]
    low, high = window or np.percentile(image[tuple(slice(*r) for r in reach)], [1, 99])
    handles = [
        Line2D([], [], color=colour, linestyle=style, label=name)
        for name, (_, colour, style) in drawn.items()
    ]
    pictures = []
    for name, (cut, across, up, letters) in PLANES.items():
        with new_figure(3.4, 3.75, face="#101418") as figure:
            axes = figure.add_subplot()
            plane = tuple(centre[a] if a == cut else slice(*reach[a]) for a in range(3))
            left, right, bottom, top = (edge * spacing[a] for a in (across, up) for edge in reach[a])
            extent = (left, right, bottom, top)
            axes.imshow(image[plane].T, "gray", vmin=low, vmax=high, origin="lower", extent=extent)
            for mask, colour, style in drawn.values():
                _outline(axes, mask[plane].T, extent, colour, style)
            axes.set(xlim=(right, left), ylim=(bottom, top))  # R, or A, on the left
            axes.set_axis_off()
            axes.set_title(name, color="white", fontsize=9)
            _letters(axes, letters)
            legend: dict[str, Any] = {"ncols": 2, "frameon": False, "labelcolor": "white"}
            figure.legend(handles=handles, loc="outside lower center", **legend)
            pictures.append(_webp(figure))
    return pictures


def organ_centre(mask: np.ndarray) -> tuple[int, int, int]:
    """The voxel of a mask that is nearest to its centroid: a hollow or bent organ is cut, not missed.

    >>> ring = np.ones((3, 3, 1), bool)
    >>> ring[1, 1, 0] = False
    >>> bool(ring[organ_centre(ring)])
    True
    """
    voxels = np.argwhere(mask)
    x, y, z = voxels[((voxels - voxels.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return int(x), int(y), int(z)


def _outline(
    axes: Axes, mask: np.ndarray, extent: tuple[float, float, float, float], colour: str, style: Any
) -> None:
    """The edge of a 2D mask along its voxels' sides, so that what is seen is what was measured."""
    if not mask.any():
        return
    fine = 5  # a contour cuts corners by half a cell: by a tenth of a voxel
    cells = np.pad(np.kron(mask, np.ones((fine, fine))), 1)
    across, up = (
        np.linspace(a - (b - a) / n / 2, b + (b - a) / n / 2, n + 2)
        for a, b, n in ((*extent[:2], cells.shape[1] - 2), (*extent[2:], cells.shape[0] - 2))
    )
    axes.contour(across, up, cells, levels=[0.5], colors=[colour], linestyles=[style], linewidths=1.5)


def _letters(axes: Axes, letters: str) -> None:
    """The patient's sides at the edges of a plane."""
    from matplotlib.patheffects import withStroke

    style: dict[str, Any] = {"color": "#ffe08a", "fontsize": 9, "fontweight": "bold"}
    style |= {"transform": axes.transAxes, "path_effects": [withStroke(linewidth=2, foreground="black")]}
    sides = [(0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center")]
    ends = [(0.5, 0.02, "center", "bottom"), (0.5, 0.98, "center", "top")]
    for letter, (x, y, horizontal, vertical) in zip(letters, sides + ends, strict=True):
        axes.text(x, y, letter, ha=horizontal, va=vertical, **style)


def _curve(axes: Axes, name: str, points: np.ndarray) -> None:
    step, value = points.T
    keep = np.unique(np.linspace(0, len(step) - 1, 1000).astype(int))
    if len(step) < 60:
        axes.plot(step, value, ".-", markersize=4, linewidth=1.2, label=name)
        return
    width = len(step) // 30
    # the mean of the last `width` values: what a person following the training sees
    total = np.cumsum(np.insert(value, 0, 0.0))
    first = np.maximum(np.arange(1, len(value) + 1) - width, 0)
    smooth = (total[1:] - total[first]) / (np.arange(1, len(value) + 1) - first)
    (line,) = axes.plot(step[keep], smooth[keep], linewidth=1.5, label=name, zorder=2)
    axes.plot(step[keep], value[keep], linewidth=0.5, alpha=0.3, color=line.get_color(), zorder=1)


def _numbers(record: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of the finite numbers, those one level down under `outer.inner`."""
    for name, value in record.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _numbers(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            yield prefix + name, float(value)


@contextmanager
def new_figure(width: float, height: float, face: str = "white") -> Iterator[Figure]:
    """A figure that no window, backend or earlier setting of the caller's has a hand in."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        yield Figure(figsize=(width, height), layout="constrained", facecolor=face)


def _svg(figure: Figure) -> str:
    return _data_uri(figure, "svg+xml", format="svg", metadata={"Date": None})


def _webp(figure: Figure) -> str:
    """Of a noisy scan 0.33 MB at most, where PNG takes 1.4: five of them stay a file to send by mail."""
    face = figure.get_facecolor()
    return _data_uri(figure, "webp", format="webp", dpi=150, facecolor=face, pil_kwargs={"quality": 85})


def _data_uri(figure: Figure, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
