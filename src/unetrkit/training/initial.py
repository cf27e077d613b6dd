"""What a run begins with instead of random weights: a published file, or a model or run of ours."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import floor
from pathlib import Path
from typing import Any, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from unetrkit.config import overridden, read_recipe
from unetrkit.data.copies import copy_of
from unetrkit.data.files import read_json, read_problems, read_start, sha256_file
from unetrkit.data.remote import spelt
from unetrkit.errors import UserError
from unetrkit.inference.model import COPY, FILES, PRETRAINED
from unetrkit.networks import build
from unetrkit.networks.audit import Audit, match
from unetrkit.networks.identify import OF_TRAINING, Identity, identify, options_for
from unetrkit.networks.published import SWIN_LAYOUTS, Named, rename
from unetrkit.networks.weights_file import Weights, read_weights, weights_of
from unetrkit.training import checkpoint
from unetrkit.training.sharding import complete

MINIMUM = 0.99  # of an encoder: less is a file of something else, or one that is not whole
PATCH = 16  # voxels a side, of UNETR's grid of patches as published
Size = tuple[int, int, int]
LONGEST = 4096  # voxels an axis
NOTHING = "nothing of it would be used: name the network that it was trained in, or get another file"
NEWER = "if MONAI 1.5 or newer trained these, say `network_options.merging=full`: "


@dataclass(frozen=True)
class Initial:
    """Weights to begin with, whose network they are, and the size they were trained at where it is known."""

    weights: Weights
    named: Named
    identity: Identity
    sha256: str
    size: Size | None

    @property
    def needs(self) -> dict[str, Any]:
        """The options of the network that these weights were trained in, as far as they are known."""
        own = self.weights.description.get("options", {})
        return self.named.options | {name: value for name, value in own.items() if name not in OF_TRAINING}

    def options(self, network: str) -> dict[str, Any]:
        """What `network` must be for these weights to mean what they meant, and to fit."""
        sizes = self.identity.options if network == self.identity.network else {}
        return options_for(network, {**sizes, **self.needs})

    def match(self, network: nn.Module, options: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], Audit]:
        """The weights that fit `network`, made with `options`, and what became of each."""
        patch = getattr(network.get_submodule("encoder.embedding"), "patch", PATCH)
        grid = tuple(-(-extent // patch) for extent in self.size) if self.size else None
        state, audit = match(self.named, network, grid)
        notes, monai = [], self.weights.monai
        old = bool(monai) and monai < (1, 5)
        if audit.layout in SWIN_LAYOUTS and options.get("merging") == "published" and not old:
            # the zoo's bundles name newer versions from year to year, and their weights stay the same
            tested = (
                f"the bundle names {'.'.join(map(str, monai))}, with which it was tested, perhaps trained"
            )
            notes = [NEWER + (tested if monai else "the file cannot tell")]
        if "width" in self.identity.options and "heads" not in options:
            notes.append("the file cannot tell `heads`: say `network_options.heads=` if there were not 12")
        if self.weights.beside:
            notes.append(
                "also in the file, not read: " + ", ".join(f"`{n}`" for n in self.weights.beside[:8])
            )
        return state, replace(audit, options=self.identity.options, notes=tuple(notes))


def open_initial(path: Path, *, trust: bool = False, size: Size | None = None) -> Initial:
    """Opens a file of published weights, a MONAI bundle, or a model folder, run folder or checkpoint of ours.

    size: the size in voxels that position embeddings were trained at, where neither file nor count tells.
    Raises UserError for anything else, as `weights_file.read_weights` does.
    """
    path = copy_of(path, "models")
    with read_problems(path):
        weights = _open(path, trust)
    try:
        named = rename(weights.tensors)
        identity = identify(named, weights.description)
    except UserError as error:
        raise UserError(f"`{path}`: {error.message}", hint=error.hint) from error
    known = identity.image_size if weights.description else None
    return Initial(weights, named, identity, sha256_file(weights.path), size or known)


def begin(
    network: nn.Module, name: str, initial: Initial, options: Mapping[str, Any], minimum: float
) -> Audit:
    """Loads what fits into `network`, made with `options`, in place.

    Raises UserError where less than `minimum` of the encoder's parameters came from the file: a run that
    begins almost at random would look like one that does not.
    """
    state, audit = initial.match(network, options)
    if audit.encoder_share < minimum:
        path, own = initial.weights.path, initial.identity
        share, (count, total) = audit.encoder_share, audit.encoder
        message = f"`{path}` has {count:,} of the {total:,} encoder parameters of `{name}`"
        hint = f"it holds {own.words()}; `unetrkit info weights FILE --network {name}` says what "
        allowing = _allowing(audit)
        hint += f"does not fit; `{allowing}` begins all the same" if allowing else f"does not fit; {NOTHING}"
        message += f": {share:.1%}, less than {minimum:.1%}"
        message += f"; {audit.unplaced:,} of its own have no place there" if audit.unplaced else ""
        raise UserError(message, hint=hint)
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unexpected or {*missing} != {entry.name for entry in audit.missing}:
        raise RuntimeError(f"the audit is wrong about {unexpected or missing}")
    return audit


def provenance(initial: Initial, audit: Audit, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a run remembers of the weights it began with."""
    pretrained = initial.weights.description
    origin = pretrained.get("origin") if pretrained.get("format") == PRETRAINED else None
    return {
        **({"pretraining": origin} if origin else {}),
        "file": initial.weights.path.name,
        "sha256": initial.sha256,
        "layout": audit.layout,
        "options": dict(options),
        "encoder_share": round(audit.encoder_share, 4),
        "decoder_share": round(audit.decoder_share, 4),
    }


@dataclass(frozen=True)
class Inspection:
    """What `unetrkit info weights` tells: the file, its audit against a network, the command that trains."""

    initial: Initial
    audit: Audit
    command: str

    def table(self) -> str:
        """For people."""
        weights = self.initial.weights
        file = f"file      {weights.path}: {weights.kind}, SHA-256 {self.initial.sha256[:16]}…"
        return "\n".join([file, f"holds     {self.initial.identity.words()}", self.audit.table()])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        weights = self.initial.weights
        about = {"file": str(weights.path), "kind": weights.kind, "sha256": self.initial.sha256}
        holds = {"holds": asdict(self.initial.identity), "next": self.command}
        return about | holds | self.audit.to_dict()


def inspect_weights(
    path: Path, network: str | None, overrides: Sequence[str], *, trust: bool = False
) -> Inspection:
    """The audit of a file against a network (by default its own), and the command that trains from it.

    overrides: `in_channels=`, `classes=`, `image_size=`, `init_size=` and the network's options.
    """
    values = overridden({}, [override.removeprefix("network_options.") for override in overrides])
    size = _size(values.pop("init_size", None), "init_size")
    initial = open_initial(path, trust=trust, size=size)
    own = initial.identity
    name = network or own.network
    image_size = _size(values.pop("image_size", None), "image_size") or size or own.image_size or (96, 96, 96)
    in_channels = _count(values.pop("in_channels", own.in_channels), "in_channels")
    classes = _count(values.pop("classes", own.classes or 2), "classes")
    automatic = initial.options(name)
    options = {**automatic, **values}
    with torch.device("meta"):
        built = build(name, in_channels, classes, image_size, options)
    _, audit = initial.match(built, options)
    said = [f"network_options.{key}={value}" for key, value in options.items() if automatic.get(key) != value]
    if size:
        said.append("init_size=" + ",".join(map(str, size)))
    if trust:
        said.append("init_trust=true")
    command = ["unetrkit train", name, f"init={shlex.quote(spelt(path))}", *said, "data=STORE"]
    if audit.encoder_share < MINIMUM:
        note, allowing = f"training wants {MINIMUM:.0%} of an encoder", _allowing(audit)
        note += ", unless `init_minimum` says less" if allowing else f"; {NOTHING}"
        audit = replace(audit, notes=(*audit.notes, note))
        command = [*command[:-1], allowing, command[-1]] if allowing else []
    return Inspection(initial, audit, " ".join(command))


def _allowing(audit: Audit) -> str:
    """What lets this file pass; nothing for one of which next to nothing is used."""
    share = floor(100 * audit.encoder_share) / 100
    return f"init_minimum={share}" if share else ""


def _open(path: Path, trust: bool) -> Weights:
    for folder in (path, path / "model"):
        if (folder / FILES[0]).is_file():
            return _model(folder)
    file = path / "state" if path.is_dir() else path
    if file.is_file() and read_start(file, 32).startswith(b'{"format": "unetrkit checkpoint'):
        return _checkpoint(path)
    if (path / "last").exists():
        raise UserError(f"the run `{path}` has no model yet", hint=f"give its checkpoint, `{path / 'last'}`")
    return read_weights(path, trust=trust)


def _model(folder: Path) -> Weights:
    """Weights and description of a model folder; the weights must be the described ones."""
    description, file = read_json(folder / FILES[0]), folder / FILES[1]
    if (
        not isinstance(description, dict)
        or not str(description.get("format", "")).startswith("unetrkit")
        or not isinstance(description.get("options", {}), dict)
        or not _is_size(description.get("image_size", [1, 1, 1]))
    ):
        raise UserError(f"`{folder / FILES[0]}` does not describe a model of unetrkit", hint=COPY)
    if sha256_file(file) != description.get("sha256"):
        raise UserError(f"`{file}` is not that of `{FILES[0]}`: its SHA-256 differs", hint=COPY)
    try:
        found = weights_of(safetensors.torch.load_file(file), file, "unetrkit model")
        return replace(found, description=description)
    except SafetensorError as error:
        raise UserError(f"`{file}` is not a safetensors file: {error}", hint=COPY) from error


def _checkpoint(path: Path) -> Weights:
    """The network in `last` or `best` of a run folder, averaged where the run keeps an average."""
    try:
        learner = complete(checkpoint.load(path), {})["learner"]
        state = learner[next(kept for kept in ("best", "average", "objective") if kept in learner)]
    except (KeyError, TypeError, IndexError, RuntimeError, StopIteration) as error:
        raise UserError(
            f"`{path}` is not the checkpoint of a run", hint="give `last` or `best` of a run"
        ) from error
    file = path / "state" if path.is_dir() else path
    found, run = weights_of(state, file, "unetrkit checkpoint"), path.parent
    if (run / "model" / FILES[0]).is_file():
        description = _model(run / "model").description
    elif (run / "config.yaml").is_file():
        recipe, record = read_recipe(run / "config.yaml"), run / "run.json"
        began = read_json(record) if record.is_file() else {}
        init = began.get("init", {}) if isinstance(began, dict) else {}
        given = recipe.get("network_options")
        options = {**init.get("options", {}), **(given if isinstance(given, dict) else {})}
        description = {"network": recipe.get("network"), "options": options}
    else:
        description = {}
    return replace(found, beside=(), description=description)


def _size(value: object, name: str) -> Size | None:
    if value is None:
        return None
    if not _is_size(value):
        hint = f"three sizes in voxels up to {LONGEST}, as in `{name}=96,96,96`"
        raise UserError(f"`{name}` is `{value}`", hint=hint)
    return (value[0], value[1], value[2])


def _is_size(value: object) -> TypeGuard[Size]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    return all(type(one) is int and 1 <= one <= LONGEST for one in value)


def _count(value: object, name: str) -> int:
    if type(value) is not int or not 1 <= value <= 10_000:
        raise UserError(f"`{name}` is `{value}`", hint="expected a whole number from 1 to 10,000")
    return value
