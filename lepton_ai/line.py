"""The short way to the broker: a command and its answer over one of redis-py's own connections, and nothing around it.

redis-py makes, authenticates, checks and mends the connections. What it does around each command (the pool, a poll of
the socket, retries, metrics) is left out while all is well, and done as ever where something is not.
"""

from __future__ import annotations

import os
from typing import Any

import redis

__all__ = ["Line"]


class Line:
    """Asks one thing at a time, each thread over a connection of its own. Raises what redis-py raises."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._idle: list[Any] = []
        """Connections that nobody asks over now. They stay the pool's, which closes them with all others."""
        self._process = os.getpid()

    def ask(self, *command: Any) -> Any:
        """The answer to a command, as it came."""
        if self._process != os.getpid():  # a child must not talk over its parent's
            self._idle, self._process = [], os.getpid()
        pool = self._client.connection_pool
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = pool.get_connection()
        try:
            if connection.is_connected:
                connection.send_command(*command)
                return connection.read_response()
        except (redis.ConnectionError, redis.TimeoutError):
            pass  # it is closed now
        finally:
            if connection.is_connected:
                self._idle.append(connection)
            else:
                pool.release(connection)
        return self._client.execute_command(*command)  # type: ignore[no-untyped-call]
