"""The command line with bad input: one `error:` line that names file or value, a `hint:`, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from bad_scans import BAD_SCANS
from unetrkit.data.phantom import write_phantom
from unetrkit.data.plan import read_plan
from unetrkit.errors import ExitCode
from unetrkit.inference.model import save_model
from unetrkit.networks import build

SECONDS = 20  # generous: the machine may be busy; typically under one
PLAN = ("patch_size=32,32,32", "spacing=8,8,9")


@pytest.fixture(scope="session")
def house(tmp_path_factory) -> Path:
    """A folder with a good data set, its store and a model: what the bad cases are made from."""
    from unetrkit.cli import app

    folder = tmp_path_factory.mktemp("house")
    datalist = write_phantom(folder / "data", training=3, validation=1, coarseness=3.5)
    words = ["prepare", str(datalist), str(folder / "store"), *PLAN, "--workers", "1"]
    app(words, standalone_mode=False)
    plan = read_plan(folder / "store" / "plan.json")
    size = (32, 32, 32)
    network = build("swin_unetr_tiny", 1, len(plan.classes), size, {})
    save_model(
        folder / "model", network, name="swin_unetr_tiny", image_size=size, options={}, plan=plan, origin={}
    )
    return folder


@pytest.fixture
def work(house, tmp_path) -> Path:
    """A copy of the house that a test may break."""
    shutil.copytree(house, tmp_path / "work")
    return tmp_path / "work"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_refused(outcome, *named: str) -> None:
    assert outcome.code == ExitCode.WRONG_USE, outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    for name in named:
        assert name in errors[0], f"{name!r} is not in {errors[0]!r}"
    assert any(line.startswith("hint: ") for line in outcome.err.splitlines()), outcome.err
    assert "Traceback" not in outcome.err


def first_scan(folder: Path) -> tuple[Path, Path]:
    entry = json.loads((folder / "data/dataset.json").read_text())["training"][0]
    return folder / "data" / entry["image"], folder / "data" / entry["label"]


@pytest.mark.parametrize("fault", BAD_SCANS)
def test_check_refuses_a_bad_scan(unetrkit, work, fault):
    image, label = first_scan(work)
    BAD_SCANS[fault](image, label)
    begin = time.monotonic()
    outcome = unetrkit("check", work / "data/dataset.json", "--workers", 1)
    assert_refused(outcome, image.name.removesuffix(".nii.gz"))
    assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("fault", BAD_SCANS)
def test_prepare_writes_no_half_of_a_bad_scan(unetrkit, work, fault):
    """Whoever skips `check` is stopped by `prepare`: the bad case is not in the store, and no index is."""
    image, label = first_scan(work)
    BAD_SCANS[fault](image, label)
    store = work / "new"
    outcome = unetrkit("prepare", work / "data/dataset.json", store, *PLAN, "--workers", 1)
    if fault in ("constant image", "image and label swapped") and outcome.code == 0:
        pytest.skip("only check looks at this")
    assert_refused(outcome, image.name.removesuffix(".nii.gz"))
    assert not (store / "store.json").exists()
    assert not list(store.rglob("*tmp*"))


# Each takes the work folder, breaks something, returns the words of a command and what its error must name.
def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _datalist(work: Path, change) -> Path:
    path = work / "data/dataset.json"
    values = json.loads(path.read_text())
    return _write(path, json.dumps(change(values) or values))


def _pickle(path: Path) -> Path:
    """A pickle that would leave a file behind if anything ever opened it."""
    code = f"cos\nsystem\n(S'touch {path.parent / 'EXECUTED'}'\ntR."
    return _write(path, code)


def _train(work: Path, *words: object) -> tuple[object, ...]:
    return (
        "train",
        "swin_unetr_tiny",
        f"data={work / 'store'}",
        f"out={work / 'run'}",
        "loop.device=cpu",
        *words,
    )


def _predict(work: Path, scan: object, *words: object, model: object = None) -> tuple[object, ...]:
    return ("predict", scan, work / "out", "--model", model or work / "model", *words)


def _scan(work: Path, array: np.ndarray, name: str = "scan.nii.gz") -> Path:
    path = work / "scans" / name
    path.parent.mkdir(exist_ok=True)
    nib.Nifti1Image(array, np.diag([8.0, 8.0, 9.0, 1.0])).to_filename(path)
    return path


def _torn_store(work: Path) -> None:
    chunks = sorted((work / "store/cases").rglob("image*"))[0]
    chunks.write_bytes(chunks.read_bytes()[:-50])


def _flipped_store(work: Path) -> None:
    chunks = sorted((work / "store/cases").rglob("image*"))[0]
    content = bytearray(chunks.read_bytes())
    content[len(content) // 2] ^= 1
    chunks.write_bytes(bytes(content))


def _edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _zip_model(work: Path) -> Path:
    path = work / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", f"cos\nsystem\n(S'touch {work / 'EXECUTED'}'\ntR.")
        archive.writestr("evil/version", "3")
    return path


def _huge_safetensors(work: Path) -> None:
    (work / "model/weights.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def _link_outside(work: Path) -> Path:
    secret = _write(work / "elsewhere/secret.nii.gz", (first_scan(work)[0]).read_bytes())
    link = work / "data/imagesTr/link.nii.gz"
    link.symlink_to(secret)
    return _datalist(work, lambda v: v["training"][0].update(image="imagesTr/link.nii.gz"))


CASES = {
    "no such data list": lambda w: (("check", w / "nowhere.json"), "nowhere.json"),
    "data list is not JSON": lambda w: (("check", _write(w / "data/bad.json", "{nope")), "bad.json"),
    "data list is a list": lambda w: (("check", _write(w / "data/bad.json", "[1, 2]")), "bad.json"),
    "data list without cases": lambda w: (
        ("check", _datalist(w, lambda v: {"labels": v["labels"]})),
        "dataset.json",
    ),
    "entry without image": lambda w: (
        ("check", _datalist(w, lambda v: v["training"][1].pop("image") and None)),
        "training",
    ),
    "entry is a number": lambda w: (("check", _datalist(w, lambda v: v["training"].append(7))), "training"),
    "labels are nonsense": lambda w: (
        ("check", _datalist(w, lambda v: v.update(labels={"0": "a", "x": "b"}))),
        "dataset.json",
    ),
    "path outside the folder": lambda w: (
        ("check", _datalist(w, lambda v: v["training"][0].update(image="../../../etc/passwd"))),
        "passwd",
    ),
    "absolute path outside": lambda w: (
        ("check", _datalist(w, lambda v: v["training"][0].update(image="/etc/hostname"))),
        "/etc/hostname",
    ),
    "link that leads outside": lambda w: (("check", _link_outside(w)), "link"),
    "same case in two splits": lambda w: (
        ("check", _datalist(w, lambda v: v["validation"].append(v["training"][0]))),
        "phantom_001",
    ),
    "same subject in two splits": lambda w: (
        (
            "check",
            _datalist(
                w, lambda v: [e.update(subject="s1") for e in (v["training"][0], v["validation"][0])] and None
            ),
        ),
        "s1",
    ),
    "copied scan in two splits": lambda w: (
        (
            "check",
            _datalist(
                w,
                lambda v: (
                    (
                        shutil.copy(
                            w / "data" / v["training"][0]["image"], w / "data" / v["validation"][0]["image"]
                        ),
                        shutil.copy(
                            w / "data" / v["training"][0]["label"], w / "data" / v["validation"][0]["label"]
                        ),
                    )
                    and None
                ),
            ),
        ),
        "phantom_001",
    ),
    "empty folder": lambda w: (("check", (w / "empty").mkdir() or w / "empty"), "empty"),
    "no such plan": lambda w: (
        ("prepare", w / "data/dataset.json", w / "new", "--plan", w / "no.json"),
        "no.json",
    ),
    "plan with an unknown entry": lambda w: (
        (
            "prepare",
            w / "data/dataset.json",
            w / "new",
            "--plan",
            _edit_json(w / "store/plan.json", spacings=[1, 1, 1]) or w / "store/plan.json",
        ),
        "spacings",
    ),
    "plan with spacing 0": lambda w: (
        ("prepare", w / "data/dataset.json", w / "new", "spacing=0,1,1"),
        "spacing",
    ),
    "plan with an unknown name": lambda w: (
        ("prepare", w / "data/dataset.json", w / "new", "spacng=1,1,1"),
        "spacng",
    ),
    "plan patch no multiple of 16": lambda w: (
        ("prepare", w / "data/dataset.json", w / "new", "patch_size=30,32,32"),
        "patch_size",
    ),
    "unknown published plan": lambda w: (
        ("prepare", w / "data/dataset.json", w / "new", "--published", "btvc"),
        "btvc",
    ),
    "store into somebody's folder": lambda w: (
        ("prepare", w / "data/dataset.json", _write(w / "mine/thesis.tex", "x").parent),
        "mine",
    ),
    "store where a file is": lambda w: (
        ("prepare", w / "data/dataset.json", _write(w / "file", "x")),
        "file",
    ),
    "unknown recipe": lambda w: (("train", "swin_untr_tiny", f"data={w / 'store'}"), "swin_untr_tiny"),
    "recipe that is no YAML": lambda w: (
        ("train", _write(w / "r.yaml", "a: [1"), f"data={w / 'store'}"),
        "r.yaml",
    ),
    "recipe that is a pipe": lambda w: (
        os.mkfifo(w / "pipe.yaml") or ("train", w / "pipe.yaml", f"data={w / 'store'}"),
        "pipe.yaml",
    ),
    "recipe with a YAML tag": lambda w: (
        (
            "train",
            _write(w / "r.yaml", "network: !!python/object/apply:os.system ['true']"),
            f"data={w / 'store'}",
        ),
        "r.yaml",
    ),
    "unknown setting": lambda w: (_train(w, "optim.lrr=1"), "optim.lrr"),
    "setting of a wrong type": lambda w: (_train(w, "loop.steps=many"), "loop.steps"),
    "setting out of range": lambda w: (_train(w, "optim.lr=-1"), "optim.lr"),
    "setting without a value": lambda w: (_train(w, "loop.steps"), "loop.steps"),
    "no data": lambda w: (("train", "swin_unetr_tiny"), "data"),
    "data is not a store": lambda w: (("train", "swin_unetr_tiny", f"data={w / 'data'}"), "data"),
    "data is a data list": lambda w: (
        ("train", "swin_unetr_tiny", f"data={w / 'data/dataset.json'}"),
        "dataset.json",
    ),
    "unknown network": lambda w: (_train(w, "network=unetrr"), "unetrr"),
    "unknown network option": lambda w: (_train(w, "network_options.featuresize=12"), "featuresize"),
    "a fold that is not there": lambda w: (_train(w, "fold=9"), "9"),
    "a GPU where there is none": lambda w: (
        ("train", "swin_unetr_tiny", f"data={w / 'store'}", "loop.device=cuda"),
        "cuda",
    ),
    "store of another plan": lambda w: (
        _edit_json(w / "store/plan.json", spacing=[2, 2, 2]) or _train(w),
        "plan",
    ),
    "store with a torn case": lambda w: (
        _torn_store(w) or _train(w, "loop.steps=2", "loop.workers=0"),
        "phantom_",
    ),
    "store with a flipped bit": lambda w: (
        _flipped_store(w) or _train(w, "loop.steps=8", "loop.workers=0", "sampling.batch_size=4"),
        "phantom_",
    ),
    "store index is not JSON": lambda w: (_write(w / "store/store.json", "x") and _train(w), "store.json"),
    "run folder with other files": lambda w: (_write(w / "run/thesis.tex", "x") and _train(w), "run"),
    "checkpoint that is not ours": lambda w: (
        _write(w / "run/last", b"PK\x03\x04 nonsense") and _train(w),
        "run",
    ),
    "no model": lambda w: (_predict(w, first_scan(w)[0], model=w / "nothing"), "nothing"),
    "pickle for a model": lambda w: (
        _predict(w, first_scan(w)[0], model=_pickle(w / "evil.pkl")),
        "evil.pkl",
    ),
    "torch archive for a model": lambda w: (_predict(w, first_scan(w)[0], model=_zip_model(w)), "evil.pt"),
    "pickle for weights": lambda w: (
        _pickle(w / "model/weights.safetensors") and _predict(w, first_scan(w)[0]),
        "weights",
    ),
    "weights of impossible size": lambda w: (
        _huge_safetensors(w) or _predict(w, first_scan(w)[0]),
        "weights",
    ),
    "model without weights": lambda w: (
        (w / "model/weights.safetensors").unlink() or _predict(w, first_scan(w)[0]),
        "weights",
    ),
    "model of a later version": lambda w: (
        _edit_json(w / "model/model.json", version=99) or _predict(w, first_scan(w)[0]),
        "model.json",
    ),
    "model that names another network": lambda w: (
        _edit_json(w / "model/model.json", network="os.system") or _predict(w, first_scan(w)[0]),
        "os.system",
    ),
    "no such scan": lambda w: (_predict(w, w / "no.nii.gz"), "no.nii.gz"),
    "scan of two channels": lambda w: (_predict(w, _scan(w, np.zeros((9, 9, 9, 2), np.int16))), "scan"),
    "flat picture": lambda w: (_predict(w, _scan(w, np.zeros((9, 9), np.int16))), "scan"),
    "text for a scan": lambda w: (_predict(w, _write(w / "scans/notes.nii.gz", "hello")), "notes.nii.gz"),
    "picture file": lambda w: (_predict(w, _write(w / "scans/photo.png", b"\x89PNG")), "photo.png"),
    "predictions over the scans": lambda w: (
        ("predict", w / "data/imagesTr", w / "data/imagesTr", "--model", w / "model"),
        "imagesTr",
    ),
    "overlap of 1": lambda w: (_predict(w, first_scan(w)[0], "overlap=1.0"), "overlap"),
    "unknown prediction setting": lambda w: (_predict(w, first_scan(w)[0], "overlp=0.5"), "overlp"),
    "unknown split": lambda w: (
        ("predict", w / "data/dataset.json", w / "out", "--model", w / "model", "--split", "vaildation"),
        "vaildation",
    ),
    "GPU for prediction": lambda w: (_predict(w, first_scan(w)[0], "device=cuda"), "cuda"),
    "no predictions": lambda w: (("evaluate", w / "none", w / "data/dataset.json", w / "report"), "none"),
    "prediction on another grid": lambda w: (
        (
            "evaluate",
            _scan(w, np.zeros((9, 9, 9), np.uint8), "phantom_004.nii.gz").parent,
            w / "data/dataset.json",
            w / "report",
        ),
        "phantom_004",
    ),
    "prediction of nobody": lambda w: (
        (
            "evaluate",
            _scan(w, np.zeros((9, 9, 9), np.uint8), "stranger.nii.gz").parent,
            w / "data/dataset.json",
            w / "report",
        ),
        "stranger",
    ),
    "report into somebody's folder": lambda w: (
        ("evaluate", w / "data/labelsTr", w / "data/dataset.json", _write(w / "mine/thesis.tex", "x").parent),
        "mine",
    ),
    "negative tolerance": lambda w: (
        ("evaluate", w / "data/labelsTr", w / "data/dataset.json", w / "report", "--tolerance-mm", "-1"),
        "tolerance",
    ),
    "unknown command": lambda w: (("predikt",), "predikt"),
    "unknown option": lambda w: (("check", w / "data/dataset.json", "--jsn"), "--jsn"),
    "missing argument": lambda w: (("prepare",), "argument"),
    "unknown topic": lambda w: (("info", "recepies"), "recepies"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line(unetrkit, work, case):
    if "GPU" in case and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words, named = CASES[case](work)
    before = contents(work)
    begin = time.monotonic()
    assert_refused(unetrkit(*words), named)
    assert time.monotonic() - begin < SECONDS
    assert not (work / "EXECUTED").exists()
    after = contents(work)
    assert {name: content for name, content in after.items() if name in before} == before  # nothing lost
    left = [name for name in after if name not in before]
    assert not [
        name for name in left if name.endswith((".nii.gz", ".html", ".csv", "store.json"))
    ]  # nothing half-done


def test_a_full_disk_is_an_error_and_loses_nothing(work):
    """A limit on the size of files stands for the full disk: an OSError from the same calls, without root."""
    before = contents(work)
    code = (
        "import resource, sys, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from unetrkit.cli import main; main()"
    )
    words = ["prepare", str(work / "data/dataset.json"), str(work / "new"), *PLAN, "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == ExitCode.WRONG_USE, done.stderr
    assert "error: " in done.stderr and "hint: " in done.stderr and "Traceback" not in done.stderr
    assert {k: v for k, v in contents(work).items() if k in before} == before
    assert not (work / "new/store.json").exists()


def test_another_run_in_the_folder_is_refused_and_kept(unetrkit, work):
    small = ("loop.steps=2", "loop.validate_every=2", "loop.workers=0", "sampling.batch_size=1")
    assert unetrkit(*_train(work, *small)).code == 0
    before = contents(work / "run")
    assert_refused(unetrkit(*_train(work, *small, "optim.lr=5e-3")), "optim.lr")
    assert contents(work / "run") == before


def test_good_input_has_no_false_alarm(unetrkit, work):
    outcome = unetrkit("check", work / "data/dataset.json", "--json", "--workers", 1)
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert not [f for f in report["findings"] if f["severity"] == "error"]


def test_help_is_quick():
    """No torch behind it. The best of three: the machine may be busy."""
    seconds = []
    for _ in range(3):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-m", "unetrkit", "--help"], check=True, capture_output=True)
        seconds.append(time.monotonic() - begin)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("command", ["demo", "check", "prepare", "train", "predict", "evaluate", "info"])
def test_every_command_has_help_with_an_example(unetrkit, command):
    outcome = unetrkit(command, "--help")
    assert outcome.code == 0 and f"Example: unetrkit {command}" in " ".join(outcome.out.split())


def test_output_into_a_closed_pipe_is_no_traceback():
    shell = f"{sys.executable} -m unetrkit info environment | true"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr
