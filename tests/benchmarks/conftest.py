from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_server import FakeServer, run_fake


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with run_fake() as server:
        yield server
