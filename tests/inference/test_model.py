"""Model folders: what is written is read back, and nothing else is believed or executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from unetrkit import networks
from unetrkit.errors import UserError
from unetrkit.inference.model import load_model, save_model

SIZE = (16, 16, 16)


def save_tiny(folder, plan, seed=0, **options):
    torch.manual_seed(seed)
    network = networks.build("tiny", 1, 3, SIZE, options)
    save_model(folder, network, name="tiny", image_size=SIZE, options=options, plan=plan, origin={"fold": 2})
    return network


def test_a_saved_model_gives_the_same_logits(tmp_path, plan):
    network = save_tiny(tmp_path / "model", plan, width=6).eval()
    loaded = load_model(tmp_path / "model")
    windows = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.network(windows), network(windows))
    assert loaded.plan == plan
    assert not loaded.network.training
    assert loaded.description["options"] == {"width": 6}
    assert loaded.description["origin"] == {"fold": 2}
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model.json",
        "weights.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_folder_gives_its_model(tmp_path, plan):
    save_tiny(tmp_path / "run" / "model", plan)
    assert load_model(tmp_path / "run").plan == plan


def test_a_model_of_before_patch_sizes_is_read_and_cuts_what_it_sees(tmp_path, plan):
    save_tiny(tmp_path / "model", plan)
    file = tmp_path / "model" / "model.json"
    content = json.loads(file.read_text())
    del content["patch_size"]
    unsealed = json.dumps(content | {"seal": ""})
    seal = hashlib.sha256(unsealed.encode()).hexdigest()
    file.write_text(json.dumps(content | {"seal": seal}))
    assert load_model(tmp_path / "model").window == SIZE


def test_saving_again_replaces_the_model(tmp_path, plan):
    save_tiny(tmp_path / "model", plan, seed=0)
    second = save_tiny(tmp_path / "model", plan, seed=1)
    loaded = load_model(tmp_path / "model").network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in second.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("at", range(6))
def test_a_model_survives_an_interruption_anywhere(tmp_path, plan, monkeypatch, at):
    """Renames are the only changes that a reader sees: stop before each of them, as a power cut would."""
    save_tiny(tmp_path / "model", plan, seed=0)
    first = (tmp_path / "model" / "weights.safetensors").read_bytes()
    calls = []

    def stop(name):
        real = getattr(os, name)

        def called(*paths):
            calls.append(paths)
            if len(calls) > at:
                raise KeyboardInterrupt
            return real(*paths)

        monkeypatch.setattr(os, name, called)

    stop("rename"), stop("replace")
    try:
        save_tiny(tmp_path / "model", plan, seed=1)
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    monkeypatch.setitem(networks.NETWORKS, "tiny", lambda c, k, s: torch.nn.Identity())
    with pytest.raises(UserError, match="is not part of the network"):  # readable, whichever it is
        load_model(tmp_path / "model")
    if at < 2:
        assert (tmp_path / "model" / "weights.safetensors").read_bytes() == first


def test_tied_and_strided_weights_can_be_saved(tmp_path, plan, monkeypatch):
    def tied(c, k, size):
        network = torch.nn.Module()
        network.a = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
        network.b = network.a
        return network

    monkeypatch.setitem(networks.NETWORKS, "tied", tied)
    network = tied(1, 3, SIZE)
    save_model(tmp_path / "m", network, name="tied", image_size=SIZE, options={}, plan=plan, origin={})
    assert torch.equal(load_model(tmp_path / "m").network.b, network.a)


def test_a_folder_of_something_else_is_not_replaced(tmp_path, plan):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "ct.nii.gz").write_bytes(b"precious")
    with pytest.raises(UserError, match="not a model"):
        save_tiny(tmp_path / "scans", plan)
    assert (tmp_path / "scans" / "ct.nii.gz").read_bytes() == b"precious"


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def change(folder, **fields):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite_weights(folder, content: bytes):
    import hashlib

    (folder / "weights.safetensors").write_bytes(content)
    change(folder, sha256=hashlib.sha256(content).hexdigest())


def test_pickles_are_never_opened(tmp_path, plan):
    canary = tmp_path / "canary"
    pickled = pickle.dumps(Canary(canary))
    for name in ("model.pt", "model.pth", "last.ckpt", "model.pkl"):
        (tmp_path / name).write_bytes(pickled)
        with pytest.raises(UserError, match="is a file, but a model is a folder"):
            load_model(tmp_path / name)
    save_tiny(tmp_path / "model", plan)
    rewrite_weights(tmp_path / "model", pickled)
    with pytest.raises(UserError, match="not a safetensors file"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "model.json").write_bytes(pickled)
    with pytest.raises(UserError, match="is not JSON"):
        load_model(tmp_path / "model")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "weights.safetensors").unlink(), "there is no file"),
        (lambda m: (m / "model.json").unlink(), "holds no model"),
        (lambda m: (m / "model.json").write_text("[1]"), "does not describe a model"),
        (lambda m: (m / "model.json").write_text('{"state_dict": 1}'), "does not describe a model"),
        (lambda m: change(m, version=2), "is of version 2"),
        (lambda m: change(m, classes=4), "4 classes and a plan of 1 channels and 3"),
        (lambda m: change(m, in_channels=2), "2 channels and 3 classes and a plan of 1"),
        (lambda m: change(m, extra=1), "`extra`"),
        (lambda m: change(m, plan={}), "`plan.dataset`"),
        (lambda m: change(m, network="tinny"), "`tinny` is not a network"),
        (lambda m: change(m, options={"width": 5}), r"`0.bias` is \(4,\) instead of \(5,\)"),
        (
            lambda m: rewrite_weights(m, safetensors.torch.save({"x": torch.zeros(1)})),
            "`0.bias` is missing, `0.weight` is missing, `2.bias` is missing and 2 more",
        ),
    ],
)
def test_damaged_models_are_refused_in_words(tmp_path, plan, damage, message):
    save_tiny(tmp_path / "model", plan)
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path / "model")
    assert str(tmp_path) in caught.value.message or "is not a network" in message
    assert "\n" not in caught.value.message


def test_every_changed_byte_of_the_weights_is_noticed(tmp_path, plan):
    save_tiny(tmp_path / "model", plan)
    path = tmp_path / "model" / "weights.safetensors"
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        with pytest.raises(UserError, match="SHA-256 differs"):
            load_model(tmp_path / "model")


def test_every_changed_byte_of_the_description_is_noticed(tmp_path, plan):
    save_tiny(tmp_path / "model", plan)
    path = tmp_path / "model" / "model.json"
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(UserError):
            load_model(tmp_path / "model")
    path.write_bytes(
        content.replace(b'"lower":0.0', b'"lower":1.0').replace(b'"lower": 0.0', b'"lower": 1.0')
    )
    with pytest.raises(UserError, match=r"model.json` was changed: its seal is broken"):
        load_model(tmp_path / "model")
    change(tmp_path / "model", seal="")
    with pytest.raises(UserError, match="seal is broken"):
        load_model(tmp_path / "model")


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no model"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path)
