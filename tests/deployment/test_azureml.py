"""The pipeline for Azure ML, built and validated without an account."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unetrkit.plain_yaml import parse_yaml

pytestmark = pytest.mark.filterwarnings("ignore")  # of marshmallow
CONFIG = """
subscription_id: a
resource_group: b
workspace_name: c
compute: A100
datastore: workspaceblobstore
instance_count: 2
processes_per_instance: 8
prepare: [--published, btcv]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    pytest.importorskip("azure.ai.ml", reason="needs the `azureml` extra")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_a_dry_run_writes_the_whole_pipeline(config, unetrkit):
    config.write_text(CONFIG + "key_vault: https://x.vault.azure.net\n")
    shown = unetrkit(
        *("launch", "azureml", "--config", config, "--dry-run", "--", "train", "swin_unetr_base", "fold=1")
    )
    assert shown.code == 0, shown.err
    jobs = parse_yaml(shown.out, "pipeline")["jobs"]
    assert list(jobs) == ["fetch", "prepare", "train"]
    commands = {name: job["component"]["command"] for name, job in jobs.items()}
    assert commands == {
        "fetch": "python -m unetrkit.deployment.key_vault https://x.vault.azure.net -- "
        "fetch btcv ${{outputs.out}}",
        "prepare": "python -m unetrkit prepare ${{inputs.data}} ${{outputs.out}} --published btcv",
        "train": "python -m unetrkit train swin_unetr_base fold=1 "
        "data=${{inputs.store}} out=${{outputs.out}}",
    }
    assert jobs["prepare"]["inputs"]["data"]["path"] == "${{parent.jobs.fetch.outputs.out}}"
    assert jobs["train"]["inputs"]["store"]["path"] == "${{parent.jobs.prepare.outputs.out}}"
    assert jobs["train"]["resources"] == {"instance_count": 2, "shm_size": "32g"}
    assert jobs["train"]["distribution"] == {"type": "pytorch", "process_count_per_instance": 8}
    run = jobs["train"]["component"]["outputs"]["out"]
    assert run["mode"] == "rw_mount"
    assert "azureml://datastores/workspaceblobstore/paths/unetrkit/train" in shown.out


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        ("", ["predict", "x", "y", "--model", "m"], "the pipeline trains"),
        ("", ["train", "x", "data=store"], "the pipeline trains"),
        ("data: azureml://x\n", ["train", "x"], "one of `fetch` and `data`"),
        ("computes: y\n", ["train", "x"], "`computes` is not a setting"),
        ("", ["train", "swin_unetr_typo"], "`swin_unetr_typo` is not a packaged recipe"),
        ("", ["train"], "`` is not a packaged recipe"),
        ("", ["train", "swin_unetr_base", "optim.lrr=1"], "`optim.lrr` is not a setting"),
        ("", ["train", "own.yaml"], "`own.yaml` is not a packaged recipe"),
        ("", ["train", "swin_unetr_base", "init=${{inputs.x}}"], "what begins with `${{`"),
        ("fetch: nonesuch\n", ["train", "swin_unetr_base"], "there is no data set `nonesuch`"),
        ("fetch: null\ndata: ../x\n", ["train", "swin_unetr_base"], "Azure ML does not see `../x`"),
    ],
)
def test_what_cannot_be_is_refused(config, unetrkit, lines, words, message, monkeypatch):
    monkeypatch.chdir(config.parent)
    Path("own.yaml").write_text("{}\n")
    config.write_text(CONFIG + lines)
    refused = unetrkit("launch", "azureml", "--config", config, "--dry-run", "--", *words)
    assert refused.code == 2 and message in refused.err


@pytest.mark.parametrize(
    ("refusal", "said"), [("AzureError", "no login"), ("ClientAuthenticationError", ""), ("", "no network")]
)
def test_what_azure_does_not_take_is_a_users_error(config, unetrkit, monkeypatch, refusal, said):
    import azure.ai.ml
    from azure.core import exceptions

    def refuse(*_: object) -> None:
        raise getattr(exceptions, refusal, OSError)(f"{said}\nmore")

    monkeypatch.setattr(azure.ai.ml, "MLClient", refuse)
    refused = unetrkit("launch", "azureml", "--config", config, "--", "train", "swin_unetr_base")
    message = f"error: Azure ML did not take the pipeline: {said or 'more'}\n"
    assert (refused.code, refused.out) == (2, "") and message in refused.err and "az login" in refused.err


def test_the_extra_is_named_where_azure_is_missing(monkeypatch, tmp_path, unetrkit):
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setitem(sys.modules, "azure.ai.ml", None)
    words = ("--config", tmp_path / "config.yaml", "--dry-run", "--", "train", "x")
    refused = unetrkit("launch", "azureml", *words)
    assert refused.code == 2 and "hint: pip install 'unetrkit[azureml]'" in refused.err
