"""Pictures in the right place: sides, millimetres, outlines, curves."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from unetrkit.evaluation import figures
from unetrkit.evaluation.figures import curves_figure, slices_figure

SPACING = (2.0, 3.0, 5.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The figure of one small organ near the right front top, and a prediction one voxel to the left."""
    caught: list[Any] = []
    monkeypatch.setattr(figures, "_webp", lambda figure: caught.append(figure) or "")
    image = np.arange(30 * 20 * 16, dtype=np.float32).reshape(30, 20, 16)
    truth = np.zeros(image.shape, bool)
    truth[22:25, 12:15, 9:12] = True
    slices_figure(image, truth, np.roll(truth, -1, axis=0), SPACING, (0.0, 1000.0))
    return [figure.axes[0] for figure in caught]


@pytest.mark.parametrize(
    ("panel", "across", "up", "letters"), [(0, 0, 1, "RLPA"), (1, 0, 2, "RLIS"), (2, 1, 2, "APIS")]
)
def test_planes_show_the_patients_sides_in_millimetres(
    drawn: Any, panel: int, across: int, up: int, letters: str
) -> None:
    axes = drawn[panel]
    start, stop = [22, 12, 9], [25, 15, 12]
    left, right, bottom, top = axes.get_images()[0].get_extent()
    assert left < start[across] * SPACING[across] < stop[across] * SPACING[across] < right
    assert bottom < start[up] * SPACING[up] < stop[up] * SPACING[up] < top
    # the index grows towards R, A and S: R and A are on the left because the axis runs backwards
    assert axes.get_xlim() == (right, left)
    assert axes.get_ylim() == (bottom, top)
    assert axes.get_aspect() == 1.0
    places = {text.get_position(): text.get_text() for text in axes.texts}
    assert [places[p] for p in ((0.02, 0.5), (0.98, 0.5), (0.5, 0.02), (0.5, 0.98))] == list(letters)


def test_outlines_follow_the_sides_of_the_voxels(drawn: Any) -> None:
    truth, prediction = drawn[0].collections
    for outline, shift in ((truth, 0), (prediction, -1)):
        points = np.concatenate([path.vertices for path in outline.get_paths()])
        low, high = points.min(axis=0), points.max(axis=0)
        np.testing.assert_allclose(low, [(22 + shift) * 2.0, 12 * 3.0], atol=0.35)
        np.testing.assert_allclose(high, [(25 + shift) * 2.0, 15 * 3.0], atol=0.35)
    assert truth.get_linestyle() != prediction.get_linestyle()
    assert not np.allclose(truth.get_edgecolor(), prediction.get_edgecolor())


def test_voxels_are_shown_where_they_are(drawn: Any) -> None:
    shown = drawn[0].get_images()[0]
    left, _, bottom, _ = shown.get_extent()
    image = np.arange(30 * 20 * 16, dtype=np.float32).reshape(30, 20, 16)
    x, y = round(left / 2.0), round(bottom / 3.0)
    assert shown.get_array()[0, 0] == image[x, y, 10]
    assert shown.get_clim() == (0.0, 1000.0)


def test_an_organ_at_the_border_and_an_empty_mask_are_drawn() -> None:
    image = np.zeros((12, 12, 12), np.float32)  # constant: the window has no width
    truth = np.zeros(image.shape, bool)
    truth[0, 0, 0] = True
    nothing = np.zeros_like(truth)
    for masks in ((truth, nothing), (nothing, truth)):
        pictures = slices_figure(image, *masks, SPACING)
        assert len(pictures) == 3
        for picture in pictures:
            kind, _, data = picture.partition(";base64,")
            assert kind == "data:image/webp"
            assert base64.b64decode(data)[8:12] == b"WEBP"


def test_curves_draw_what_the_log_has() -> None:
    records: list[dict[str, object]] = [
        {"step": s, "loss": 1 / s, "lr": 0.1, "seed": "x"} for s in range(1, 200)
    ]
    records += [
        {"step": 100, "validation": {"dice": 0.5, "by_organ": {"liver": 0.4}}},
        {"step": 150, "dice": None},
    ]
    records += [{"event": "start", "loss": 5.0}]
    picture = curves_figure(records)
    assert picture is not None
    text = base64.b64decode(picture.partition(";base64,")[2]).decode()
    assert [title in text for title in ("Loss", "Dice", "Learning rate", "by_organ")] == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "records", [[], [{"step": 1, "seconds": 3.0}], [{"loss": 1.0}], [{"step": 1, "loss": "nan"}]]
)
def test_a_log_without_curves_has_no_picture(records: list[dict[str, object]]) -> None:
    assert curves_figure(records) is None
