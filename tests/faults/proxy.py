"""A network that can break: a TCP proxy before one server, for one process, which cuts, swallows, slows, and traps.

A trap acts *between two commands*: the proxy hands a connection's commands on one at a time, counts them, and kills (or
freezes) the process when the chosen one has arrived, or when it has been executed and its reply is still withheld. So
every point between two commands of the product is reached without a hook in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tests.faults.resp import Frames, decode, is_push

__all__ = ["Network", "Proxy", "Trap"]

T = TypeVar("T")

_READ_BYTES = 1 << 16
_RESET = struct.pack("ii", 1, 0)
#: These turn a connection into a stream of replies that no command asked for.
_STREAMS = (b"SUBSCRIBE", b"PSUBSCRIBE", b"MONITOR")
#: Neither this nor the command behind it is answered.
_MUTE = [b"CLIENT", b"REPLY", b"SKIP"]


class Trap:
    """Springs once, at the `after`-th command behind (and counting) the first `begins`.

    `begins` is a command's name, or its name and a part of its first argument (`FCALL lepton_commit`). `fruitful`
    passes over those that were answered with nothing, such as a wait in vain. `asked` springs when the command has
    arrived and is never sent on; else it has been executed, and its answer never arrives.
    """

    def __init__(
        self,
        act: Callable[[], None],
        begins: str,
        *,
        connections: str = "",
        after: int = 0,
        asked: bool = False,
        fruitful: bool = False,
        withhold: bool = True,
    ) -> None:
        self.connections = re.compile(connections.encode())
        self.sprung = threading.Event()
        self.at = ""
        """The command that it sprang at."""
        self.withhold = withhold
        """Whether the connection ends there; a frozen process gets its answer when it thaws."""
        self._act = act
        self._begins = begins.upper().encode().split(b" ")
        self._after = after
        self._asked = asked
        self._fruitful = fruitful
        self._seen: int | None = None
        self._owner: object = None

    def arrives(self, connection: object, command: list[bytes]) -> bool:
        """Told of every command; True where it springs here."""
        if self._seen is None and not self._fruitful and self._is_beginning(command):
            self._seen, self._owner = 0, connection
        return self._asked and self._is_due(connection) and self._spring(command)

    def answered(self, connection: object, command: list[bytes], reply: Any) -> bool:
        """Told of every answer; True where it springs here."""
        if self._seen is None and self._fruitful and reply is not None and self._is_beginning(command):
            self._seen, self._owner = 0, connection
        if self._is_due(connection) and not self._asked:
            return self._spring(command)
        if self._seen is not None and connection is self._owner:
            self._seen += 1
        return False

    def _is_beginning(self, command: list[bytes]) -> bool:
        name, *part = self._begins
        return command[0].upper() == name and (not part or part[0].lower() in command[1].lower())

    def _is_due(self, connection: object) -> bool:
        return self._seen == self._after and connection is self._owner and not self.sprung.is_set()

    def _spring(self, command: list[bytes]) -> bool:
        self.at = b" ".join(command[:2] if command[0] == b"FCALL" else command[:1]).decode(errors="replace")
        self._act()
        self.sprung.set()
        return True


class Network:
    """The proxies of one play, on an event loop in a thread of its own. Use it in a `with`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._proxies: list[Proxy] = []

    def __enter__(self) -> Network:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for proxy in self._proxies:
            proxy.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def proxy(self, port: int) -> Proxy:
        """A new way to a port of this machine."""
        proxy = self.run(Proxy.open(self, port))
        self._proxies.append(proxy)
        return proxy

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        """Runs a step on the loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(step, self._loop).result(10)


class Proxy:
    """One way to a server. Its methods are called from any thread but the loop's own."""

    def __init__(self, network: Network, target: int) -> None:
        self.port = 0
        self.trap: Trap | None = None
        """Set it before the process connects: a connection is watched from its beginning or not at all."""
        self.latency_s = 0.0
        self.bytes_per_s = float("inf")
        self.is_cut = False
        self._network = network
        self._target = target
        self._server: asyncio.Server | None = None
        self._connections: dict[_Connection, asyncio.Task[None]] = {}

    @classmethod
    async def open(cls, network: Network, target: int) -> Proxy:
        proxy = cls(network, target)
        proxy._server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
        proxy.port = proxy._server.sockets[0].getsockname()[1]
        return proxy

    @property
    def url(self) -> str:
        """As a broker's address."""
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        """Breaks every connection, and each new one at once, until `mend`."""
        self._network.run(self._break(refuse=True))

    def mend(self) -> None:
        self.is_cut = False

    def reset(self) -> None:
        """Breaks every connection; new ones are welcome."""
        self._network.run(self._break(refuse=False))

    def swallow(self) -> None:
        """From now on nothing comes through the connections that there are, and nothing tells; new ones work."""
        self._network.run(self._swallow())

    def close(self) -> None:
        self._network.run(self._close())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            _abort(writer)
            return
        connection = _Connection(self, reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self._connections[connection] = task
        try:
            await connection.run(self._target)
        except asyncio.CancelledError:
            pass  # we are broken or closed
        finally:
            del self._connections[connection]
            connection.abort()

    async def _break(self, *, refuse: bool) -> None:
        self.is_cut = refuse
        for connection, task in list(self._connections.items()):
            connection.abort()
            task.cancel()

    async def _swallow(self) -> None:
        for connection in self._connections:
            connection.swallows = True

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = list(self._connections.values())
        await self._break(refuse=True)
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connection:
    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.swallows = False
        self._proxy = proxy
        self._reader, self._writer = reader, writer
        self._up: asyncio.StreamWriter | None = None
        self._trap: Trap | None = None
        self._commands: list[list[bytes]] = []
        """Sent on and not yet answered: one, where the connection is watched."""
        self._is_mute = False
        """The next command is not answered, as the client has asked for."""
        self._free = asyncio.Event()
        self._free.set()

    async def run(self, target: int) -> None:
        try:
            answers, self._up = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            return
        pumps = [asyncio.create_task(self._forth()), asyncio.create_task(self._back(answers))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def abort(self) -> None:
        _abort(self._writer)
        if self._up is not None:
            _abort(self._up)

    async def _forth(self) -> None:
        assert self._up is not None
        with contextlib.suppress(OSError):
            frames = Frames()
            first = True
            while data := await self._reader.read(_READ_BYTES):
                if self.swallows:
                    continue
                if first:
                    self._trap, first = self._watched_by(data), False
                for part in frames.feed(data) if self._trap is not None else [data]:
                    if self._trap is not None and not await self._may_pass(part):
                        return
                    await self._slowly(self._up, part)

    async def _back(self, answers: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            frames = Frames()
            while data := await answers.read(_READ_BYTES):
                if self.swallows:
                    continue
                for part in frames.feed(data) if self._trap is not None else [data]:
                    if self._trap is not None and not is_push(part) and not self._answered(part):
                        return
                    await self._slowly(self._writer, part)

    def _watched_by(self, data: bytes) -> Trap | None:
        trap = self._proxy.trap
        return trap if trap is not None and not trap.sprung.is_set() and trap.connections.search(data) else None

    async def _may_pass(self, frame: bytes) -> bool:
        """Waits until the command before it has been answered; False where the trap has sprung."""
        assert self._trap is not None
        await self._free.wait()
        command = decode(frame)
        if command[0].upper() in _STREAMS:
            self._trap = None
            return True
        if self._is_mute or [word.upper() for word in command] == _MUTE:
            self._is_mute = not self._is_mute
            return True
        if self._trap.arrives(self, command) and self._trap.withhold:
            return False
        self._commands.append(command)
        self._free.clear()
        return True

    def _answered(self, frame: bytes) -> bool:
        """Notes an answer; False where the trap has sprung and it is withheld."""
        assert self._trap is not None
        if not self._commands:  # from before it was watched
            return True
        command = self._commands.pop()
        if self._trap.answered(self, command, decode(frame)) and self._trap.withhold:
            return False  # and the next command is not sent on either
        self._free.set()
        return True

    async def _slowly(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if delay_s := self._proxy.latency_s + len(data) / self._proxy.bytes_per_s:
            await asyncio.sleep(delay_s)
        if not self.swallows:
            writer.write(data)
            await writer.drain()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Closes at once, with a reset rather than a good-bye."""
    plain = writer.get_extra_info("socket")
    if plain is not None and plain.fileno() >= 0:
        with contextlib.suppress(OSError):
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
