"""One file over HTTPS: gone on with after a cut or a kill, and believed only when its hash is right."""

import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from unetrkit.data.files import atomic_write, sync_folder, write_problems
from unetrkit.errors import UserError
from unetrkit.progress import Progress

PIECE = 2**20  # bytes
ATTEMPTS = 6  # without one new byte, before the user is asked to look at the connection
FIRST_WAIT = 1.0  # seconds; doubled each time
TIMEOUT = 60  # seconds without a byte
LARGEST_ANSWER = 256 * 2**20  # bytes of JSON: the series of the largest collection are about 5 MB
OTHER = "try again; if it stays so, the file behind the address is another one: tell its owner"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CUT = (OSError, http.client.HTTPException)  # OSError: urllib's own errors, resets, timeouts


@dataclass(frozen=True)
class Remote:
    """A file to download. url: asked for at every attempt, since signed addresses expire. digest: `md5:…` or
    `sha256:…`, what its bytes must hash to. Raises UserError for a name or a digest that is none."""

    name: str
    url: Callable[[], str]
    digest: str
    size: int | None = None

    def __post_init__(self) -> None:  # they come from servers
        plain = re.fullmatch(r"\w[\w.+ -]{0,199}", self.name)
        if not plain or not re.fullmatch(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", self.digest):
            raise UserError(f"a server names a file {self.name!r} of digest {self.digest!r}", hint=OTHER)


def download(remote: Remote, folder: Path, progress: Progress) -> Path:
    """The file in `folder`, complete and verified; one that is there is verified and not loaded again.

    Bytes go into NAME.part, which is gone on with by Range and renamed when its hash is right: nothing
    half-written has the final name. Raises UserError where the server refuses, sends other bytes than were
    published, or cannot be reached for `ATTEMPTS` times without a new byte.
    """
    path, part = folder / remote.name, folder / f"{remote.name}.part"
    if path.exists():
        if hash_of(path, remote.digest) == remote.digest:
            return path
        message = f"`{path}` is not the file that was published"
        raise UserError(message, hint="remove it, and run the command again")
    with write_problems(folder):
        folder.mkdir(parents=True, exist_ok=True)
    while True:
        resumed = part.exists() and part.stat().st_size > 0
        _load(remote, part, progress)
        found = hash_of(part, remote.digest)
        if found == remote.digest:
            with write_problems(path):
                os.replace(part, path)
                sync_folder(folder)
            return path
        part.unlink()  # a part of an older version, or of another file, cannot be gone on with
        if not resumed:
            break
    message = f"`{remote.name}` arrived with the hash {found}, but was published with {remote.digest}"
    raise UserError(message, hint=OTHER)


def _load(remote: Remote, part: Path, progress: Progress) -> None:
    """Appends to `part` until all is there."""
    failed = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _append(remote, part, progress)
            return
        except CUT as problem:
            gained = (part.stat().st_size if part.exists() else 0) > before
            failed = 0 if gained else failed + 1
            refuse_answer(problem, remote.name)
            if failed >= ATTEMPTS:
                message = f"`{remote.name}` cannot be downloaded: {reason(problem)}"
                hint = "what has arrived is kept: run the command again when the connection is back"
                raise UserError(message, hint=hint) from problem
            time.sleep(FIRST_WAIT * 2 ** max(0, failed - 1))


def _append(remote: Remote, part: Path, progress: Progress) -> None:
    start = part.stat().st_size if part.exists() else 0
    if remote.size is not None and start == remote.size:
        return
    try:
        answer = open_url(remote.url(), {"Range": f"bytes={start}-"} if start else {})
    except urllib.error.HTTPError as error:
        if error.code != 416:  # there is nothing after what has arrived
            raise
        if error.headers.get("Content-Range") != f"bytes */{start}":
            part.unlink()
            raise ConnectionError("the part that has arrived is longer than the file") from error
        return
    with answer:
        if answer.status != 206:
            start = 0  # this server sends files from their beginning only
        elif not (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise ConnectionError("the server sends another part than it was asked for")
        total = remote.size if answer.length is None else start + answer.length
        if total is not None and remote.size is not None and total != remote.size:
            message = f"`{remote.name}` has {total} bytes, but was published with {remote.size}"
            raise UserError(message, hint=OTHER)
        check_space(part.parent, (total or 0) - start)
        with write_problems(part):
            file = open(part, "r+b" if start else "wb", buffering=0)
        with file:
            file.seek(start)
            while piece := answer.read(PIECE):
                start += len(piece)
                if total is not None and start > total:  # an answer without a length may have no end
                    raise UserError(f"`{remote.name}` has more than its {total} bytes", hint=OTHER)
                write_all(file, piece, part)
                progress(start, total or start, remote.name)
            with write_problems(part):
                os.fsync(file.fileno())
    if total is not None and start < total:  # http.client ends a cut answer like a complete one
        raise ConnectionError(f"the connection ended after {start} of {total} bytes")


def open_url(url: str, headers: Mapping[str, str]) -> Any:
    """The answer to a GET. Only HTTPS, wherever it is led on to, but on the loopback."""
    _require_https(url)
    request = urllib.request.Request(url)  # noqa: S310
    for name, value in {"User-Agent": "unetrkit", **headers}.items():
        request.add_header(name, value)
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request: Any, answer: Any, code: int, why: str, headers: Any, url: str) -> Any:
        try:
            _require_https(url, loopback=request.type == "http")
        except UserError:
            answer.close()
            raise
        return super().redirect_request(request, answer, code, why, headers, url)


def get_json(url: str, what: str, headers: Mapping[str, str] | None = None) -> Any:
    """What a server answers in JSON; an empty answer is an empty list."""
    for attempt in range(ATTEMPTS):
        try:
            with open_url(url, headers or {}) as answer:
                content = answer.read(LARGEST_ANSWER)
                if answer.length:  # http.client ends a cut answer like a complete one
                    raise ConnectionError("the answer is cut, or far too long")
            return json.loads(content) if content.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"the answer about {what} is not JSON", hint=f"look at {url}") from error
        except CUT as problem:
            refuse_answer(problem, what)
            if attempt == ATTEMPTS - 1:
                hint = "run the command again when the connection is back"
                raise UserError(f"cannot ask about {what}: {reason(problem)}", hint=hint) from problem
            time.sleep(FIRST_WAIT * 2**attempt)


def get_zip(url: str, path: Path, what: str) -> None:
    """An archive that a server makes while it sends it: without length or hash, from its beginning only."""
    for attempt in range(ATTEMPTS):
        try:
            with write_problems(path):
                file = open(path, "wb", buffering=0)
            with file, open_url(url, {}) as answer:
                while piece := answer.read(PIECE):
                    write_all(file, piece, path)
            if not zipfile.is_zipfile(path):  # its directory is at its end
                raise ConnectionError("the connection ended amid the archive")
            return
        except CUT as problem:
            refuse_answer(problem, what)
            if attempt == ATTEMPTS - 1:
                hint = "run the command again when the connection is back"
                raise UserError(f"cannot download {what}: {reason(problem)}", hint=hint) from problem
            time.sleep(FIRST_WAIT * 2**attempt)


def refuse_answer(problem: BaseException, what: str) -> None:
    """Raises UserError for an answer that another attempt will not change."""
    if not isinstance(problem, urllib.error.HTTPError) or problem.code in (408, 429) or problem.code >= 500:
        return
    hint = "its address has changed, or it was withdrawn: look at its page, `unetrkit fetch` names it"
    if problem.code in (401, 403):
        hint = "it needs a registration: `unetrkit fetch` names its page"
    raise UserError(f"the server refuses {what}: {problem.code} {problem.reason}", hint=hint) from problem


def reason(problem: BaseException) -> str:
    """What went wrong, without the address, which may be a signed one."""
    if isinstance(problem, http.client.InvalidURL):
        return "its address is none"
    inner = getattr(problem, "reason", None)
    return str(inner if inner is not None else problem) or type(problem).__name__


def hash_of(path: Path, digest: str) -> str:
    """The hash of a file, of the kind of `digest`."""
    kind = digest.partition(":")[0]
    with open(path, "rb") as file:
        return f"{kind}:{hashlib.file_digest(file, kind).hexdigest()}"


def write_all(file: IO[bytes], piece: bytes, path: Path) -> None:
    """Writes to a file without a buffer: what a full disk has left in one would fail once more at its end."""
    with write_problems(path):
        left = memoryview(piece)
        while left:
            left = left[file.write(left) :]


def write_json(path: Path, value: object) -> None:
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def _require_https(url: str, *, loopback: bool = True) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (loopback and parts.scheme == "http" and parts.hostname in LOOPBACK):
        message = f"`{parts.scheme}://{parts.hostname}` is not HTTPS"
        raise UserError(message, hint="data are downloaded over HTTPS only")


def check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"`{folder}` has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are still to come"
        raise UserError(message, hint="free some space, or choose another folder; what has arrived is kept")
