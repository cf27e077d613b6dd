"""The notebooks of docs/guides: sound files without outputs, whose cells run in order and draw."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from unetrkit.plain_yaml import parse_value
from unetrkit.pretraining import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ROOT / "docs/guides"
NOTEBOOKS = sorted(GUIDES.glob("*.ipynb"))
SMALL = {
    "pretrain": {"STEPS": 5, "SCANS": 4, "LABELLED": 4, "COARSENESS": 2.0},
    "fine_tune": {"STEPS": 3, "CASES": 1},
}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def run_notebook(path: Path, **parameters: float) -> tuple[dict[str, Any], int]:
    """What its code cells define and how many figures they draw; `parameters` follow the cell of that tag."""
    from matplotlib import pyplot as plt

    defined: dict[str, Any] = {"__name__": "__main__"}
    figures = 0
    for cell in read(path)["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), defined)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= defined.keys()
            defined |= parameters
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()
        figures += len(plt.get_fignums())
        plt.close("all")
    return defined, figures


def test_both_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["fine_tune", "pretrain"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_file_is_a_notebook_without_outputs(path):
    """nbformat 4.5, as its JSON schema has it, and nothing that running it leaves behind."""
    notebook = read(path)
    assert notebook.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    names = [cell["id"] for cell in cells]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    common = {"id", "cell_type", "metadata", "source"}
    for cell in cells:
        assert isinstance(cell["source"], list) and cell["source"], cell["id"]
        assert all(line.endswith("\n") for line in cell["source"][:-1]), cell["id"]
        if cell["cell_type"] == "markdown":
            assert cell.keys() == common, cell["id"]
        else:
            assert cell.keys() == common | {"execution_count", "outputs"}, cell["id"]
            assert cell["cell_type"] == "code", cell["id"]
            assert cell["outputs"] == [], f"{cell['id']}: clear the outputs before a commit"
            assert cell["execution_count"] is None, cell["id"]
            ast.parse("".join(cell["source"]))
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in cells) == 1


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "docs/pretraining.md"], ids=lambda path: path.stem)
def test_their_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([\w./]+)\)", text)
    assert links
    assert [link for link in links if not (path.parent / link).is_file()] == []


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], int]:
    """The folder that pretrain.ipynb was run in, what it defined and how many figures it drew."""
    folder = tmp_path_factory.mktemp("guides")
    with pytest.MonkeyPatch.context() as patch:
        surround(patch, folder)
        return folder, *run_notebook(GUIDES / "pretrain.ipynb", **SMALL["pretrain"])


def surround(patch: pytest.MonkeyPatch, folder: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    patch.chdir(folder)
    patch.setenv("PYTHONPATH", str(ROOT / "src"))
    patch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_pretrain(first):
    folder, defined, figures = first
    assert figures == 5
    crop, views = defined["image"], (defined["first"], defined["second"])
    assert all(view.shape == crop.shape and not view.equal(crop) for view in views)
    assert not views[0].equal(views[1])
    events = [(record["step"], record["event"]) for record in defined["records"]]
    assert events.count((5, "validation")) == 1
    assert all("probe_dice" in record for record in defined["records"] if record["event"] == "validation")
    assert (folder / "guide/pretrained/report.html").is_file()


@pytest.mark.slow
def test_fine_tune(first, monkeypatch, capfd):
    folder, *_ = first
    surround(monkeypatch, folder)
    defined, figures = run_notebook(GUIDES / "fine_tune.ipynb", **SMALL["fine_tune"])
    assert figures == 3
    assert defined["init"]["encoder_share"] == 1
    assert defined["init"]["pretraining"]["run"] == "pretrained"
    printed = capfd.readouterr().out
    assert "0 of the 694,998 encoder parameters of `swin_unetr_tiny`" in printed
    assert printed.count("/cells/") == 12  # 2 starts, 2 numbers of volumes, 3 seeds
    for run in ("random", "tuned", "gentle"):
        assert (folder / "guide" / run / "model").is_dir(), run


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_difference_between_published_and_default_is_told(name):
    section = (ROOT / "docs/pretraining.md").read_text().split(f"\n### {name}\n")[1].split("\n### ")[0]
    told = {
        setting: (parse_value(published), parse_value(default))
        for setting, published, default in re.findall(r"^\| `(\w+)` \| `(\S+)` \| `(\S+)` \| ", section, re.M)
    }
    defaults = OBJECTIVES[name].settings().model_dump()
    assert told == {key: (value, defaults[key]) for key, value in OBJECTIVES[name].published.items()}
