"""One plain connection to the broker: a socket, hiredis, packed commands. What the hot path uses.

redis-py costs 60 to 100 us a command over this; services that are not hot use redis-py.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from lepton_ai.errors import BrokerUnavailable, InvalidSettings, LeptonError

__all__ = ["CommandError", "Connection"]

Command = Sequence[str | bytes | int | float]
_READ_BYTES = 1 << 18
_CONNECT_S = 5.0
_ANSWER_S = 30.0


class CommandError(LeptonError):
    """The broker answered a command with an error; the connection is fine."""

    code = "broker_command"


class Connection:
    """A connection for one thread. Every method raises BrokerUnavailable when it breaks; make a new one then."""

    def __init__(self, url: str, name: str) -> None:
        self.pushes: list[Any] = []
        """RESP3 push messages that have arrived between replies."""
        self._reader = hiredis.Reader(replyError=_reply_error, notEnoughData=_NOTHING)
        self._socket, hello, database = _open(url)
        try:
            self.call(*hello, "SETNAME", name)
            if database:
                self.call("SELECT", database)
            self.call("PING")  # a broker that still loads what it had answers HELLO, and nothing else
        except CommandError as error:
            self.close()
            raise BrokerUnavailable(f"the broker refuses us: {error}") from error
        except BrokerUnavailable:
            self.close()
            raise

    def call(self, *command: str | bytes | int | float) -> Any:
        """One command and its reply; CommandError where the broker refuses it."""
        return self.many([command])[0]

    def many(self, commands: Iterable[Command]) -> list[Any]:
        """Commands in one write, and their replies; CommandError for the first that the broker refused."""
        replies = self.receive(self.send(commands))
        for reply in replies:
            if isinstance(reply, CommandError):
                raise reply
        return replies

    def send(self, commands: Iterable[Command]) -> int:
        """Writes commands without waiting; returns how many replies will come."""
        packed: list[bytes] = []
        last: Command | None = None
        for command in commands:
            # One that is repeated, as in `[move] * 256`, is packed once.
            packed.append(packed[-1] if command is last else hiredis.pack_command(tuple(command)))
            last = command
        try:
            self._socket.sendall(b"".join(packed))
        except OSError as error:
            raise BrokerUnavailable(f"the connection to the broker broke: {error}") from error
        return len(packed)

    def receive(self, count: int, timeout_s: float = _ANSWER_S) -> list[Any]:
        """The next replies, errors among them as CommandError values. Pushes go to `pushes`."""
        replies: list[Any] = []
        while len(replies) < count:
            for reply in self._arrived():
                if isinstance(reply, hiredis.PushNotification):
                    self.pushes.append(reply)
                else:
                    replies.append(reply)
                    if len(replies) == count:
                        return replies
            self._fill(timeout_s)
        return replies

    def drain_pushes(self) -> list[Any]:
        """Reads whatever has arrived without waiting (call it when the socket is readable) and hands out the pushes."""
        self._socket.setblocking(False)
        try:
            while data := self._socket.recv(_READ_BYTES):
                self._reader.feed(data)
            raise BrokerUnavailable("the broker closed the connection")
        except (BlockingIOError, ssl.SSLWantReadError):
            pass  # everything that was there has been read
        except OSError as error:
            raise BrokerUnavailable(f"the connection to the broker broke: {error}") from error
        finally:
            self._socket.setblocking(True)
        self.pushes.extend(self._arrived())
        pushes, self.pushes = self.pushes, []
        return pushes

    @property
    def has_more(self) -> bool:
        """Whether something has been read and not handed out yet: no select tells of that."""
        return bool(self.pushes) or self._reader.has_data()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def _arrived(self) -> Iterator[Any]:
        """What has been read and not handed out."""
        try:
            yield from iter(self._reader.gets, _NOTHING)
        except hiredis.HiredisError as error:
            raise BrokerUnavailable(f"what answers there is no broker: {error}") from error

    def _fill(self, timeout_s: float) -> None:
        try:
            self._socket.settimeout(timeout_s)
            data = self._socket.recv(_READ_BYTES)
        except OSError as error:
            raise BrokerUnavailable(f"the broker did not answer: {error}") from error
        if not data:
            raise BrokerUnavailable("the broker closed the connection")
        self._reader.feed(data)


_NOTHING: Any = object()


def _reply_error(text: str) -> CommandError:
    return CommandError(text)


def _open(url: str) -> tuple[socket.socket, list[str], int]:
    try:
        parts = urlsplit(url)
        port, query = parts.port or 6379, parse_qs(parts.query)
        database = int(query.get("db", ["0"])[0] if parts.scheme == "unix" else parts.path.strip("/") or 0)
    except ValueError as error:  # what stands before the @ is a secret
        raise InvalidSettings(f"{url.rpartition('@')[2]!r} is not a broker's address: {error}", "redis_url") from None
    user, password = unquote(parts.username or "default"), unquote(parts.password or "")
    hello = ["HELLO", "3", *(("AUTH", user, password) if password else ())]
    try:
        if parts.scheme == "unix":
            return _unix(unquote(parts.path)), hello, database
        if parts.scheme not in ("redis", "rediss"):
            raise InvalidSettings(f"a broker's address is redis://, rediss:// or unix://, not {url!r}", "redis_url")
        host = parts.hostname or "127.0.0.1"
        plain = socket.create_connection((host, port), _CONNECT_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if parts.scheme == "rediss":
            plain = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        return plain, hello, database
    except OSError as error:
        where = parts.path if parts.scheme == "unix" else f"{parts.hostname}:{port}"
        raise BrokerUnavailable(f"no broker at {where}: {error}") from error


def _unix(path: str) -> socket.socket:
    plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        plain.settimeout(_CONNECT_S)
        plain.connect(path)
    except OSError:
        plain.close()
        raise
    return plain
