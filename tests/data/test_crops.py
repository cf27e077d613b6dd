"""Crops without labels: a function of seed and step, from several stores, in the shares asked for."""

from __future__ import annotations

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from tests.data.small_store import SHAPE, MemoryCase, small_plan, small_store

from unetrkit.data.crops import ALONE, Crops, CropSettings, Rank, Source, crop_batches, draw_crop, source_at
from unetrkit.data.plan import Intensity
from unetrkit.data.sampling import generator_for
from unetrkit.data.store import Store, StoredCase
from unetrkit.errors import UserError

MR = {"channels": ("MR",), "intensity": (Intensity(kind="zscore", lower=0.5, upper=99.5),)}
NAMES = tuple(f"case{n}" for n in range(5))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Five cases of CT, three of MR, two of CT again."""
    root = tmp_path_factory.mktemp("stores")
    made = (("ct", 5, {}), ("mr", 3, MR), ("more", 2, {"channels": ("ct",)}))
    for name, count, changes in made:
        (root / name).mkdir()
        small_store(root / name, count, small_plan(**changes))
    return [Source(root / name, NAMES[:count]) for name, count, _ in made]


def run(sources, stop, *, start=0, seed=0, workers=0, rank=ALONE, **settings):
    about = {"seed": seed, "steps": range(start, stop), "workers": workers, "rank": rank}
    return list(crop_batches(sources, CropSettings(**settings), **about))


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_holds_crops_their_cases_and_modalities(sources):
    seen = set()
    for batch in run(sources, 20, batch_size=4, crops_per_case=1):
        image, case, modality = batch["image"], batch["case"], batch["modality"]
        assert image.shape == (4, 1, 16, 16, 16) and image.dtype == torch.float32 and image.is_contiguous()
        assert case.dtype == modality.dtype == torch.int64
        assert modality.tolist() == [int(5 <= number < 8) for number in case.tolist()]  # `CT` is `ct`
        seen |= set(case.tolist())
    assert seen == set(range(10))


def test_a_crop_is_of_the_case_that_it_says(sources):
    wholes = []
    for source in sources:
        wholes += [case.whole_image()[0] for case in Store.open(source.store).cases]
    made = Crops(tuple(sources), CropSettings(batch_size=3, crops_per_case=2), seed=5)
    for step in range(6):
        batch, _ = made[step]
        numbers = batch["case"].tolist()
        for image, number in zip(batch["image"][:, 0].numpy(), numbers, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(wholes[number], image.shape)
            assert (windows[..., 0, 0, 0] == image[0, 0, 0]).any()
            places = np.argwhere(windows[..., 0, 0, 0] == image[0, 0, 0])
            assert any(np.array_equal(windows[tuple(place)], image) for place in places)
        every = [f"{name} of {source.store}" for source in sources for name in source.cases]
        assert made.cases(step) == list(dict.fromkeys(every[number] for number in numbers))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_the_first_step_change_nothing(sources, workers):
    settings = {"batch_size": 3, "p_flip": 0.5}
    whole = run(sources, 8, **settings)
    same(run(sources, 8, start=3, workers=workers, **settings), whole[3:])
    assert run(sources, 8, start=8) == []


def test_no_batch_comes_twice(sources):
    # of so small a volume a single crop comes again; four in a row do not
    crops, others = (
        {batch["image"].numpy().tobytes() for batch in run(sources, 100, seed=seed, batch_size=4)}
        for seed in (0, 1)
    )
    assert len(crops) == len(others) == 100 and not crops & others


def test_two_ranks_see_what_one_rank_with_twice_the_batch_sees(sources):
    halves = [run(sources, 6, rank=Rank(rank, 2), batch_size=2) for rank in range(2)]
    joined = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    same(joined, run(sources, 6, batch_size=4))
    assert halves[0][0]["case"].tolist() != halves[1][0]["case"].tolist()


def numbers_of(sources: list[Source], steps: int, **settings: object) -> list[int]:
    return [
        n
        for batch in run(sources, steps, patch_size=(16, 16, 16), **settings)
        for n in batch["case"].tolist()
    ]


def test_without_weights_a_pass_takes_every_scan_once(sources):
    numbers = numbers_of(sources, 20, batch_size=2, crops_per_case=1)
    passes = [numbers[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes) and len(set(map(tuple, passes))) == 4
    # two crops of a case in a row
    pairs = numbers_of(sources, 10, batch_size=2, crops_per_case=2)
    assert pairs[::2] == pairs[1::2] and sorted(pairs[::2]) == list(range(10))


def test_sources_have_the_shares_of_their_weights_and_their_cases_equal_shares(sources):
    weighted = [Source(s.store, s.cases, weight) for s, weight in zip(sources, (0.5, 0.2, 0.3), strict=True)]
    counts = Counter(numbers_of(weighted, 300, batch_size=2, crops_per_case=1))
    shares = [sum(counts[n] for n in group) for group in (range(5), range(5, 8), range(8, 10))]
    assert shares == [pytest.approx(600 * share, abs=1.5) for share in (0.5, 0.2, 0.3)]
    assert all(counts[n] == pytest.approx(60, abs=10) for n in range(5))
    # neither alternates with the batches: both orders of modalities occur
    firsts = Counter(tuple(batch["modality"].tolist()) for batch in run(weighted, 100, crops_per_case=1))
    assert {(0, 1), (1, 0), (0, 0)} <= set(firsts)


def test_sources_take_turns_as_evenly_as_their_shares_allow():
    shares = [Fraction(0.3), Fraction(7), Fraction(1, 3), Fraction(2)]
    used = [0] * 4
    for position in range(2000):
        k, before = source_at(position, shares)
        assert before == used[k]
        used[k] += 1
        if position % 100 == 99:
            assert all(
                abs(n - (position + 1) * share / sum(shares)) <= 3
                for n, share in zip(used, shares, strict=True)
            )


def test_a_volume_smaller_than_the_crop_is_in_its_middle_in_what_means_air(sources):
    size = (48, 16, 32)
    (ct,) = run(sources[:1], 1, patch_size=size)
    assert ct["image"].shape == (2, 1, *size)
    assert ct["image"][:, :, :9].eq(0).all() and ct["image"][:, :, 39:].eq(0).all()  # 30 voxels in 48
    assert ct["image"][:, :, 9:39, :, 5:27].gt(0).float().mean() > 0.99
    (mr,) = run(sources[1:2], 1, patch_size=size)
    for image in mr["image"]:
        assert image[:, :9].eq(image.min()).all()
    (anywhere,) = run(sources[:1], 1, patch_size=size, centre="anywhere")
    assert anywhere["image"][:, :, 9:39, :, 5:27].gt(0).float().mean() > 0.99


def test_a_crop_is_around_the_body_or_anywhere():
    classes = np.zeros(SHAPE, np.int64)
    classes[20:, 20:, 18:] = 1

    class Body(MemoryCase):
        @property
        def counts(self) -> tuple[int, ...]:
            return (self.classes.size,)  # as a store without labels says

        def centres(self, k: int) -> np.ndarray:
            assert k == 0
            return np.argwhere(self.classes == 1)

    case, size = Body(np.zeros((1, *SHAPE)), classes), (8, 8, 8)
    draws = {
        centre: np.array([draw_crop(generator_for(0, n), case, size, centre) for n in range(3000)])
        for centre in ("body", "anywhere")
    }
    assert draws["body"].min(axis=0).tolist() == [16, 16, 14]
    last = np.array(SHAPE) - size
    for axis, n in enumerate(last):
        assert draws["body"][:, axis].max() == n
        counts = np.bincount(draws["anywhere"][:, axis], minlength=n + 1)
        assert len(counts) == n + 1  # every start, and each alike: six standard deviations
        assert np.abs(counts - 3000 / (n + 1)).max() < 6 * np.sqrt(3000 / (n + 1))


def test_flips_mirror_the_crop_and_nothing_else(sources):
    plain, flipped = (run(sources, 4, p_flip=p) for p in (0.0, 1.0))
    for a, b in zip(plain, flipped, strict=True):
        assert torch.equal(a["image"].flip((-3, -2, -1)), b["image"])
        assert torch.equal(a["case"], b["case"])


def test_what_cannot_be_learnt_from_is_said_before_the_first_batch(sources, tmp_path):
    def refused(sources: list[Source], message: str) -> str:
        with pytest.raises(UserError, match=message) as caught:
            crop_batches(sources, CropSettings(), seed=0, steps=range(1), workers=2)
        return caught.value.hint

    refused([], "no store was given")
    refused([sources[0], Source(sources[1].store, ())], "no cases of `.*mr`")
    assert "case" in refused([Source(sources[0].store, ("case9",))], "holds no case `case9`")
    for weight in (0, -1.0, float("nan"), float("inf")):
        hint = refused([Source(sources[0].store, NAMES, weight)], f"the weight of `.*ct` is {weight}")
        assert "above 0" in hint
    two = small_plan(channels=("CT", "PET"), intensity=(Intensity(kind="window", lower=0, upper=1),) * 2)
    (tmp_path / "two").mkdir()
    other = Source(small_store(tmp_path / "two", 1, two), NAMES[:1])
    assert "channels" in refused([sources[0], other], "`.*two` has 2 channels, `.*ct` has 1")
    refused([Source(tmp_path / "none", NAMES)], "there is no store in")


def test_an_error_of_a_worker_keeps_its_hint(sources, monkeypatch):
    def fail(self, start, size):
        raise UserError("the disk is gone", hint="plug it in")

    monkeypatch.setattr(StoredCase, "image", fail)
    with pytest.raises(UserError, match=r"^case `case\d`: the disk is gone$") as caught:
        run(sources, 3, workers=1)
    assert caught.value.hint == "plug it in"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_scan_of_a_store_takes_the_place_of_one_that_cannot_be_read(tmp_path, capsys, workers):
    store = small_store(tmp_path, cases=3)
    for file in (store / "cases" / "case1").glob("*.chunks"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    source = [Source(store, ("case0", "case1", "case2"))]
    settings = CropSettings(batch_size=3, skip_broken=True)
    found = list(crop_batches(source, settings, seed=0, steps=range(8), workers=workers))
    drawn = {n for batch in found for n in batch["case"].tolist()}
    made, twos = Crops(tuple(source), settings, seed=0), sum((b["case"] == 2).sum() for b in found)
    meant = [made._place(step, i)[1] for step in range(8) for i in range(3)]
    assert drawn == {0, 2} and twos == meant.count(1) + meant.count(2)
    (said,) = capsys.readouterr().err.splitlines()
    assert "cases/case1/" in said and "the next case takes its place" in said
    settings = settings.model_copy(update={"skip_broken": False})
    with pytest.raises(UserError, match=r"cases/case1/.* is damaged"):
        list(crop_batches(source, settings, seed=0, steps=range(8), workers=workers))


def test_crops_never_read_labels(sources, monkeypatch):
    monkeypatch.setattr(StoredCase, "label", lambda self, start, size: 1 / 0)
    assert len(run(sources, 3)) == 3


def test_crops_survive_being_sent_to_a_new_process(sources):
    crops = Crops(tuple(sources), CropSettings(), seed=0)
    first, _ = crops[3]
    same([pickle.loads(pickle.dumps(crops))[3][0]], [first])


def test_settings_are_strict():
    for wrong in ({"batch_size": 0}, {"crops_per_case": 0}, {"centre": "air"}, {"p_flip": 1.5}, {"size": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CropSettings(**wrong)
    assert CropSettings(patch_size=(16, 32, 48)).patch_size == (16, 32, 48)
