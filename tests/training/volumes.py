"""A store of four small volumes, and the settings of a run on it that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np

from unetrkit.data.datalist import read_dataset
from unetrkit.data.fingerprint import make_plan
from unetrkit.data.plan import override_plan
from unetrkit.data.prepare import prepare

SMALL = [
    "network=swin_unetr_tiny",
    "loop.steps=4",
    "loop.validate_every=2",
    "loop.save_every=1",
    "loop.log_every=1",
    "loop.workers=0",
    "loop.device=cpu",
    "optim.lr=1e-3",
    "sampling.batch_size=1",
    "validation.overlap=0",
]


def four_volumes(folder: Path) -> Path:
    """Three volumes to train on and one to validate on, 32 x 32 x 32 in another orientation, two organs."""
    affine = np.diag([-2.0, -2.0, 2.5, 1.0])
    entries = []
    for n in range(4):
        label = np.zeros((32, 32, 32), np.uint8)
        label[6 + n : 16 + n, 8:18, 8:18] = 3
        label[20:28, 10:20, 12 - n : 22 - n] = 7
        image = np.random.default_rng(n).normal(0, 20, label.shape) + 100 * (label > 0) + 60 * (label == 7)
        for kind, array in (("image", image.astype(np.int16)), ("label", label)):
            nibabel.Nifti1Image(array, affine).to_filename(folder / f"{n}_{kind}.nii.gz")
        entries.append({"image": f"{n}_image.nii.gz", "label": f"{n}_label.nii.gz"})
    labels = {"0": "background", "3": "liver", "7": "spleen"}
    content = {"name": "four", "modality": {"0": "CT"}, "labels": labels}
    content |= {"training": entries[:3], "validation": entries[3:]}
    (folder / "dataset.json").write_text(json.dumps(content))
    dataset = read_dataset(folder / "dataset.json")
    plan = override_plan(make_plan(dataset, workers=1), ["patch_size=32,32,32", "spacing=2,2,2.5"])
    prepare(dataset, plan, folder / "store", workers=1)
    return folder / "store"
