"""Where the values of Redis' protocol (RESP2 and RESP3) end in a stream of bytes: all that a proxy must know of it."""

from __future__ import annotations

from typing import Any

import hiredis

__all__ = ["Frames", "decode", "is_push"]

_LINE = b"\r\n"


class Frames:
    """Bytes come in as the network cuts them; whole values come out, as they were sent."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The values that are complete now."""
        self._buffer += data
        found: list[bytes] = []
        at = 0
        while at < len(self._buffer) and (end := _end(self._buffer, at)) is not None:
            found.append(bytes(self._buffer[at:end]))
            at = end
        del self._buffer[:at]
        return found


def decode(frame: bytes) -> Any:
    """The value of one frame; an error reply is an exception object."""
    reader = hiredis.Reader()
    reader.feed(frame)
    return reader.gets()


def is_push(frame: bytes) -> bool:
    """Whether a value was not asked for by a command."""
    return frame[:1] == b">"


def _end(data: bytearray, at: int) -> int | None:
    """Where the value that begins at `at` ends; None where it is not all there."""
    values = 1
    while values:
        line = data.find(_LINE, at)
        if line < 0:
            return None
        kind, text, at = data[at : at + 1], data[at + 1 : line], line + len(_LINE)
        values -= 1
        if kind in (b"$", b"=", b"!"):
            size = int(text)
            at += size + len(_LINE) if size >= 0 else 0
            if at > len(data):
                return None
        elif kind in (b"*", b"~", b">"):
            values += max(0, int(text))
        elif kind in (b"%", b"|"):  # an attribute stands before the value that it is of
            values += 2 * int(text) + (kind == b"|")
    return at
