"""Files on an object store, whole or not at all, by way of fsspec: a URL may stand for a folder of ours."""

import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import PlainSerializer

from unetrkit.data.files import read_problems, write_problems
from unetrkit.errors import MissingExtra, UserError

URL = re.compile(r"(?s)([A-Za-z][A-Za-z0-9+.-]+):(?:/(.*))?")  # not C:/; of `s3://` Path keeps `s3:`
WAITS = (1.0, 5.0)  # seconds before the second try and before the third, which is the last
# where an upload that is cut off leaves the object of before; elsewhere a rename does that
WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}
TOKENS = ("ETag", "etag", "md5Hash", "mtime", "created", "last_modified", "LastModified")
Found = TypeVar("Found")


def url_of(path: Path) -> str | None:
    """The URL that a user wrote, of which `Path` keeps one slash; None for a local path.

    Raises UserError for one with a password or a key in it, which would be written to config.yaml, and for
    one that names nothing or leaves its folder.

    >>> url_of(Path("s3://bucket/store")), url_of(Path("file:///data/store")), url_of(Path("data/store"))
    ('s3://bucket/store', 'file:///data/store', None)
    """
    found = URL.fullmatch(path.as_posix())
    if not found:
        return None
    protocol, rest = found[1].lower(), found[2] or ""
    secret = "[^/]*@" if protocol in ("http", "https") else "[^/]*:[^/]*@"  # sftp and abfs have names there
    if re.match(f"(?s){secret}|.*[?&]", rest):
        raise UserError(
            f"the `{protocol}://` URL holds a password or a key",
            hint="leave it out: credentials come from the environment, as for the store's own tools",
        )
    if not rest or ".." in rest.split("/"):
        raise UserError(f"`{protocol}://{rest}` is no place", hint="write `s3://bucket/folder`, without `..`")
    return f"{protocol}://{'/' * (protocol in ('file', 'local'))}{rest}"


def spelt(path: Path) -> str:
    """A local path or a URL, as a user writes it."""
    return url_of(path) or str(path)


def placed(path: Path) -> Path:
    """The same from any folder; a URL is that already. Raises UserError for what no path can be."""
    if url_of(path):
        return path
    try:
        with read_problems(path), suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
        return path.resolve()
    except ValueError as error:
        raise UserError(f"`{path}` is no path: {error}", hint="write another path") from error


# of settings: a local path, or a URL
Place = Annotated[Path, PlainSerializer(spelt, return_type=str, when_used="json")]


def listing(url: str) -> dict[str, str]:
    """Every file below a URL, and what tells that it has changed; the name of a file itself is empty."""

    def work(fs: Any, root: str) -> dict[str, str]:
        found = {path[len(root) :].strip("/"): about for path, about in fs.find(root, detail=True).items()}
        return {name: _token(about) for name, about in found.items() if ".." not in PurePosixPath(name).parts}

    return _attempt("list", url, work)


def get(url: str, name: str, to: Path) -> None:
    """Brings one file here, whole or not at all, however many processes do so at once."""
    temporary = to.with_name(f".{to.name[:80]}.{secrets.token_hex(6)}.tmp")
    with write_problems(to):
        to.parent.mkdir(parents=True, exist_ok=True)
    try:
        _attempt("read", f"{url}/{name}".rstrip("/"), lambda fs, path: fs.get_file(path, str(temporary)))
        with write_problems(to):
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)


def put(file: Path, url: str, name: str) -> str:
    """Brings one file there, whole or not at all; gives what will tell that it has changed."""

    def work(fs: Any, path: str) -> str:
        if url.partition(":")[0] in WHOLE:
            fs.put_file(str(file), path)
        else:
            folder, _, base = path.rpartition("/")
            fs.makedirs(folder, exist_ok=True)
            fs.put_file(str(file), f"{folder}/.{base}.part")
            fs.mv(f"{folder}/.{base}.part", path)
        return _token(fs.find(path, detail=True)[path])  # not `info`, which may tell the same in other words

    return _attempt("write", f"{url}/{name}", work)


def _token(about: dict[str, Any]) -> str:
    """What tells that an object has changed: best is a hash of its content."""
    changes = next((about[name] for name in TOKENS if about.get(name)), "")
    return f"{about['size']} {changes}".replace('"', "")


def _attempt(verb: str, url: str, work: Callable[[Any, str], Found]) -> Found:
    """What `work` makes of a file system and the path in it, in three tries.

    Each file system raises errors of its own; all become a UserError.
    """
    import fsspec.core

    # what another thread has listed may be of before; other file systems keep none, and sftp takes no option
    options = {"use_listings_cache": False} if url.partition(":")[0] in WHOLE else {}
    for wait in (*WAITS, None):
        try:
            fs, path = fsspec.core.url_to_fs(url, **options)  # it keeps connections, of each process its own
            return work(fs, path)
        except ImportError as error:
            if "s3fs" in str(error):
                raise MissingExtra(f"`{url}`", "remote") from error
            raise UserError(f"cannot {verb} `{url}`: a package is missing", hint=str(error)) from error
        except Exception as error:
            denied = isinstance(error, PermissionError) or "redential" in f"{type(error)}{error}"
            if wait is None or denied or isinstance(error, ValueError):
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
                hint = "check the address, the network, and that there is space"
                if denied:
                    hint = "give credentials as for the store's own tools: by the environment or a profile"
                raise UserError(f"cannot {verb} `{url}`: {why}", hint=hint) from error
        time.sleep(wait)
    raise AssertionError
