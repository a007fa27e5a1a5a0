"""What redis-py asks of those who use it: its errors as ours, and tasks over it that really end."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterable

import redis.asyncio as redis

from lepton_ai.errors import BrokerUnavailable

__all__ = ["broker_errors", "end"]

_QUOTED = re.compile(r"Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)


@contextlib.asynccontextmanager
async def broker_errors() -> AsyncIterator[None]:
    """Errors of redis-py as BrokerUnavailable."""
    try:
        yield
    except redis.RedisError as error:
        # redis-py quotes the command, which holds a caller's arguments.
        reason = _QUOTED.sub("", str(error))
        raise BrokerUnavailable(f"the broker cannot be reached or refuses: {reason}") from error


async def end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks until they have ended: redis-py may swallow a cancellation while it connects or waits."""
    running = ended = set(tasks)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=0.1)
    await asyncio.gather(*ended, return_exceptions=True)
