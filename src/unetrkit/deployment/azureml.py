"""Azure ML: one pipeline from fetching through preparing to training, with its results on the datastore."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from unetrkit.config import Settings, recipes
from unetrkit.deployment.training import KINDS, read
from unetrkit.errors import MissingExtra, UserError, nearest
from unetrkit.fetch.catalogue import published

IMAGE = "mcr.microsoft.com/azureml/openmpi4.1.0-cuda11.8-cudnn8-ubuntu22.04"
VAULT_PACKAGES = ("azure-identity", "azure-keyvault-secrets")


class AzureSettings(Settings):
    """What `config.yaml` says: where the work is done and where its results are."""

    subscription_id: str
    resource_group: str
    workspace_name: str
    # a compute cluster with GPUs
    compute: str
    datastore: str = "workspaceblobstore"
    # results are at azureml://datastores/DATASTORE/paths/FOLDER
    folder: str = "unetrkit"
    instance_count: int = Field(default=1, ge=1)
    # one for each GPU of a machine
    processes_per_instance: int = Field(default=1, ge=1)
    shared_memory: str = "32g"
    image: str = IMAGE
    python: str = "3.11"
    packages: tuple[str, ...] = ("unetrkit[io,fetch]", "mlflow-skinny", "azureml-mlflow")
    # the data set that is fetched; null: `data` is there already
    fetch: str | None = "btcv"
    # azureml://… of a folder with a data list
    data: str | None = None
    # https://NAME.vault.azure.net with the secrets synapse-username and synapse-password (a token)
    key_vault: str | None = None
    # words for `unetrkit prepare DATA STORE …`
    prepare: tuple[str, ...] = ()


def pipeline(settings: AzureSettings, words: Sequence[str]) -> Any:
    """The pipeline job whose last step is `unetrkit WORDS data=… out=…`; nothing is sent anywhere.

    words: `train RECIPE KEY=VALUE …` without `data` and `out`, which are the pipeline's. All three steps
    write into folders of the mounted datastore, so that each goes on when the pipeline is submitted again.
    Raises UserError without azure-ai-ml, for words that do not train, and for a pipeline that it finds wrong.
    """
    ml = _azure()
    if words[0] not in KINDS or any(word.startswith(("data=", "out=")) for word in words):
        hint = "as in `unetrkit launch azureml --config config.yaml -- train swin_unetr_base`"
        raise UserError("the pipeline trains, and sets `data` and `out` itself", hint=hint)
    if (settings.fetch is None) == (settings.data is None):
        raise UserError("one of `fetch` and `data` says where the scans are", hint="leave out the other")
    if settings.fetch is not None:
        published(settings.fetch)
    elif not str(settings.data).startswith("azureml:"):
        raise UserError(f"Azure ML does not see `{settings.data}`", hint="`data: azureml://datastores/…`")
    if any("${{" in word for word in (*words, *settings.prepare)):
        raise UserError("Azure ML fills in what begins with `${{`", hint="write the value itself")
    recipe, known = "".join(words[1:2]), dict(recipes())
    if recipe not in known:  # a file of this machine is not there
        raise UserError(f"`{recipe}` is not a packaged recipe", hint=nearest(recipe, known))
    read([*words, "data=store", "out=run"])
    packages = [*settings.packages, *(VAULT_PACKAGES if settings.key_vault else ())]
    conda = {"name": "unetrkit", "dependencies": [f"python={settings.python}", "pip", {"pip": packages}]}
    environment = ml.entities.Environment(name="unetrkit", image=settings.image, conda_file=conda)
    root = f"azureml://datastores/{settings.datastore}/paths/{settings.folder}"

    def step(name: str, command: str, takes: str | None, **options: Any) -> Any:
        made = ml.Output(type="uri_folder", mode="rw_mount", path=f"{root}/{name}")
        given = {takes: ml.Input(type="uri_folder", mode="ro_mount")} if takes else {}
        told = {"name": name, "command": command, "environment": environment, **options}
        return ml.command(inputs=given, outputs={"out": made}, **told)

    secrets = f"python -m unetrkit.deployment.key_vault {shlex.quote(settings.key_vault or '')} -- "
    program = secrets if settings.key_vault else "python -m unetrkit "
    fetch = step("fetch", f"{program}fetch {shlex.quote(settings.fetch or '')} ${{{{outputs.out}}}}", None)
    plan = " ".join(["${{inputs.data}} ${{outputs.out}}", *map(shlex.quote, settings.prepare)])
    prepare = step("prepare", f"python -m unetrkit prepare {plan}", "data")
    train = step(
        "train",
        f"python -m unetrkit {shlex.join(words)} data=${{{{inputs.store}}}} out=${{{{outputs.out}}}}",
        "store",
        instance_count=settings.instance_count,
        shm_size=settings.shared_memory,
        distribution={"type": "PyTorch", "process_count_per_instance": settings.processes_per_instance},
    )

    @ml.dsl.pipeline(name="unetrkit", default_compute=settings.compute)
    def steps() -> dict[str, Any]:
        data = fetch().outputs.out if settings.fetch else ml.Input(type="uri_folder", path=settings.data)
        store = prepare(data=data).outputs.out
        return {"run": train(store=store).outputs.out}

    job = steps()
    validate = getattr(job, "_validate", None)  # a private name: without it the service alone validates
    if validate is not None and not (found := validate()).passed:
        problems = "; ".join(f"{where}: {what}" for where, what in found.error_messages.items())
        raise UserError(f"the pipeline is not sound: {problems}", hint="correct the file of `--config`")
    return job


def submit(settings: AzureSettings, words: Sequence[str]) -> Any:
    """Submits the pipeline as who is logged in (`az login`, a managed identity, …); the job in Azure."""
    job = pipeline(settings, words)
    from azure.core.exceptions import AzureError
    from azure.identity import DefaultAzureCredential

    ids = settings.subscription_id, settings.resource_group, settings.workspace_name
    try:
        return _azure().MLClient(DefaultAzureCredential(), *ids).jobs.create_or_update(job)
    except (AzureError, OSError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "`az login`; check subscription_id, resource_group and workspace_name"
        raise UserError(f"Azure ML did not take the pipeline: {why}", hint=hint) from error


def _azure() -> Any:
    try:
        import azure.ai.ml
        import azure.ai.ml.dsl
        import azure.ai.ml.entities
    except ImportError as error:
        raise MissingExtra("`unetrkit launch azureml`", "azureml") from error
    return azure.ai.ml
