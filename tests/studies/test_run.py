"""Whole studies of a network that trains in a moment: tables, stopping and going on, what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.studies.small import SMALL

from command import CommandLine
from unetrkit.config import load_recipe
from unetrkit.data.folds import split_cases
from unetrkit.data.store import Store
from unetrkit.deployment.slurm import stages
from unetrkit.errors import Interrupted, UserError
from unetrkit.inference.model import load_model
from unetrkit.inference.predict import PredictSettings
from unetrkit.studies import cells, run
from unetrkit.studies.cells import make, scores_of
from unetrkit.studies.design import ARCHITECTURE, AUGMENTATION, Study, design, read_settings
from unetrkit.studies.run import commands, open_study, run_study, unfinished
from unetrkit.training import run as training
from unetrkit.training.run import TrainSettings, train
from unetrkit.training.validation import Validation

FILES = ("table.md", "table.csv", "cells.csv", "plot.svg")


def opened(store: Path, out: Path, *more: str, name: str = "label_efficiency") -> Study:
    return open_study(name, read_settings(name, [f"data={store}", f"out={out}", *SMALL, *more]))


def tables(study: Study) -> dict[str, bytes]:
    return {name: (study.out / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(store: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """2 numbers of volumes, 2 arms, 1 seed."""
    out = tmp_path_factory.mktemp("studies") / "study"
    study = opened(store, out, f"init={pretrained}", "volumes=3,1", "seeds=1")
    run_study(study)
    return study


def test_cells_are_runs_on_the_first_cases_that_differ_in_their_weights_only(whole, store, pretrained):
    names = ["random-n1-seed0", "pretrained-n1-seed0", "random-n3-seed0", "pretrained-n3-seed0"]
    assert [cell.name for cell in whole.cells] == names
    training, validation = split_cases(Store.open(store).cases, None)
    for cell in whole.cells:
        record = json.loads((cell.folder / "run.json").read_text())
        assert record["training"] == [case.name for case in training][: cell.volumes]
        assert record["validation"] == [case.name for case in validation]
        assert ("init" in record) == (cell.row == "pretrained")
        config = load_recipe(TrainSettings, cell.folder / "config.yaml")
        assert config.model_copy(update={"out": None, "cases": None, "init": None}) == whole.cells[
            0
        ].settings.model_copy(update={"out": None, "cases": None})
    assert whole.cells[1].settings.init == pretrained


def test_scores_are_the_dice_of_the_last_step_s_model_on_every_case(whole, store):
    cell = whole.cells[2]
    model = load_model(cell.folder)
    assert model.description["origin"]["step"] == 2
    again = Validation(model.plan, whole.validation, PredictSettings(overlap=0, window=(16, 16, 16)))
    scores = scores_of(cell, whole.validation)
    assert scores.dice == again.each_case(model.network)
    assert len(scores.dice) == 3
    assert scores.organs == ["liver", "spleen"]
    lines = [json.loads(line) for line in (cell.folder / "metrics.jsonl").read_text().splitlines()]
    assert scores.training_loss == [one["loss"] for one in lines if one["event"] == "training"][-1]
    assert not (cell.folder / "last").exists()  # checkpoints of a large network would fill the disk


def test_a_checkpoint_that_is_a_folder_is_removed_too(whole, monkeypatch):
    cell = whole.cells[2]
    monkeypatch.setattr(cells, "train", lambda settings: (cell.folder / "last").mkdir())
    make(cell, whole.validation)
    assert not (cell.folder / "last").exists()


def test_the_table_is_that_of_the_originals_with_intervals(whole):
    rows = list(csv.DictReader((whole.out / "table.csv").read_text().splitlines()))
    cells = list(csv.DictReader((whole.out / "cells.csv").read_text().splitlines()))
    mean = {
        name: np.mean([[float(c["liver"]), float(c["spleen"])] for c in cells if c["cell"] == name])
        for name in (cell.name for cell in whole.cells)
    }
    [row] = [r for r in rows if (r["row"], r["training_volumes"], r["organ"]) == ("pretrained", "3", "mean")]
    first, second = mean["random-n3-seed0"], mean["pretrained-n3-seed0"]
    assert float(row["reference"]) == pytest.approx(first, abs=1e-6)
    assert float(row["dice"]) == pytest.approx(second, abs=1e-6)
    assert float(row["difference"]) == pytest.approx(second - first, abs=2e-6)
    assert float(row["relative_improvement"]) == pytest.approx((second - first) / first, abs=1e-4)
    assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
    text = (whole.out / "table.md").read_text()
    assert f"| {first:.3f} " in text
    assert "pretrained against random, 3 training volumes: " in text
    assert "With one seed" in text
    assert text.count("| liver") == 2
    assert (whole.out / "plot.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize("batch", [1, 5], ids=["first cell", "third cell"])
def test_a_killed_study_goes_on_to_the_same_tables(whole, store, pretrained, tmp_path, monkeypatch, batch):
    out = tmp_path / whole.out.name
    calls = iter(range(100))

    def interrupting(*where: object, **named: object):
        for one in batches(*where, **named):
            if next(calls) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            yield one

    batches = training.batches
    monkeypatch.setattr(training, "batches", interrupting)
    study = opened(store, out, f"init={pretrained}", "volumes=3,1", "seeds=1")
    with pytest.raises(Interrupted):
        run_study(study)
    assert len(unfinished(study)) == 4 - batch // 2
    run_study(opened(store, out, f"init={pretrained}", "volumes=3,1", "seeds=1"))
    assert tables(study) == tables(whole)


def test_a_cell_trained_by_its_own_command_is_the_study_s(whole, store, pretrained, tmp_path, unetrkit):
    study = opened(store, tmp_path / whole.out.name, f"init={pretrained}", "volumes=3,1", "seeds=1")
    assert commands(study)[2].startswith("unetrkit train ")
    assert unetrkit(*commands(study)[2].split()[1:]).code == 0
    run_study(study, only=study.cells[2].name)
    assert [cell.name for cell in unfinished(study)] == [study.cells[n].name for n in (0, 1, 3)]
    assert scores_of(study.cells[2], study.validation) == scores_of(whole.cells[2], whole.validation)
    text = (study.out / "table.md").read_text()
    assert "Not finished yet: `random-n1-seed0`" in text


def test_parts_that_run_at_once_make_the_study_s_tables(whole, store, pretrained, tmp_path, unetrkit):
    out = tmp_path / whole.out.name
    words = ["study", "label_efficiency", f"data={store}", f"out={out}", *SMALL, f"init={pretrained}"]
    parts, [last] = stages([*words, "volumes=3,1", "seeds=1"], 2)
    jobs = [
        subprocess.Popen([sys.executable, "-m", "unetrkit", *part], stderr=subprocess.PIPE, text=True)
        for part in parts
    ]
    said = [job.communicate(timeout=100)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert [text.count("cell 2 of 2: ") for text in said] == [1, 1]
    assert not (out / "table.md").exists()
    done = unetrkit(*last)
    assert done.code == 0 and "4 cells, 0 not finished" in done.err
    assert {name: (out / name).read_bytes() for name in FILES} == tables(whole)


def test_a_study_may_be_opened_while_another_opens_it(whole, store, pretrained, tmp_path, monkeypatch):
    """At every moment: before and after each file that is written."""
    words = (store, tmp_path / "study", f"init={pretrained}", "volumes=3,1", "seeds=1")
    write = run.atomic_write

    def meanwhile(path: Path, content: bytes) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(run, "atomic_write", write)
            opened(*words)
        write(path, content)

    monkeypatch.setattr(run, "atomic_write", meanwhile)
    assert len(unfinished(opened(*words))) == 4


def test_more_seeds_add_cells_and_other_settings_are_refused(whole, store, pretrained):
    before = tables(whole)
    more = [f"init={pretrained}", "volumes=1,3"]
    larger = opened(store, whole.out, *more, "seeds=2")
    assert [cell.seed for cell in unfinished(larger)] == [1] * 4
    with pytest.raises(UserError, match=r"its `optim\.lr` is 0\.01, not 0\.02"):
        opened(store, whole.out, *more, "seeds=1", "optim.lr=2e-2")
    with pytest.raises(UserError, match="something that is not a study of augmentation"):
        opened(store, whole.out, name="augmentation")
    with pytest.raises(UserError, match="not on an object store"):
        opened(store, Path("s3://bucket/study"), name="augmentation")
    assert tables(whole) == before


def test_rows_of_the_ablations(store, tmp_path):
    settings = read_settings("augmentation", [f"data={store}", *SMALL, "seeds=2"])
    study = design("augmentation", settings)
    assert study.rows[0] == "baseline"
    assert {cell.row: cell.settings.augment for cell in study.cells} == AUGMENTATION
    assert {cell.volumes for cell in study.cells} == {3}
    settings = read_settings("architecture", [f"data={store}", *SMALL[2:], "network_options.feature_size=8"])
    study = design("architecture", settings)
    assert {cell.row: cell.settings.network for cell in study.cells} == {row: row for row in ARCHITECTURE}
    assert all(cell.settings.network_options == {"feature_size": 8} for cell in study.cells)


def test_an_ablation_s_table(store, tmp_path, monkeypatch):
    study = opened(store, tmp_path / "study", "seeds=1", name="augmentation")
    for cell in study.cells[:3]:
        make(cell, study.validation)
    monkeypatch.setattr("unetrkit.studies.run.make", lambda *_: pytest.fail("all that was asked is there"))
    text = run_study(study, only=study.cells[0].name)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("| ")] == [
        "augmentation", "baseline", "none", "flip_only"
    ]  # fmt: skip
    assert "training loss" in text
    assert "Dice without background" in text
    assert "flip_only against baseline, 3 training volumes: " in text


def test_random_weights_get_the_network_of_the_given_ones(store, pretrained, tmp_path):
    """A pre-trained network of another size than the default would be compared with that default."""
    words = [f"data={store}", f"init={pretrained}", *SMALL[:1], *SMALL[2:], "volumes=1"]
    study = design("label_efficiency", read_settings("label_efficiency", words))
    assert {json.dumps(cell.settings.network_options, sort_keys=True) for cell in study.cells} == {
        json.dumps(study.cells[0].settings.network_options, sort_keys=True)
    }
    assert study.cells[0].settings.network_options["width"] == 16
    wider = tmp_path / "wider"
    changed = load_recipe(
        TrainSettings, pretrained / "config.yaml", [f"out={wider}", "network_options.width=32"]
    )
    train(changed)
    words[1] = f"init={pretrained},{wider}"
    with pytest.raises(UserError, match="needs another network than"):
        design("label_efficiency", read_settings("label_efficiency", words))


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["label_eficiency"], "there is no study `label_eficiency`", "did you mean `label_efficiency`?"),
        (["label_efficiency"], "`init` is not given", "write `init=…`"),
        (["label_efficiency", "init=no.pt"], "there is no file `{cwd}/no.pt`", ""),
        (["label_efficiency", "init=p,p"], "two rows would be called `pretrained`", "another name"),
        (["augmentation", "volume=3"], "`volume` is not a setting", "did you mean `volumes`?"),
        (["augmentation", "volumes=4"], "4 training cases are asked for, and there are 3", "give fewer"),
        (["augmentation", "volumes=0"], "`volumes` is 0", ""),
        (["augmentation", "seeds=0"], "`seeds` is 0", ""),
        (["augmentation", "cases=2"], "`cases` is not for this study to be told", "`volumes` says"),
        (["augmentation", "augment.p_flip=0"], "`augment.p_flip` is not for", "the rows of the study"),
        (["architecture", "network=unetr"], "`network` is not for", "the rows of the study"),
        (["augmentation", "loop.validate_every=1"], "`loop.validate_every` is not for", "at its end only"),
        (["augmentation", "data=dataset.json"], "there is no store in `dataset.json`", "unetrkit prepare"),
        (["augmentation", "--part", "3/2"], "`3/2` is not a part", "write the third of 16 parts as 3/16"),
        (["augmentation", "--cell", "basline-n3-seed0"], "the study has no cell", "`baseline-n3-seed0`"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_trained(
    unetrkit: CommandLine, store, pretrained, tmp_path, monkeypatch, words, message, hint
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").symlink_to(pretrained)
    small = SMALL[2:] if "architecture" in words else SMALL
    name, *rest = words
    outcome = unetrkit("study", name, f"data={store}", *small, *rest)
    assert outcome.code == 2
    assert message.format(cwd=tmp_path) in outcome.err
    assert hint in outcome.err
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_command_lists_cells_and_says_what_to_do_next(unetrkit: CommandLine, whole, store, pretrained):
    words = ["study", "label_efficiency", f"data={store}", f"out={whole.out}", *SMALL]
    words += [f"init={pretrained}", "volumes=1,3", "seeds=1"]
    listed = unetrkit(*words, "--list")
    assert listed.out.splitlines() == commands(whole)
    before = tables(whole)
    done = unetrkit(*words)
    assert done.code == 0
    assert done.out.splitlines()[0].startswith("| training volumes | validation volumes | initialisation")
    assert "pretrained against random, 1 training volume: " in done.out
    assert done.err.splitlines()[-1].startswith("next: ")
    assert tables(whole) == before
