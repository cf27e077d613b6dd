"""Files as the original projects write them: MONAI's own classes, under the published names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def shaken(network: nn.Module) -> nn.Module:
    """MONAI starts norms and biases at zero or one, where mistakes do not show."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval()


def published_merging() -> type[nn.Module]:
    """What MONAI's patch merging was before 1.5."""
    from monai.networks.nets.swin_unetr import PatchMerging

    class Old(PatchMerging):
        def forward(self, x: Tensor) -> Tensor:
            starts = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
            return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in starts], -1)))

    return Old


def swin(channels: int = 1, classes: int = 14, feature_size: int = 12, **options: object) -> nn.Module:
    """Swin UNETR as it was before MONAI 1.5."""
    from monai.networks.nets import SwinUNETR

    sizes = {"feature_size": feature_size, "downsample": published_merging()}
    return shaken(SwinUNETR(channels, classes, **sizes, **options))


def checkpoint(state: Mapping[str, Tensor], key: str = "state_dict", **more: object) -> dict[str, object]:
    """What the originals' trainers save: numpy scalars, an optimizer's state."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    saved = {"epoch": 5, "best_acc": np.float64(0.8), "optimizer": optimizer.state_dict(), key: dict(state)}
    return saved | more


def encoder_of(state: State) -> State:
    """`swinViT.*` without its prefix, and with the names that pre-training used: fc1 and fc2."""
    names = {n: n.removeprefix("swinViT.").replace("linear", "fc") for n in state if n.startswith("swinViT.")}
    return {names[name]: state[name] for name in names}


def layout_b(state: State) -> dict[str, object]:
    """`model_swinvit.pt`."""
    inner = {f"module.{name}": tensor for name, tensor in encoder_of(state).items()}
    for head in ("rotation_head", "contrastive_head"):
        inner |= {f"module.{head}.weight": torch.ones(4, 8), f"module.{head}.bias": torch.ones(4)}
    inner |= {"module.norm.weight": torch.ones(192), "module.norm.bias": torch.ones(192)}
    return {"state_dict": inner}


def layout_c(state: State, prefix: str = "swinViT.") -> dict[str, object]:
    """What `SwinUNETR/Pretrain` saves."""
    inner = {prefix + name.replace("fc", "linear"): tensor for name, tensor in encoder_of(state).items()}
    inner |= {"rotation_head.weight": torch.ones(4, 192), "contrastive_head.weight": torch.ones(512, 192)}
    inner |= {"conv.0.weight": torch.ones(96, 192, 3, 3, 3), "conv.20.bias": torch.ones(1)}
    return checkpoint({f"module.{name}": tensor for name, tensor in inner.items()}, global_step=7)


def layout_d(state: State) -> dict[str, object]:
    """`ssl_pretrained_weights.pth`."""
    inner: State = {"encoder.mask_token": torch.zeros(1, 1, 12), "encoder.norm.weight": torch.ones(192)}
    inner["encoder.norm.bias"] = torch.ones(192)
    for name, tensor in encoder_of(state).items():
        stage, dot, rest = name.partition(".0.")
        inner[f"encoder.{stage}.0.0.{rest}" if dot and name.startswith("layers") else f"encoder.{name}"] = (
            tensor
        )
    inner |= {name: tensor for name, tensor in state.items() if not name.startswith("swinViT.")}
    for number in ("2", "3", "4", "10"):  # MONAI 0.8 made these and did not use them
        channels = state[f"encoder{number}.layer.conv1.conv.weight"].shape[0]
        inner[f"encoder{number}.layer.conv3.conv.weight"] = torch.ones(channels, channels, 1, 1, 1)
    return {"model": inner}


def old_unetr(state: State) -> State:
    """A UNETR of MONAI 0.7: a class token, and shortcuts that nothing used."""
    inner = {name: tensor for name, tensor in state.items() if "norm_cross_attn" not in name}
    inner["vit.patch_embedding.cls_token"] = torch.zeros(1, 1, 768)
    for number, block, channels in (("2", 0, 32), ("2", 1, 32), ("3", 0, 64)):
        inner[f"encoder{number}.blocks.{block}.1.conv3.conv.weight"] = torch.ones(channels, channels, 1, 1, 1)
    return inner


def unetr_of_1_4(state: State) -> State:
    """A UNETR of MONAI 1.4, with a cross attention that nothing read."""
    extra = {f"vit.blocks.{i}.cross_attn.{n}.weight": torch.ones(8, 8) for i in range(12) for n in "qkv"}
    return {**state, **extra}
