from __future__ import annotations

import pytest

from fetch.archive_server import Archives, serving
from unetrkit.fetch import download


@pytest.fixture
def archives(monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.001)
    served = Archives()
    with serving(served):
        yield served
