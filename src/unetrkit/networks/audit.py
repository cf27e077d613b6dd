"""What became of every tensor of a file of weights, and of every weight of the network it was read into."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from unetrkit.errors import UserError, many
from unetrkit.networks.adapt import Grid, adapt
from unetrkit.networks.published import STRAY, Entry, Named


@dataclass(frozen=True)
class Audit:
    """A file's tensors are loaded, adapted or skipped; a network's are loaded, adapted or missing."""

    layout: str
    title: str
    loaded: tuple[Entry, ...]
    adapted: tuple[Entry, ...]
    skipped: tuple[Entry, ...]
    missing: tuple[Entry, ...]
    encoder: tuple[int, int]  # parameters that came from the file, and all
    unplaced: int  # of the file's encoder, which the network's does not have
    decoder: tuple[int, int]  # of the skips and the decoder
    options: dict[str, object]  # what the network must be for these weights
    notes: tuple[str, ...] = field(default=())

    @property
    def encoder_share(self) -> float:
        return self.encoder[0] / max(1, self.encoder[1] + self.unplaced)

    @property
    def decoder_share(self) -> float:
        return self.decoder[0] / max(1, self.decoder[1])

    def summary(self) -> list[str]:
        """A few lines for people."""
        counts = [f"{len(self.loaded)} loaded"]
        for word in ("adapted", "skipped", "missing"):
            if entries := getattr(self, word):
                counts.append(f"{len(entries)} {word}")
        return [
            f"layout {self.layout}: {self.title}; tensors: {', '.join(counts)}",
            f"encoder: {_share(self.encoder, self.unplaced)}; decoder: {_share(self.decoder)}",
        ]

    def table(self) -> str:
        """All of it for people; tensors of one reason in one line."""
        lines = [f"layout    {self.layout}: {self.title}"]
        for option, value in self.options.items():
            lines.append(f"needs     {option}={value}")
        lines += [f"encoder   {_share(self.encoder, self.unplaced)}", f"decoder   {_share(self.decoder)}"]
        for word in ("loaded", "adapted", "skipped", "missing"):
            entries: tuple[Entry, ...] = getattr(self, word)
            lines.append(f"{word:9} {many(len(entries), 'tensor')}")
            if word != "loaded":
                lines += _grouped(entries)
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"encoder_share": self.encoder_share, "decoder_share": self.decoder_share}


def match(named: Named, network: nn.Module, source: Grid | None = None) -> tuple[dict[str, Tensor], Audit]:
    """What of a file fits `network`, in its shapes, for `load_state_dict(..., strict=False)`, and the audit.

    The network may be on `meta`: only its shapes are looked at. source: the grid of patches that position
    embeddings of the file lie on, where it is known.

    Raises UserError: weights that are not finite, or position embeddings on a grid that has to be named.
    """
    state: dict[str, Tensor] = {}
    loaded: list[Entry] = []
    adapted: list[Entry] = []
    skipped, unplaced = list(named.left), 0
    wanted = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    target = getattr(network.get_submodule("encoder"), "grid", None)
    for name, weight in named.tensors.items():
        theirs, shape = named.theirs[name], tuple(weight.shape)
        if name not in wanted:
            stray = named.layout.key != "ours" and name.endswith(".shortcut.weight")
            reason = STRAY if stray else "is no part of this network"
            skipped.append(Entry(theirs, shape, reason))
            # a deeper encoder, used in part, is not the one that was trained
            unplaced += weight.numel() if name.startswith("encoder.") and not stray else 0
            continue
        if not weight.is_floating_point():
            skipped.append(Entry(theirs, shape, f"holds {weight.dtype}, not weights"))
            continue
        same = shape == wanted[name]
        if same and name == "encoder.position" and target is not None:
            same = target == (source or _cube_or(shape[1], target))
        try:
            fitting, how = (weight, "") if same else adapt(name, weight, wanted[name], source, target)
        except ValueError as reason_not:
            skipped.append(Entry(theirs, shape, str(reason_not)))
            continue
        if not torch.isfinite(fitting).all():
            message = f"`{theirs}` in the weights is not finite"
            raise UserError(message, hint="that training went wrong: take an earlier checkpoint of it")
        (loaded if same else adapted).append(Entry(name, wanted[name], how))
        state[name] = fitting
    missing = [Entry(name, shape) for name, shape in wanted.items() if name not in state]
    sizes = {name: weight.numel() for name, weight in network.named_parameters()}
    entries = tuple(loaded), tuple(adapted), tuple(skipped), tuple(missing)
    encoder, decoder = _counts(sizes, state, True), _counts(sizes, state, False)
    layout = named.layout.key, named.layout.title
    return state, Audit(*layout, *entries, encoder, unplaced, decoder, dict(named.options))


def _cube_or(count: int, target: Grid) -> Grid:
    """64 positions may be a cube's though the network has 8 x 4 x 2; other counts are taken as they are."""
    side = round(count ** (1 / 3))
    return (side, side, side) if side**3 == count else target


def _counts(sizes: dict[str, int], state: dict[str, Tensor], encoder: bool) -> tuple[int, int]:
    own = {name: size for name, size in sizes.items() if name.startswith("encoder.") == encoder}
    return sum(size for name, size in own.items() if name in state), sum(own.values())


def _share(counts: tuple[int, int], unplaced: int = 0) -> str:
    """Rounded down: 100 % are all.

    >>> _share((999_999, 1_000_000))
    '99.9 % of 1,000,000 parameters'
    """
    more = f" and {unplaced:,} of the file's that have no place" if unplaced else ""
    return f"{counts[0] * 1000 // max(1, counts[1] + unplaced) / 10:.1f} % of {counts[1]:,} parameters{more}"


def _grouped(entries: Iterable[Entry]) -> list[str]:
    lines = []
    for note, group in groupby(sorted(entries, key=lambda entry: entry.note), key=lambda entry: entry.note):
        some = list(group)
        shape = f" {some[0].shape}" if some[0].shape else ""
        more = f" and {len(some) - 1} more" if len(some) > 1 else ""
        lines.append(f"            {some[0].name}{shape}{more}{': ' if note else ''}{note}")
    return lines
