"""The networks, by name: each (b, channels, x, y, z) -> logits (b, classes, x, y, z), of any size."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from unetrkit.errors import UserError, nearest
from unetrkit.networks.masked_autoencoder import masked_autoencoder, masked_autoencoder_primus
from unetrkit.networks.primus import primus
from unetrkit.networks.swin_heads import swin_heads, swin_unetr_reconstruction
from unetrkit.networks.swin_unetr import swin_unetr
from unetrkit.networks.unetr import unetr
from unetrkit.networks.unetr_fpn import unetr_fpn
from unetrkit.networks.vit_autoencoder import vit_autoencoder

LARGEST = 10**10  # parameters; thirty times those of the largest network of the tables
LARGEST_OPTION = 10_000

# each is called with (in_channels, classes, image_size, **options)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "unetr": unetr,
    # the five rows of the study of an improved UNETR: each change alone, and all of them
    "unetr_stem": partial(unetr_fpn, stem=True),
    "unetr_light_vit": partial(unetr_fpn, light_vit=True),
    "unetr_skip_alignment": partial(unetr_fpn, skip_alignment=True),
    "unetr_fpn_fusion": partial(unetr_fpn, fpn_fusion=True),
    "unetr_fpn": partial(unetr_fpn, stem=True, light_vit=True, skip_alignment=True, fpn_fusion=True),
    "swin_unetr_tiny": partial(swin_unetr, feature_size=12),
    "swin_unetr_small": partial(swin_unetr, feature_size=24),
    "swin_unetr_base": partial(swin_unetr, feature_size=48),
    "primus_s": partial(primus, width=396, depth=12, heads=6),
    "primus_b": partial(primus, width=792, depth=12, heads=12),
    "primus_m": partial(primus, width=864, depth=16, heads=12),
    "primus_l": partial(primus, width=1056, depth=24, heads=16),
}

# for scans without labels: each is called with (in_channels, image_size, **options); its `encoder` has the
# names of the encoder of the network above that is fine-tuned from it
PRETRAINING_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vit_autoencoder": vit_autoencoder,  # -> unetr
    "masked_autoencoder": masked_autoencoder,  # -> unetr
    "masked_autoencoder_primus": masked_autoencoder_primus,  # -> primus_*
    "swin_heads": swin_heads,  # -> swin_unetr_*
    "swin_unetr_reconstruction": partial(swin_unetr_reconstruction, feature_size=48),  # -> swin_unetr_*
}


def build(
    name: str, in_channels: int, classes: int, image_size: tuple[int, int, int], options: Mapping[str, Any]
) -> nn.Module:
    """A new network, initialised from torch's random state.

    * image_size: the size it will mostly see, in voxels; others work too.
    * options: by name, as a recipe or a model's description has them; lists stand for tuples.

    Raises UserError: unknown network or option, a value that an option cannot have, or impossible sizes.

    >>> build("swin_unetr_tny", 1, 2, (96, 96, 96), {})
    Traceback (most recent call last):
    ...
    unetrkit.errors.UserError: `swin_unetr_tny` is not a network
    """
    network = _named(name, NETWORKS)
    checked = _options(name, network, options)
    return _built(name, lambda: network(in_channels, classes, image_size, **checked))


def build_pretraining(
    name: str, in_channels: int, image_size: tuple[int, int, int], options: Mapping[str, Any]
) -> nn.Module:
    """A new network of `PRETRAINING_NETWORKS`; the rest as in `build`."""
    network = _named(name, PRETRAINING_NETWORKS)
    checked = _options(name, network, options)
    return _built(name, lambda: network(in_channels, image_size, **checked))


def _built(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` makes, tried on `meta` first, where it takes no memory and draws no random number."""
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in make().parameters())
    except (RuntimeError, TypeError, OverflowError) as error:  # numbers that no tensor can have
        hint = "a file, an option or an image size is far from any real one"
        raise UserError(f"`{name}` cannot be made in such sizes", hint=hint) from error
    if count > LARGEST:
        message = f"`{name}` would have {count:,} parameters in such sizes"
        raise UserError(message, hint=f"up to {LARGEST:,} are made: smaller options or a smaller image")
    return make()


def _named(name: str, table: Mapping[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    if name not in table:
        raise UserError(f"`{name}` is not a network", hint=nearest(name, table))
    return table[name]


def _options(name: str, network: Callable[..., nn.Module], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the network's own types, or a UserError."""
    known = known_options(network)
    for option in options:
        if option not in known:
            raise UserError(f"`{option}` is not an option of `{name}`", hint=nearest(option, known))
    return {option: _checked(option, value, known[option]) for option, value in options.items()}


def known_options(network: Callable[..., nn.Module]) -> dict[str, Any]:
    """The options that a network of a table takes, and their types."""
    known: dict[str, Any] = {}
    for parameter in inspect.signature(network, eval_str=True).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            known[parameter.name] = parameter.annotation
        elif parameter.kind is parameter.VAR_KEYWORD:  # **name: Unpack[a TypedDict]
            known |= get_type_hints(get_args(parameter.annotation)[0])
    return known


def _checked(option: str, value: Any, kind: Any) -> Any:
    """The value as the option's type, or a UserError."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"`{option}` is `{value}`", hint=nearest(str(value), get_args(kind)))
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or any(type(item) is not int for item in value):
            raise UserError(f"`{option}` is `{value}`", hint="expected a list of whole numbers")
        return tuple(value)
    if isinstance(value, int | float) and abs(value) > LARGEST_OPTION:
        raise UserError(f"`{option}` is `{value}`", hint=f"{LARGEST_OPTION:,} at most")
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"`{option}` is `{value}`", hint=f"expected a value of type {kind.__name__}")
    return value
