"""Plans: read back as written, and every mistake in one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.data.small_store import small_plan

from unetrkit.data.plan import (
    Intensity,
    Plan,
    apply_published,
    override_plan,
    parse_plan,
    plan_bytes,
    plan_hash,
    read_plan,
    write_plan,
)
from unetrkit.data.store import preprocessing_hash
from unetrkit.errors import UserError

VALUES: dict[str, object] = {
    "dataset": "abdomen",
    "channels": ["CT"],
    "classes": [
        {"id": 0, "name": "background"},
        {"id": 2, "name": "kidney_left"},
        {"id": 7, "name": "kidney_right"},
    ],
    "spacing": [0.8, 0.8, 3.0],
    "intensity": [{"kind": "window", "lower": -160.0, "upper": 240.0}],
    "patch_size": [128, 128, 48],
    "mirror_pairs": [[2, 7]],
    "statistics": {"cases": 3},
}


def plan(**changes: object) -> Plan:
    return parse_plan(VALUES | changes, "plan")


def test_a_plan_is_read_back_as_written(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", plan())
    assert read_plan(tmp_path / "plan.json") == plan()


def test_a_plan_has_short_lists_on_one_line_whatever_the_names_hold(tmp_path: Path) -> None:
    names = ['a [\n "b",', "x\\", '"]}', *(f"class {k}" for k in range(100)), "]", "{é"]
    named = plan(
        channels=names, intensity=VALUES["intensity"] * len(names), statistics={"odd": [names, [[]]]}
    )
    for one in (named, plan()):
        write_plan(tmp_path / "plan.json", one)
        assert read_plan(tmp_path / "plan.json") == one
    text = (tmp_path / "plan.json").read_text()
    assert '\n "spacing": [0.8, 0.8, 3.0],\n' in text
    assert '\n  {"id": 2, "name": "kidney_left"},\n' in text
    assert text.count("\n") == 20


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"spacin": [1, 1, 1]}, "`spacin` is not a setting", "did you mean `spacing`?"),
        ({"spacing": [1, 1, -1]}, "`spacing.2` is -1: expected greater than 0", ""),
        ({"spacing": [1, 1, float("nan")]}, "`spacing.2` is NaN: expected a finite number", ""),
        ({"spacing": [1, 1]}, "`spacing` is [1, 1]: expected more values", "mm along"),
        ({"spacing": ["1", 1, 1]}, '`spacing.0` is "1": expected a valid number', ""),
        ({"patch_size": [96, 96, 90]}, "`patch_size.2` is 90: expected a multiple of 16", ""),
        (
            {"intensity": [{"kind": "window", "lowr": 0, "upper": 1}]},
            "`intensity.0.lowr` is not a setting",
            "did you mean `intensity.0.lower`?",
        ),
        (
            {"intensity": [{"kind": "window", "lower": 3, "upper": 3}]},
            "`intensity.0`: lower (3.0) must be below upper (3.0)",
            "",
        ),
        (
            {"intensity": [{"kind": "zscore", "lower": 0.5, "upper": 250}]},
            "percentiles, found 0.5 and 250.0",
            "",
        ),
        ({"channels": ["CT", "PET"]}, "2 channels but 1 intensity entries", ""),
        ({"mirror_pairs": [[2, 9]]}, "mirror_pairs names ids that are not classes: [9]", ""),
        ({"classes": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}, "must begin with id 0", ""),
        ({"crop_foreground": "yes"}, '`crop_foreground` is "yes": expected a valid boolean', ""),
        ({"version": 2}, "`version` is 2: expected 1", ""),
    ],
)
def test_a_mistake_is_named_with_file_field_and_value(
    tmp_path: Path, changes: dict[str, object], message: str, hint: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(VALUES | changes))
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert caught.value.message.startswith(f"`{path}`: ")
    assert message in caught.value.message and "\n" not in caught.value.message
    assert caught.value.hint.startswith(hint)


def test_a_file_that_is_not_a_plan_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="found a list"):
        read_plan(tmp_path / "plan.json")


def test_overrides_replace_entries_in_order() -> None:
    changed = override_plan(
        plan(),
        [
            "spacing=1.5,1.5,2.0",
            "patch_size=96,96,96",
            "intensity.0.lower=-175",
            "classes.1.name=left",
            "spacing.2=2.5",
        ],
    )
    assert changed.spacing == (1.5, 1.5, 2.5) and changed.patch_size == (96, 96, 96)
    assert changed.intensity[0].lower == -175.0 and changed.intensity[0].upper == 240.0
    assert changed.classes[1].name == "left" and changed.channels == ("CT",)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("spacin=1,1,1", "`spacin` is not a setting", "did you mean `spacing`?"),
        ("intensity.1.lower=3", "`intensity.1.lower` is not a setting", "write either `intensity=…`"),
        ("intensity.0.lowr=3", "`intensity.0.lowr` is not a setting", "did you mean `intensity.0.lower`?"),
        ("spacing.0.x=3", "`spacing.0` is 0.8", ""),
        ("spacing", "`spacing` is not a setting", "write `name=value`"),
        ("spacing=1.5", "`spacing` is 1.5: expected a list", ""),
        ("patch_size=100,100,100", "`patch_size.0` is 100: expected a multiple of 16", ""),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        override_plan(plan(), [override])
    assert message in caught.value.message
    assert caught.value.hint.startswith(hint)


def test_the_published_btcv_plan_fixes_what_the_recipe_fixes_and_no_more() -> None:
    published = apply_published(plan(), "btcv")
    assert published.spacing == (1.5, 1.5, 2.0) and published.patch_size == (96, 96, 96)
    assert (published.intensity[0].lower, published.intensity[0].upper) == (-175.0, 250.0)
    assert published.classes == plan().classes and published.mirror_pairs == ((2, 7),)
    with pytest.raises(UserError) as caught:
        apply_published(plan(), "btvc")
    assert caught.value.hint == "did you mean `btcv`?"


def test_the_hash_follows_what_matters_and_nothing_else(tmp_path: Path) -> None:
    assert plan_hash(plan()) == plan_hash(plan(dataset="other", statistics={}))
    others = [
        {"spacing": [0.8, 0.8, 3.0000001]},
        {"crop_foreground": False},
        {"patch_size": [96, 96, 96]},
        {"mirror_pairs": []},
        {"intensity": [{"kind": "window", "lower": -161.0, "upper": 240.0}]},
    ]
    assert len({plan_hash(plan(**change)) for change in [{}, *others]}) == 6
    write_plan(tmp_path / "plan.json", plan())
    assert plan_hash(read_plan(tmp_path / "plan.json")) == plan_hash(plan())


def test_published_plans_for_pretraining() -> None:
    swin, vit, dae = (apply_published(plan(), name) for name in ("swin_ssl", "vit_ssl", "dae"))
    assert (swin.intensity[0].lower, swin.intensity[0].upper) == (-1000, 1000) and not swin.resample
    assert (vit.intensity[0].lower, vit.intensity[0].upper) == (-57, 164) and vit.resample
    assert vit.spacing == (2, 2, 2) and swin.spacing == dae.spacing == plan().spacing
    assert {one.patch_size for one in (swin, vit, dae)} == {(96, 96, 96)}
    mr = {"kind": "zscore", "lower": 0.5, "upper": 99.5}
    both = plan(channels=["MR", "CT"], intensity=[mr, *VALUES["intensity"]])
    assert apply_published(both, "dae").intensity == (
        Intensity(kind="zscore", lower=0, upper=100),
        Intensity(kind="window", lower=-1000, upper=1000),
    )


def test_a_plan_that_resamples_is_what_it_was_before_one_could_choose(tmp_path: Path) -> None:
    # both hashes were computed before `resample` was an entry: the stores of that time stay valid
    before = "2cf3084aaf7da48bedac25a78fa92e6f3cfd29f04a2d8de98962a3a531909e0a"
    assert preprocessing_hash(small_plan()) == before
    assert plan_hash(small_plan()) == "e16d2dab79ba76dc847fef2d2a2cd465a23dc5e6cfec6735d24c19bfcb58380a"
    assert b"resample" not in plan_bytes(small_plan(resample=True))
    native = override_plan(small_plan(), ["resample=false"])
    assert preprocessing_hash(native) != before
    write_plan(tmp_path / "plan.json", native)
    assert read_plan(tmp_path / "plan.json") == native and not native.resample
    assert override_plan(native, ["resample=true"]) == small_plan()


def test_a_plan_without_classes_is_one_and_with_background_alone_is_none() -> None:
    assert plan(classes=[], mirror_pairs=[]).mirrored == ()
    with pytest.raises(UserError, match="classes must begin with id 0"):
        plan(classes=[{"id": 0, "name": "background"}], mirror_pairs=[])
    with pytest.raises(UserError, match="mirror_pairs names ids that are not classes"):
        plan(classes=[])
