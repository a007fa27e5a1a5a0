"""How long what a dead process held could not be claimed by anybody: seen from outside, by looking at its lists."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable

from lepton_ai import topology
from lepton_ai.errors import BrokerUnavailable
from queues.broker import LISTS_EACH
from queues.connection import Connection

__all__ = ["Recovery", "lists_of"]

_LOOK_EVERY_S = 0.02


class Recovery:
    """Watches over a connection of its own, in a thread of its own. Use it in a `with`."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self.spans_s: list[float] = []
        """From each death until nothing was left in the dead one's lists; who held nothing is not among them."""
        self._connect = connect
        self._watched: dict[str, tuple[float, bool]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recovery", daemon=True)

    def __enter__(self) -> Recovery:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def died(self, incarnation: str, at: float | None = None) -> None:
        """A process of this incarnation has died: now, or at that monotonic time."""
        self._watched[incarnation] = (time.monotonic() if at is None else at, False)

    @property
    def watching(self) -> int:
        """How many of the dead have not been seen to lose what they held; among them who held nothing."""
        return len(self._watched)

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_EVERY_S):
            with contextlib.suppress(BrokerUnavailable), contextlib.closing(self._connect()) as connection:
                while not self._stopping.wait(_LOOK_EVERY_S):
                    self._look(connection)

    def _look(self, connection: Connection) -> None:
        for incarnation, (since, held) in list(self._watched.items()):
            if sum(connection.many([("LLEN", each) for each in lists_of(incarnation)])):
                self._watched[incarnation] = (since, True)
            elif held:
                del self._watched[incarnation]
                self.spans_s.append(time.monotonic() - since)


def lists_of(incarnation: str) -> Iterable[str]:
    """Every list that an incarnation may hold messages in."""
    kind = topology.claim if incarnation.startswith("router-") else topology.held
    return (kind(incarnation, number) for number in range(LISTS_EACH))
