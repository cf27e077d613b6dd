"""Names of published weights: MONAI's UNETR and Swin UNETR, and everything trained with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from unetrkit.errors import UserError

Rule = tuple[str, str | Callable[[re.Match[str]], str]]

# MONAI 1.4 and later carry parameters that nothing reads; the index of relative positions is computed
UNUSED = re.compile(r"\.(norm_cross_attn|cross_attn)\.|\.relative_position_index$")

UNETR: tuple[Rule, ...] = (
    (r"^vit\.patch_embedding\.position_embeddings$", "encoder.position"),
    (r"^vit\.patch_embedding\.patch_embeddings\.(1\.)?", "encoder.embedding."),
    (r"^vit\.", "encoder."),
    (r"^encoder1\.layer\.", "skip.0."),
    (r"^encoder([234])\.transp_conv_init\.", lambda m: f"skip.{int(m[1]) - 1}.0."),
    # blocks.J.0 doubles, blocks.J.1 refines
    (
        r"^encoder([234])\.blocks\.(\d)\.([01])\.",
        lambda m: f"skip.{int(m[1]) - 1}.{2 * int(m[2]) + int(m[3]) + 1}.",
    ),
    (r"^decoder([2345])\.", lambda m: f"decoder.up.{int(m[1]) - 2}."),
)
SWIN: tuple[Rule, ...] = (
    (r"^swinViT\.patch_embed\.proj\.", "encoder.embedding."),
    (r"^swinViT\.layers([1234])\.0\.downsample\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.merging."),
    (r"^swinViT\.layers([1234])\.0\.", lambda m: f"encoder.stages.{int(m[1]) - 1}."),
    (r"^encoder([1234])\.layer\.", lambda m: f"skip.{int(m[1]) - 1}."),
    (r"^encoder10\.layer\.", "skip.5."),
    (r"^decoder([12345])\.", lambda m: f"decoder.up.{int(m[1]) - 1}."),
)
BOTH: tuple[Rule, ...] = (
    (r"^out\.conv\.conv\.", "decoder.head."),
    (r"\.attn\.", ".attention."),
    (r"\.out_proj\.", ".proj."),
    (r"\.relative_position_bias_table$", ".bias"),
    (r"\.conv_block\.", ".block."),
    (r"\.transp_conv\.", ".doubling."),
    (r"\.conv3\.", ".shortcut."),
    (r"\.conv\.weight$", ".weight"),
)


def translate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of MONAI's `UNETR` or `SwinUNETR` under our names, for `load_state_dict`.

    The networks they belong to: `unetr`, and `swin_unetr_*` with `relative_positions="sliced"` and, where
    MONAI was older than 1.5 when they were trained, `merging="published"`.

    Raises:
        UserError: a name that is neither network's.
    """
    rules = (SWIN if any(name.startswith("swinViT.") for name in state_dict) else UNETR) + BOTH
    translated = {}
    for name, weight in state_dict.items():
        if UNUSED.search(name):
            continue
        ours = name
        for pattern, replacement in rules:
            ours = re.sub(pattern, replacement, ours)
        if not ours.startswith(("encoder.", "skip.", "decoder.")):
            hint = "MONAI's names are expected"
            raise UserError(f"`{name}` is not a weight of a published UNETR or Swin UNETR", hint=hint)
        if name.startswith("vit.patch_embedding.patch_embeddings.") and name.endswith("weight"):
            weight = _cubes(weight)
        translated[ours] = weight
    return translated


def _cubes(weight: Tensor) -> Tensor:
    """UNETR's patch embedding as (dim, c*p*p*p), from a convolution or a "perceptron" (dim, p*p*p*c)."""
    if weight.ndim == 2:
        weight = weight.unflatten(1, (16, 16, 16, -1)).movedim(-1, 1)
    return weight.flatten(1)
