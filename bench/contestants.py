"""Who computes a kernel in `bench kernels`: its variant on an opened device, or an expression of NumPy or SciPy.

All are timed in turns within one process: in each round every one for a few milliseconds, at least once, and of a round
its median call. Ratios are taken within a round, so that what slows the whole machine slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from lepton_ai.kernel import Run, Work
from tasks.driver import Driver
from tasks.warmup import IdleContext

__all__ = ["Contestant", "OnDevice", "OnHost", "Pace", "Rounds", "digits", "grown_s", "play"]

#: Nobody is called more often in a round.
_MOST_CALLS = 1000
_CONTEXT = IdleContext()


class Pace(msgspec.Struct, frozen=True):
    """How long all may take."""

    rounds: int
    turn_s: float
    """What a contestant is called for in each round, at least once."""
    limit_s: float
    """What all rounds of one contestant at one size may take; whose first call takes longer is called no more."""
    longest_s: float
    """What one call may take by what a smaller size took; of an emulator, `limit_s`. Else it is left out."""


class Contestant(Protocol):
    """What is timed."""

    def once(self) -> float:
        """Computes once; the seconds that count."""


class OnHost:
    """An expression."""

    def __init__(self, expression: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
        self._expression = expression
        self._inputs = inputs

    def once(self) -> float:
        start = time.perf_counter()
        self._expression(**self._inputs)
        return time.perf_counter() - start


class OnDevice:
    """A variant. Only the launch counts; inputs are brought anew for each, as a program may take their memory.

    `transfers_s` has what the ways there and back took, by launch.
    """

    def __init__(self, driver: Driver, run: Run, inputs: Mapping[str, Any]) -> None:
        self._driver = driver
        self._run = run
        self._inputs = inputs
        self.transfers_s: list[float] = []

    def once(self) -> float:
        driver = self._driver
        start = time.perf_counter()
        inputs = {
            name: driver.upload(each) if isinstance(each, np.ndarray) else each for name, each in self._inputs.items()
        }
        driver.synchronize()
        uploaded = time.perf_counter()
        outputs = driver.launch(self._run, inputs, _CONTEXT)
        launched = time.perf_counter()
        for value in outputs.values():
            driver.download(value)
        self.transfers_s.append(time.perf_counter() - launched + uploaded - start)
        return launched - uploaded


class Rounds(msgspec.Struct, frozen=True):
    """What somebody took, the median call of each round in seconds; or the ratios of two."""

    values: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def range(self) -> list[float]:
        """The least and the greatest, rounded."""
        return [digits(min(self.values)), digits(max(self.values))]

    def over(self, other: Rounds) -> Rounds:
        """How many times as long it took as the other, round by round."""
        return Rounds([own / its for own, its in zip(self.values, other.values, strict=False)])


def play(contestants: Mapping[str, Contestant], warm_s: Mapping[str, float], pace: Pace) -> dict[str, Rounds]:
    """So many rounds of all, another one first in each; fewer for who takes long.

    `warm_s` is what a call has taken, which is all there is of who took longer than all rounds may.
    """
    names = list(contestants)
    calls = {name: max(1, min(_MOST_CALLS, round(pace.turn_s / max(warm_s[name], 1e-9)))) for name in names}
    rounds = {name: min(pace.rounds, int(pace.limit_s / max(warm_s[name], 1e-9))) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(pace.rounds if names else 0):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            if number < rounds[name]:
                found[name].append(statistics.median(contestants[name].once() for _ in range(calls[name])))
    return {name: Rounds(each or [warm_s[name]]) for name, each in found.items()}


def grown_s(seconds: float, before: Work, now: Work) -> float:
    """What a call may take at another size by what one took, in proportion to the kernel's own formulas."""
    pairs = ((before.flops, now.flops), (before.bytes, now.bytes))
    return seconds * max([1.0, *(after / earlier for earlier, after in pairs if earlier > 0)])


def digits(value: float) -> float:
    """A measured figure to four digits, which is more than it is good for."""
    return float(f"{value:.4g}")
