"""Synapse, Zenodo, NBIA and a plain file host on the loopback, with the faults that real ones have."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Archives:
    """What is served: `files` by path, `answers` in JSON by path. Faults: `cut` ends so many answers after
    `cut_at` bytes; without `ranges` a file comes from its beginning only; `changed` are headers that replace
    the right ones, None those that are left out; `moved` leads on by path. `asked`: every request."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, Callable[[dict[str, list[str]], bytes], object]] = {}
        self.cut, self.cut_at, self.ranges = 0, 1000, True
        self.refuse: dict[str, int] = {}
        self.changed: dict[str, str | None] = {}
        self.moved: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = ""

    def reply(self, path: str, query: str, body: bytes, wanted: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append((path, wanted))
        if path in self.refuse:
            return self.refuse[path], {}, b""
        if path in self.moved:
            return 302, {"Location": self.moved[path]}, b""
        if path in self.answers:
            content = self.answers[path](parse_qs(query), body)
            return 200, {}, content if isinstance(content, bytes) else json.dumps(content).encode()
        if path not in self.files:
            return 404, {}, b""
        content = self.files[path]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start and start >= len(content):
            return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        return 206 if start else 200, headers, content[start:]


@contextmanager
def serving(archives: Archives) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            code, headers, content = archives.reply(
                parts.path, parts.query, self.rfile.read(length), self.headers.get("Range") or ""
            )
            self.send_response(code)
            changed = archives.changed if parts.path in archives.files else {}
            for name, value in ({"Content-Length": str(len(content))} | headers | changed).items():
                if value is not None:
                    self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if parts.path in archives.files and archives.cut:
                archives.cut -= 1
                content = content[: archives.cut_at]
                self.close_connection = True
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    archives.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tar_of(files: dict[str, bytes], mode: str = "w", links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return out.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()
