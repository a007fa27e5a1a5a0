"""Following the event stream: what happened since an entry, as typed Events, from any process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from lepton_ai import event, topology
from lepton_ai.event import Cursor, Event
from queues.connection import Connection

__all__ = ["EventStream"]

_ENTRIES_AT_ONCE = 512


class EventStream:
    """A reader of `lepton:events` over its own connection. `position` is the id of the last entry read."""

    def __init__(self, connection: Connection, position: str | None = None) -> None:
        self.connection = connection
        self.position = position or self._last()
        self.is_behind = False
        """The last answer was as long as one can be, so there may be more already."""
        self._is_asked = False
        self._is_overtaken = False
        """What `ask` brings may have been seen by `catch_up` since."""

    def ask(self, block_ms: int = 0) -> None:
        """Asks for what comes next; `answer` collects it once the connection is readable."""
        if not self._is_asked:
            self.connection.send(
                [("XREAD", "COUNT", _ENTRIES_AT_ONCE, "BLOCK", block_ms, "STREAMS", topology.EVENTS, self.position)]
            )
            self._is_asked = True

    def answer(self, timeout_s: float = 30.0) -> list[tuple[str, Event]]:
        """The Events that `ask` waited for, each with the id of its entry; [] when its time ran out."""
        (reply,) = self.connection.receive(1, timeout_s)
        self._is_asked = False
        self.is_behind = any(len(entries) == _ENTRIES_AT_ONCE for entries in (reply or {}).values())
        after = self.position if self._is_overtaken else None
        self._is_overtaken = False
        return list(self._events(reply, after))

    def catch_up(self, connection: Connection) -> list[tuple[str, Event]]:
        """What has come by now, read over another connection while `ask` may still wait on ours: one round trip."""
        command = ("XREAD", "COUNT", _ENTRIES_AT_ONCE, "STREAMS", topology.EVENTS)
        found: list[tuple[str, Event]] = []
        while reply := connection.call(*command, self.position):
            self._is_overtaken |= self._is_asked
            found += self._events(reply)
            if all(len(entries) < _ENTRIES_AT_ONCE for entries in reply.values()):
                break
        return found

    def read(self, block_ms: int) -> list[tuple[str, Event]]:
        """Waits up to `block_ms` for what comes next."""
        self.ask(block_ms)
        return self.answer(block_ms / 1000 + 30)

    def _events(self, reply: Any, after: str | None = None) -> Iterator[tuple[str, Event]]:
        seen = None if after is None else Cursor.parse(after)
        for entries in (reply or {}).values():
            for entry_id, fields in entries:
                if seen is not None and Cursor.parse(entry_id.decode()) <= seen:
                    continue
                self.position = entry_id.decode()
                try:
                    found = event.decode(fields[1])
                except msgspec.DecodeError:
                    continue  # of another release, or no event at all
                for each in found:
                    yield self.position, each

    def _last(self) -> str:
        newest = self.connection.call("XREVRANGE", topology.EVENTS, "+", "-", "COUNT", 1)
        return newest[0][0].decode() if newest else "0-0"
