"""Runs a command of ours with the Synapse login that an Azure Key Vault keeps."""

from __future__ import annotations

import os
import sys

# what `synapseclient` reads; a password is a personal access token, Synapse takes no others
SECRETS = {"SYNAPSE_USERNAME": "synapse-username", "SYNAPSE_AUTH_TOKEN": "synapse-password"}


def read_secrets(vault: str) -> dict[str, str]:
    """The values of the secrets, as environment variables; they are never printed or written."""
    from azure.identity import DefaultAzureCredential
    from azure.keyvault.secrets import SecretClient

    client = SecretClient(vault_url=vault, credential=DefaultAzureCredential())
    return {variable: client.get_secret(name).value for variable, name in SECRETS.items()}


if __name__ == "__main__":  # python -m unetrkit.deployment.key_vault VAULT -- COMMAND …
    program = [sys.executable, "-m", "unetrkit", *sys.argv[3:]]
    os.execve(program[0], program, os.environ | read_secrets(sys.argv[1]))  # noqa: S606
