"""A check of schemathesis' run: 503 is no mistake of the server's where it says when to come back."""

from typing import Any

import schemathesis


@schemathesis.check  # type: ignore[untyped-decorator]
def unavailable_says_when(context: Any, response: Any, case: Any) -> None:
    if response.status_code in (429, 503):
        assert response.headers.get("retry-after"), "no Retry-After"
