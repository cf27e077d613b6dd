"""Recipes: what a person writes, what becomes of it, and what they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

from unetrkit.config import Settings, load_recipe, read_recipe, recipes, settings_from, to_yaml
from unetrkit.errors import UserError
from unetrkit.plain_yaml import parse_value, parse_yaml


class Optim(Settings):
    lr: float = 1e-4
    name: Literal["adamw", "sgd"] = "adamw"


class Loop(Settings):
    steps: int = 100
    amp: Literal["off", "bf16"] = "off"
    clip: float | None = None


class Root(Settings):
    data: Path
    network: str = "unetr"
    patch: tuple[int, int, int] | None = None
    options: dict[str, object] = Field(default_factory=dict)
    optim: Optim = Optim()
    loop: Loop = Loop()


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def load(tmp_path: Path, text: str = "data: store\n", *overrides: str) -> Root:
    return load_recipe(Root, recipe(tmp_path, text), overrides)


def test_an_override_wins_over_the_recipe_and_that_over_the_default(tmp_path: Path) -> None:
    text = "data: store\noptim: {lr: 3e-4}\nloop: {steps: 7}\n"
    found = load(tmp_path, text, "loop.steps=8", "loop.steps=9")
    assert found == Root(data=Path("store"), optim=Optim(lr=3e-4), loop=Loop(steps=9))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 100_000),
        ("5e3", 5000),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("010", 10),
        ("1:30", "1:30"),
        ("2026-11-20", "2026-11-20"),
        ("no", "no"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("96,96,96", [96, 96, 96]),
        ("1.5,1.5,2", [1.5, 1.5, 2]),
        ("[3, 6]", [3, 6]),
        ("'96'", "96"),
        ("{a: 1}", {"a": 1}),
        ("a,b", "a,b"),
        ("/a #b", "/a #b"),
        ("C: x", "C: x"),
        ("*star", "*star"),
        ("!tag", "!tag"),
        ("1e999", float("inf")),
    ],
)
def test_value_is_what_a_person_means(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("optim.lrr=1", "`optim.lrr` is not a setting", "did you mean `optim.lr`?"),
        ("lr=1", "`lr` is not a setting", "did you mean `optim.lr`?"),
        ("train.steps=1", "`train.steps` is not a setting", "did you mean `loop.steps`?"),
        ("optim.zzz=1", "`optim.zzz` is not a setting", "known: optim.lr, optim.name"),
        ("optim.lr=fast", '`optim.lr` is "fast": expected a valid number', ""),
        ("optim.lr='1'", '`optim.lr` is "1": expected a valid number', ""),
        ("loop.steps=1.5", "`loop.steps` is 1.5: expected a valid integer", ""),
        ("loop.steps=true", "`loop.steps` is true: expected a valid integer", ""),
        ("loop.amp=fp8", "`loop.amp` is \"fp8\": expected 'off' or 'bf16'", ""),
        ("loop.clip=x", '`loop.clip` is "x": expected a valid number', ""),
        ("patch=96,96", "`patch` is [96, 96]: ", ""),
        ("patch=96,96,x", '`patch` is "96,96,x": expected a list', ""),
        ("optim=3", "`optim` is 3: expected an object", ""),
        ("network.depth=3", "`network` is", ""),
        ("data.x=1", "`data.x` is not a setting: `data` is 'store'", ""),
        ("optim.lr", "`optim.lr` is not a setting", "write `name=value`, as in `optim.lr=1e-4`"),
        ("=3", "`=3` is not a setting", "write `name=value`"),
        ("patch=[1, 2", "`[1, 2` is not YAML", ""),
    ],
)
def test_a_wrong_override_is_explained(tmp_path: Path, override: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as found:
        load(tmp_path, "data: store\n", override)
    assert found.value.message.startswith(message)
    assert found.value.hint.startswith(hint)
    assert "\n" not in found.value.message


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`data` is not given") as found:
        load(tmp_path, "network: unetr\n")
    assert found.value.hint == "write `data=…`"


def test_a_file_that_lacks_a_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe\.yaml`: `data` is not given"):
        load(tmp_path, "")
    with pytest.raises(UserError, match=r"^`data` is not given"):
        load(tmp_path, "", "network=unetr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "`a` is there twice"),
        ("a: !!python/object/apply:os.system [id]\n", "YAML tags are not allowed"),
        ("a: !!str 1\n", "YAML tags are not allowed"),
        ("a: &x [1]\nb: *x\n", "YAML anchors and aliases are not allowed"),
        ("a: " + "[" * 500 + "]" * 500, "nested deeper than 16"),
        ("a: [1", "is not YAML"),
        ("- 1\n", "must hold names and values, found a list"),
        ("1: 2\n", "names must be words"),
        ("? [a]\n: 2\n", "names must be words"),
        ("a: \x00\n", "is not YAML"),
    ],
)
def test_a_recipe_that_is_not_plain_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as found:
        load(tmp_path, text)
    assert message in found.value.message
    assert "recipe.yaml" in found.value.message


def test_a_large_or_binary_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = recipe(tmp_path, "# " + "x" * 70_000)
    with pytest.raises(UserError, match="larger than 64 KB"):
        load_recipe(Root, path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="byte 0 is not UTF-8"):
        load_recipe(Root, path)
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe(Root, tmp_path / "none.yaml")


def test_an_unknown_recipe_leads_to_the_nearest() -> None:
    with pytest.raises(UserError, match="there is no recipe `swin_untr_tiny`") as found:
        load_recipe(Root, "swin_untr_tiny")
    assert found.value.hint == "did you mean `swin_unetr_tiny`?"


def test_settings_written_as_yaml_are_read_back_the_same(tmp_path: Path) -> None:
    odd = {"b": "off", "c": "1e-4", "d": None, "e": [1, 2.5], "f": "", "g": "null", "h": "010", "i": "a: #b"}
    settings = Root(data=Path("a b/é"), network="yes", patch=(96, 96, 64), options=odd, optim=Optim(lr=1e-5))
    text = to_yaml(settings)
    assert load_recipe(Root, recipe(tmp_path, text)) == settings
    assert yaml.safe_load(text)["options"]["b"] == "off"  # other people's YAML 1.1 readers agree


def test_empty_yaml_is_no_settings() -> None:
    assert parse_yaml("# nothing\n", "x") == {}


def test_packaged_recipes_are_described_and_load() -> None:
    import torch

    from unetrkit.networks import build
    from unetrkit.pretraining import OBJECTIVES
    from unetrkit.pretraining.run import PretrainSettings
    from unetrkit.training.run import TrainSettings

    described = dict(recipes())
    known = {"swin_unetr_tiny", "swin_unetr_small", "swin_unetr_base", "unetr", "unetr_fpn"}
    assert known | {"primus_s", "primus_m"} <= described.keys()
    for name, description in described.items():
        assert 20 < len(description) < 110, name
        if "objective" in read_recipe(name):
            pretraining = load_recipe(PretrainSettings, name, ["data=store"])
            assert pretraining.data == (Path("store"),), name
            chosen = OBJECTIVES[pretraining.objective]
            own = settings_from(chosen.settings, pretraining.objective_options)
            size = pretraining.crops.patch_size or (96, 96, 96)
            with torch.device("meta"):
                chosen.build(1, size, pretraining.network_options, own)
            continue
        settings = load_recipe(TrainSettings, name, ["data=store"])
        assert settings.data == Path("store"), name
        with torch.device("meta"):  # else `network_options` would first be read in a run
            build(settings.network, 1, 14, (96, 96, 96), settings.network_options)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("swin_heads_5050ct", "swin_heads"),
        ("vit_autoencoder_tcia_covid19", "vit_autoencoder"),
        ("disruptive_autoencoder_50k", "disruptive_autoencoder"),
    ],
)
def test_published_pre_training_is_the_published_form(name: str, objective: str) -> None:
    from unetrkit.pretraining import OBJECTIVES
    from unetrkit.pretraining.run import PretrainSettings

    settings = load_recipe(PretrainSettings, name)
    assert settings.objective == objective
    assert settings.objective_options == OBJECTIVES[objective].published
    assert settings.crops.centre == "anywhere"


def test_primus_recipes_train_as_published() -> None:
    from unetrkit.training.run import TrainSettings

    for name in ("primus_s", "primus_m"):
        settings = load_recipe(TrainSettings, name, ["data=store"])
        assert settings.network == name and settings.network_options == {"drop_path": 0.2}
        assert (settings.optim.lr, settings.optim.weight_decay, settings.loop.clip) == (3e-4, 5e-2, 1)
        assert settings.optim.warmup == settings.loop.steps // 20  # 50 of 1000 passes


def test_the_recipe_of_the_azure_example_states_its_flags() -> None:
    from unetrkit.training.run import TrainSettings

    settings = load_recipe(TrainSettings, "azure_swin_unetr", ["data=store"])
    sampling, loop, passes = settings.sampling, settings.loop, 24
    assert settings.network == "swin_unetr_base" and settings.network_options == {"checkpointing": True}
    assert (sampling.patch_size, sampling.network_size) == ((128,) * 3, (256,) * 3)
    assert (sampling.batch_size, sampling.patches_per_case) == (1, 1)
    assert (settings.optim.lr, settings.optim.warmup, loop.amp) == (1e-3, 50 * passes, "off")
    assert (loop.steps, loop.validate_every) == (1000 * passes, 5 * passes)


def test_the_published_loss_of_unetr_is_in_its_recipe() -> None:
    from unetrkit.training.losses import LossSettings
    from unetrkit.training.run import TrainSettings

    published = LossSettings(squared=True, smooth_numerator=0, smooth_denominator=1e-6)
    assert load_recipe(TrainSettings, "unetr", ["data=store"]).loss == published


def test_a_recipe_of_another_command_is_named_as_one() -> None:
    from unetrkit.pretraining.run import PretrainSettings
    from unetrkit.training.run import TrainSettings

    with pytest.raises(UserError, match="`swin_heads` is a recipe of `unetrkit pretrain`"):
        load_recipe(TrainSettings, "swin_heads", ["data=store"])
    with pytest.raises(UserError, match="`unetr` is a recipe of `unetrkit train`"):
        load_recipe(PretrainSettings, "unetr", ["data=store"])


@pytest.mark.parametrize("value", ["3", "null", "[]", "{a: 1}"])
def test_a_list_of_stores_is_one_or_more_paths(value: str) -> None:
    from unetrkit.pretraining.run import PretrainSettings

    assert load_recipe(PretrainSettings, "swin_heads", ["data=a,b"]).data == (Path("a"), Path("b"))
    with pytest.raises(UserError, match="`data` is"):
        load_recipe(PretrainSettings, "swin_heads", [f"data={value}"])
