"""A store of six small volumes, and a run on it to begin from."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tests.studies.small import SMALL

from unetrkit.config import overridden, settings_from
from unetrkit.data.datalist import read_dataset
from unetrkit.data.fingerprint import make_plan
from unetrkit.data.plan import override_plan
from unetrkit.data.prepare import prepare
from unetrkit.training.run import TrainSettings, train


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes to train on and three to validate on, 16 x 16 x 16, two organs."""
    folder = tmp_path_factory.mktemp("studied")
    entries = []
    for n in range(6):
        label = np.zeros((16, 16, 16), np.uint8)
        label[2 + n : 8 + n, 3:9, 3:9] = 1
        label[9:14, 8:14, 4 : 8 + n] = 2
        image = np.random.default_rng(n).normal(0, 10, label.shape) + 50 * label
        for kind, array in (("image", image.astype(np.float32)), ("label", label)):
            nibabel.Nifti1Image(array, np.eye(4)).to_filename(folder / f"{n}_{kind}.nii.gz")
        entries.append({"image": f"{n}_image.nii.gz", "label": f"{n}_label.nii.gz"})
    labels = {"0": "background", "1": "liver", "2": "spleen"}
    content = {"name": "six", "modality": {"0": "MR"}, "labels": labels}
    content |= {"training": entries[:3], "validation": entries[3:]}
    (folder / "dataset.json").write_text(json.dumps(content))
    dataset = read_dataset(folder / "dataset.json")
    plan = override_plan(make_plan(dataset, workers=1), ["patch_size=16,16,16", "spacing=1,1,1"])
    prepare(dataset, plan, folder / "store", workers=1)
    return folder / "store"


@pytest.fixture(scope="session")
def pretrained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step: weights that are not random."""
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    more = [f"data={store}", f"out={out}", "loop.steps=1", "loop.seed=7"]
    train(settings_from(TrainSettings, overridden({}, [*SMALL, *more])))
    return out
