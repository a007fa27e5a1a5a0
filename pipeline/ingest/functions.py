"""The server functions that the ingest calls, over redis-py: loaded where the broker does not have them yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis.asyncio as redis

from queues.functions import library

__all__ = ["call"]


async def call(
    client: Any, name: str, keys: Sequence[str] = (), arguments: Sequence[Any] = (), *, read: bool = False
) -> Any:
    """The answer of one function of this release; `read` where it writes nothing. Raises redis-py's errors."""
    version, source = library()
    command = ("FCALL_RO" if read else "FCALL", f"lepton_{name}_{version}", len(keys), *keys, *arguments)
    try:
        return await client.execute_command(*command)
    except redis.ResponseError as error:
        if "function not found" not in str(error).lower():
            raise
    try:
        await client.execute_command("FUNCTION", "LOAD", source)
    except redis.ResponseError as error:
        if "already exists" not in str(error):  # somebody else has loaded them at this moment
            raise
    return await client.execute_command(*command)
