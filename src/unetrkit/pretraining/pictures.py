"""Pictures of what was taken from crops and what a network restores: a row for each crop."""

import io
from pathlib import Path

from torch import Tensor

from unetrkit.data.files import atomic_write
from unetrkit.evaluation.figures import new_figure

COLUMNS = ("original", "corrupted", "restored")


def write_picture(path: Path, restored: dict[str, Tensor], title: str) -> None:
    """A PNG: for each crop of (b, c, x, y, z) its middle axial slice in the three states, first channel.

    All of a row is on the grey scale of its original (1st to 99th percentile); the patient's right is on the
    left, anterior is up.
    """
    crops = len(restored["original"])
    with new_figure(6.3, 2.1 * crops + 0.5, face="#101418") as figure:
        figure.suptitle(title, color="white", fontsize=10)
        axes = figure.subplots(crops, len(COLUMNS), squeeze=False)
        for row in range(crops):
            planes = [restored[name][row, 0, :, :, restored[name].shape[4] // 2].float() for name in COLUMNS]
            low, high = planes[0].flatten().quantile(planes[0].new_tensor([0.01, 0.99])).tolist()
            for name, plane, axis in zip(COLUMNS, planes, axes[row], strict=True):
                axis.imshow(plane.T.numpy(), "gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower")
                axis.invert_xaxis()
                axis.set_axis_off()
                if row == 0:
                    axis.set_title(name, color="white", fontsize=9)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110, facecolor=figure.get_facecolor())
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, content.getvalue())
