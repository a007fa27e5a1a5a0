"""What redis-py asks of those who use it: its errors as ours, and tasks over it that really end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

import redis.asyncio as redis

from lepton_ai.errors import BrokerUnavailable

__all__ = ["broker_errors", "end"]


@contextlib.asynccontextmanager
async def broker_errors() -> AsyncIterator[None]:
    """Errors of redis-py as BrokerUnavailable."""
    try:
        yield
    except redis.RedisError as error:
        raise BrokerUnavailable(f"the broker cannot be reached or refuses: {error}") from error


async def end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks until they have ended: redis-py may swallow a cancellation while it connects or waits."""
    running = ended = set(tasks)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=0.1)
    await asyncio.gather(*ended, return_exceptions=True)
