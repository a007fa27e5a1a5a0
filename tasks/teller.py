"""Telling others what the slots do, from a thread of its own: nothing of it may hold a job up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import structlog

from lepton_ai.errors import LeptonError
from lepton_ai.event import Event, encode
from lepton_ai.settings import Settings
from queues.broker import event_command
from queues.celery_events import EventMessage
from queues.connection import Command, Connection

__all__ = ["Teller"]

#: What waits to be told, at most; the oldest goes first. Nobody's job depends on it.
_WAITING: Final = 20_000
_RETRY_S: Final = 1.0
_STOP_S: Final = 2.0

log = structlog.get_logger()


class Teller:
    """Tells of progress in the event stream and, to Celery's listeners, of jobs, in the order in which it is asked."""

    def __init__(self, settings: Settings, url: str, incarnation: str, hostname: str) -> None:
        self._settings = settings
        self._url = url
        self._incarnation = incarnation
        self._message = EventMessage(url, hostname)
        self._waiting: deque[Mapping[str, Any] | Event] = deque(maxlen=_WAITING)
        self._more = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="teller", daemon=True)
        self._thread.start()

    def tell(self, events: Sequence[Mapping[str, Any] | Event]) -> None:
        """Celery's task events as they are, and Events of our own. Returns at once; any thread may call it."""
        if events:
            self._waiting.extend(events)
            self._more.set()

    def close(self) -> None:
        """Tells what still waits, if the broker lets it."""
        self._stopping = True
        self._more.set()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        connection: Connection | None = None
        while not self._stopping or self._waiting:
            self._more.wait()
            self._more.clear()
            try:
                if connection is None:
                    connection = Connection(self._url, f"{self._incarnation}-teller")
                while commands := self._commands():
                    connection.many(commands)
            except LeptonError as error:
                log.warning("events_not_told", reason=error.message)
                if connection is not None:
                    connection.close()
                    connection = None
                if self._stopping:
                    return
                threading.Event().wait(_RETRY_S)
            except Exception:  # a defect of ours must not silence the worker for good
                log.exception("teller_failed")
        if connection is not None:
            connection.close()

    def _commands(self) -> list[Command]:
        """What waits, as commands: Celery's events in one list, each of ours as an entry."""
        found = []
        while self._waiting:
            found.append(self._waiting.popleft())
        celerys = [each for each in found if not isinstance(each, Event)]
        ours = [encode(each) for each in found if isinstance(each, Event)]
        commands: list[Command] = [event_command(each, self._settings.events_kept) for each in ours]
        return [*commands, self._message.tasks(celerys)] if celerys else commands
