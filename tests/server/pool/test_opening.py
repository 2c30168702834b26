"""How many tokens a request may have."""

import pytest

from server.pool.opening import served_context


@pytest.mark.parametrize(
    ("wanted", "own", "default", "served"),
    [
        (None, None, 4096, 4096),
        (None, 512, 4096, 512),
        (None, 8192, 4096, 4096),
        (1024, 8192, 4096, 1024),
        (8192, 8192, 4096, 8192),
        (8192, 1024, 4096, 1024),
        (8192, None, 4096, 8192),
    ],
)
def test_never_more_than_the_models_own(
    wanted: int | None, own: int | None, default: int, served: int
) -> None:
    assert served_context(wanted, own, default) == served
