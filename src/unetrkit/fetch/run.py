"""A public data set in a folder, with its data list: what is there already is not fetched again."""

from pathlib import Path

from unetrkit.data.files import alone, read_json, write_problems
from unetrkit.errors import UserError
from unetrkit.fetch.arrange import arrange, place
from unetrkit.fetch.catalogue import Published, published
from unetrkit.fetch.download import download, write_json
from unetrkit.fetch.series import convert_series, series_of
from unetrkit.fetch.sources import Hosts, remotes
from unetrkit.fetch.unpack import unpack
from unetrkit.progress import Progress

RECORD = ".fetched.json"  # the files, with their sizes, that came out of each archive; "complete" at the end
HOSTS = Hosts()
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


def fetch(name: str, out: Path, progress: Progress, hosts: Hosts = HOSTS) -> Path:
    """Downloads, verifies, unpacks or converts, and arranges a data set in `out`; gives its data list.

    Stopped or killed at any moment, the same call goes on. Archives are removed once they are unpacked.
    Raises UserError for an unknown name, a registration that is missing (with its address), and everything
    that `download`, `unpack` and `arrange` refuse.
    """
    data = published(name)
    with write_problems(out):
        out.mkdir(parents=True, exist_ok=True)
    with alone(out / ".fetch.lock", f"another process is fetching into `{out}`"):
        if data.source == "nbia":
            found = series_of(data, hosts.nbia, out / "downloads")
            return arrange(data, out, convert_series(found, out, progress))
        if data.source == "by hand":
            _unpack_by_hand(data, out)
        else:
            _fetch_archives(data, out, progress, hosts)
        return arrange(data, out)


def _fetch_archives(data: Published, out: Path, progress: Progress, hosts: Hosts) -> None:
    path = out / RECORD
    record = read_json(path) if path.exists() else {}
    if not isinstance(record, dict) or record.get("name", data.name) != data.name:
        hint = "give every data set a folder of its own"
        raise UserError(f"`{out}` holds another data set", hint=hint)
    done: dict[str, dict[str, int]] = record.get("archives", {})
    whole = {archive for archive, files in done.items() if _all_there(out, files)}
    if record.get("complete") and whole == set(done):
        return
    for remote in remotes(data, hosts):
        if remote.name in whole:
            (out / "downloads" / remote.name).unlink(missing_ok=True)  # of a process killed before it did
            continue
        archive = download(remote, out / "downloads", progress)
        names = unpack(archive, out, lambda inner: place(data, inner))
        done[remote.name] = {name: (out / name).stat().st_size for name in names}
        write_json(path, {"name": data.name, "archives": done})
        archive.unlink()
    write_json(path, {"name": data.name, "archives": done, "complete": True})


def _all_there(out: Path, files: dict[str, int]) -> bool:
    paths = ((out / name, size) for name, size in files.items())
    return bool(files) and all(path.exists() and path.stat().st_size == size for path, size in paths)


def _unpack_by_hand(data: Published, out: Path) -> None:
    """What the user put into `downloads`: archives are unpacked and stay, files are found where they are."""
    downloads = out / "downloads"
    there = sorted(file for file in downloads.rglob("*") if file.is_file())
    if not there:
        raise UserError(f"`{data.name}` cannot be downloaded by a program: see {data.page}", hint=data.first)
    for archive in there:
        if archive.name.lower().endswith(ARCHIVES):
            unpack(archive, out, lambda inner: place(data, inner))
