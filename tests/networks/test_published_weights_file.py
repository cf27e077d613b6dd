"""Files of weights are opened without running what is in them; what is no file of weights is named."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from unetrkit.errors import UserError
from unetrkit.networks import weights_file
from unetrkit.networks.torchscript import read_torchscript
from unetrkit.networks.weights_file import read_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:The PyTorch API of nested"
)
WEIGHTS = {"encoder.a": torch.arange(6.0).reshape(2, 3), "encoder.b": torch.ones(2, dtype=torch.float16)}


class Net(nn.Module):
    """Something to script: nested, a buffer, attributes of other types, two names for one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2), nn.Linear(3, 2).half())
        self.register_buffer("index", torch.arange(5))
        self.names = ["x", "y"]
        self.sizes = [1, 2]
        self.tied = self.inner[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)


class Writes:
    """A pickle that makes a file where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def assert_weights(path: Path, kind: str) -> None:
    found = read_weights(path)
    assert found.kind == kind and found.tensors.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype


def bundle(folder: Path) -> Path:
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs/metadata.json").write_text('{"monai_version": "1.4.0"}')
    torch.save(WEIGHTS, folder / "models/model.pt")
    return folder


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files(tmp_path: Path, zipped: bool) -> None:
    for name in ("x.pt", "x.pth", "weights"):
        torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert_weights(tmp_path / name, "PyTorch file" if zipped else "PyTorch file (old form)")


def test_what_trainers_save_beside_the_weights(tmp_path: Path) -> None:
    content = {
        "model": {"state_dict": WEIGHTS},
        "best_acc": np.float64(0.5),
        "scores": np.ones(3, np.float32),
        "count": np.int64(3),
        "args": argparse.Namespace(lr=1e-3, nested=argparse.Namespace(x=1)),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "new.pt")
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_weights(tmp_path / "new.pt", "PyTorch file")
    assert_weights(tmp_path / "old.pt", "PyTorch file (old form)")
    assert read_weights(tmp_path / "new.pt").beside == ("best_acc", "scores", "count", "args", "epoch")
    # numpy 1 called its module otherwise: so do the published files. As long a name keeps the pickle whole
    old = (tmp_path / "old.pt").read_bytes()
    assert b"numpy._core.multiarray\nscalar" in old
    (tmp_path / "numpy1.pt").write_bytes(old.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert_weights(tmp_path / "numpy1.pt", "PyTorch file (old form)")


def test_safetensors(tmp_path: Path) -> None:
    for name in ("x.safetensors", "weights.bin"):
        safetensors.torch.save_file(WEIGHTS, tmp_path / name)
        assert_weights(tmp_path / name, "safetensors file")


def test_bundles(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "swin")
    assert_weights(folder, "MONAI bundle, PyTorch file")
    assert read_weights(folder).monai == (1, 4)
    for prefix, packing in (("", zipfile.ZIP_STORED), ("swin/", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / "bundle.zip", "w", packing) as archive:
            for file in folder.rglob("*.*"):
                archive.write(file, prefix + str(file.relative_to(folder)))
        before = set(tmp_path.rglob("*"))
        assert_weights(tmp_path / "bundle.zip", "MONAI bundle, PyTorch file")
        assert read_weights(tmp_path / "bundle.zip").monai == (1, 4)
        assert set(tmp_path.rglob("*")) == before
    for said in ('{"monai_version": 1.4}', "[]", ""):
        (folder / "configs/metadata.json").write_text(said)
        assert read_weights(folder).monai == ()
    (folder / "configs/metadata.json").unlink()
    assert read_weights(folder).monai == ()


@pytest.mark.parametrize("traced", [True, False])
def test_torchscript_is_read_without_torch_s_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: bool
) -> None:
    net = Net()
    script = torch.jit.trace(net, torch.zeros(1, 1, 3, 3, 3)) if traced else torch.jit.script(net)
    torch.jit.save(script, tmp_path / "net.pt")
    expected = script.state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    found = read_weights(tmp_path / "net.pt")
    assert found.kind == "TorchScript archive" and found.tensors.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found.tensors[name], tensor) and found.tensors[name].dtype == tensor.dtype


def read_torchscript_not(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    raise ValueError("it is odd")


def test_a_torchscript_archive_that_needs_its_code_needs_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Linear(4, 4)
    torch.jit.save(torch.jit.script(net), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "odd.pt", "w") as odd:
        for part in whole.infolist():
            content = whole.read(part)
            if part.filename.endswith("/data.pkl"):  # an operation that no archive has
                content = content[:2] + b"\x8a\x01\x010" + content[2:]
            odd.writestr(part.filename, content)
    with pytest.raises(
        UserError, match="cannot be read without running its code: it has the operation POP"
    ) as no:
        read_weights(tmp_path / "odd.pt")
    assert "--trust" in no.value.hint and "init_trust=true" in no.value.hint
    with monkeypatch.context() as patched:  # one that torch can read and we cannot
        patched.setattr(weights_file, "read_torchscript", read_torchscript_not)
        with pytest.raises(UserError, match="without running its code: it is odd"):
            read_weights(tmp_path / "whole.pt")
        found = read_weights(tmp_path / "whole.pt", trust=True)
    assert torch.equal(found.tensors["weight"], net.weight)


@pytest.mark.parametrize("form", ["zip", "old", "bundle", "torchscript", "whole module"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, form: str) -> None:
    made, path = tmp_path / "made", tmp_path / "x.pt"
    evil = {"state_dict": WEIGHTS, "best_acc": Writes(made)}
    if form == "whole module":
        torch.save(nn.Linear(2, 2), path)
        names = "torch.nn.modules.linear.Linear"
    elif form == "torchscript":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "good.pt")
        with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(path, "w") as bad:
            for part in good.infolist():
                content = pickle.dumps(evil["best_acc"], 2) if part.filename.endswith("data.pkl") else None
                bad.writestr(part.filename, content or good.read(part))
        names = "posix.mkdir"
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form != "old")
        names = "posix.mkdir"
        if form == "bundle":
            path.replace(bundle(tmp_path / "b") / "models/model.pt")
            path = tmp_path / "b"
    with pytest.raises(UserError) as refusal:
        read_weights(path)
    assert names in refusal.value.message and "run" in refusal.value.message and refusal.value.hint
    assert not made.exists()
    pickle.loads(pickle.dumps(Writes(made)))  # what it would have done
    assert made.exists()


def inside(model: bytes) -> bytes:
    """A bundle's zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("models/model.pt", model)
    return buffer.getvalue()


def wrecks(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Contents that are called weights, and what they are."""
    buffers = {}
    for kind, new in (("zip", True), ("old", False)):
        buffer = io.BytesIO()
        torch.save(
            {**WEIGHTS, "encoder.c": torch.randn(100, 100)}, buffer, _use_new_zipfile_serialization=new
        )
        buffers[kind] = buffer.getvalue()
    tensors = safetensors.torch.save(WEIGHTS)
    flipped = bytearray(buffers["zip"])
    flipped[len(flipped) // 2] ^= 1
    page = b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title></html>" * 20
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 250000000\n"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02.")
        archive.writestr("x/data/0", b"\0" * 2**25)
    return {
        "empty": (b"", "is empty"),
        "cut zip": (buffers["zip"][:-300], "is damaged or cut off"),
        "half a zip": (buffers["zip"][:20_000], "is damaged or cut off"),
        "flipped bit": (bytes(flipped), "is damaged or cut off"),
        "cut old": (buffers["old"][:-300], "is damaged or cut off"),
        "cut safetensors": (tensors[:-3], "is damaged or cut off"),
        "random": (np.random.default_rng(0).bytes(5000), "is no file of weights"),
        "a pickle of noise": (b"\x80\x02" + np.random.default_rng(1).bytes(500), "is damaged or cut off"),
        "a pickle of Python's own": (
            pickle.dumps({"a": 1}),
            "cut off, or holds more than tensors: Unsupported operand 149",
        ),
        "a bundle in a bundle": (inside(inside(buffers["zip"])), "is a zip archive without weights"),
        "web page": (page, "is a web page"),
        "pointer": (pointer, "is a pointer of Git LFS"),
        "gzip": (b"\x1f\x8b\x08" + bytes(100), "is a packed archive"),
        "another zip": (packed.getvalue(), "is a zip archive without weights"),
        "bomb": (bomb.getvalue(), "unpacks to more than 16 times its size"),
    }


@pytest.mark.parametrize("wreck", wrecks(Path()))
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, wreck: str, suffix: str) -> None:
    content, message = wrecks(tmp_path)[wreck]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    if suffix == ".safetensors" and wreck in ("random", "a pickle of Python's own"):
        message = "is damaged or cut off"
    with pytest.raises(UserError, match=message) as refusal:
        read_weights(path)
    assert str(path) in refusal.value.message and "\n" not in refusal.value.message and refusal.value.hint


def holds_itself(content: dict[str, object]) -> dict[str, object]:
    content["state_dict"] = content
    return content


CLAIMS: dict[str, tuple[Callable[[], object], str]] = {
    "one number for a huge tensor": (
        lambda: {"encoder.a": torch.zeros(1).expand(10**12)},
        r"`encoder.a` in .* is \(1000000000000,\), but its values are not stored",
    ),
    "sparse": (lambda: {"encoder.a": torch.eye(3).to_sparse()}, "not stored"),
    "no dictionary": (lambda: torch.ones(3), "has no weights by name"),
    "a list": (lambda: [torch.ones(3)], "has no weights by name"),
    "an empty dictionary": (dict, "has no weights by name: it holds nothing"),
    "numbers as names": (lambda: {1: torch.ones(3)}, "has no weights by name"),
    "itself": (lambda: holds_itself({"epoch": 3}), "it holds names of `epoch`"),
    "no values": (lambda: {"encoder.a": torch.ones(3, device="meta")}, r"is \(3,\), but its values are not"),
    "nested": (
        lambda: {"encoder.a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        "is nested, but its values are not stored",
    ),
    "nothing": (lambda: {"encoder.a": torch.ones(0, 3)}, r"is \(0, 3\) of torch.float32, which no network"),
    "eight bits": (
        lambda: {"encoder.a": torch.ones(3).to(torch.float8_e4m3fn)},
        r"is \(3,\) of torch.float8_e4m3fn, which no network",
    ),
    "a name that a terminal obeys": (
        lambda: {"\x1b[2J\nerror: no": torch.ones(3)},
        r"no weight's: `\\x1b\[2J\\nerror: no`$",
    ),
    "a name of a megabyte": (lambda: {"a" * 10**6: torch.ones(3)}, "no weight's: `a{200}`$"),
    "an optimizer only": (
        lambda: {"optimizer": {"lr": 1}, "epoch": 3},
        "it holds names of `optimizer`, `epoch`",
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_contents_that_are_no_weights(tmp_path: Path, claim: str) -> None:
    make, message = CLAIMS[claim]
    torch.save(make(), tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "x.pt")


def test_a_claim_of_more_memory_than_there_is(tmp_path: Path) -> None:
    torch.save({"encoder.a": torch.arange(1000.0)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pt").read_bytes()
    number = b"M\xe8\x03"  # 1000, as a pickle writes it
    assert content.count(number) >= 2
    (tmp_path / "x.pt").write_bytes(content.replace(number, b"\x8a\x07" + (2**50).to_bytes(7, "little")))
    with pytest.raises(UserError, match="asks for more memory than there is"):
        read_weights(tmp_path / "x.pt")


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder without weights"):
        read_weights(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.pt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe"):
        read_weights(tmp_path / "pipe")


@pytest.mark.parametrize("start", [b"", (1000).to_bytes(8, "little") + b"{"])
def test_a_terabyte_of_holes_costs_nothing(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(start)
    os.truncate(path, 2**40)
    with pytest.raises(UserError, match="is damaged or cut off"):
        read_weights(path)


def test_what_lies_beside_cannot_move_the_cursor(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "\x1b[2J\nnote": 1}, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt").beside == (r"\x1b[2J\nnote",)


@pytest.mark.parametrize("name", [b"a", b"a" * 1001])
def test_torchscript_modules_nested_without_end(tmp_path: Path, name: bytes) -> None:
    # a module whose attribute is itself; a long name would be repeated for each of its depths
    length = len(name).to_bytes(4, "little")
    loop = b"\x80\x02c__torch__\nM\n)\x81q\x00}(X" + length + name + b"h\x00ub."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", loop)
        archive.writestr("x/constants.pkl", b"")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive, pytest.raises(ValueError, match="without end"):
        read_torchscript(archive)
