"""Names of published weights: MONAI's UNETR and Swin UNETR, what was pre-trained for them, and ours."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unetrkit.errors import UserError

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


@dataclass(frozen=True)
class Layout:
    """A way in which published files name their weights."""

    key: str
    title: str
    signs: tuple[str, ...]  # patterns, each of which one of its names matches
    to_monai: tuple[Rule, ...] = ()  # from its names to those of MONAI's network


# in the order in which they are recognised: the first whose signs are all found
LAYOUTS = (
    Layout("ours", "unetrkit", (r"^encoder\.(embedding|position|stages|blocks)\b",)),
    Layout("A", "MONAI SwinUNETR", (r"^swinViT\.", r"^(encoder10|decoder\d)\.")),
    Layout("C", "Swin pre-training (SSLHead)", (r"^(swinViT|swin_vit)\.",), ((r"^swin_vit\.", "swinViT."),)),
    Layout(
        "D",
        "Swin pre-training (disruptive autoencoder)",
        (r"^encoder\.layers\d\.0\.",),
        (
            (r"^encoder\.(layers\dc?\.0\.)(?:0\.)?", r"swinViT.\1"),
            (r"^encoder\.(?=patch_embed\.|norm\.|mask_token)", "swinViT."),
        ),
    ),
    Layout(
        "B",
        "Swin pre-training (model_swinvit)",
        (r"^patch_embed\.proj\.", r"^layers\d\.0\.blocks\."),
        ((r"^(?=patch_embed\.|layers\dc?\.|norm\.)", "swinViT."),),
    ),
    Layout("E", "MONAI UNETR", (r"^vit\.",)),
    Layout(
        "F",
        "ViT pre-training (ViTAutoEnc)",
        (r"^patch_embedding\.", r"^blocks\.\d+\."),
        ((r"^(?=patch_embedding\.|blocks\.|norm\.|cls_token)", "vit."),),
    ),
)
SWIN_LAYOUTS = "ABCD"

# what a wrapper puts before every name: DataParallel, torch.compile, Lightning modules, our objectives
WRAPPERS = re.compile(r"^((module|_orig_mod|_model|model|network|net)\.)+")

# what is left behind, and why; names are MONAI's
LEFT: tuple[tuple[str, str], ...] = (
    (r"\.relative_position_index$", "is computed, not learned"),
    (r"\.(norm_cross_attn|cross_attn)\.", "is carried by MONAI 1.4 and later and read by nothing"),
    (r"\bcls_token$", "is a token for classification, which segmentation does not read"),
    (r"\bmask_token$", "stands for hidden patches in pre-training only"),
    (r"^swinViT\.norm\.", "is a norm after the last stage that Swin UNETR does not have"),
    (r"^swinViT\.patch_embed\.norm\.", "is a norm that Swin UNETR does not have"),
    (r"^(rotation|contrastive)_head\.|^conv\.\d+\.|^conv3d_transpose", "is a head of the pre-training"),
    (r"^(encoder|decoder)\d+\..*\bnorm\d\.", "is a scale of a norm that these networks do not learn"),
)
UNKNOWN = "is no name of this layout"
STRAY = "is a shortcut that MONAI before 0.9 made for every block and used only where channels change"

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
    # Swin UNETR V2: a residual convolution before each stage
    (r"^swinViT\.layers([1234])c\.0\.layer\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.conv."),
    (r"^encoder([1234])\.layer\.", lambda m: f"skip.{int(m[1]) - 1}."),
    (r"^encoder10\.layer\.", "skip.5."),
    (r"^decoder([12345])\.", lambda m: f"decoder.up.{int(m[1]) - 1}."),
)
BOTH: tuple[Rule, ...] = (
    (r"^out\.conv\.conv\.", "decoder.head."),
    (r"\.attn\.", ".attention."),
    (r"\.out_proj\.", ".proj."),
    (r"\.mlp\.fc([12])\.", r".mlp.linear\1."),
    (r"\.relative_position_bias_table$", ".bias"),
    (r"\.conv_block\.", ".block."),
    (r"\.transp_conv\.", ".doubling."),
    (r"\.conv3\.", ".shortcut."),
    (r"\.conv\.weight$", ".weight"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor: its name in the network (in the file, where it was skipped), its shape there, and why."""

    name: str
    shape: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Named:
    """Published weights under our names."""

    layout: Layout
    tensors: dict[str, Tensor]
    theirs: dict[str, str]  # our name -> the file's
    left: tuple[Entry, ...]  # what was left behind
    options: dict[str, object]  # what the network must be for these weights to mean what they meant


def translate(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names, for `load_state_dict`, if every one of them has a place or a reason.

    Raises UserError: a name that is none of a published network's.
    """
    named = rename(state_dict)
    for entry in named.left:
        if entry.note == UNKNOWN:
            hint = "MONAI's names are expected"
            raise UserError(f"`{entry.name}` is not a weight of a published UNETR or Swin UNETR", hint=hint)
    return named.tensors


def rename(state_dict: Mapping[str, Tensor]) -> Named:
    """The weights of a file under our names, and what the network must be for them.

    Raises UserError: the names follow no layout that is known, or two are of one weight.
    """
    bare = {name: WRAPPERS.sub("", name) for name in state_dict}
    layout = recognise(bare.values())
    rules = (SWIN if layout.key in SWIN_LAYOUTS else UNETR) + BOTH if layout.key != "ours" else ()
    tensors: dict[str, Tensor] = {}
    theirs: dict[str, str] = {}
    left: list[Entry] = []
    for name, tensor in state_dict.items():
        monai = _replaced(bare[name], layout.to_monai)
        ours = _replaced(monai, rules)
        reason = next((why for pattern, why in LEFT if re.search(pattern, monai)), None)
        if reason is None and not ours.startswith(("encoder.", "skip.", "decoder.")):
            reason = UNKNOWN
        if reason is None and ours in tensors:
            if not torch.equal(tensor, tensors[ours]):
                message = f"`{theirs[ours]}` and `{name}` differ and are one weight of the network"
                raise UserError(message, hint="save one network's `model.state_dict()` alone")
            reason = f"is `{theirs[ours]}` again"
        if reason is not None:
            left.append(Entry(name, () if tensor is None else tuple(tensor.shape), reason))
            continue
        if monai.startswith("vit.patch_embedding.patch_embeddings.") and tensor.ndim > 1:
            # from a convolution or a "perceptron" (dim, p*p*p*c) to (dim, c*p*p*p)
            if tensor.ndim == 2 and tensor.shape[1] % 16**3 == 0:
                tensor = tensor.unflatten(1, (16, 16, 16, -1)).movedim(-1, 1)
            tensor = tensor.flatten(1)
        tensors[ours], theirs[ours] = tensor, name
    return Named(layout, tensors, theirs, tuple(left), _options(layout, bare.values(), tensors))


def recognise(names: Collection[str]) -> Layout:
    """The layout of these names. Raises UserError where there is none."""
    for layout in LAYOUTS:
        if all(any(re.search(sign, name) for name in names) for sign in layout.signs):
            return layout
    shown = ", ".join(f"`{name}`" for name in list(names)[:3])
    hint = "known: UNETR and Swin UNETR of MONAI, their pre-training, and unetrkit's own; see docs/weights.md"
    raise UserError(f"no published UNETR or Swin UNETR has weights of these names: {shown}, …", hint=hint)


def _options(layout: Layout, names: Collection[str], tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """The quirks that weights of this layout were trained with."""
    if layout.key in SWIN_LAYOUTS:
        # the file cannot tell whether MONAI was 1.5 or newer; every released one was trained with an older
        quirks: dict[str, object] = {"merging": "published", "relative_positions": "sliced"}
        return quirks | ({"residual_stages": True} if "encoder.stages.0.conv.conv1.weight" in tensors else {})
    if layout.key == "ours":
        return {"residual_stages": True} if "encoder.stages.0.conv.conv1.weight" in tensors else {}
    linear = any(".patch_embeddings.1." in f".{name}" for name in names)
    return {"patch_embedding": "perceptron" if linear else "conv"}


def _replaced(name: str, rules: tuple[Rule, ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
