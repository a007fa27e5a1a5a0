"""Drift: notices that launches have begun to take longer, or shorter, than what was learned of them says.

Two detectors look at the same standardised misses. CUSUM (E. S. Page, "Continuous inspection schemes", Biometrika 41,
1954) adds up what goes beyond the noise in one direction and is quick with a change of a standard deviation
and more. ADWIN (A. Bifet and R. Gavalda, "Learning from time-changing data with adaptive windowing", SDM 2007;
`river`'s) compares the parts of a long window, and finds the small and slow ones that CUSUM ignores. Where `river` is
not installed, CUSUM is alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

__all__ = ["Drift", "has_adwin"]

#: A miss counts as so many standard deviations at most: a few outliers are no drift.
_MOST: Final = 3.0
#: What CUSUM allows each miss, and the sum at which it alarms, in standard deviations: half of the change that matters,
#: and a false alarm in half a million launches of normal noise (D. Siegmund, "Sequential Analysis", 1985, eq. 2.56).
_ALLOWED: Final = 0.5
_ALARM: Final = 12.0
#: ADWIN's bound on its false alarms, and the rest as river has it.
_ADWIN: Final = {"delta": 0.002, "clock": 32, "max_buckets": 5, "min_window_length": 5, "grace_period": 10}


def has_adwin() -> bool:
    """Whether both detectors are there; False where river is not installed."""
    return _windows() is not None


@cache
def _windows() -> Any:
    """What river's ADWIN is a thin shell of: the shell takes 0.8 s of CPU and 100 MB to import, this 2 ms.

    A thread that imported the shell held up the first hundreds of jobs of a router (docs/costs.md).
    """
    try:
        from river._river_rust.drift import AdaptiveWindowing
    except ImportError:
        return None
    return AdaptiveWindowing


def _adwin() -> Any:
    windows = _windows()
    return None if windows is None else windows(**_ADWIN)


class Drift:
    """The two detectors of one (kernel, device)."""

    __slots__ = ("_above", "_adwin", "_below")

    def __init__(self) -> None:
        self._above = self._below = 0.0
        self._adwin = _adwin()

    def notices(self, miss: float) -> bool:
        """Folds in one miss, in standard deviations, above 0 where it took longer; True on an alarm."""
        miss = min(_MOST, max(-_MOST, miss))
        self._above = max(0.0, self._above + miss - _ALLOWED)
        self._below = max(0.0, self._below - miss - _ALLOWED)
        is_alarm = self._adwin is not None and self._adwin.update(miss)
        if is_alarm or max(self._above, self._below) > _ALARM:
            self._above = self._below = 0.0
            self._adwin = _adwin()
            return True
        return False
