"""Drift: notices that launches have begun to take longer, or shorter, than what was learned of them says.

Two detectors look at the same standardised misses. CUSUM (E. S. Page, "Continuous inspection schemes", Biometrika 41,
1954) adds up what goes beyond the noise in one direction and is quick with a change of a standard deviation
and more. ADWIN (A. Bifet and R. Gavalda, "Learning from time-changing data with adaptive windowing", SDM 2007;
`river`'s) compares the parts of a long window, and finds the small and slow ones that CUSUM ignores. River's package
takes most of a second to load, so a thread loads it at the first miss; until it is there, and where it is not
installed, CUSUM is alone.
"""

from __future__ import annotations

import threading
from typing import Any, Final

__all__ = ["Drift", "await_detectors"]

#: A miss counts as so many standard deviations at most: a few outliers are no drift.
_MOST: Final = 3.0
#: What CUSUM allows each miss, and the sum at which it alarms, in standard deviations: half of the change that matters,
#: and a false alarm in half a million launches of normal noise (D. Siegmund, "Sequential Analysis", 1985, eq. 2.56).
_ALLOWED: Final = 0.5
_ALARM: Final = 12.0
#: ADWIN's bound on its false alarms.
_DELTA: Final = 0.002


class _Loader:
    """Imports ADWIN once, beside whatever goes on."""

    def __init__(self) -> None:
        self.adwin: Any = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Begins, unless that was done already."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._load, name="load-river", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Returns once it is loaded, or known to be missing."""
        self.begin()
        if self._thread is not None:
            self._thread.join()

    def _load(self) -> None:
        try:
            from river.drift.adwin import ADWIN
        except ImportError:
            return
        self.adwin = ADWIN


_LOADER: Final = _Loader()


def await_detectors() -> bool:
    """Waits until both detectors can be had; False where river is not installed."""
    _LOADER.end()
    return _LOADER.adwin is not None


class Drift:
    """The two detectors of one (kernel, device)."""

    __slots__ = ("_above", "_adwin", "_below")

    def __init__(self) -> None:
        self._above = self._below = 0.0
        self._adwin: Any = None

    def notices(self, miss: float) -> bool:
        """Folds in one miss, in standard deviations, above 0 where it took longer; True on an alarm."""
        miss = min(_MOST, max(-_MOST, miss))
        self._above = max(0.0, self._above + miss - _ALLOWED)
        self._below = max(0.0, self._below - miss - _ALLOWED)
        if self._adwin is None:
            _LOADER.begin()
            if _LOADER.adwin is not None:
                self._adwin = _LOADER.adwin(_DELTA)
        if self._adwin is not None:
            self._adwin.update(miss)
        if max(self._above, self._below) > _ALARM or (self._adwin is not None and self._adwin.drift_detected):
            self._above = self._below = 0.0
            self._adwin = None
            return True
        return False
