"""A run that begins with published weights or a run of ours: what it takes over, records, refuses."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.command import CommandLine
from tests.networks import published_files as files
from tests.training.test_run import settings, store  # noqa: F401
from torch import Tensor

from unetrkit.data.files import sha256_file
from unetrkit.errors import UserError
from unetrkit.inference.model import load_model
from unetrkit.networks import build
from unetrkit.networks.adapt import resize_positions
from unetrkit.training import checkpoint
from unetrkit.training import run as run_module
from unetrkit.training.initial import inspect_weights, open_initial
from unetrkit.training.run import job_of, train

ONE_STEP = ("loop.steps=1", "loop.validate_every=1")
# one step at such a rate moves no weight by more than this
STILL = ("optim.lr=1e-12", "optim.warmup=0")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model_swinvit.pt` at feature size 12."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("published") / "model_swinvit.pt"
    torch.save(files.layout_b(files.swin(1, 14).state_dict()), path)
    return path


@pytest.fixture(scope="module")
def tuned(store: Path, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("runs") / "tuned"
    train(settings(store, out, f"init={published}", *ONE_STEP, *STILL))
    return out


def encoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.startswith("encoder.")}


def test_a_run_begins_with_the_file_s_encoder_and_records_it(published: Path, tuned: Path) -> None:
    model = load_model(tuned)
    expected = encoder(open_initial(published).named.tensors)
    found = encoder(model.network.state_dict())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert model.description["options"] == {"merging": "published", "relative_positions": "sliced"}
    record = {
        "file": "model_swinvit.pt",
        "sha256": sha256_file(published),
        "layout": "B",
        "options": {"merging": "published", "relative_positions": "sliced"},
        "encoder_share": 1.0,
        "decoder_share": 0.0,
    }
    assert model.description["origin"]["init"] == record
    assert json.loads((tuned / "run.json").read_text())["init"] == record


def test_a_run_goes_on_without_the_file(
    store: Path,  # noqa: F811
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "weights.pt"
    copy.write_bytes(published.read_bytes())
    words = (f"init={copy}", "loop.validate_every=1", "optim.schedule=constant")
    train(settings(store, tmp_path / "run", *words, "loop.steps=1"))
    said = capsys.readouterr().err
    assert "layout B" in said and "encoder: 100.0 % of 694,998 parameters; decoder: 0.0 %" in said
    copy.unlink()
    monkeypatch.setattr(run_module, "open_initial", None)
    train(settings(store, tmp_path / "run", *words, "loop.steps=2", "init_minimum=0.5"))
    assert load_model(tmp_path / "run").description["options"]["merging"] == "published"
    with pytest.raises(UserError, match=r"its `init` is .*not null"):
        train(settings(store, tmp_path / "run", *words[1:], "loop.steps=2"))


def test_what_the_user_says_goes_before_the_file(store: Path, published: Path, tmp_path: Path) -> None:  # noqa: F811
    words = (f"init={published}", "network_options.merging=full", *ONE_STEP)
    train(settings(store, tmp_path / "run", *words))
    options = load_model(tmp_path / "run").description["options"]
    assert options == {"merging": "full", "relative_positions": "sliced"}


@pytest.mark.parametrize("what", ["", "model", "last", "best"])
def test_a_run_of_ours_is_a_beginning_with_its_quirks(
    store: Path,  # noqa: F811
    tuned: Path,
    tmp_path: Path,
    what: str,
) -> None:
    initial = open_initial(tuned / what)
    assert initial.options("swin_unetr_tiny") == {"merging": "published", "relative_positions": "sliced"}
    assert initial.identity.words() == "swin_unetr_tiny, 1 channel, 3 classes"
    assert "needs     merging=published" in inspect_weights(tuned / what, None, []).table().splitlines()
    if what:
        return
    train(settings(store, tmp_path / "run", f"init={tuned}", *ONE_STEP, *STILL))
    found, expected = (load_model(run).network.state_dict() for run in (tmp_path / "run", tuned))
    for name, tensor in expected.items():  # the head too: it has as many classes
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    origin = load_model(tmp_path / "run").description["origin"]["init"]
    assert (origin["layout"], origin["encoder_share"], origin["decoder_share"]) == ("ours", 1.0, 1.0)


def test_a_checkpoint_without_a_model_beside_it_keeps_its_quirks(tuned: Path, tmp_path: Path) -> None:
    for name in ("last", "config.yaml", "run.json"):
        (tmp_path / name).write_bytes((tuned / name).read_bytes())
    options = open_initial(tmp_path / "last").options("swin_unetr_tiny")
    assert options == {"merging": "published", "relative_positions": "sliced"}


def test_too_little_of_an_encoder_is_refused(store: Path, published: Path, tmp_path: Path) -> None:  # noqa: F811
    for words, message in {
        ("network_options.feature_size=24",): r"has .* of the 2,171,466 encoder .* less than 99\.0%",
        ("network=unetr",): r"has 0 of the 8\d,\d+,\d+ encoder parameters of `unetr`: 0.0%",
    }.items():
        with pytest.raises(UserError, match=message) as refusal:
            train(settings(store, tmp_path / "run", f"init={published}", *words))
        assert "it holds swin_unetr_tiny, 1 channel, no output layer" in refusal.value.hint
        offered = "`init_minimum=0.0" in refusal.value.hint
        assert offered == (words[0] != "network=unetr")  # of which nothing fits
        assert offered != ("nothing of it would be used" in refusal.value.hint)
        assert not (tmp_path / "run").exists()


def test_half_an_encoder_needs_to_be_allowed(store: Path, tmp_path: Path) -> None:  # noqa: F811
    state = files.encoder_of(files.swin(1, 14).state_dict())
    torch.save({n: t for n, t in state.items() if not n.startswith("layers4")}, tmp_path / "part.pt")
    with pytest.raises(UserError, match=r"less than 99\.0%") as refusal:
        train(settings(store, tmp_path / "run", f"init={tmp_path / 'part.pt'}", *ONE_STEP))
    allowed = refusal.value.hint.partition("`init_minimum=")[2].partition("`")[0]
    assert 0 < float(allowed) < 0.5
    state = train(
        settings(
            store, tmp_path / "run", f"init={tmp_path / 'part.pt'}", f"init_minimum={allowed}", *ONE_STEP
        )
    )
    assert state.step == 1


def test_an_averaged_checkpoint_gives_its_average(tmp_path: Path) -> None:
    weights = build("swin_unetr_tiny", 1, 2, (32, 32, 32), {}).state_dict()
    average = {f"module.network.{name}": tensor + 1 for name, tensor in weights.items()}
    objective = {f"network.{name}": tensor for name, tensor in weights.items()}
    learner = {"objective": objective, "average": {"n_averaged": torch.tensor(3), **average}}
    checkpoint.save(tmp_path / "last", {"learner": learner, "state": {}})
    found = open_initial(tmp_path / "last").named
    assert found.tensors.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name] + 1) for name, tensor in found.tensors.items())


def test_the_next_command_says_what_the_file_does_not_bring_by_itself(tmp_path: Path) -> None:
    torch.save(files.swin(2, 3).state_dict(), tmp_path / "my model.pt")
    found = inspect_weights(tmp_path / "my model.pt", None, [])
    assert found.audit.encoder_share == found.audit.decoder_share == 1
    assert found.command == f"unetrkit train swin_unetr_tiny init='{tmp_path / 'my model.pt'}' data=STORE"
    words = ["classes=5", "in_channels=1", "merging=full"]
    found = inspect_weights(tmp_path / "my model.pt", "swin_unetr_tiny", words)
    assert len(found.audit.adapted) == 3 and len(found.audit.missing) == 2
    assert "network_options.merging=full" in found.command


def test_heads_of_deep_supervision_are_of_training_only(store: Path, published: Path, tmp_path: Path) -> None:  # noqa: F811
    words = (f"init={published}", "network_options.deep_supervision=2", *ONE_STEP)
    train(settings(store, tmp_path / "deep", *words))
    model = load_model(tmp_path / "deep")
    assert model.description["options"]["deep_supervision"] == 2
    assert model.description["origin"]["init"]["encoder_share"] == 1
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.network(image), model.network.scales(image)[0])

    train(settings(store, tmp_path / "plain", f"init={tmp_path / 'deep'}", *ONE_STEP, *STILL))
    plain = load_model(tmp_path / "plain")
    assert "deep_supervision" not in plain.description["options"]
    with torch.no_grad():
        torch.testing.assert_close(plain.network(image), model.network(image), rtol=0, atol=1e-5)
    audit = inspect_weights(tmp_path / "plain", None, ["deep_supervision=2"]).audit
    heads = [f"decoder.coarse_heads.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")]
    assert sorted(entry.name for entry in audit.missing) == sorted(heads)
    assert audit.encoder_share == 1 and 0.99 < audit.decoder_share < 1


def test_a_file_brings_its_own_feature_size(tmp_path: Path) -> None:
    small = {"feature_size": 8, "depth": 5, "width": 48, "heads": 4}
    torch.save(build("unetr", 1, 2, (32, 32, 32), small).state_dict(), tmp_path / "unetr.pt")
    initial = open_initial(tmp_path / "unetr.pt")
    assert initial.options("unetr") == {"feature_size": 8, "depth": 5, "width": 48}
    assert inspect_weights(tmp_path / "unetr.pt", None, []).audit.encoder_share == 1
    for words, doubt in {(): True, ("heads=4",): False}.items():
        notes = inspect_weights(tmp_path / "unetr.pt", None, words).audit.notes
        assert ["the file cannot tell `heads`" in note for note in notes] == [True] * doubt
    assert initial.options("unetr_fpn") == {}  # another network has its own
    torch.save(
        build("swin_unetr_base", 1, 2, (32, 32, 32), {"feature_size": 36}).state_dict(), tmp_path / "s.pt"
    )
    found = inspect_weights(tmp_path / "s.pt", None, [])
    assert found.audit.encoder_share == found.audit.decoder_share == 1
    assert found.command == f"unetrkit train swin_unetr_base init={tmp_path / 's.pt'} data=STORE"


def test_a_bundle_older_than_the_new_merging_leaves_no_doubt(tmp_path: Path) -> None:
    for folder in ("configs", "models"):
        (tmp_path / folder).mkdir()
    torch.save(files.swin(1, 2).state_dict(), tmp_path / "models/model.pt")
    for version, doubt in {
        "1.4.0": "",
        "1.10.1": "names 1.10, with which it was tested",
        "": "cannot tell",
    }.items():
        (tmp_path / "configs/metadata.json").write_text(json.dumps({"monai_version": version}))
        found = inspect_weights(tmp_path, None, [])
        assert open_initial(tmp_path).options("swin_unetr_tiny")["merging"] == "published"
        notes = [note for note in found.audit.notes if "merging=full" in note]
        assert len(notes) == bool(doubt) and all(doubt in note for note in notes)


def test_no_command_begins_with_a_file_of_which_nothing_fits(tmp_path: Path) -> None:
    weights = {name: tensor.to(torch.int8) for name, tensor in files.swin(1, 2).state_dict().items()}
    torch.save(weights, tmp_path / "whole_numbers.pt")
    found = inspect_weights(tmp_path / "whole_numbers.pt", None, [])
    assert (found.audit.encoder_share, found.command) == (0, "")
    assert "nothing of it would be used" in found.audit.notes[-1]


def test_the_merging_that_was_named_is_not_advised(published: Path) -> None:
    for words, notes in {("merging=full",): 0, ("merging=published",): 1, (): 1}.items():
        found = inspect_weights(published, None, words).audit.notes
        assert sum("merging=full" in note for note in found) == notes


@pytest.mark.parametrize("size", ["0,0,0", "1,1", "5000,16,16", "abc"])
def test_sizes_that_are_none(store: Path, published: Path, tmp_path: Path, size: str) -> None:  # noqa: F811
    with pytest.raises(UserError, match="init_size"):
        inspect_weights(published, None, [f"init_size={size}"])
    with pytest.raises(UserError, match="init_size"):
        train(settings(store, tmp_path / "run", f"init={published}", f"init_size={size}"))


@pytest.mark.parametrize(
    "said",
    [
        *({"options": value} for value in (5, [1], None)),
        *({"image_size": value} for value in ("abc", 7, ["a", "b", "c"], [1, 2], [0, 0, 0], [10**9] * 3)),
    ],
    ids=str,
)
def test_a_description_that_is_none(tuned: Path, tmp_path: Path, said: dict[str, object]) -> None:
    (tmp_path / "weights.safetensors").write_bytes((tuned / "model/weights.safetensors").read_bytes())
    description = json.loads((tuned / "model/model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(description))
    assert open_initial(tmp_path).identity.network == "swin_unetr_tiny"
    (tmp_path / "model.json").write_text(json.dumps(description | said))
    with pytest.raises(UserError, match="does not describe a model"):
        open_initial(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1],
        torch.ones(2),
        {"learner": torch.ones(2)},
        {"learner": {}},
        {"learner": {"objective": 5}},
        {"learner": {"objective": {1: torch.ones(2)}}},
        {"learner": {"objective": {"network.encoder.embedding.weight": torch.ones(2, device="meta")}}},
    ],
    ids=str,
)
def test_a_checkpoint_of_something_else(tmp_path: Path, content: dict[str, object]) -> None:
    checkpoint.save(tmp_path / "last", content)
    with pytest.raises(UserError, match=r"is not the checkpoint of a run|no weights by name|not stored"):
        open_initial(tmp_path / "last")


def test_a_run_without_a_model_yet_names_its_checkpoint(tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "last").write_bytes((tuned / "last").read_bytes())
    with pytest.raises(UserError, match="has no model yet") as refusal:
        open_initial(tmp_path)
    assert f"`{tmp_path / 'last'}`" in refusal.value.hint
    (tmp_path / "last").unlink()
    (tmp_path / "last").mkdir()  # of a sharded run
    with pytest.raises(UserError, match="has no model yet"):
        open_initial(tmp_path)


def test_a_size_that_was_named_tells_how_positions_lie(store: Path, tmp_path: Path) -> None:  # noqa: F811
    sizes = {"feature_size": 4, "depth": 3, "width": 24, "heads": 4}
    state = build("unetr", 1, 3, (48, 32, 16), sizes).state_dict()
    torch.save(state, tmp_path / "unetr.pt")
    words = ("network=unetr", f"init={tmp_path / 'unetr.pt'}", "network_options.heads=4")
    with pytest.raises(UserError, match="6 position embeddings, and the file does not say how they lie"):
        job_of(settings(store, tmp_path / "run", *words))
    job = job_of(settings(store, tmp_path / "run", *words, "init_size=48,32,16"))
    encoder = job.objective.get_submodule("network.encoder")
    expected = resize_positions(state["encoder.position"], (3, 2, 1), encoder.grid)
    assert encoder.grid != (3, 2, 1)
    torch.testing.assert_close(encoder.position.detach(), expected)


def test_trust_lets_torch_open_what_cannot_be_read_otherwise(
    store: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unetrkit: CommandLine,
) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"x/{name}", b"not what we read")
    state = files.swin(1, 3).state_dict()
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: SimpleNamespace(state_dict=lambda: state))
    init = f"init={tmp_path / 'x.pt'}"
    with pytest.raises(UserError, match="without running its code") as refusal:
        job_of(settings(store, tmp_path / "run", init))
    assert "init_trust=true" in refusal.value.hint
    job = job_of(settings(store, tmp_path / "run", init, "init_trust=true"))
    embedding = job.objective.get_submodule("network.encoder.embedding").weight
    assert torch.equal(embedding, state["swinViT.patch_embed.proj.weight"])
    assert unetrkit("info", "weights", tmp_path / "x.pt").code == 2
    outcome = unetrkit("info", "weights", tmp_path / "x.pt", "--trust")
    assert outcome.code == 0 and "init_trust=true" in outcome.err


def test_a_terminal_does_not_obey_a_file(tuned: Path, tmp_path: Path, unetrkit: CommandLine) -> None:
    folder = tmp_path / "a\x1b[2J"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes((tuned / "model/weights.safetensors").read_bytes())
    description = json.loads((tuned / "model/model.json").read_text())
    for network, code in {"swin_unetr_tiny": 0, "\x1b]0;owned\x07": 2}.items():
        (folder / "model.json").write_text(json.dumps(description | {"network": network}))
        outcome = unetrkit("info", "weights", folder)
        assert (outcome.code, "\x1b" in outcome.out + outcome.err) == (code, False)
        assert r"\x1b" in outcome.out + outcome.err
