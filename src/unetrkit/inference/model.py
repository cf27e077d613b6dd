"""A trained network as a folder: `model.json` says what it is, `weights.safetensors` holds its tensors.

Together they are enough to predict; nothing in them is ever executed or unpickled.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from unetrkit.data.copies import copy_of
from unetrkit.data.files import atomic_write, put_in_place, read_json, sha256_file, write_problems
from unetrkit.data.plan import Plan, Settings
from unetrkit.errors import UserError
from unetrkit.networks.scaled import seen_as

FORMAT = "unetrkit-model"
PRETRAINED: Final = "unetrkit-pretrained"  # the format of what only begins a training
FILES = ("model.json", "weights.safetensors")
COPY = "copy the whole model folder again: its two files belong together"


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode, the plan it was trained with, and what `model.json` says of it."""

    network: nn.Module
    plan: Plan
    description: dict[str, Any]

    @property
    def window(self) -> tuple[int, int, int]:
        """The size of what was cut for it in training."""
        x, y, z = self.description.get("patch_size") or self.description["image_size"]
        return x, y, z


class Sealed(Settings):
    """What every `model.json` has. network, options: what `networks.build` makes the network from."""

    sha256: str  # of weights.safetensors
    seal: str = ""  # the SHA-256 of `model.json` with this left empty
    format: str
    version: Literal[1] = 1
    network: str
    in_channels: int = Field(ge=1)
    image_size: tuple[int, int, int]
    options: dict[str, Any] = Field(default_factory=dict)
    plan: Plan
    origin: dict[str, Any] = Field(default_factory=dict)


class Description(Sealed):
    """What the `model.json` of a trained network holds."""

    format: Literal["unetrkit-model"] = "unetrkit-model"
    classes: int = Field(ge=2)
    # of what is cut and then interpolated to `image_size`; None: of that size
    patch_size: tuple[int, int, int] | None = None


def save_model(
    folder: Path,
    network: nn.Module,
    *,
    name: str,
    image_size: tuple[int, int, int],
    options: Mapping[str, Any],
    plan: Plan,
    origin: Mapping[str, Any],
    patch_size: tuple[int, int, int] | None = None,
) -> None:
    """Writes a model folder; one that is there is replaced only when the new one is complete.

    `name`, `image_size` and `options` are what `networks.build` makes the network from; `patch_size` is that
    of what was cut and then interpolated to `image_size`. `origin` is anything that JSON can hold: `fold` in
    it tells `predict` which cases validate; the rest is for people.
    Raises UserError where `folder` holds something else than a model, or cannot be written.
    """
    write_folder(
        folder,
        network.state_dict(),
        lambda sha256: Description(
            network=name,
            in_channels=len(plan.channels),
            classes=len(plan.classes),
            image_size=image_size,
            patch_size=patch_size,
            options=dict(options),
            plan=plan,
            origin=dict(origin),
            sha256=sha256,
        ),
    )


def write_folder(folder: Path, tensors: Mapping[str, Tensor], describe: Callable[[str], Sealed]) -> None:
    """Tensors and what `describe` says of them, given their SHA-256, whole or not at all.

    Raises UserError where `folder` holds something else than a model, or cannot be written.
    """
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not found <= set(FILES) or folder.is_file():
        raise UserError(
            f"`{folder}` is not a model, so it is not replaced", hint="remove it, or choose another folder"
        )
    # clones: safetensors refuses tensors that share memory (tied weights, views)
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    try:
        with write_problems(folder):
            temporary.mkdir(parents=True)
        atomic_write(temporary / FILES[1], safetensors.torch.save(copies))
        description = describe(sha256_file(temporary / FILES[1]))
        seal = hashlib.sha256(_bytes(description)).hexdigest()
        atomic_write(temporary / FILES[0], _bytes(description.model_copy(update={"seal": seal})))
        with write_problems(folder):
            put_in_place(temporary, folder, _previous(folder))  # where `_folder` looks next
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_model(path: Path, device: str | torch.device = "cpu") -> Model:
    """The model of a model folder, or of a run folder that holds `model`, on `device`.

    Raises UserError for anything else: a pickle or checkpoint, foreign JSON, a description that was changed,
    weights that are missing, changed, or not those of the network that `model.json` describes.
    """
    from unetrkit.networks import build

    folder = _folder(copy_of(path, "models"))
    description = _description(folder / FILES[0])
    weights = folder / FILES[1]
    if not weights.exists():
        raise UserError(f"there is no file `{weights}`", hint=COPY)
    if sha256_file(weights) != description.sha256:
        raise UserError(f"`{weights}` is not that of `{FILES[0]}`: its SHA-256 differs", hint=COPY)
    sizes = description.in_channels, description.classes, description.image_size
    network = build(description.network, *sizes, description.options)
    try:
        tensors = safetensors.torch.load_file(weights)
    except SafetensorError as error:
        raise UserError(f"`{weights}` is not a safetensors file: {error}", hint=COPY) from error
    _compare(network.state_dict(), tensors, weights)
    # last: what is wrong with it, where it shows, says more than that something was changed
    content, seal = (folder / FILES[0]).read_bytes(), description.seal.encode()
    if hashlib.sha256(content.replace(seal, b"", 1)).hexdigest().encode() != seal:
        raise UserError(f"`{folder / FILES[0]}` was changed: its seal is broken", hint=COPY)
    network.load_state_dict(tensors)
    network = seen_as(network, description.patch_size or description.image_size, description.image_size)
    return Model(network.to(device).eval(), description.plan, description.model_dump(mode="json"))


def _bytes(description: Sealed) -> bytes:
    return (description.model_dump_json(indent=1) + "\n").encode()


def _previous(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.previous")


def _folder(path: Path) -> Path:
    candidates = [path, path / "model"]
    for folder in [*candidates, *(_previous(candidate) for candidate in candidates)]:
        if (folder / FILES[0]).is_file():
            return folder
    hint = "give the run folder, or the `model` folder in it; `unetrkit train` makes one"
    if not path.exists():
        raise UserError(f"there is no model `{path}`", hint=hint)
    if path.is_file():
        raise UserError(f"`{path}` is a file, but a model is a folder with {' and '.join(FILES)}", hint=hint)
    raise UserError(f"`{path}` holds no model: neither `{FILES[0]}` nor `model/{FILES[0]}`", hint=hint)


def _description(path: Path) -> Description:
    content = read_json(path)
    if isinstance(content, dict) and content.get("format") == PRETRAINED:
        hint = f"fine-tune it: `unetrkit train {content.get('network')} init={path.parent.parent} data=STORE`"
        raise UserError(f"`{path.parent}` was pre-trained: it cannot segment yet", hint=hint)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        hint = "give the run folder, or the `model` folder in it"
        raise UserError(f"`{path}` does not describe a model: its `format` is not `{FORMAT}`", hint=hint)
    if content.get("version") != 1:
        found = json.dumps(content.get("version"))[:40]
        hint = "use the version of unetrkit that wrote it"
        raise UserError(f"`{path}` is of version {found}, this program reads version 1", hint=hint)
    try:
        description = Description.model_validate_json(json.dumps(content))  # JSON mode: lists are tuples
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"`{path}` is not sound: `{where}`: {first['msg']}", hint=COPY) from error
    plan = description.plan
    said = f"{description.in_channels} channels and {description.classes} classes"
    if (description.in_channels, description.classes) != (len(plan.channels), len(plan.classes)):
        planned = f"{len(plan.channels)} channels and {len(plan.classes)} classes"
        raise UserError(f"`{path}` describes a network of {said} and a plan of {planned}", hint=COPY)
    return description


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor by name and shape; the first differences are named."""
    shapes, there = ({name: tuple(one.shape) for name, one in some.items()} for some in (expected, found))
    differences = [f"`{name}` is missing" for name in shapes.keys() - there.keys()]
    differences += [f"`{name}` is not part of the network" for name in there.keys() - shapes.keys()]
    differences += [
        f"`{name}` is {there[name]} instead of {shapes[name]}"
        for name in shapes.keys() & there.keys()
        if there[name] != shapes[name]
    ]
    if differences:
        words = ", ".join(sorted(differences)[:3])
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(f"`{path}` does not fit the network of `{FILES[0]}`: {words}{more}", hint=COPY)
