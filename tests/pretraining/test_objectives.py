"""What every objective must stand: gradients, seeds, bf16, two processes, odd sizes, the encoder's way on.

The published forms against formulas written here, given the same corrupted views. A new entry of OBJECTIVES
joins by itself, at the sizes of `SMALL`.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.two_processes import run_two
from torch import Tensor, nn

from unetrkit.config import settings_from, to_yaml
from unetrkit.networks import NETWORKS, build
from unetrkit.networks.identify import options_for
from unetrkit.plain_yaml import parse_yaml
from unetrkit.pretraining import OBJECTIVES
from unetrkit.pretraining.corruptions import generator_of_step

SMALL: dict[str, dict[str, object]] = {
    "vit": {"depth": 4, "width": 48, "heads": 4},
    "swin": {"feature_size": 12},
    "disruptive": {"feature_size": 12},
    "masked": {
        "depth": 4, "width": 48, "heads": 4, "decoder_depth": 1, "decoder_width": 24, "decoder_heads": 2
    },
}  # fmt: skip
SIZE = (32, 32, 32)
FORMS = [(name, form) for name in OBJECTIVES for form in ("default", "published")]


def small(name: str) -> dict[str, object]:
    return next(options for start, options in SMALL.items() if name.startswith(start))


def built(name: str, form: str = "default", **settings: object) -> nn.Module:
    torch.manual_seed(0)
    objective = OBJECTIVES[name]
    values = {**(objective.published if form == "published" else {}), **settings}
    return objective.build(1, SIZE, small(name), settings_from(objective.settings, values))


def batch(count: int = 3, size: tuple[int, int, int] = SIZE) -> dict[str, Tensor]:
    image = F.interpolate(torch.rand(count, 1, 6, 6, 6, generator=torch.Generator().manual_seed(1)), size)
    return {
        "image": image,
        "case": torch.tensor([7, 7, 2, 5])[:count],
        "modality": torch.tensor([0, 0, 1, 1])[:count],
    }


def losses(objective: nn.Module, given: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return objective(given)


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_parameter_learns(name: str, form: str) -> None:
    objective = built(name, form)
    found = losses(objective, batch())
    for value in found.values():
        assert value.shape == () and value.dtype == torch.float32 and value.isfinite()
    found["loss"].backward()
    still = [key for key, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    assert all(p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_the_same_seed_gives_the_same_loss(name: str, form: str) -> None:
    objective = built(name, form).eval()
    with torch.no_grad():
        one, again, other = (losses(objective, batch(), seed)["loss"] for seed in (3, 3, 4))
    assert one == again and one != other


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_bf16_is_finite_and_close(name: str, form: str) -> None:
    objective = built(name, form)
    exact = losses(objective, batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(objective, batch())
    found["loss"].backward()
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[key].item(), rel=0.05, abs=0.02), key
    assert all(p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("count", "size"), [(1, SIZE), (2, (35, 18, 50)), (4, (33, 33, 20))])
def test_any_size_and_a_single_crop_train(name: str, count: int, size: tuple[int, int, int]) -> None:
    objective = built(name)
    found = losses(objective, batch(count, size))
    found["loss"].backward()
    assert all(value.isfinite() for value in found.values())
    assert all(p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_restore_shows_what_was_corrupted(name: str, form: str) -> None:
    objective = built(name, form).eval()
    given = batch(3, (35, 33, 33))
    torch.manual_seed(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = objective.restore(given)
    assert list(found) == ["original", "corrupted", "restored"]
    for shown in found.values():
        assert shown.shape == given["image"].shape and shown.dtype == torch.float32
    changed = (found["original"] != found["corrupted"]).float().mean((1, 2, 3, 4))
    everywhere = name == "disruptive_autoencoder"  # noise on every voxel; the others leave some as they were
    assert (changed == 1).all() if everywhere else (changed > 0).all() and (changed < 1).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_encoder_moves_on_by_name(name: str) -> None:
    objective = OBJECTIVES[name]
    assert objective.networks and set(objective.networks) <= set(NETWORKS)
    options = {**options_for(objective.networks[0], small(name)), "feature_size": 12}
    tuned = build(objective.networks[0], 1, 3, SIZE, options)
    encoder = built(name).network.encoder
    tuned.encoder.load_state_dict(encoder.state_dict())  # strict
    with torch.no_grad():
        for a, b in zip(
            tuned.eval().encoder(batch()["image"]), encoder.eval()(batch()["image"]), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_published_settings_differ_from_the_defaults_and_survive_a_recipe(name: str) -> None:
    objective = OBJECTIVES[name]
    published = settings_from(objective.settings, objective.published)
    default = objective.settings().model_dump()
    assert all(default[key] != value for key, value in objective.published.items())
    assert settings_from(objective.settings, parse_yaml(to_yaml(published), "")) == published


@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
def test_vit_of_any_patch_is_restored_on_the_crops_grid(patch: int) -> None:
    objective = OBJECTIVES["vit_autoencoder"]
    options = {"depth": 4, "width": 24, "heads": 2, "patch": patch}
    module = objective.build(1, (32, 32, 32), options, objective.settings())
    given = batch(2, (20, 32, 17))
    assert module.network(given["image"]).shape == given["image"].shape
    # a token is restored from itself alone: its cube, and no other
    decoded = module.network.decode(torch.eye(24)[:2].reshape(2, 24, 1, 1, 1), (patch,) * 3)
    assert decoded.shape == (2, 1, patch, patch, patch)


# the published forms, as original-systems.md has them


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """(1 / 2N) sum over i of -log(exp(s_i,pos / T) / sum over k != i of exp(s_ik / T))."""
    z = F.normalize(torch.cat((first, second)).flatten(1).double())
    s = (z @ z.T / temperature).exp()
    n = len(first)
    terms = [-(s[i, (i + n) % (2 * n)] / (s[i].sum() - s[i, i])).log() for i in range(2 * n)]
    return torch.stack(terms).mean()


def test_published_vit_autoencoder() -> None:
    objective, given = built("vit_autoencoder", "published"), batch(4)
    torch.manual_seed(2)
    generator = generator_of_step()
    views = [objective.corrupt(given["image"], generator) for _ in range(2)]
    with torch.no_grad():
        first, second = (objective.network(view) for view in views)
        found = losses(objective, given, 2)
    r = (first - given["image"]).abs().double().mean()
    c = nt_xent(first, second, 0.05)
    for key, expected in {"reconstruction": r, "contrast": c, "loss": r + c * r}.items():
        assert found[key].item() == pytest.approx(expected.item(), rel=1e-4), key


def test_default_vit_autoencoder_restores_both_views_and_contrasts_features() -> None:
    objective, given = built("vit_autoencoder"), batch(4)
    given["case"] = torch.arange(4)
    torch.manual_seed(2)
    generator = generator_of_step()
    views = [objective.corrupt(given["image"], generator) for _ in range(2)]
    with torch.no_grad():
        restored = torch.stack([objective.network(view) for view in views])
        first, second = (objective.network.encoder(view)[-1].mean((2, 3, 4)) for view in views)
        found = losses(objective, given, 2)
    assert found["reconstruction"].item() == pytest.approx((restored - given["image"]).abs().mean().item())
    assert found["contrast"].item() == pytest.approx(nt_xent(first, second, 0.05).item(), rel=1e-4)


@pytest.mark.parametrize("form", ["default", "published"])
def test_swin_heads_losses(form: str) -> None:
    objective, given = built("swin_heads", form), batch(4)
    given["case"] = torch.arange(4)
    assert objective.network.pooled == (form == "default")
    torch.manual_seed(2)
    generator = generator_of_step()
    views = [objective.view(given["image"], generator) for _ in range(2)]
    plane = (2, 3) if form == "default" else (3, 4)
    with torch.no_grad():
        outputs = [objective.network(corrupted) for _, corrupted, _ in views]
        found = losses(objective, given, 2)
    rotation, restored = [], []
    for (turned, _, turns), output in zip(views, outputs, strict=True):
        for i, k in enumerate(turns.tolist()):
            assert torch.equal(turned[i : i + 1], given["image"][i : i + 1].rot90(k, plane))
            rotation.append(-output["rotation"][i].double().log_softmax(0)[k])
        restored.append((output["reconstruction"] - turned).abs().double().mean())
    expected = {
        "rotation": torch.stack(rotation).mean(),
        "contrast": nt_xent(outputs[0]["contrast"], outputs[1]["contrast"], 0.5),
        "reconstruction": torch.stack(restored).mean(),
    }
    expected["loss"] = sum(expected.values())
    for key, value in expected.items():
        assert found[key].item() == pytest.approx(value.item(), rel=1e-4), key


def test_crops_of_one_volume_are_negatives_only_as_published() -> None:
    given = batch(2)  # of one volume
    for name in ("vit_autoencoder", "swin_heads"):
        assert losses(built(name), given)["contrast"] == 0
        assert losses(built(name, same_volume_negatives=True), given)["contrast"] > 0


# two processes: this file runs as their program


def test_two_processes_train_every_objective(tmp_path: Path) -> None:
    said = run_two("-W", "ignore", __file__, tmp_path / "meeting")
    assert said[0].split() == said[1].split() and len(said[0].split()) == 2 * len(OBJECTIVES)


def process(meeting: str, rank: int) -> None:
    """Two steps: a parameter without a gradient in the first would stop the second."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=2)
    for name in OBJECTIVES:
        shared = nn.parallel.DistributedDataParallel(copy.deepcopy(built(name)))
        given = {key: part[2 * rank : 2 * rank + 2] for key, part in batch(4).items()}
        for step in range(2):
            losses(shared, given, step + 10 * rank)["loss"].backward()
            with torch.no_grad():
                for parameter in shared.parameters():
                    parameter -= 0.01 * parameter.grad
            shared.zero_grad()
        # the same weights on both: what they print is compared
        print(name, sum(float(p.detach().double().abs().sum()) for p in shared.parameters()), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    process(sys.argv[1], int(sys.argv[2]))
