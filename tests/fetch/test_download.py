"""Cuts, kills, wrong bytes, refusals: a final name has the published bytes or is not there."""

from __future__ import annotations

import io
import random
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from fetch.archive_server import Archives, md5
from unetrkit.errors import UserError
from unetrkit.fetch import download as module
from unetrkit.fetch.download import Remote, download, get_json, open_url

CONTENT = random.Random(0).randbytes(300_000)


def quiet(done: float, total: int, note: str = "") -> None:
    pass


def remote(archives: Archives, content: bytes = CONTENT, **changes: object) -> Remote:
    archives.files["/scans.tar"] = content
    values = {"name": "scans.tar", "digest": f"md5:{md5(CONTENT)}", "size": len(CONTENT), **changes}
    return Remote(url=lambda: f"{archives.url}/scans.tar", **values)


def test_what_is_cut_is_gone_on_with_from_the_byte_that_arrived(archives, tmp_path):
    archives.cut, archives.cut_at = 7, 40_000
    path = download(remote(archives), tmp_path, quiet)
    assert path.read_bytes() == CONTENT and not list(tmp_path.glob("*.part"))
    assert [wanted for _, wanted in archives.asked] == ["", *(f"bytes={k * 40_000}-" for k in range(1, 8))]


def test_a_server_without_ranges_is_begun_again(archives, tmp_path):
    archives.ranges = False
    (tmp_path / "scans.tar.part").write_bytes(b"x" * 50_000)
    assert download(remote(archives), tmp_path, quiet).read_bytes() == CONTENT


def test_a_part_of_another_version_is_thrown_away_once(archives, tmp_path):
    (tmp_path / "scans.tar.part").write_bytes(b"x" * 50_000)
    assert download(remote(archives), tmp_path, quiet).read_bytes() == CONTENT
    (tmp_path / "scans.tar").unlink()
    (tmp_path / "scans.tar.part").write_bytes(CONTENT)  # complete, but killed before it was renamed
    archives.asked.clear()
    assert download(remote(archives), tmp_path, quiet).read_bytes() == CONTENT and not archives.asked


def test_a_part_that_is_too_long_is_thrown_away(archives, tmp_path):
    (tmp_path / "scans.tar.part").write_bytes(CONTENT + b"more")
    assert download(remote(archives, size=None), tmp_path, quiet).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [b"<html>moved</html>", CONTENT[:-1] + b"?"])
def test_wrong_bytes_are_refused_and_leave_nothing(archives, tmp_path, content):
    with pytest.raises(UserError, match="published with"):
        download(remote(archives, content), tmp_path, quiet)
    assert not (tmp_path / "scans.tar").exists()
    assert len(archives.asked) <= 2


def test_a_complete_file_is_verified_and_not_loaded_again(archives, tmp_path):
    (tmp_path / "scans.tar").write_bytes(CONTENT)
    download(remote(archives), tmp_path, quiet)
    assert not archives.asked
    (tmp_path / "scans.tar").write_bytes(b"?" + CONTENT[1:])
    with pytest.raises(UserError, match="is not the file that was published"):
        download(remote(archives), tmp_path, quiet)


def test_a_part_that_was_not_asked_for_is_thrown_away(archives, tmp_path):
    (tmp_path / "scans.tar.part").write_bytes(CONTENT[:1000])
    one = remote(archives)
    archives.changed = {"Content-Range": f"bytes 2000-{len(CONTENT) - 1}/{len(CONTENT)}"}
    assert download(one, tmp_path, quiet).read_bytes() == CONTENT
    assert [wanted for _, wanted in archives.asked] == ["bytes=1000-", ""]


def test_a_part_of_a_longer_file_is_refused(archives, tmp_path):
    (tmp_path / "scans.tar.part").write_bytes(CONTENT[:1000])
    with pytest.raises(UserError, match="has 300001 bytes, but was published with 300000"):
        download(remote(archives, CONTENT + b"?"), tmp_path, quiet)


def test_more_bytes_than_were_declared_are_not_taken(archives, tmp_path):
    one = remote(archives, CONTENT + b"more")
    archives.changed = {"Content-Length": str(len(CONTENT))}
    assert download(one, tmp_path, quiet).read_bytes() == CONTENT
    archives.changed = {"Content-Length": None}  # until the connection ends
    (tmp_path / "scans.tar").unlink()
    with pytest.raises(UserError, match="has more than its 300000 bytes"):
        download(one, tmp_path, quiet)
    assert not (tmp_path / "scans.tar").exists()


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://localhost/a", "http://example.org/?sig=secret"]
)
def test_a_redirection_from_https_is_refused_without_being_followed(archives, tmp_path, target):
    archives.moved["/scans.tar"] = target
    with pytest.raises(UserError) as caught:
        download(remote(archives), tmp_path, quiet)
    assert "secret" not in caught.value.message and len(archives.asked) == 1


def test_a_redirection_is_followed_where_it_is_safe(archives, tmp_path, monkeypatch):
    archives.moved["/old"] = f"{archives.url}/scans.tar"
    one = remote(archives)
    moved = Remote("scans.tar", lambda: f"{archives.url}/old", one.digest)
    assert download(moved, tmp_path, quiet).read_bytes() == CONTENT
    request = urllib.request.Request("https://example.org/a")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1"):  # from elsewhere into this machine
        module._Redirects().redirect_request(request, io.BytesIO(), 302, "", {}, archives.url)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("../evil", md5(b"")),
        ("/etc/evil", md5(b"")),
        (".hidden", md5(b"")),
        ("a\n", md5(b"")),
        ("a", "crc32:0"),
    ],
)
def test_a_name_or_digest_of_a_server_that_is_none(name, digest):
    with pytest.raises(UserError, match="a server names"):
        Remote(name, str, digest if ":" in digest else f"md5:{digest}")


def test_a_full_disk_is_said_and_what_arrived_is_kept(archives, tmp_path):
    code = f"""
    import resource
    from pathlib import Path
    from unetrkit.errors import UserError
    from unetrkit.fetch import download
    download.FIRST_WAIT = 60
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    one = download.Remote("scans.tar", lambda: "{archives.url}/scans.tar", "md5:{md5(CONTENT)}")
    try:
        download.download(one, Path({str(tmp_path)!r}), lambda *_: None)
    except UserError as error:
        print(error.message, error.hint)
    """
    archives.files["/scans.tar"] = CONTENT
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "File too large free some space" in run.stdout and not run.stderr
    assert (tmp_path / "scans.tar.part").stat().st_size == 100_000
    assert download(remote(archives), tmp_path, quiet).read_bytes() == CONTENT


def test_a_signed_address_that_is_none_is_not_shown(archives, tmp_path):
    signed = Remote("scans.tar", lambda: f"{archives.url}/a file?sig=secret", f"md5:{md5(CONTENT)}")
    with pytest.raises(UserError, match="cannot be downloaded") as caught:
        download(signed, tmp_path, quiet)
    assert "secret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(("code", "word"), [(403, "registration"), (404, "withdrawn")])
def test_a_refusal_is_said_at_once(archives, tmp_path, code, word):
    archives.refuse["/scans.tar"] = code
    with pytest.raises(UserError, match=str(code)) as caught:
        download(remote(archives), tmp_path, quiet)
    assert word in caught.value.hint and len(archives.asked) == 1


def test_a_busy_server_is_asked_again_and_at_last_given_up(archives, tmp_path):
    archives.refuse["/scans.tar"] = 503
    with pytest.raises(UserError, match="cannot be downloaded: Service Unavailable") as caught:
        download(remote(archives), tmp_path, quiet)
    assert "is kept" in caught.value.hint and len(archives.asked) == 6


def test_only_https_and_no_answer_that_is_no_json(archives):
    for url in ("http://example.org/a", "file:///etc/passwd", "ftp://example.org/a"):
        with pytest.raises(UserError, match="is not HTTPS"):
            open_url(url, {})
    archives.files["/list"] = b"<html>"
    with pytest.raises(UserError, match="is not JSON"):
        get_json(f"{archives.url}/list", "the series")
    archives.files["/list"] = b"[" * 100_000
    with pytest.raises(UserError, match="is not JSON"):
        get_json(f"{archives.url}/list", "the series")


def test_a_cut_answer_is_asked_for_again(archives):
    archives.files["/list"] = b'[{"key": 1}, {"key": 2}]'
    archives.cut, archives.cut_at = 2, 12
    assert len(get_json(f"{archives.url}/list", "the series")) == 2


def test_a_killed_process_is_gone_on_with(archives, tmp_path):
    archives.cut, archives.cut_at = 1, 100_000
    code = f"""
    from pathlib import Path
    from unetrkit.fetch import download
    download.FIRST_WAIT = 60
    url, digest = "{archives.url}/scans.tar", "md5:{md5(CONTENT)}"
    one = download.Remote("scans.tar", lambda: url, digest, {len(CONTENT)})
    download.download(one, Path({str(tmp_path)!r}), lambda *_: None)
    """
    archives.files["/scans.tar"] = CONTENT
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    part = tmp_path / "scans.tar.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size == 100_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "scans.tar").exists()
    assert download(remote(archives), tmp_path, quiet).read_bytes() == CONTENT
    assert archives.asked[-1] == ("/scans.tar", "bytes=100000-")


def test_a_signed_address_is_asked_for_at_every_attempt(archives, tmp_path):
    archives.cut, archives.cut_at = 1, 1000
    given: list[int] = []
    one = remote(archives)
    signed = Remote(one.name, lambda: given.append(1) or one.url(), one.digest, one.size)
    download(signed, Path(tmp_path), quiet)
    assert len(given) == 2
