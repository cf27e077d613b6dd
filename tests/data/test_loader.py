from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import signal

import pytest
import torch
from tests.data.small_store import small_store

from unetrkit.data.augment import AugmentSettings
from unetrkit.data.loader import ALONE, Rank, Steps, batches
from unetrkit.data.sampling import SamplingSettings
from unetrkit.data.store import StoredCase
from unetrkit.errors import UserError

NAMES = [f"case{n}" for n in range(5)]
STRONG = AugmentSettings(set="strong")
NONE = AugmentSettings(set="none")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return small_store(tmp_path_factory.mktemp("small"))


def run(store, stop, *, start=0, seed=0, augment=STRONG, cases=NAMES, workers=0, rank=ALONE, **sampling):
    return list(
        batches(
            store,
            cases,
            SamplingSettings(**sampling),
            augment,
            seed=seed,
            steps=range(start, stop),
            workers=workers,
            rank=rank,
        )
    )


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def digests(made):
    return [hashlib.sha256(b["image"].numpy().tobytes()).hexdigest() for b in made]


@pytest.mark.parametrize("set_", ["none", "default", "strong"])
def test_batch_is_float32_image_and_uint8_label_of_the_same_voxels(store, set_):
    augment = AugmentSettings(set=set_, p_scale=0, p_shift=0)
    for batch in run(store, 5, augment=augment, batch_size=3):
        image, label = batch["image"], batch["label"]
        assert image.shape == (3, 1, 16, 16, 16) and image.dtype == torch.float32 and image.is_contiguous()
        assert label.shape == (3, 16, 16, 16) and label.dtype == torch.uint8
        if set_ == "none":
            assert torch.equal((image[:, 0] * 8).floor().to(torch.uint8), label)


def test_flipped_image_keeps_its_labels_and_its_sides(store):
    augment = AugmentSettings(p_flip=1.0, p_rot90=0.5, p_scale=0, p_shift=0)
    for batch in run(store, 10, augment=augment):
        shown = (batch["image"][:, 0] * 8).floor().to(torch.uint8)
        exchanged = torch.tensor([0, 1, 3, 2, 4], dtype=torch.uint8)
        assert torch.equal(exchanged[shown.int()], batch["label"])


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
@pytest.mark.parametrize("threads", [1, 2])
def test_workers_change_nothing(store, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    alone = run(store, 12, batch_size=2)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    same(alone, run(store, 12, batch_size=2, workers=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_run_resumes_at_any_step(store, workers):
    whole = run(store, 10)
    same(run(store, 10, start=7, workers=workers), whole[7:])
    assert run(store, 10, start=10) == []


def test_no_batch_comes_twice(store):
    # 200 steps of 2 patches are 80 passes over 5 cases; without augmentation only the corners can differ
    assert len(set(digests(run(store, 200, augment=AugmentSettings())))) == 200
    assert len(set(digests(run(store, 50)) + digests(run(store, 50, seed=1)))) == 100


def test_two_ranks_see_what_one_rank_with_twice_the_batch_sees(store):
    halves = [run(store, 6, rank=Rank(rank, 2), batch_size=2) for rank in range(2)]
    joined = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    same(joined, run(store, 6, batch_size=4))
    assert not set(digests(halves[0])) & set(digests(halves[1]))


def test_each_pass_uses_each_case_alike(store, monkeypatch):
    used = []
    monkeypatch.setattr(
        StoredCase,
        "image",
        lambda self, start, size: used.append(self.name) or self.arrays["image"].read(start, size),
    )
    run(store, 10, batch_size=2, patches_per_case=4)
    assert sorted(used) == sorted(NAMES * 4)
    assert all(len(set(used[i : i + 4])) == 1 for i in range(0, 20, 4))


def test_patch_size_of_the_settings_wins_and_small_volumes_are_padded(store):
    (batch,) = run(store, 1, augment=NONE, patch_size=(48, 16, 32))
    assert batch["image"].shape == (2, 1, 48, 16, 32)
    # 30 voxels in 48: 9 before, 9 after
    assert batch["image"][:, :, :9].eq(0).all() and batch["image"][:, :, 39:].eq(0).all()
    assert batch["image"][:, :, 9:39, :, 5:27].gt(0).float().mean() > 0.99


def test_wrong_cases_are_said_before_the_first_batch(store):
    with pytest.raises(UserError, match="holds no case `case9`") as caught:
        batches(store, ["case9"], SamplingSettings(), NONE, seed=0, steps=range(1), workers=2)
    assert "case" in caught.value.hint
    with pytest.raises(UserError, match="no cases"):
        batches(store, [], SamplingSettings(), NONE, seed=0, steps=range(1), workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_found_by_a_worker_is_told_as_it_is(tmp_path, workers):
    store = small_store(tmp_path, cases=1)
    file = store / "cases" / "case0" / "image.chunks"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        run(store, 20, cases=["case0"], workers=workers)
    assert caught.value.message.startswith(f"`{file}` is damaged") and "\n" not in caught.value.message
    # though the error's traceback is held: a program that exits with it would wait for them for ever
    assert multiprocessing.active_children() == []


def test_hint_of_a_worker_arrives(store, monkeypatch):
    def fail(self, start, size):
        raise UserError("the disk is gone", hint="plug it in")

    monkeypatch.setattr(StoredCase, "image", fail)
    with pytest.raises(UserError, match=r"^case `case\d`: the disk is gone$") as caught:
        run(store, 3, workers=1)
    assert caught.value.hint == "plug it in"


def test_programming_error_in_a_worker_keeps_its_traceback(store, monkeypatch):
    monkeypatch.setattr(StoredCase, "image", lambda self, start, size: 1 / 0)
    with pytest.raises(ZeroDivisionError, match=r"(?s)in _batch.*while case `case4` was read"):
        run(store, 3, workers=1, cases=["case4"])


def damage(store, name):
    """Flips the last byte of each chunk file of a case: whatever is read of it is found to be damaged."""
    for file in (store / "cases" / name).glob("*.chunks"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_next_case_takes_the_place_of_one_that_cannot_be_read(store, tmp_path, capsys, workers):
    whole, broken = store, small_store(tmp_path)
    damage(broken, "case1")
    damage(broken, "case2")
    found = run(broken, 12, batch_size=3, workers=workers, skip_broken=True)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(
        "is damaged" in line and "the next case takes its place" in line for line in said
    )
    assert sorted(name for name in NAMES for line in said if f"/{name}/" in line) == ["case1", "case2"]
    # what is drawn of case 3 in their place is what would be drawn of it where it is the case of that patch
    three = run(whole, 12, batch_size=3, cases=["case3"])
    steps, numbers = Steps(whole, tuple(NAMES), SamplingSettings(batch_size=3), STRONG, seed=0), set()
    for step, (ours, all_, instead) in enumerate(
        zip(found, run(whole, 12, batch_size=3), three, strict=True)
    ):
        for i in range(3):
            number = steps._case(step, i)
            expected = instead if number in (1, 2) else all_
            assert torch.equal(ours["image"][i], expected["image"][i])
            assert torch.equal(ours["label"][i], expected["label"][i])
            numbers.add(number)
    assert numbers == set(range(5))
    with pytest.raises(UserError, match=r"case[12]/.* is damaged"):
        run(broken, 12, batch_size=3, workers=workers)


def test_where_no_case_can_be_read_that_is_the_error(tmp_path):
    store = small_store(tmp_path, cases=2)
    for name in NAMES[:2]:
        damage(store, name)
    with pytest.raises(UserError, match="none of the cases can be read"):
        run(store, 2, cases=NAMES[:2], skip_broken=True)


def test_killed_worker_is_a_message(store, monkeypatch):
    monkeypatch.setattr(StoredCase, "image", lambda self, start, size: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a process that loads data ended, at one of `case4`: ") as caught:
        run(store, 3, workers=1, cases=["case4"])
    assert "fewer workers" in caught.value.hint


def test_steps_survive_being_sent_to_a_new_process(store):
    steps = Steps(store, tuple(NAMES), SamplingSettings(), STRONG, seed=0)
    first, _ = steps[3]
    same([pickle.loads(pickle.dumps(steps))[3][0]], [first])
