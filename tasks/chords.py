"""Counting the parts of Celery's chords once they are committed, from a thread of its own.

A commit leaves a part in `lepton:chord.parts`; whoever finds it counts it and takes it away. To count one twice is
safe. The worker that committed it is the first to know; what is left, by whom ever, is looked for now and then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from lepton_ai import topology
from lepton_ai.errors import BrokerUnavailable, LeptonError
from queues.broker import Broker
from queues.connection import CommandError, Connection

__all__ = ["ChordParts"]

#: How often parts are looked for that others have left; one is taken for left when it is seen twice.
_LOOK_S: Final = 5.0
#: How soon a part is tried again that another worker is just about to finish.
_AGAIN_S: Final = 0.2
_STOP_S: Final = 5.0

log = structlog.get_logger()


class ChordParts:
    """`finish` counts a part; False where it has to be called again."""

    def __init__(self, connect: Callable[[str], Broker], finish: Callable[[bytes], bool]) -> None:
        self._connect = connect
        self._finish = finish
        self._lock = threading.Lock()
        self._fresh: set[str] = set()
        self._seen: set[str] = set()
        self._more = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="chord-parts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def committed(self, jobs: Iterable[str]) -> None:
        """Parts of these jobs have been committed."""
        with self._lock:
            self._fresh.update(jobs)
        self._more.set()

    def close(self) -> None:
        """Counts what is known, if the broker lets it; the rest is another's to find."""
        self._stopping = True
        self._more.set()
        self._thread.join(_STOP_S)

    def _run(self) -> None:
        connection: Connection | None = None
        wait_s = _LOOK_S
        look_at = time.monotonic() + _LOOK_S
        while not self._stopping or self._fresh:
            self._more.wait(wait_s)
            self._more.clear()
            try:
                connection = connection or self._connect("chords").connection
                if time.monotonic() >= look_at:  # however much there is to do: what others have left waits for it
                    self._look(connection)
                    look_at = time.monotonic() + _LOOK_S
                wait_s = _AGAIN_S if self._count(connection) else _LOOK_S
            except LeptonError as error:
                log.warning("chord_parts_wait", reason=error.message)
                if connection is not None:
                    connection.close()
                    connection = None
                wait_s = _LOOK_S
            except Exception:  # a defect of ours must not end it: chords would wait for ever
                log.exception("chord_parts_failed")
                wait_s = _LOOK_S
            if self._stopping and wait_s == _LOOK_S:
                break
        if connection is not None:
            connection.close()

    def _look(self, connection: Connection) -> None:
        """Whoever was here the last time already has been left."""
        here = {job.decode(errors="replace") for job in connection.call("HKEYS", topology.CHORD_PARTS)}
        with self._lock:
            self._fresh |= here & self._seen
        self._seen = here

    def _count(self, connection: Connection) -> bool:
        """Counts the parts that are known; True where some must be tried again.

        One that fails otherwise than for want of the broker keeps none of the others: it is left to be found again.
        """
        with self._lock:
            jobs, self._fresh = sorted(self._fresh), set()
        for at, job in enumerate(jobs):
            try:
                part = connection.call("HGET", topology.CHORD_PARTS, job)
                if part is None or self._finish(part):
                    connection.call("HDEL", topology.CHORD_PARTS, job)
                else:
                    self._put_back([job])
            except BrokerUnavailable:
                self._put_back(jobs[at:])
                raise
            except CommandError as error:  # the broker is full, for one
                log.warning("chord_part_waits", job=job, reason=error.message)
            except Exception:
                log.exception("chord_part_failed", job=job)
        return bool(self._fresh)

    def _put_back(self, jobs: Iterable[str]) -> None:
        with self._lock:
            self._fresh.update(jobs)
