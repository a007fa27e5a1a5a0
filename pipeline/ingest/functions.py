"""The server functions that the ingest calls, over redis-py: loaded where the broker does not have them yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis.asyncio as redis

from lepton_ai.durability import Barrier
from queues import functions

__all__ = ["call", "written"]

_AT_ONCE = Barrier()


async def call(
    client: Any,
    name: str,
    keys: Sequence[str] = (),
    arguments: Sequence[Any] = (),
    *,
    read: bool = False,
    barrier: Barrier = _AT_ONCE,
) -> Any:
    """The answer of one function of this release, once what it wrote is behind the barrier; `read` where it writes not.

    Raises redis-py's errors, and BrokerUnavailable where the write is not known to be as durable as it should be.
    """
    _, *rest = functions.call(name, keys, arguments)
    command = ("FCALL_RO" if read else "FCALL", *rest)
    try:
        return await written(client, command, barrier)
    except redis.ResponseError as error:
        if "function not found" not in str(error).lower():
            raise
    try:
        await client.execute_command("FUNCTION", "LOAD", functions.library()[1])
    except redis.ResponseError as error:
        if "already exists" not in str(error):  # somebody else has loaded them at this moment
            raise
    return await written(client, command, barrier)


async def written(client: Any, command: Sequence[Any], barrier: Barrier) -> Any:
    """The answer to a command, once what it wrote is behind the barrier. Raises as `call`."""
    if not barrier.commands():
        return await client.execute_command(*command)
    async with client.pipeline(transaction=False) as pipeline:  # one connection: that is whose writes are waited for
        for each in (command, *barrier.commands()):
            pipeline.execute_command(*each)
        answer, *waited = await pipeline.execute(raise_on_error=False)
    if isinstance(answer, Exception):
        raise answer
    barrier.check(waited)
    return answer
