"""`unetrkit info` as a user sees it: networks and what they cost, and the audit of a file of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.networks import published_files as files


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.manual_seed(0)
    torch.save(files.checkpoint(files.swin(1, 14).state_dict()), path)
    return path


def test_networks_cost_what_they_are_known_to_cost(unetrkit) -> None:
    rows = {row["network"]: row for row in json.loads(unetrkit("info", "networks", "--json").out)}
    # MONAI 1.6.1's own counts; UNETR without the 18,432 that nothing reads
    known = {"swin_unetr_tiny": 4_078_220, "swin_unetr_base": 62_187_296, "unetr": 92_784_046}
    assert {name: rows[name]["parameters"] for name in known} == known
    # by hand: the head of UNETR is 16 x 14 products a voxel, a 3 x 3 x 3 convolution 27 x 16 x 16 …
    assert rows["unetr"]["flops"] > 2 * 96**3 * (16 * 14 + 27 * (16 + 16 * 16 + 32 * 16 + 16 * 16))
    table = unetrkit("info", "networks").out.splitlines()
    assert "parameters" in table[0] and "2 x multiply-adds" in table[-1]
    assert len({len(line) for line in table[:-1]}) == 1


def test_weights_are_audited(unetrkit, weights: Path) -> None:
    outcome = unetrkit("info", "weights", weights)
    assert outcome.code == 0
    for line in (
        "holds     swin_unetr_tiny, 1 channel, 14 classes",
        "layout    A: MONAI SwinUNETR",
        "needs     merging=published",
        "encoder   100.0 % of 694,998 parameters",
        "missing   0 tensors",
        "note      also in the file, not read: `epoch`, `best_acc`, `optimizer`",
    ):
        assert line in outcome.out.splitlines()
    assert outcome.err == f"next: unetrkit train swin_unetr_tiny init={weights} data=STORE\n"
    told = json.loads(unetrkit("info", "weights", weights, "--json").out)
    assert (told["layout"], told["encoder_share"], told["holds"]["network"]) == ("A", 1.0, "swin_unetr_tiny")
    assert len(told["sha256"]) == 64 and len(told["skipped"]) == 8


def test_weights_are_audited_against_another_network(unetrkit, weights: Path) -> None:
    outcome = unetrkit(
        "info", "weights", weights, "classes=3", "in_channels=4", "--network", "swin_unetr_tiny"
    )
    assert "adapted   3 tensors" in outcome.out and "from 1 input channel to 4" in outcome.out
    assert "is for 14 classes, not 3" in outcome.out
    outcome = unetrkit("info", "weights", weights, "--network", "unetr")
    assert "encoder   0.0 %" in outcome.out and "training wants 99%" in outcome.out
    assert "nothing of it would be used" in outcome.out and not outcome.err  # no command begins with it


def bad(folder: Path, weights: Path) -> dict[str, tuple[tuple[str | Path, ...], str]]:
    page = folder / "page.pt"
    page.write_text("<html>sign in</html>")
    other = folder / "other.pt"
    torch.save({"layer.weight": torch.ones(2)}, other)
    run = folder / "run"
    run.mkdir()
    (run / "model.json").write_text('{"format": "other"}')
    info = ("info", "weights")
    return {
        "no file": (info, "needs a file"),
        "missing": ((*info, folder / "pages.pt"), "there is no file"),
        "folder": ((*info, folder), "is a folder without weights"),
        "page": ((*info, page), "is a web page"),
        "names": ((*info, other), "`layer.weight`"),
        "foreign folder": ((*info, run), "does not describe a model"),
        "network": ((*info, weights, "--network", "unet"), "`unet` is not a network"),
        "option": ((*info, weights, "mergin=full"), "`mergin` is not an option of `swin_unetr_tiny`"),
        "value": ((*info, weights, "merging=half"), "`merging` is `half`"),
        "classes": ((*info, weights, "classes=none"), "`classes` is `none`"),
        "size": ((*info, weights, "image_size=96"), "`image_size` is `96`"),
        "no setting": ((*info, weights, "classes"), "`classes` is not a setting"),
    }


CASES = "no file,missing,folder,page,names,foreign folder,network,option,value,classes,size,no setting"


@pytest.mark.parametrize("case", CASES.split(","))
def test_what_cannot_be_audited_is_one_line(unetrkit, weights: Path, tmp_path: Path, case: str) -> None:
    words, message = bad(tmp_path, weights)[case]
    outcome = unetrkit(*words)
    lines = outcome.err.rstrip().splitlines()
    assert (outcome.code, outcome.out) == (2, "")
    assert lines[0].startswith("error: ") and message in lines[0]
    assert lines[1] == "" and lines[2].startswith("hint: ") and len(lines) == 3


def test_a_list_takes_no_file(unetrkit, weights: Path) -> None:
    outcome = unetrkit("info", "networks", weights)
    assert outcome.code == 2 and outcome.err.startswith(
        "error: `info networks` takes no more words\n\nhint: "
    )
