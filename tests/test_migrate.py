"""The guide for users of the originals: every flag has its row, every setting exists, every command runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from unetrkit.config import apply_overrides, load_recipe
from unetrkit.data.phantom import write_phantom
from unetrkit.data.plan import override_plan, read_plan
from unetrkit.errors import UserError
from unetrkit.inference.model import save_model
from unetrkit.inference.predict import PredictSettings
from unetrkit.networks import NETWORKS, build, build_pretraining
from unetrkit.pretraining.run import PretrainSettings
from unetrkit.training.run import TrainSettings

GUIDE = Path(__file__).resolve().parents[1] / "docs/guides/migrate.md"

# every flag of the argparse calls of UNETR/BTCV, SwinUNETR/BTCV, SwinUNETR/BRATS21 and Azure ML
MAIN = """
checkpoint logdir pretrained_dir data_dir json_list pretrained_model_name save_checkpoint max_epochs
batch_size sw_batch_size optim_lr optim_name reg_weight momentum noamp val_every distributed
world_size rank dist-url dist-backend workers model_name pos_embed norm_name num_heads mlp_dim
hidden_size feature_size in_channels out_channels res_block conv_block use_normal_dataset a_min
a_max b_min b_max space_x space_y space_z roi_x roi_y roi_z dropout_rate RandFlipd_prob
RandRotate90d_prob RandScaleIntensityd_prob RandShiftIntensityd_prob infer_overlap lrschedule
warmup_epochs resume_ckpt resume_jit smooth_dr smooth_nr saved_checkpoint dropout_path_rate
use_checkpoint use_ssl_pretrained spatial_dims squared_dice exp_name fold cache_dataset gpu
randcrop_samples randcrop_x randcrop_y randcrop_z
"""
# of SwinUNETR/Pretrain
PRETRAIN = """
logdir epochs num_steps eval_num warmup_steps in_channels feature_size dropout_path_rate
use_checkpoint spatial_dims a_min a_max b_min b_max space_x space_y space_z roi_x roi_y roi_z
batch_size sw_batch_size lr decay momentum lrdecay max_grad_norm loss_type opt lr_schedule resume
local_rank grad_clip noamp dist-url smartcache_dataset cache_dataset
"""
# of mgpu_ssl_train.py
MGPU = "data_root json_path logdir_path output epochs batch_size base_lr seed deterministic"
SECTIONS = {"Training and testing": MAIN, "Pre-training: Swin UNETR": PRETRAIN, "Pre-training: ViT": MGPU}
COMMANDS = {"train", "prepare", "predict", "pretrain", "torchrun", "gone"}
SMALL = {
    "unetr": {"width": 32, "heads": 2, "depth": 4, "feature_size": 4},
    "unetr_fpn": {"feature_size": 4},
    "swin_unetr_base": {"feature_size": 12},
    "swin_heads": {"feature_size": 12},
    "vit_autoencoder": {"width": 32, "heads": 2, "depth": 4},
    "disruptive_autoencoder": {"feature_size": 12},
}
# the store that each recipe of pre-training is tried on here
UNLABELLED = {
    "swin_heads_5050ct": "LUNA16",
    "vit_autoencoder_tcia_covid19": "TCIA-Covid-19",
    "disruptive_autoencoder_50k": "LIDC",
}


def section(title: str) -> str:
    return GUIDE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[tuple[str, str, str]]:
    """Flag, command and ours of each row of the section's table."""
    lines = [line for line in section(title).splitlines() if line.startswith("| `--")]
    cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [(flag.strip("`- "), command, ours) for flag, command, ours, *_ in cells]


ROWS = [row for title in SECTIONS for row in rows(title)]
STATED = [
    (command, word)
    for _, command, ours in ROWS
    for word in re.findall(r"`([^`]+)`", ours)
    if re.fullmatch(r"[\w.]+=\S+", word)
]


@pytest.mark.parametrize("title", SECTIONS)
def test_every_flag_has_one_row_with_a_command_or_the_reason_why_it_is_gone(title):
    found = [flag for flag, _, _ in rows(title)]
    assert sorted(found) == sorted(SECTIONS[title].split())
    assert all(command in COMMANDS and ours for _, command, ours in rows(title))


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A generated abdomen and its store; what the guide's commands name is found here."""
    from unetrkit.cli import app

    folder = tmp_path_factory.mktemp("migrate")
    datalist = write_phantom(folder, training=3, validation=1, coarseness=3.5)
    assert datalist == folder / "dataset.json"
    words = ["prepare", str(datalist), str(folder / "store"), "patch_size=32,32,32", "spacing=8,8,9"]
    app([*words, "--workers", "1"], standalone_mode=False)
    return folder


@pytest.mark.parametrize(("command", "word"), sorted(set(STATED)))
def test_every_setting_of_the_tables_exists(shop, command, word):
    name, _, value = word.partition("=")
    if command == "prepare":
        override_plan(read_plan(shop / "store/plan.json"), [word])
    elif command == "predict":
        apply_overrides(PredictSettings, [word])
    elif command == "pretrain":
        options = load_recipe(PretrainSettings, "swin_heads", ["data=x", word]).network_options
        with torch.device("meta"):
            build_pretraining("swin_heads", 1, (32, 32, 32), options)
    elif name.startswith("network_options."):
        networks = (
            ("unetr", "swin_unetr_base") if name.endswith("feature_size") else ("unetr", "swin_unetr_tiny")
        )
        options = load_recipe(TrainSettings, "unetr", ["data=x", word]).network_options
        if name == "network_options.feature_size" and value == "48":
            networks = ("swin_unetr_tiny",)
        refusals = []
        for network in networks:
            try:
                with torch.device("meta"):  # no memory, no time
                    build(network, 1, 2, (32, 32, 32), options)
                return
            except UserError as refusal:
                refusals.append(refusal.message)
        pytest.fail(str(refusals))
    else:
        load_recipe(TrainSettings, "unetr", ["data=x", word])


def guide_blocks() -> list[list[str]]:
    """The commands of each block; what they make together they use in order."""
    blocks = re.findall(r"```console\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    lines = [[line for line in block.splitlines() if not line.startswith("#")] for block in blocks]
    return [[re.sub(r"^torchrun .* -m unetrkit", "unetrkit", line) for line in block] for block in lines]


def known(words: list[str], help_text: str) -> str:
    """Why a command cannot run: one that is not there, a setting of one that is not."""
    if not re.search(rf"^\W*{words[1]}\b", help_text, re.MULTILINE):
        return f"there is no command {words[1]} here"
    if any("network_size" in word for word in words):
        from unetrkit.data.sampling import SamplingSettings

        if "network_size" not in SamplingSettings.model_fields:
            return "there is no setting network_size here"
    return ""


def smoke(words: list[str], shop: Path) -> list[str]:
    """The command at smoke size, with the folders of the shop."""
    made = re.compile("|".join([r"dataset\.json|store|report|\w*predictions", *UNLABELLED.values()]))
    paths = [str(shop / w) if made.fullmatch(w) or (shop / w).exists() else w for w in words]
    paths = [re.sub(r"^(data|out|init)=", lambda m: f"{m[0]}{shop}/", w) for w in paths]
    if words[1] == "prepare":
        return [*paths, "patch_size=32,32,32", "spacing=8,8,9", "resample=true", "--workers", "1"]
    if words[1] == "predict":
        return [*paths, "device=cpu"]
    if words[1] not in ("train", "pretrain"):
        return paths
    small = [f"network_options.{name}={value}" for name, value in SMALL[network_of(words)].items()]
    small += [f"loop.{w}" for w in ("steps=1", "validate_every=1", "workers=0", "device=cpu", "trackers=[]")]
    if words[1] == "pretrain":
        small += ["crops.patch_size=32,32,32", "crops.batch_size=2", "crops.crops_per_case=1"]
        small += ["watch.crops=4", "watch.pictures=1"]
        if not any(word.startswith("data=") for word in words):  # the recipe names the published stores
            small.append(f"data={shop / UNLABELLED[words[2]]}")
    else:
        small += ["sampling.patch_size=32,32,32", "sampling.batch_size=1", "sampling.patches_per_case=1"]
        small += ["sampling.network_size=64,64,64"] if any("network_size" in w for w in words) else []
        small += ["validation.cases=1"]
    return [*(word for word in paths if "network_options.feature_size" not in word), *small]


def network_of(words: list[str]) -> str:
    """The network of a training, the objective of a pre-training."""
    stated = [word.removeprefix("network=") for word in words if word.startswith("network=")]
    if words[1] == "info":  # the weights of Swin UNETR
        return "swin_unetr_base"
    if words[1] == "pretrain":
        return load_recipe(PretrainSettings, words[2], ["data=x"]).objective
    return stated[0] if stated else load_recipe(TrainSettings, words[2], ["data=x"]).network


def put_weights(words: list[str], shop: Path) -> None:
    """A small model of ours in the place of a published file that the command names."""
    for word in words:
        name = word.removeprefix("init=")
        if not name.endswith((".pt", ".pth")) or (shop / name).exists():
            continue
        network, size = network_of(words), (32, 32, 32)
        assert network in NETWORKS
        plan = read_plan(shop / "store/plan.json")
        built = build(network, 1, len(plan.classes), size, SMALL[network])
        save_model(
            shop / name,
            built,
            name=network,
            image_size=size,
            options=SMALL[network],
            plan=plan,
            origin={},
        )


@pytest.mark.parametrize("block", guide_blocks(), ids=lambda block: " ".join(block[0].split()[1:3]))
def test_the_commands_of_the_guide_run_at_smoke_size(unetrkit, shop, block):
    help_text, missing = unetrkit("--help").out, []
    for line in block:
        words = shlex.split(line)
        if why := known(words, help_text):
            missing.append(why)
            continue
        if words[1] == "launch":  # takes an account; of the pipeline the launcher's own tests
            place, (command, recipe, *settings) = words[2], words[words.index("--") + 1 :]
            assert (place, command) == ("azureml", "train")
            load_recipe(TrainSettings, recipe, ["data=x", *settings])
            assert not [word for word in settings if word.startswith(("data=", "out="))]
            continue
        put_weights(words, shop)
        outcome = unetrkit(*smoke(words, shop)[1:])
        assert outcome.code == 0, f"{line}\n{outcome.err}"
    if len(missing) == len(block):
        pytest.skip("; ".join(missing))


def test_every_original_command_of_a_readme_is_in_the_guide():
    text = GUIDE.read_text()
    for script in (
        "python main.py",
        "python test.py",
        "mgpu_ssl_train.py",
        "torch.distributed.launch",
        "submit.py",
    ):
        assert script in text
    for system in (
        "UNETR/BTCV",
        "SwinUNETR/BTCV",
        "SwinUNETR/BRATS21",
        "improved UNETR",
        "Azure ML",
        "50,000",
    ):
        assert system in text
