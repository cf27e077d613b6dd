"""The networks, by name: each (b, channels, x, y, z) -> logits (b, classes, x, y, z), of any size."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from unetrkit.errors import UserError, nearest
from unetrkit.networks.swin_unetr import swin_unetr
from unetrkit.networks.unetr import unetr
from unetrkit.networks.unetr_fpn import unetr_fpn

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
}


def build(
    name: str, in_channels: int, classes: int, image_size: tuple[int, int, int], options: Mapping[str, Any]
) -> nn.Module:
    """A new network, initialised from torch's random state.

    Args:
        image_size: the size it will mostly see, in voxels; others work too.
        options: by name, as a recipe or a model's description has them; lists stand for tuples.

    Raises:
        UserError: unknown network or option, or a value that an option cannot have.

    >>> build("swin_unetr_tny", 1, 2, (96, 96, 96), {})
    Traceback (most recent call last):
    ...
    unetrkit.errors.UserError: `swin_unetr_tny` is not a network
    """
    if name not in NETWORKS:
        raise UserError(f"`{name}` is not a network", hint=nearest(name, NETWORKS))
    network = NETWORKS[name]
    known = [p.name for p in inspect.signature(network).parameters.values() if p.kind is p.KEYWORD_ONLY]
    hints = get_type_hints(network.func if isinstance(network, partial) else network)
    checked = {}
    for option, value in options.items():
        if option not in known:
            raise UserError(f"`{option}` is not an option of `{name}`", hint=nearest(option, known))
        checked[option] = _checked(option, value, hints[option])
    return network(in_channels, classes, image_size, **checked)


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
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"`{option}` is `{value}`", hint=f"expected a value of type {kind.__name__}")
    return value
