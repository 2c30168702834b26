"""A stream of parts that has to be complete within the client's `timeout`."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from server.errors import RequestTimeout

T = TypeVar("T")


async def within(parts: AsyncGenerator[T], seconds: float | None) -> AsyncGenerator[T]:
    """The same parts. Raises RequestTimeout, with `parts` closed, when they are not at their end in time.

    The time is checked at each part by itself: a generator may be resumed by another task than the one that
    started it, which no timer that is bound to a task survives.
    """
    async with aclosing(parts):
        if seconds is None:
            async for part in parts:
                yield part
            return
        until = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                async with asyncio.timeout_at(until):
                    part = await anext(parts)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise RequestTimeout(
                    "timeout: the answer was not complete in time", param="timeout"
                ) from None
            yield part
