"""The store: what is read is what was prepared, or an error that names the case."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from unetrkit.data.geometry import Grid
from unetrkit.data.plan import Intensity, LabelClass, Plan, override_plan, plan_hash, read_plan, write_plan
from unetrkit.data.store import (
    Store,
    pick_centres,
    preprocessing_hash,
    seal,
    unseal,
    write_case,
    write_index,
)
from unetrkit.errors import UserError

PLAN = Plan(
    dataset="phantom",
    channels=("CT", "PET"),
    classes=(
        LabelClass(id=0, name="background"),
        LabelClass(id=4, name="liver"),
        LabelClass(id=9, name="spleen"),
    ),
    spacing=(1.5, 1.5, 2.0),
    intensity=(Intensity(kind="window", lower=-175, upper=250),) * 2,
    patch_size=(32, 32, 32),
)
AFFINE = np.diag([-1.5, -1.5, 2.0, 1.0])


def arrays(seed: int, shape: tuple[int, int, int] = (37, 33, 20)) -> tuple[np.ndarray, np.ndarray, Grid]:
    rng = np.random.default_rng(seed)
    image = rng.random((2, *shape), np.float32).astype(np.float16).astype(np.float32)
    label = rng.integers(0, 3, shape).astype(np.uint8)
    box = tuple((0, n) for n in shape)
    return image, label, Grid(shape, Grid.nested(AFFINE), (0, 1, 2), (True, True, False), box, shape)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_plan(tmp_path / "plan.json", PLAN)
    cases = []
    for seed, name in enumerate(["amos_0001", "amos 0002 (ü)"]):
        image, label, grid = arrays(seed)
        write_case(
            tmp_path / "cases" / name,
            image,
            label,
            grid,
            classes=3,
            source="-",
            preprocessing=preprocessing_hash(PLAN),
        )
        cases.append(
            SimpleNamespace(
                name=name,
                subject=f"s{seed}",
                split="training",
                fold=seed or None,
                images=(Path("/a.nii"),),
                label=Path("/b.nii"),
            )
        )
    write_index(tmp_path, "phantom", cases)
    return tmp_path


def read_all(path: Path) -> None:
    for case in Store.open(path).cases:
        case.whole_image()
        case.label((0, 0, 0), case.shape)
        for k in range(len(case.counts)):
            case.centres(k)


def test_a_store_gives_back_what_was_written(store: Path) -> None:
    opened = Store.open(store)
    assert opened.plan == PLAN and opened.plan_hash == plan_hash(PLAN) and opened.name == "phantom"
    for seed, case in enumerate(opened.cases):
        image, label, grid = arrays(seed)
        assert (case.name, case.subject, case.fold) == (
            ["amos_0001", "amos 0002 (ü)"][seed],
            f"s{seed}",
            seed or None,
        )
        assert case.images == (Path("/a.nii"),) and case.label_file == Path("/b.nii")
        assert case.grid == grid and case.shape == label.shape
        assert case.counts == tuple(np.bincount(label.ravel()))
        assert case.whole_image().dtype == np.float32 and np.array_equal(case.whole_image(), image)
        assert case.image((3, 30, 7), (34, 3, 9)).dtype == np.float16
        assert np.array_equal(case.image((3, 30, 7), (34, 3, 9)), image[:, 3:, 30:, 7:16])
        assert np.array_equal(case.label((3, 30, 7), (34, 3, 9)), label[3:, 30:, 7:16])


def test_centres_are_voxels_of_their_class(store: Path) -> None:
    case, (image, label, _) = Store.open(store).cases[0], arrays(0)
    for k in (1, 2):  # fewer than the limit: all of them, in the order of the array
        assert np.array_equal(case.centres(k), np.argwhere(label == k))
    something = (image > image.min(axis=(1, 2, 3), keepdims=True)).any(axis=0)
    assert np.array_equal(case.centres(0), np.argwhere((label == 0) & something))
    assert case.centres(0).dtype == np.int32


def test_centres_of_a_large_class_are_an_even_draw_that_is_repeatable() -> None:
    label = np.ones((60, 60, 60), np.uint8)
    label[0] = 2
    image = np.zeros((1, 60, 60, 60), np.float16)
    rows, kept, counts = pick_centres(image, label, 4)
    assert kept == (0, 20_000, 3600, 0) and counts == (0, 59 * 3600, 3600, 0)
    assert np.array_equal(rows, pick_centres(image, label, 4)[0])
    drawn = rows[:20_000]
    assert len(np.unique(drawn, axis=0)) == 20_000 and (label[tuple(drawn.T)] == 1).all()
    assert np.allclose(drawn.mean(axis=0), [30, 29.5, 29.5], atol=0.6)  # the mean's deviation is 0.12


def test_background_centres_avoid_air_where_they_can() -> None:
    label = np.zeros((8, 8, 8), np.uint8)
    image = np.zeros((2, 8, 8, 8), np.float16)
    assert len(pick_centres(image, label, 2)[0]) == 512  # nothing but air
    image[1, 2:4] = 1
    rows, kept, counts = pick_centres(image, label, 2)
    assert kept == (128, 0) and counts == (512, 0)
    assert set(rows[:, 0].tolist()) == {2, 3}


def test_two_hundred_flipped_bytes_are_all_found(store: Path) -> None:
    rng = np.random.default_rng(5)
    files = sorted(file for file in store.rglob("*") if file.is_file())
    assert {file.name for file in files} >= {"plan.json", "store.json", "case.json", "centres.chunks"}
    for i in range(200):
        file = files[i % len(files)]
        content = file.read_bytes()
        changed = bytearray(content)
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        with pytest.raises(UserError) as caught:
            read_all(store)
        assert str(file.parent) in caught.value.message and "\n" not in caught.value.message
        if file.parent.name != store.name:
            assert "redoes only this case" in caught.value.hint
        file.write_bytes(content)
    read_all(store)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_every_truncation_is_found(store: Path, keep: float) -> None:
    for file in sorted(file for file in store.rglob("*") if file.is_file()):
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * keep)])
        with pytest.raises(UserError):
            read_all(store)
        file.write_bytes(content)


def test_an_edited_plan_is_found(store: Path) -> None:
    write_plan(store / "plan.json", override_plan(PLAN, ["spacing=1,1,1"]))
    with pytest.raises(UserError, match="another plan"):
        Store.open(store)
    write_plan(store / "plan.json", override_plan(PLAN, ["classes.1.name=Leber"]))
    with pytest.raises(UserError, match="another plan"):
        Store.open(store)


def test_a_case_of_another_plan_is_found(store: Path) -> None:
    write_plan(store / "plan.json", override_plan(read_plan(store / "plan.json"), ["spacing=1,1,1"]))
    cases = [
        SimpleNamespace(name="amos_0001", subject="s", split="training", fold=None, images=(), label=None)
    ]
    write_index(store, "phantom", cases)
    with pytest.raises(UserError, match=r"`amos_0001`.*another plan"):
        Store.open(store)


def test_a_missing_or_unfinished_store_is_said(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no store"):
        Store.open(tmp_path / "none")
    (store / "store.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        Store.open(store)


@pytest.mark.parametrize("file", ["store.json", "cases/amos_0001/case.json"])
def test_a_store_of_an_older_format_is_refused(store: Path, file: str) -> None:
    content = unseal(store / file)
    (store / file).write_bytes(seal(content | {"format": 1}))
    with pytest.raises(UserError, match=f"{file}` has the store format 1, this version reads 3") as caught:
        Store.open(store)
    assert "`unetrkit prepare` again" in caught.value.hint


def test_an_image_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    image, label, grid = arrays(0)
    image[0, 0, 0, 0] = 1e6
    with pytest.raises(UserError, match="1000000"):
        write_case(tmp_path / "a", image, label, grid, classes=3, source="", preprocessing="")
    assert not list(tmp_path.iterdir())
