"""A file of weights, whoever wrote it, opened without running anything that is in it."""

import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from unetrkit.errors import UserError, printable, refuse_pipe
from unetrkit.networks.torchscript import read_torchscript

AGAIN = "download it again and compare its size with the one that the publisher names"
# in the order in which they are looked for; each was seen in a published file or a trainer's source
CONTAINERS = ("state_dict", "model_state_dict", "model", "network", "net", "weights")
LONGEST_NAME = 200  # letters of a weight
METADATA = "configs/metadata.json"  # of a MONAI bundle
# a part of a .pt file is stored as it is; a part that unpacks to far more than the file is a bomb
INFLATION = 16


class Inert:
    """Stands for what lies beside the weights (`best_acc`, a trainer's arguments) and does nothing.

    numpy's own functions are not let in: a dtype with a forged state makes them read foreign memory.
    """

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


HARMLESS = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float16", "Float32", "Float64", "Int32", "Int64", "Bool")),
    "numpy.dtype",
    "numpy.ndarray",
    "argparse.Namespace",
)


@dataclass(frozen=True)
class Weights:
    """Tensors by the names that their file gives them."""

    path: Path
    kind: str  # what the file is, in words
    tensors: Mapping[str, Tensor]
    beside: tuple[str, ...] = ()  # what else the file holds
    # of a model of ours: its `network`, `options`, `image_size`, `in_channels`, `classes`
    description: Mapping[str, Any] = field(default_factory=dict)
    monai: tuple[int, ...] = ()  # the version that a MONAI bundle says it was made or tested with


def read_weights(path: Path, *, trust: bool = False) -> Weights:
    """The tensors of a .pt, .pth, .safetensors or TorchScript file, or of a MONAI bundle (folder or zip).

    trust: let torch compile a TorchScript archive that cannot be read without; its code may then run.

    Raises:
        UserError: anything else, a damaged file, and a pickle that holds more than tensors and numbers.
        OSError: what the operating system says of a file that is missing or may not be read.
    """
    if path.is_dir():
        for name in ("model.pt", "model.safetensors", "model.ts"):
            if (path / "models" / name).is_file():
                found = read_weights(path / "models" / name, trust=trust)
                metadata = path / METADATA
                return _bundled(found, metadata.read_bytes() if metadata.is_file() else b"")
        hint = "give a file of weights, a MONAI bundle, a run folder, or a model folder"
        raise UserError(f"`{path}` is a folder without weights: it has no `models/model.pt`", hint=hint)
    refuse_pipe(path)
    with open(path, "rb") as file:
        return _read(file, path, path.stat().st_size, trust)


def _read(file: IO[bytes], path: Path, size: int, trust: bool, *, within: bool = False) -> Weights:
    """`within`: the file lies in a bundle's zip, as a bundle does not."""
    start = file.read(512)
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(file, path, size, trust, within=within)
    header = int.from_bytes(start[:8], "little")
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and 2 <= header <= size - 8):
        try:
            # a file is mapped, not read: one of a terabyte of holes costs nothing
            load = safetensors.torch.load
            content = load(file.read()) if within else safetensors.torch.load_file(path)
            return weights_of(content, path, "safetensors file")
        except (SafetensorError, KeyError, ValueError) as error:
            _refuse_by_its_beginning(start, path)
            raise UserError(f"`{path}` is damaged or cut off: {_line(error)}", hint=AGAIN) from error
    if start[:1] == b"\x80":  # after the other, whose length may begin with this byte too
        return weights_of(_loaded(file, path), path, "PyTorch file (old form)")
    _refuse_by_its_beginning(start, path)
    hint = "expected a .pt, .pth or .safetensors file, a TorchScript archive, or a MONAI bundle"
    raise UserError(f"`{path}` is no file of weights", hint=hint)


def _refuse_by_its_beginning(start: bytes, path: Path) -> None:
    """Raises UserError for what is found under the name of weights more often than damage."""
    if not start:
        raise UserError(f"`{path}` is empty", hint=AGAIN)
    if start.startswith(b"version https://git-lfs"):
        hint = "`git lfs pull` in its repository fetches the file itself"
        raise UserError(f"`{path}` is a pointer of Git LFS, not the weights", hint=hint)
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        hint = "the download gave a page, perhaps of a login or a warning: open the link in a browser"
        raise UserError(f"`{path}` is a web page, not weights", hint=hint)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")) or start[257:262] == b"ustar":
        raise UserError(f"`{path}` is a packed archive", hint="unpack it and give the file of weights in it")


def _read_zip(file: IO[bytes], path: Path, size: int, trust: bool, *, within: bool) -> Weights:
    try:
        archive = zipfile.ZipFile(file)
        parts = {part.filename: part for part in archive.infolist()}
        if sum(part.file_size for part in parts.values()) > INFLATION * size + 2**20:
            message = f"`{path}` unpacks to more than {INFLATION} times its size, as weights do not"
            raise UserError(message, hint="get the weights from another place")
        if changed := archive.testzip():  # torch does not look at the checksums
            raise zipfile.BadZipFile(f"the checksum of its part {changed} is another")
        if any(re.fullmatch(r"([^/]+/)?data\.pkl", name) for name in parts):
            if not any(re.fullmatch(r"([^/]+/)?(constants\.pkl|code/.*)", name) for name in parts):
                file.seek(0)
                return weights_of(_loaded(file, path), path, "PyTorch file")
            return weights_of(_torchscript(archive, file, path, trust), path, "TorchScript archive")
        for kind in () if within else ("pt", "safetensors", "ts"):
            for name in parts:
                if re.fullmatch(rf"([^/]+/)?models/model\.{kind}", name):
                    inside = io.BytesIO(archive.read(name))
                    found = _read(inside, path, size, trust, within=True)
                    metadata = name.removesuffix(f"models/model.{kind}") + METADATA
                    return _bundled(found, archive.read(metadata) if metadata in parts else b"")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"`{path}` is damaged or cut off: {_line(error)}", hint=AGAIN) from error
    hint = "expected a file that torch.save or torch.jit.save wrote, or a MONAI bundle with `models/model.pt`"
    raise UserError(f"`{path}` is a zip archive without weights", hint=hint)


def _bundled(found: Weights, metadata: bytes) -> Weights:
    version = re.search(rb'"monai_version"\s*:\s*"(\d{1,4})\.(\d{1,4})', metadata)
    monai = tuple(map(int, version.groups())) if version else ()
    return replace(found, kind=f"MONAI bundle, {found.kind}", monai=monai)


def _torchscript(archive: zipfile.ZipFile, file: IO[bytes], path: Path, trust: bool) -> dict[str, Tensor]:
    try:
        return read_torchscript(archive)
    except Exception as error:  # whatever a foreign pickle makes go wrong is its fault
        if trust:
            file.seek(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that torch.jit is deprecated
                    return torch.jit.load(file, map_location="cpu").state_dict()
            except RuntimeError as second:
                raise UserError(f"`{path}` is damaged: {_line(second)}", hint=AGAIN) from second
        message = f"`{path}` is a TorchScript archive whose weights cannot be read without running its code"
        hint = "if you trust its source, `--trust` (`init_trust=true` in training) lets torch open it"
        raise UserError(f"{message}: {_line(error)}", hint=hint) from error


def _loaded(file: IO[bytes], path: Path) -> object:
    """What torch reads under `weights_only`: tensors, containers and numbers, and `HARMLESS` as `Inert`."""
    try:
        safe = torch.serialization.safe_globals([(Inert, name) for name in HARMLESS])
        with safe, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of noise, that it is of an odd pickle protocol
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise _too_large(path) from error
    except Exception as error:  # whatever a foreign pickle makes go wrong is its fault
        text = str(error)
        if "DefaultCPUAllocator" in text:
            raise _too_large(path) from error
        if name := re.search(r"(?:GLOBAL|class|function|module) <?(?:function |class )?'?([\w.]+)", text):
            found = f"`{path}` holds `{name[1]}` beside tensors and numbers"
            instead = "where it was made, save `model.state_dict()` instead"
            hint = f"{instead}; or get the weights from another place"
            raise UserError(f"{found}, and reading that could run code", hint=hint) from error
        said, hint, more = text.rpartition("WeightsUnpickler error:")[2], AGAIN, ""
        if "Unsupported operand" in said:  # of Python's pickle, for objects of other kinds
            more, hint = ", or holds more than tensors", f"save it with `torch.save`, or {AGAIN}"
        raise UserError(f"`{path}` is damaged or cut off{more}: {_line(said or error)}", hint=hint) from error


def _too_large(path: Path) -> UserError:
    return UserError(f"`{path}` asks for more memory than there is", hint=AGAIN)


def weights_of(content: object, path: Path, kind: str) -> Weights:
    """The tensors in what was read: of the first of `CONTAINERS` that there is, else at the top.

    Raises UserError: there are none by name, or one that has no values, or none that can be computed with.
    """
    beside: list[str] = []
    for _ in CONTAINERS:  # no deeper: a dictionary can hold itself
        held = content if isinstance(content, Mapping) else {}
        inner = next((name for name in CONTAINERS if isinstance(held.get(name), Mapping)), None)
        if inner is None:
            break
        beside += [_short(name) for name in held if name != inner]
        content = held[inner]
    named = content if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    beside += [_short(name) for name in named if name not in tensors]
    if not tensors or not all(isinstance(name, str) for name in tensors):
        found = "names of " + ", ".join(f"`{name}`" for name in beside[:5]) if beside else "nothing"
        hint = "expected a state dict: what `model.state_dict()` returns"
        raise UserError(f"`{path}` has no weights by name: it holds {found}", hint=hint)
    for name, tensor in tensors.items():
        if name != _short(name):
            raise UserError(f"a name in `{path}` is no weight's: `{_short(name)}`", hint=AGAIN)
        dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)
        shape = "nested" if tensor.is_nested else tuple(tensor.shape)
        # a stride of 0 makes a tensor of any size from one number
        if not dense or tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            message = f"`{name}` in `{path}` is {shape}, but its values are not stored one by one"
            raise UserError(message, hint="save it with `.contiguous()`, dense and not quantised")
        if not tensor.numel() or (tensor.is_floating_point() and tensor.itemsize == 1):
            message = f"`{name}` in `{path}` is {shape} of {tensor.dtype}, which no network can use"
            raise UserError(message, hint="save it as float32, and only what holds numbers")
    return Weights(path, kind, tensors, tuple(beside))


def _short(name: object) -> str:
    """A name as it can be shown."""
    return printable(str(name)[:LONGEST_NAME]).replace("\n", "\\n")


def _line(said: object) -> str:
    """The first sentence of what a library said."""
    return (str(said).strip().splitlines() or [type(said).__name__])[0][:120]
