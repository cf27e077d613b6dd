"""What every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from command import CommandLine

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scans beside the checkout; the tests that want them are skipped where there are none."""
    if not SHARED.is_dir():
        pytest.skip("no real scans beside the checkout")
    return SHARED


@pytest.fixture
def unetrkit(monkeypatch, capsys) -> CommandLine:
    """The command line: `unetrkit("check", path)`."""
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 in this process, whom the environment's credentials please."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def elsewhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A URL below which there is nothing; copies of what is there are this test's own."""
    import fsspec

    monkeypatch.setenv("UNETRKIT_CACHE", str(tmp_path / "cache"))
    if request.param == "file":
        yield Path(f"file://{tmp_path}/elsewhere")
        return
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "of-a-test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{os.getpid()}"
    fs = fsspec.filesystem(request.param)
    fs.mkdir(bucket)
    yield Path(f"{request.param}://{bucket}")
    fs.rm(bucket, recursive=True)
