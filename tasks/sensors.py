"""Readings that may fail or hang: neither may cost a worker its heartbeat."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

import structlog

__all__ = ["Sensor", "SlowSensor", "opened"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

log = structlog.get_logger()


class _Reading(Protocol[T_co]):
    def read(self) -> T_co: ...


def opened(kind: Callable[[], _Reading[T]]) -> Callable[[], T]:
    """The reading of something that counts from when it is made: now, or by the first reading for which that works."""
    found: list[_Reading[T]] = []

    def read() -> T:
        if not found:
            found.append(kind())
        return found[0].read()

    with suppress(Exception):  # the first reading tells why
        found.append(kind())
    return read


class Sensor(Generic[T]):
    """A quick reading. One that raises is told of once, and left out until it works again."""

    def __init__(self, name: str, reading: Callable[[], T]) -> None:
        self.name = name
        self._reading = reading
        self._works = True

    def read(self) -> T | None:
        """What it reads now; None where it fails."""
        try:
            found = self._reading()
        except Exception as error:  # noqa: BLE001 - vendors' libraries raise what they like
            if self._works:
                log.warning("sensor_failed", sensor=self.name, reason=f"{type(error).__name__}: {error}")
            self._works = False
            return None
        self._works = True
        return found


class SlowSensor(Generic[T]):
    """A reading that may take its time, or for ever: it is read in a thread of its own, asked for by each `read`."""

    def __init__(self, name: str, reading: Callable[[], T], patience_s: float) -> None:
        self._sensor = Sensor(name, reading)
        self._patience_s = patience_s
        self._asked = threading.Event()
        self._asked_at: float | None = None
        """When the reading that is under way was asked for, in monotonic seconds."""
        self._found: T | None = None
        self._hangs = False
        threading.Thread(target=self._serve, name=f"sensor-{name}", daemon=True).start()

    def read(self) -> T | None:
        """The newest reading, and asks for the next; None before the first, and while it fails or does not answer."""
        now = time.monotonic()
        if self._asked_at is None:
            self._hangs = False
            found = self._found
            self._asked_at = now
            self._asked.set()
            return found
        if now - self._asked_at <= self._patience_s:
            return self._found
        if not self._hangs:
            log.warning("sensor_hangs", sensor=self._sensor.name, seconds=round(now - self._asked_at, 1))
        self._hangs = True
        return None

    def _serve(self) -> None:
        while True:
            self._asked.wait()
            self._asked.clear()
            self._found = self._sensor.read()
            self._asked_at = None
