"""One application for all tests of a module that only ask it questions."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.server.api.support import serving


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(tmp_path) as client:
        yield client
