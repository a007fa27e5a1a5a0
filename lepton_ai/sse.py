"""Server-sent events, read as their bytes come: html.spec.whatwg.org, section 9.2.6."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Message", "Parser"]

_LINE_END = re.compile(rb"\r\n|\n|\r")


class Message(NamedTuple):
    """One message. `data` is empty where it only moves the place to go on from."""

    id: str
    event: str
    data: bytes


class Parser:
    """Bytes in, Messages out. Comments are passed over, as is a message that the stream breaks off in."""

    def __init__(self, last_id: str = "") -> None:
        #: The id of the last whole message.
        self.last_id = last_id
        self._rest = b""
        self._clear(last_id)

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that these bytes complete."""
        data = self._rest + data
        held = b"\r" if data.endswith(b"\r") else b""  # perhaps the first half of a line end
        *lines, rest = _LINE_END.split(data[: len(data) - len(held)])
        self._rest = rest + held
        for line in lines:
            if line:
                self._field(line)
            else:
                moved, self.last_id = self._id != self.last_id, self._id
                if self._data or moved:
                    yield Message(self._id, self._event, b"\n".join(self._data))
                self._clear(self._id)

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value.decode(errors="replace")
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode(errors="replace")

    def _clear(self, last_id: str) -> None:
        self._id, self._event = last_id, ""
        self._data: list[bytes] = []
