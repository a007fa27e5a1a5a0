"""The short way to the broker: commands and their answers over redis-py's own connections, and nothing around them.

redis-py makes, authenticates, checks and mends the connections. What it does around each command (the pool, a poll of
the socket, retries, metrics) is left out while all is well, and done as ever where something is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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

        def short(connection: Any) -> Any:
            connection.send_command(*command)
            return connection.read_response()

        return self._over(short, lambda: self._client.execute_command(*command))  # type: ignore[no-untyped-call]

    def transact(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers to commands that happen all or none."""

        def short(connection: Any) -> list[Any]:
            together = [("MULTI",), *commands, ("EXEC",)]
            connection.send_packed_command(connection.pack_commands(together))
            answers = [_answer(connection) for _ in together]
            found: list[Any] = answers[-1] if isinstance(answers[-1], list) else []
            for each in (*answers, *found):
                if isinstance(each, redis.ResponseError):
                    raise each
            return found

        def long() -> list[Any]:
            with self._client.pipeline(transaction=True) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
                return pipeline.execute()

        found: list[Any] = self._over(short, long)
        return found

    def _over(self, short: Callable[[Any], Any], long: Callable[[], Any]) -> Any:
        """What the short way brings over an idle connection; the long one where that is broken."""
        if self._process != os.getpid():  # a child must not talk over its parent's
            self._idle, self._process = [], os.getpid()
        pool = self._client.connection_pool
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = pool.get_connection()
        try:
            if connection.is_connected:
                return short(connection)
        except (redis.ConnectionError, redis.TimeoutError):
            pass  # it is closed now
        finally:
            if connection.is_connected:
                self._idle.append(connection)
            else:
                pool.release(connection)
        return long()


def _answer(connection: Any) -> Any:
    """The next answer; an error where it is one, for those behind it have to be read too."""
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error
