"""How long to go on trying while the other side is away."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

from lepton_ai.errors import Overloaded, QuotaExceeded, Unavailable

__all__ = ["REFUSALS", "Clock", "Patience", "Pause"]

#: The other side is there, has taken nothing, and says when to come again.
REFUSALS: Final = (Overloaded, QuotaExceeded)

_AWAY_S: Final = 30.0
_FIRST_PAUSE_S: Final = 0.05
_LAST_PAUSE_S: Final = 2.0
#: No longer than this, however long it says: others may have made room long before.
_LONGEST_RETRY_AFTER_S: Final = 5.0

Clock = Callable[[], float]


class Pause(NamedTuple):
    """To wait before going on."""

    seconds: float


class Patience:
    """Patience with a side that has been there: 30 s for each absence. With one that never was there is none."""

    def __init__(self, clock: Clock = time.monotonic, *, was_there: bool = False) -> None:
        self._clock = clock
        self._was_there = was_there
        self._since: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def renew(self) -> None:
        """It is there."""
        self._was_there, self._since = True, None

    def spend(self, error: Unavailable, deadline: float | None = None) -> Pause:
        """The pause before the next try; the error itself is raised where that is too late."""
        now = self._clock()
        if self._since is None:
            self._since, self._pause_s = now, _FIRST_PAUSE_S
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LAST_PAUSE_S)
        if isinstance(error, REFUSALS):
            pause_s = max(pause_s, min(error.retry_after_s, _LONGEST_RETRY_AFTER_S))
        too_late = now - self._since >= _AWAY_S or (deadline is not None and now + pause_s > deadline)
        if too_late or not self._was_there:
            raise error
        return Pause(pause_s)
