"""Pre-training as a user runs it: what it leaves, how it goes on, what begins from it, when it warns."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.small_store import small_plan, small_store
from torch import Tensor, nn

from unetrkit.config import load_recipe
from unetrkit.errors import Interrupted, UserError
from unetrkit.inference.model import load_model
from unetrkit.pretraining import OBJECTIVES
from unetrkit.pretraining import run as run_module
from unetrkit.pretraining.corruptions import generator_of_step
from unetrkit.pretraining.run import PretrainSettings, job_of, pretrain
from unetrkit.training.folder import rehearse
from unetrkit.training.run import TrainSettings, train

SMALL = [
    "crops.patch_size=32,32,32",
    "loop.steps=4",
    "loop.validate_every=2",
    "loop.save_every=1",
    "loop.log_every=1",
    "loop.workers=0",
    "loop.device=cpu",
    "loop.amp=off",
    "optim.lr=1e-3",
    "watch.crops=4",
    "watch.pictures=2",
]
VIT = ["depth=2", "width=24", "heads=2", "patch=8"]
NETWORK = {
    "vit_autoencoder": VIT,
    "masked_autoencoder": [*VIT, "decoder_depth=1", "decoder_width=24", "decoder_heads=2"],
    "swin_heads": ["feature_size=12"],
    "disruptive_autoencoder": ["feature_size=12"],
}
BEGINS = {  # what begins from it, and the share of its decoder that comes along
    "vit_autoencoder": ("unetr", 0.0),
    "masked_autoencoder": ("unetr", 0.0),
    "swin_heads": ("swin_unetr_tiny", 0.0),
    "disruptive_autoencoder": ("swin_unetr_tiny", 0.99),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("store"))


def settings(objective: str, store: Path, out: Path, *more: str) -> PretrainSettings:
    recipe = out.parent / "none.yaml"
    recipe.write_text("{}\n")
    network = [f"network_options.{option}" for option in NETWORK[objective]]
    words = [f"data={store}", f"out={out}", f"objective={objective}", *SMALL, *network, *more]
    return load_recipe(PretrainSettings, recipe, words)


@pytest.fixture(scope="module", params=sorted(OBJECTIVES))
def whole(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / request.param
    pretrain(settings(request.param, store, out, f"watch.probe={store}", "watch.probe_patches=2"))
    return out


def records(out: Path, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def test_a_run_leaves_weights_pictures_figures_and_a_report(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} - {".train.lock"} == {
        "config.yaml", "run.json", "metrics.jsonl", "last", "previous", "best", "model", "pictures",
        "report.html",
    }  # fmt: skip
    assert [path.name for path in sorted((whole / "pictures").iterdir())] == [
        "step-0000002.png", "step-0000004.png"
    ]  # fmt: skip
    validated = records(whole, "validation")
    assert [record["step"] for record in validated] == [2, 4]
    for record in validated:
        assert {"loss", "spread", "effective_rank", "alignment", "uniformity", "probe_dice"} < record.keys()
        assert record["collapsed"] == 0
        assert 0 <= record["probe_dice"] <= 1
    assert set(records(whole, "training")[0]) - {"step", "event", "lr", "grad_norm"} <= set(validated[0])
    report = (whole / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 2
    assert "Effective rank" in report and f"init={whole.name}" in report


def test_segmentation_begins_with_all_of_its_encoder_and_remembers_it(
    whole: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, decoder = BEGINS[whole.name]
    recipe = tmp_path / "none.yaml"
    recipe.write_text("{}\n")
    words = [
        f"network={network}",
        f"data={store}",
        f"out={tmp_path / 'tuned'}",
        f"init={whole}",
        "loop.steps=1",
    ]
    words += ["sampling.patch_size=32,32,32", "sampling.batch_size=1", "loop.workers=0", "loop.device=cpu"]
    begun = load_recipe(TrainSettings, recipe, [*words, "fold=0"])
    monkeypatched = pytest.MonkeyPatch()
    with monkeypatched.context() as patch:
        patch.setattr("unetrkit.training.run.Validation", lambda *_: lambda network, show: {"dice": 0.5})
        train(begun)
    record = json.loads((tmp_path / "tuned" / "run.json").read_text())["init"]
    assert record["encoder_share"] == 1
    assert record["decoder_share"] >= decoder
    assert record["pretraining"]["objective"] == whole.name
    model = load_model(tmp_path / "tuned")
    assert model.description["origin"]["init"]["pretraining"]["run"] == whole.name
    assert "encoder: 100.0 %" in capsys.readouterr().err


def test_what_was_pre_trained_does_not_predict(whole: Path) -> None:
    with pytest.raises(UserError, match="was pre-trained: it cannot segment yet") as found:
        load_model(whole)
    assert f"init={whole}" in found.value.hint


def test_stopped_and_resumed_equals_never_stopped_bitwise(
    whole: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = run_module.crop_batches

    def interrupting(*arguments: Any, **more: Any) -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(batches(*arguments, **more)):
            if number == 1 and more["seed"] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    out = tmp_path / whole.name
    same = settings(whole.name, store, out, f"watch.probe={store}", "watch.probe_patches=2")
    monkeypatch.setattr(run_module, "crop_batches", interrupting)
    with pytest.raises(Interrupted, match="after step 2"):
        pretrain(same)
    monkeypatch.setattr(run_module, "crop_batches", batches)
    pretrain(same.model_copy(update={"loop": same.loop.model_copy(update={"workers": 2})}))
    for name in ("last", "best", "metrics.jsonl", "model/model.json", "model/weights.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_collapse_is_said_and_recorded(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = OBJECTIVES["vit_autoencoder"]

    class Collapsing(nn.Module):
        """Wants all crops to look alike."""

        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.network, self.restore, self.corrupt = inside.network, inside.restore, inside.corrupt

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            view = self.corrupt(batch["image"], generator_of_step())
            last = self.network.encoder(view)[-1].mean((2, 3, 4))
            return {"loss": (last - torch.linspace(-1, 1, last.shape[1])).square().mean()}

    def build(*arguments: Any) -> nn.Module:
        return Collapsing(chosen.build(*arguments))

    monkeypatch.setitem(
        OBJECTIVES, "vit_autoencoder", type(chosen)(chosen.settings, build, {}, chosen.networks)
    )
    more = [
        "loop.steps=120",
        "loop.validate_every=120",
        "optim.lr=1e-2",
        "optim.warmup=0",
        "watch.pictures=0",
    ]
    pretrain(settings("vit_autoencoder", store, tmp_path / "run", *more))
    assert "at step 120 the features have collapsed: all crops look alike" in capsys.readouterr().err
    assert records(tmp_path / "run", "validation")[-1]["collapsed"] == 1


def test_several_stores_are_drawn_from_by_weight(store: Path, tmp_path: Path) -> None:
    other = small_store(tmp_path, cases=5, plan=small_plan(dataset="other", channels=("T1",)))
    both = settings("swin_heads", store, tmp_path / "run", f"data={store},{other}", "weights=3,1")
    seen: list[float] = []

    def look(sources: Any, *arguments: Any, **more: Any) -> Iterator[dict[str, Tensor]]:
        seen.extend(source.weight for source in sources)
        return iter(())

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="non-empty"):
        patch.setattr(run_module, "crop_batches", look)
        pretrain(both)
    assert seen == [3, 1]
    with pytest.raises(UserError, match="`weights` has 2 values for 1 stores"):
        pretrain(settings("swin_heads", store, tmp_path / "run", "weights=3,1"))


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["objective=swin_head"], "`swin_head` is not an objective", "did you mean `swin_heads`?"),
        (["objective_options.temprature=1"], "`temprature` is not a setting", "temperature"),
        (["network_options.depth=3"], "`depth` is not an option of `swin_heads`", ""),
        (["watch.probe=nowhere"], "there is no store in", "unetrkit prepare"),
    ],
)
def test_what_is_wrong_is_said_before_a_folder_is_made(
    store: Path, tmp_path: Path, words: list[str], message: str, hint: str
) -> None:
    with pytest.raises(UserError) as found:
        pretrain(settings("swin_heads", store, tmp_path / "run", *words))
    assert message in found.value.message
    assert hint in found.value.hint
    assert not (tmp_path / "run").exists()


def test_a_dry_run_takes_three_steps_and_writes_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(settings("vit_autoencoder", store, tmp_path / "run"))
    assert job.batches.lower == ("crops.batch_size", "crops.patch_size")
    rehearse(job)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == job.about[0] and said[1].startswith("time: ") and "2 validations" in said[1]
    assert not (tmp_path / "run").exists()
