"""Which files a data set consists of, asked of those who keep them: Synapse, Zenodo, a plain address."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from unetrkit.errors import MissingExtra, UserError
from unetrkit.fetch.catalogue import NBIA, ZENODO, Published
from unetrkit.fetch.download import Remote, get_json

RETRIES = 5  # of a question to Synapse, with waits that double: half a minute


@dataclass(frozen=True)
class Hosts:
    """Where the archives are asked; a test names its own."""

    zenodo: str = ZENODO
    nbia: str = NBIA
    # None: the client's own
    synapse: str | None = None


def remotes(data: Published, hosts: Hosts) -> list[Remote]:
    """The archives of a data set. Raises UserError where a registration, a client or an answer is missing."""
    if data.source == "https":
        named = ((urlsplit(url).path.rpartition("/")[2], url, digest) for url, digest in data.what)
        return [Remote(name, partial(str, url), digest) for name, url, digest in named]
    if data.source == "zenodo":
        return [remote for record, start in data.what for remote in _zenodo(hosts.zenodo, record, start)]
    client = _synapse_client(data, hosts.synapse)
    return [_synapse(data, client, entity) for entity, _ in data.what]


def _zenodo(host: str, record: str, start: str) -> list[Remote]:
    answer = get_json(host + record, f"the Zenodo record {record}")
    try:
        found = [
            Remote(one["key"], partial(str, one["links"]["self"]), one["checksum"], one["size"])
            for one in answer["files"]
            if one["key"].startswith(start)
        ]
    except (KeyError, TypeError) as error:
        message = f"the answer about the Zenodo record {record} has no files with checksums"
        raise UserError(message, hint=f"look at https://zenodo.org/records/{record}") from error
    if not found:
        hint = f"look at https://zenodo.org/records/{record}"
        raise UserError(f"the Zenodo record {record} has no file `{start}…`", hint=hint)
    return found


def _synapse_client(data: Published, endpoint: str | None) -> Any:
    """A client of a user who is logged in: its own library finds the token, which we never see."""
    try:
        import synapseclient
        from synapseclient.client import STANDARD_RETRY_PARAMS
        from synapseclient.core.exceptions import SynapseAuthenticationError
    except ImportError as error:
        raise MissingExtra(f"fetching `{data.name}`", "fetch") from error
    quiet = logging.getLogger("synapseclient_silent")
    STANDARD_RETRY_PARAMS["retries"] = RETRIES  # as it is made it tries for half an hour without a word
    client = synapseclient.Synapse(skip_checks=True, silent=True, cache_client=False)
    client.logger = quiet  # it says whose account it is
    if endpoint is not None:
        services = (f"{endpoint}{service}/v1" for service in ("repo", "auth", "file"))
        client.setEndpoints(*services, endpoint, skip_checks=True)
    try:
        _asked(data, lambda: client.login(silent=True))
    except SynapseAuthenticationError as error:
        # without its words, which may hold the token
        raise UserError(f"Synapse knows no user for `{data.name}`", hint=data.first) from error
    return client


def _synapse(data: Published, client: Any, entity: str) -> Remote:
    """A file of Synapse; its address is signed for some minutes, so that it is asked for again each time."""
    handle = _asked(data, lambda: client.restGET(f"/entity/{entity}"))["dataFileHandleId"]
    file = {"fileHandleId": handle, "associateObjectId": entity, "associateObjectType": "FileEntity"}

    def ask() -> dict[str, Any]:
        body = json.dumps(
            {"includeFileHandles": True, "includePreSignedURLs": True, "requestedFiles": [file]}
        )
        post = partial(client.restPOST, "/fileHandle/batch", body=body, endpoint=client.fileHandleEndpoint)
        answer = _asked(data, post)["requestedFiles"][0]
        if answer.get("failureCode"):
            message = f"Synapse does not give `{data.name}` to this user: {answer['failureCode']}"
            raise UserError(message, hint=data.first)
        return answer

    about = ask()["fileHandle"]
    digest = f"md5:{about['contentMd5']}"
    return Remote(about["fileName"], lambda: ask()["preSignedURL"], digest, about["contentSize"])


def _asked(data: Published, question: Callable[[], Any]) -> Any:
    try:
        return question()
    except OSError as error:  # those of its HTTP library, too
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in range(400, 500):
            raise UserError(f"Synapse refuses `{data.name}`: {status}", hint=data.first) from error
        hint = "run the command again when the connection is back; what has arrived is kept"
        raise UserError(f"Synapse gives no answer about `{data.name}`", hint=hint) from error
