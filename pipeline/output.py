"""What all processes and we ourselves say, on one stream, line by line: nobody ever waits for a slow terminal."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from io import TextIOBase
from typing import IO, Any, TextIO, cast

import msgspec
from rich.console import Console
from rich.text import Text

__all__ = ["Output"]

#: What may wait to be written; beyond it the children's lines are left out, and counted.
_WAITING_BYTES = 4 * 1024 * 1024
_LINE_BYTES = 64 * 1024
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


class Output:
    """Lines of processes, for people with the name of each before them, or for machines as JSON, one object a line.

    `names` are those who will speak. Written by a thread of its own, so a terminal that stands still holds nobody up,
    and one that is gone is forgotten.
    """

    def __init__(self, descriptor: int, names: Sequence[str], *, as_json: bool) -> None:
        self._descriptor = descriptor
        self._as_json = as_json
        self._prefixes = {} if as_json else _prefixes(names, os.isatty(descriptor))
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._left_out = 0
        self._closed = False
        self._readers: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._writer = threading.Thread(target=self._write, name="output", daemon=True)
        self._writer.start()

    def of(self, name: str) -> IO[bytes]:
        """Somewhere for a child to write to; what it writes appears here. Close it once the child has it."""
        reading, writing = os.pipe()
        stream = os.fdopen(reading, "rb")
        reader = threading.Thread(target=self._read, args=(stream, name), name=f"output-{name}", daemon=True)
        self._readers = [*(each for each in self._readers if each.is_alive()), reader]
        reader.start()
        return os.fdopen(writing, "wb")

    def ours(self, name: str | None = None) -> TextIO:
        """Somewhere for us to write lines to; they are never left out."""
        prefix = b"" if name is None else self._prefixes.get(name, b"")
        stream = _Ours(lambda line: self._put(prefix + line, ours=True), os.isatty(self._descriptor))
        return cast(TextIO, stream)

    def close(self, patience_s: float) -> None:
        """Returns once everything has been written, or at the latest after so long."""
        deadline = time.monotonic() + patience_s
        for reader in self._readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writer.join(max(0.0, deadline - time.monotonic()))

    def _read(self, stream: IO[bytes], name: str) -> None:
        with stream:
            while raw := stream.readline(_LINE_BYTES):
                if line := raw.rstrip():
                    self._put(self._dressed(line, name), ours=False)

    def _dressed(self, line: bytes, name: str) -> bytes:
        if not self._as_json:
            return self._prefixes.get(name, b"") + line + b"\n"
        entry: dict[str, Any]
        try:
            entry = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            entry = {
                "event": line.decode("utf-8", "replace"),
                "service": name,
                "level": "info",
                "timestamp": datetime.now(UTC).isoformat(),
            }
        entry["process"] = name  # a service may run as several
        return msgspec.json.encode(entry) + b"\n"

    def _put(self, line: bytes, *, ours: bool) -> None:
        with self._changed:
            if not ours and self._bytes + len(line) > _WAITING_BYTES:
                self._left_out += 1
                return
            self._lines.append(line)
            self._bytes += len(line)
            self._changed.notify_all()

    def _write(self) -> None:
        while (lines := self._take()) is not None:
            try:
                while lines:
                    lines = lines[os.write(self._descriptor, lines) :]
            except BlockingIOError:  # somebody else has made the stream so
                time.sleep(0.01)
            except OSError:  # it is gone: the terminal closed, or `| head` has seen enough
                self._descriptor = os.open(os.devnull, os.O_WRONLY)

    def _take(self) -> bytes | None:
        """Everything that waits, as one piece; None once closed and empty."""
        with self._changed:
            while not self._lines:
                if self._closed:
                    return None
                self._changed.wait()
            lines = list(self._lines)
            self._lines.clear()
            self._bytes = 0
            if self._left_out:
                lines.append(self._confession(self._left_out))
                self._left_out = 0
        return b"".join(lines)

    def _confession(self, count: int) -> bytes:
        if self._as_json:
            entry = {"event": "lines_left_out", "count": count, "service": "up", "level": "warning"}
            return msgspec.json.encode({**entry, "timestamp": datetime.now(UTC).isoformat()}) + b"\n"
        return f"{count} lines were left out here: the terminal was slower than they came\n".encode()


class _Ours(TextIOBase):
    """A text stream that hands on whole lines, from any thread."""

    def __init__(self, put: Callable[[bytes], None], is_terminal: bool) -> None:
        self._put = put
        self._is_terminal = is_terminal
        self._begun = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self._put(line.encode("utf-8", "replace") + b"\n")
        return len(text)

    def isatty(self) -> bool:
        return self._is_terminal

    def writable(self) -> bool:
        return True


def _prefixes(names: Sequence[str], is_terminal: bool) -> dict[str, bytes]:
    width = max(map(len, names), default=0)
    console = Console(force_terminal=is_terminal, width=width + 8, legacy_windows=False)
    found = {}
    for index, name in enumerate(names):
        with console.capture() as captured:
            console.print(Text(f"{name:<{width}} | ", style=_COLOURS[index % len(_COLOURS)]), end="", no_wrap=True)
        found[name] = captured.get().encode()
    return found
