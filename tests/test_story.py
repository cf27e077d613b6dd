"""The whole job as a user runs it: check, prepare, train, predict, evaluate; on real scans too."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from unetrkit.data.phantom import write_phantom

SMALL = (
    "loop.steps=6",
    "loop.validate_every=6",
    "loop.workers=0",
    "loop.device=cpu",
    "sampling.batch_size=1",
)


def some_cases(source: Path, training: int, validation: int, out: Path) -> Path:
    """A datalist of a few cases of a larger one; the scans stay where they are."""
    full = json.loads(source.read_text())
    pool = {key: full.get(key) or full["training"][training:] for key in ("training", "validation")}
    for key, count in (("training", training), ("validation", validation)):
        pool[key] = [
            {name: str(source.parent / entry[name]) for name in ("image", "label")}
            for entry in pool[key][:count]
        ]
    datalist = {key: full[key] for key in ("labels", "modality") if key in full} | pool
    out.write_text(json.dumps(datalist))
    return out


def phantom(tmp_path: Path) -> Path:
    return write_phantom(tmp_path / "data", training=3, validation=1, coarseness=2.5)


def hippocampus(tmp_path: Path, shared_data: Path) -> Path:
    return some_cases(shared_data / "mr_hippocampus/dataset_40_10.json", 4, 2, tmp_path / "dataset.json")


def head_and_neck(tmp_path: Path, shared_data: Path) -> Path:
    return some_cases(shared_data / "ct_openkbp_hn/dataset.json", 2, 1, tmp_path / "dataset.json")


def abdomen(tmp_path: Path, shared_data: Path) -> Path:
    return some_cases(
        shared_data / "ct_abdomen_totalseg/dataset_btcv13.json", 1, 1, tmp_path / "dataset.json"
    )


@pytest.mark.parametrize(
    ("data", "recipe", "plan"),
    [
        (phantom, "swin_unetr_tiny", ("patch_size=32,32,32", "spacing=6,6,8")),
        (hippocampus, "unetr", ("patch_size=32,48,32",)),
        (head_and_neck, "swin_unetr_tiny", ("patch_size=48,48,32",)),
        (abdomen, "swin_unetr_tiny", ("patch_size=48,48,48", "spacing=5,5,5")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_scans_become_measured_results(unetrkit, tmp_path, request, data, recipe, plan):
    real = () if data is phantom else (request.getfixturevalue("shared_data"),)
    datalist = data(tmp_path, *real)
    store, run, predictions, report = (tmp_path / name for name in ("store", "run", "predictions", "report"))
    outside = ("--allow-outside",) if real else ()

    for words, promised in (
        (("check", datalist, "--workers", 1, *outside), "next: unetrkit prepare"),
        (("prepare", datalist, store, *plan, "--workers", 1, *outside), "next: unetrkit train"),
        (("train", recipe, f"data={store}", f"out={run}", *SMALL), "unetrkit predict"),
        (
            ("predict", datalist, predictions, "--model", run, "--split", "validation", *outside),
            "next: unetrkit evaluate",
        ),
        (("evaluate", predictions, datalist, report, "--run", run, "--workers", 1, *outside), "report.html"),
    ):
        outcome = unetrkit(*words)
        assert outcome.code == 0, outcome.err
        assert promised in outcome.err + outcome.out

    listed = json.loads(datalist.read_text())["validation"]
    for entry in listed:
        source = nib.load(datalist.parent / entry["label"])
        predicted = nib.load(predictions / Path(entry["image"]).name)
        assert predicted.shape == source.shape
        np.testing.assert_allclose(predicted.affine, source.affine, atol=1e-4)
    rows = list(csv.DictReader((report / "metrics.csv").read_text().splitlines()))
    assert len(rows) == len(listed) * (len(json.loads((store / "plan.json").read_text())["classes"]) - 1)
    page = (report / "report.html").read_text()
    assert "http" + "://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_the_same_command_again_says_that_the_run_is_finished(unetrkit, tmp_path):
    datalist = write_phantom(tmp_path / "data", training=2, validation=1, coarseness=3)
    store, run = tmp_path / "store", tmp_path / "run"
    assert (
        unetrkit("prepare", datalist, store, "patch_size=32,32,32", "spacing=8,8,9", "--workers", 1).code == 0
    )
    train = ("train", "swin_unetr_tiny", f"data={store}", f"out={run}", *SMALL)
    assert unetrkit(*train).code == 0
    weights = (run / "model" / "weights.safetensors").read_bytes()
    again = unetrkit(*train)
    assert again.code == 0 and "finished" in again.err
    assert (run / "model" / "weights.safetensors").read_bytes() == weights
    repeated = unetrkit("train", run / "config.yaml", f"out={tmp_path / 'repeated'}")
    assert repeated.code == 0
    assert (tmp_path / "repeated" / "model" / "weights.safetensors").read_bytes() == weights
