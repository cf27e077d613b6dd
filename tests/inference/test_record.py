"""The record of a prediction: what was made stays, what was not is made, whatever came in between."""

from __future__ import annotations

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch

from unetrkit.data.parts import Part
from unetrkit.data.processes import for_each
from unetrkit.errors import UserError
from unetrkit.inference.cases import Choice
from unetrkit.inference.model import load_model, save_model
from unetrkit.inference.predict import PredictSettings, predict

CPU = PredictSettings(device="cpu")


def write(path, image):
    nib.save(nib.Nifti1Image(image, np.diag([1, 1, 2, 1])), path)


def datalist(tmp_path, image, count):
    for k in range(count):
        write(tmp_path / f"c{k}.nii.gz", image)
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"test": [f"c{k}.nii.gz" for k in range(count)]}))
    return path


def hashes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_the_same_command_goes_on_after_a_kill(tmp_path, save, blocks, monkeypatch, capsys):
    """Killed at any place: while a label map is written, before and after it is recorded, before its name."""
    path, model, out = datalist(tmp_path, blocks, 3), save(tmp_path / "model"), tmp_path / "out"
    predict(path, out, [model], CPU)
    whole = {k: v for k, v in hashes(out).items() if k != "predictions.json"}
    for place in ("unetrkit.inference.predict.write_label", "unetrkit.inference.record.atomic_write"):
        for killed in ("before", "after"):
            again, calls, real = tmp_path / f"{place}{killed}", [], attribute(place)

            def die(*words, killed=killed, calls=calls, real=real):
                calls.append(1)
                if len(calls) == 2 and killed == "before":
                    raise KeyboardInterrupt
                real(*words)
                if len(calls) == 2:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(place, die)
                predict(path, again, [model], CPU)
            assert [p.name for p in predict(path, again, [model], CPU)] == ["c1.nii.gz", "c2.nii.gz"]
            assert "1 label map in " in capsys.readouterr().err
            assert whole.items() <= hashes(again).items()
            assert predict(path, again, [model], CPU) == []


def attribute(place):
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("change", ["model", "settings", "image"])
def test_label_maps_of_something_else_do_not_stay(tmp_path, save, blocks, change):
    path, model, settings = datalist(tmp_path, blocks, 1), save(tmp_path / "model"), CPU
    predict(path, tmp_path / "out", [model], CPU)
    if change == "model":
        loaded = load_model(model)
        with torch.no_grad():
            loaded.network.bounds += 0.1
        shape = {"image_size": (16, 16, 16), "options": {}}
        save_model(model, loaded.network, name="thresholds", plan=loaded.plan, origin={}, **shape)
    elif change == "settings":
        settings = PredictSettings(device="cpu", overlap=0.25)
    else:
        write(tmp_path / "c0.nii.gz", blocks[::-1])
    with pytest.raises(UserError, match="exists already"):
        predict(path, tmp_path / "out", [model], settings)
    assert len(predict(path, tmp_path / "out", [model], settings, overwrite=True)) == 1


def test_parts_at_the_same_time_keep_one_record(tmp_path, save, blocks):
    path, model = datalist(tmp_path, blocks, 5), save(tmp_path / "model")
    parts = [Choice(part=Part(k, 3)) for k in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda choice: predict(path, tmp_path / "out", [model], CPU, choice), parts))
    assert [len(one) for one in done] == [2, 2, 1]
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sorted(record["cases"]) == ["c0", "c1", "c2", "c3", "c4"]
    assert predict(path, tmp_path / "out", [model], CPU) == []


def test_ranks_of_torchrun_do_a_part_each(tmp_path, save, blocks, monkeypatch, unetrkit):
    path, model = datalist(tmp_path, blocks, 3), save(tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, wrote in ((0, "2 label maps"), (1, "1 label map")):
        monkeypatch.setenv("RANK", str(rank))
        done = unetrkit("predict", path, tmp_path / "out", "--model", model, "device=cpu")
        assert done.code == 0 and f"wrote {wrote} in `{tmp_path / 'out'}`, part {rank + 1}/2" in done.err
        assert ("next: unetrkit evaluate" in done.err) == (rank == 0)
    assert sorted(hashes(tmp_path / "out")) == [*(f"c{k}.nii.gz" for k in range(3)), "predictions.json"]


def test_label_maps_are_the_same_wherever_they_are_made(tmp_path, save, blocks):
    path, model = datalist(tmp_path, blocks, 3), save(tmp_path / "model")
    write(tmp_path / "c1.nii.gz", np.stack([blocks, blocks], -1))
    for out, each in (("here", None), ("there", partial(for_each, patience=99))):
        with pytest.raises(UserError, match=r"1 of 3 cases could not be segmented: `c1`: .*2 channels"):
            predict(path, tmp_path / out, [model], CPU, each=each)
    here, there = hashes(tmp_path / "here"), hashes(tmp_path / "there")
    assert sorted(here) == sorted(there) == ["c0.nii.gz", "c2.nii.gz", "predictions.json"]
    assert all(here[name] == there[name] for name in ("c0.nii.gz", "c2.nii.gz"))
