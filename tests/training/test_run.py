"""A run on four small volumes: what it leaves, what it refuses, and that it goes on bitwise."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from tests.training.volumes import SMALL, four_volumes

from unetrkit.config import load_recipe
from unetrkit.data.datalist import read_dataset
from unetrkit.data.files import alone
from unetrkit.data.fingerprint import make_plan
from unetrkit.data.prepare import prepare
from unetrkit.data.store import Store
from unetrkit.errors import Interrupted, UserError
from unetrkit.inference.model import load_model
from unetrkit.memory import peak_memory
from unetrkit.training import folder as folder_module
from unetrkit.training import run as run_module
from unetrkit.training.folder import LOCK
from unetrkit.training.guards import space_of
from unetrkit.training.learner import build_learner
from unetrkit.training.run import Patches, TrainSettings, job_of, train
from unetrkit.training.trackers import PACKAGES


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_volumes(tmp_path_factory.mktemp("data"))


def settings(store: Path, out: Path, *more: str) -> TrainSettings:
    recipe = out.parent / "none.yaml"
    recipe.write_text("{}\n")
    return load_recipe(TrainSettings, recipe, [f"data={store}", f"out={out}", *SMALL, *more])


def results(out: Path) -> dict[str, bytes]:
    files = ("last", "best", "metrics.jsonl", "model/model.json", "model/weights.safetensors")
    return {name: (out / name).read_bytes() for name in files}


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(settings(store, out))
    return out


def test_a_run_leaves_what_the_next_commands_need(store: Path, whole: Path) -> None:
    left = {path.name for path in whole.iterdir()}
    assert left - {".train.lock"} == {
        "config.yaml", "run.json", "metrics.jsonl", "last", "previous", "best", "model"
    }  # fmt: skip
    model = load_model(whole)
    assert model.plan == Store.open(store).plan
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    measured = [r for r in records if r["event"] == "validation"]
    assert [r["step"] for r in measured] == [2, 4]
    assert measured[0]["dice"] == pytest.approx((measured[0]["dice/liver"] + measured[0]["dice/spleen"]) / 2)
    trained = [r for r in records if r["event"] == "training"]
    assert trained[0].keys() == {"step", "event", "loss", "dice_loss", "cross_entropy", "lr", "grad_norm"}
    assert trained[0]["loss"] == pytest.approx(trained[0]["dice_loss"] + trained[0]["cross_entropy"])
    record = json.loads((whole / "run.json").read_text())
    assert (len(record["training"]), len(record["validation"])) == (3, 1)


def test_the_exported_model_predicts_what_was_validated(store: Path, whole: Path) -> None:
    from unetrkit.data.volume import read_image, read_label
    from unetrkit.evaluation.metrics import dice_scores
    from unetrkit.inference.predict import PredictSettings, predict_label

    best = json.loads((whole / "model/model.json").read_text())["origin"]
    case = next(case for case in Store.open(store).cases if case.split == "validation")
    how = PredictSettings(overlap=0, device="cpu")
    found = predict_label([load_model(whole)], read_image(case.images), how)
    scores = dice_scores(read_label(case.label_file).array[0], found, [3, 7])
    assert best["dice"] == pytest.approx(sum(scores.values()) / 2, abs=1e-3)


def test_a_network_that_sees_patches_enlarged_is_validated_and_predicts_at_that_scale(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unetrkit.data.volume import read_image
    from unetrkit.inference.predict import PredictSettings, predict_label
    from unetrkit.networks.blocks import EncoderDecoder

    seen: dict[str, set[tuple[int, ...]]] = {}
    forward = EncoderDecoder.forward

    def watched(self: EncoderDecoder, image: torch.Tensor) -> torch.Tensor:
        seen.setdefault("training" if self.training else "validation", set()).add(tuple(image.shape[2:]))
        return forward(self, image)

    monkeypatch.setattr(EncoderDecoder, "forward", watched)
    sizes = ["sampling.patch_size=16,16,16", "sampling.network_size=32,48,32"]
    train(settings(store, tmp_path / "run", *sizes, "loop.steps=2"))
    assert seen == {"training": {(32, 48, 32)}, "validation": {(32, 48, 32)}}
    model = load_model(tmp_path / "run")
    assert model.window == (16, 16, 16) and model.description["image_size"] == [32, 48, 32]

    case = next(case for case in Store.open(store).cases if case.split == "validation")
    how = PredictSettings(overlap=0, device="cpu", blending="constant")
    found = predict_label([model], read_image(case.images), how)
    image = torch.from_numpy(case.whole_image())
    by_hand = torch.empty(3, *image.shape[1:])
    assert image.shape[1:] == (32, 32, 32)  # 2 x 2 x 2 windows, nothing to blend
    for x, y, z in ((x, y, z) for x in (0, 16) for y in (0, 16) for z in (0, 16)):
        place = (slice(None), slice(x, x + 16), slice(y, y + 16), slice(z, z + 16))
        window = torch.nn.functional.interpolate(image[place][None], (32, 48, 32), mode="trilinear")
        with torch.no_grad():
            logits = forward(model.network.network, window)
        by_hand[place] = torch.nn.functional.interpolate(logits, (16, 16, 16), mode="trilinear")[0]
    expected = torch.tensor([0, 3, 7])[by_hand.argmax(0)].numpy()[::-1, ::-1]  # the file's axes: L, P, S
    assert np.mean(found == expected) > 0.999 and len(np.unique(expected)) > 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
@pytest.mark.parametrize("more", [["loop.workers=4"], ["loop.amp=bf16"]], ids=["workers", "bf16"])
def test_a_run_goes_on_bitwise_where_the_same_command_stopped(
    store: Path, whole: Path, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "loop.amp=bf16" in more:
        whole = tmp_path / "whole"
        train(settings(store, whole, *more))
    out = tmp_path / "other" / whole.name
    out.parent.mkdir()
    calls = iter(range(100))

    def interrupting(*where: object, **named: object):
        for batch in batches(*where, **named):
            if next(calls) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    batches = run_module.batches
    monkeypatch.setattr(run_module, "batches", interrupting)
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        train(settings(store, out, *more))
    train(settings(store, out, *more))
    assert results(out) == results(whole)


def test_a_finished_run_is_left_as_it_is_and_its_config_repeats_it(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(whole)
    train(load_recipe(TrainSettings, whole / "config.yaml"))
    assert "has done its 4 steps already" in capsys.readouterr().err
    assert results(whole) == before
    train(load_recipe(TrainSettings, whole / "config.yaml", [f"out={tmp_path / whole.name}"]))
    assert results(tmp_path / whole.name) == before


@pytest.mark.parametrize("more", [[], ["loop.ema=0.9"]], ids=["plain", "ema"])
def test_a_damaged_model_of_a_finished_run_is_written_again(
    store: Path, whole: Path, tmp_path: Path, more: list[str]
) -> None:
    out = tmp_path / whole.name
    if more:
        train(settings(store, out, *more, "loop.steps=2"))
    else:
        shutil.copytree(whole, out)
    before = results(out)
    (out / "model/weights.safetensors").write_bytes(before["model/weights.safetensors"][:-1])
    train(load_recipe(TrainSettings, out / "config.yaml", [f"out={out}"]))
    assert results(out) == before
    shutil.rmtree(out / "model")
    train(load_recipe(TrainSettings, out / "config.yaml", [f"out={out}"]))
    assert results(out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.lr=2e-3", r"holds another run: its `optim\.lr` is 0\.001, not 0\.002"),
        ("loop.steps=8", "holds a run of 4 steps, not of 8"),
        ("loop.steps=3", "holds a run of 4 steps, not of 3"),
        ("network=unetr", r"its `network` is \"swin_unetr_tiny\", not \"unetr\""),
        ("fold=1", "its `fold` is null, not 1"),
        ("network_options={feature_size: 24}", r"its `network_options\.feature_size` is null, not 24"),
    ],
)
def test_another_run_s_folder_is_refused(store: Path, whole: Path, change: str, message: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    with pytest.raises(UserError, match=message):
        train(settings(store, whole, change))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_run_at_a_constant_rate_can_go_on_for_longer(store: Path, tmp_path: Path) -> None:
    constant = ["optim.schedule=constant", "optim.warmup=0", "loop.steps=2"]
    train(settings(store, tmp_path / "run", *constant))
    assert train(settings(store, tmp_path / "run", *constant[:2], "loop.steps=3")).step == 3


def test_changed_data_is_refused(store: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"training": record["training"][:1]}))
    with pytest.raises(UserError, match="has other training cases than when the run in"):
        train(settings(store, out))
    before = record["sources"] | {record["training"][0]: "of another image"}
    (out / "run.json").write_text(json.dumps(record | {"sources": before}))
    with pytest.raises(UserError, match="has other images or labels than when the run in"):
        train(settings(store, out))
    for other in ("[]", "null"):
        (out / "run.json").write_text(other)
        with pytest.raises(UserError, match=r"run\.json` is not what a run wrote"):
            train(settings(store, out))
    (out / "run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json`, which says what .* is missing"):
        train(settings(store, out))


def test_two_at_once_in_one_folder_are_refused(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with (
        alone(out / LOCK, "not alone"),
        pytest.raises(UserError, match="another process is training in"),
    ):
        train(settings(store, out))
    assert [path.name for path in out.iterdir()] == [LOCK]


def test_a_folder_with_other_files_is_refused_and_untouched(store: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is not a run"):
        train(settings(store, tmp_path / "notes"))
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_wrong_settings_are_found_before_a_folder_is_made(store: Path, tmp_path: Path) -> None:
    for change, message in (
        ("network=swin_unet_tiny", "swin_unet_tiny"),
        ("network_options={depth: 3}", "depth"),
        ("fold=9", "no fold 9"),
        ("data=/nowhere", "no store"),
    ):
        with pytest.raises(UserError, match=message):
            train(settings(store, tmp_path / "run", change))
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_said_before_a_folder_is_made(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "mlflow", ["not_installed_anywhere"])
    with pytest.raises(UserError, match="needs the `mlflow` extra"):
        train(settings(store, tmp_path / "run", "loop.trackers=mlflow"))
    assert not (tmp_path / "run").exists()


def test_cases_named_for_a_batch_are_those_in_it(store: Path, tmp_path: Path) -> None:
    names = tuple(case.name for case in Store.open(store).cases)
    how = settings(store, tmp_path / "run", "sampling.batch_size=4", "sampling.patches_per_case=2")
    patches = Patches(store, names, how)
    assert patches.size == 4
    for number in range(3):
        assert len(patches.cases(number)) == 2
    seen = [name for number in range(4) for name in patches.cases(number)]
    assert sorted(seen) == sorted(names * 2)


def test_validation_means_skip_what_no_case_defines(store: Path) -> None:
    from unetrkit.inference.predict import PredictSettings
    from unetrkit.training.validation import Validation

    class Nothing(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.ones_like(image), *[torch.zeros_like(image)] * 2], dim=1)

    opened = Store.open(store)
    measure = Validation(opened.plan, opened.cases[:2], PredictSettings(overlap=0))
    assert measure(Nothing()) == {"dice": 0.0, "dice/liver": 0.0, "dice/spleen": 0.0}
    measure._kept = {case.name: np.zeros((32, 32, 32), np.uint8) for case in opened.cases}
    assert all(math.isnan(value) for value in measure(Nothing()).values())


def test_a_label_that_changed_its_grid_since_it_was_prepared_is_named(store: Path, tmp_path: Path) -> None:
    from unetrkit.inference.predict import PredictSettings
    from unetrkit.training.validation import Validation

    opened = Store.open(store)
    record = opened.cases[0].record  # of a store from before labels were kept in it
    before = replace(record, layouts={name: one for name, one in record.layouts.items() if name != "truth"})
    changed = tmp_path / "changed.nii.gz"
    nibabel.Nifti1Image(np.zeros((32, 32, 31), np.uint8), np.diag([-2.0, -2.0, 2.5, 1])).to_filename(changed)
    measure = Validation(opened.plan, [], PredictSettings())
    with pytest.raises(UserError, match=r"changed\.nii\.gz` is not on the grid .*32x32x31 instead of"):
        measure._truth(replace(opened.cases[0], label_file=changed, record=before))
    unread = replace(opened.cases[0], record=before)
    assert np.array_equal(measure._truth(unread), measure._read(opened.cases[0]))


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(
    store: Path, whole: Path, tmp_path: Path, unetrkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 9, 0.5 and 0.75 s: the first step of a run is no measure
    ticks = iter(2 * [0, 9, 9, 9.5, 9.5, 10.25])
    monkeypatch.setattr(folder_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}\n")
    words = [*SMALL, f"data={store}", "loop.steps=7200", "loop.validate_every=1000", "loop.ema=0.99"]
    for out in (tmp_path / "run", whole):
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        outcome = unetrkit("train", recipe, *words, f"out={out}", "--dry-run")
        assert outcome.code == 0, outcome.err
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert not (tmp_path / "run").exists() and not list(ticks)
    about, taking, sizes = outcome.err.splitlines()
    assert about.startswith("swin_unetr_tiny on 3 cases, validated on 1, in ")
    assert taking == "time: 0.75 s a step, 1 h 30 min in all, and 8 validations"
    memory, disk = re.match(r"memory: (\S+) GB of the computer's; disk: (\S+) GB$", sizes).groups()
    assert float(memory) * 1e9 == pytest.approx(peak_memory(), rel=0.05)
    weights = (whole / "model/weights.safetensors").stat().st_size
    assert float(disk) * 1e9 == pytest.approx((3 * 4 + 2) * weights, rel=0.02)


def test_what_a_run_leaves_is_no_more_than_a_dry_run_says(store: Path, whole: Path) -> None:
    job = job_of(settings(store, whole))
    said = space_of(build_learner(job.objective, job.loop, job.optim))
    left = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    # 2 checkpoints of the 3 that are there while one is written, the best and the model
    assert 0.7 * said < left < said


def test_a_broken_case_ends_a_run_which_then_goes_on_without_it(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "store"
    shutil.copytree(store, broken)
    name = next(case.name for case in Store.open(store).cases if case.split == "training")
    for file in (broken / "cases" / name).glob("*.chunks"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"/cases/{name}/.* is damaged"):
        train(settings(broken, tmp_path / "run"))
    train(settings(broken, tmp_path / "run", "sampling.skip_broken=true"))
    assert capsys.readouterr().err.count("the next case takes its place") == 1


def test_a_case_without_a_label_is_named_before_the_first_step(store: Path) -> None:
    from unetrkit.inference.predict import PredictSettings
    from unetrkit.training.validation import Validation

    opened = Store.open(store)
    cases = [opened.cases[0], replace(opened.cases[1], label_file=None)]
    with pytest.raises(UserError, match=f"`{cases[1].name}` has no label to validate against"):
        Validation(opened.plan, cases, PredictSettings())


@pytest.mark.parametrize("name", ["patch_size", "network_size"])
def test_the_sizes_that_patches_can_have_are_named(store: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="expected a multiple of 16") as refusal:
        settings(store, tmp_path / "run", f"sampling.{name}=33,32,32")
    assert (
        refusal.value.hint == f"voxels along x, y and z, multiples of 16 up to 512, as in `{name}=96,96,96`"
    )


def test_scans_without_labels_cannot_be_trained_on(store: Path, tmp_path: Path) -> None:
    dataset = read_dataset(store.parent / "dataset.json", unlabelled=True)
    prepare(dataset, make_plan(dataset, workers=1), tmp_path / "store", workers=1)
    with pytest.raises(UserError, match="were prepared without labels") as caught:
        train(settings(tmp_path / "store", tmp_path / "run"))
    assert "unetrkit pretrain" in caught.value.hint and not (tmp_path / "run").exists()
