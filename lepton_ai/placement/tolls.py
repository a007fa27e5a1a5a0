"""What a second of each device costs the jobs after it, learned from what a router places: for `externality`.

A device is taken for a queue that jobs reach at random. While W seconds wait there, one more second of work delays,
until the queue is next empty, about `rate / (1 - busy) * W` jobs: the first step of policy iteration from a random
split (Krishnan, "Joining the right queue: a state-dependent decision rule", IEEE Trans. Automatic Control 35, 1990; for
known sizes Hyytiä, Penttinen and Aalto, "Size- and state-aware dispatching problem with queue-specific job sizes",
European J. Operational Research 217, 2012). That factor is the pressure. Its mean product with W is the toll, as of a
crowded road, and plays the part of a dual price of the linear program: a device that few jobs are good at stays dear to
the others while it happens to be idle.

Why, and what was measured: docs/decisions/0022-tolls.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Problem

__all__ = ["Tolls"]

#: The running means remember so many typical jobs' times.
_HORIZON: Final = 200.0
#: They begin as if this part of that had been idle: the first jobs are no measure. (As if all had been, tolls came too
#: late, and at 0.95 of what a fleet can carry the backlog of the start stayed for tens of thousands of jobs.)
_IDLE: Final = 0.05
#: No device is taken to be busier: what is left of 1 divides.
_BUSIEST: Final = 0.97
#: A job counts as so many typical ones at most: anybody may declare one that would take for ever.
_OUTLIER: Final = 10_000.0
#: Weight of the newest job in the typical one's time.
_NEWEST: Final = 0.005


class Tolls:
    """Learned by one router, of the devices in their order. Its clock is the caller's, in seconds.

    `share` is the part of all jobs that it places: of several routers side by side each takes the others to do as it
    does itself. Without `is_compiled` its loops run plain: Numba need not be loaded.
    """

    def __init__(self, devices: int, share: float = 1.0, *, is_compiled: bool = True) -> None:
        # Run plain, a loop over lists takes a third of the time.
        column: Callable[[int], Any] = np.zeros if is_compiled else _zeros
        self._pressure, self._toll = column(devices), column(devices)
        self._rate, self._busy, self._load = column(devices), column(devices), column(devices)
        self._mean = column(3)
        """The mean time of a job on its best device, how many jobs it is the mean of, and the part of what the other
        means remember that there has been."""
        self._mean[2] = _IDLE
        self.share = share
        self._now_s = 0.0
        self._loops = _compiled() if is_compiled else (_advance, _placed)

    @property
    def pressure(self) -> Floats:
        """[device]: `Problem.pressure`."""
        return np.array(self._pressure, np.float64)

    @property
    def toll(self) -> Floats:
        """[device]: `Problem.toll`."""
        return np.array(self._toll, np.float64)

    @property
    def typical_s(self) -> float | None:
        """`Problem.typical_s`."""
        return float(self._mean[0]) or None

    def compiled(self) -> Tolls:
        """The same, to go on in compiled loops."""
        found = Tolls(len(self._toll), self.share)
        for name in ("_pressure", "_toll", "_rate", "_busy", "_load", "_mean"):
            getattr(found, name)[:] = getattr(self, name)
        found._now_s = self._now_s
        return found

    def advance(self, now_s: float) -> None:
        """Time has passed: what waited is worked off, and what is long ago counts less."""
        span_s, self._now_s = now_s - self._now_s, now_s
        if self._mean[1] and span_s > 0:
            self._loops[0](self._pressure, self._toll, self._rate, self._busy, self._load, self._mean, span_s)

    def placed(self, problem: Problem, device: Indices, gone: Sequence[bool] | NDArray[np.bool_]) -> None:
        """A plan gives these jobs to these devices; those that are not `gone` wait to be placed again."""
        problem = problem.expanded()
        seconds: Any = problem.seconds
        slots: Any = problem.slots
        chosen: Any = device
        if isinstance(self._load, list):
            seconds, slots, chosen = seconds.tolist(), slots.tolist(), chosen.tolist()
            self._load = problem.ready.tolist()
        else:
            gone = np.array(gone, np.bool_)
            self._load = problem.ready.astype(np.float64)
        self._loops[1](seconds, slots, chosen, gone, self._rate, self._busy, self._load, self._mean, self.share)


def _zeros(count: int) -> list[float]:
    return [0.0] * count


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    from lepton_ai.placement.compiled import compiled  # loads Numba, which those who place few jobs do without

    return compiled(_advance), compiled(_placed)


def _advance(pressure: Any, toll: Any, rate: Any, busy: Any, load: Any, mean: Any, span_s: float) -> None:
    """Of arrays or, run plain, of lists; so too `_placed`."""
    kept = math.exp(-span_s / (_HORIZON * mean[0]))
    before = mean[2]
    seen = 1 - kept * (1 - before)
    mean[2] = seen
    for at in range(len(toll)):
        # The mean of what waited in this time, all of it worked off at one second a second.
        worked_s = min(span_s, load[at])
        waited_s = (load[at] - worked_s / 2) * worked_s / span_s
        load[at] -= worked_s
        toll[at] = (kept * before * toll[at] + (1 - kept) * pressure[at] * waited_s) / seen
        rate[at] *= kept
        busy[at] *= kept
        pressure[at] = rate[at] / seen / (1 - min(busy[at] / seen, _BUSIEST))


def _placed(
    seconds: Any, slots: Any, device: Any, gone: Any, rate: Any, busy: Any, load: Any, mean: Any, share: float
) -> None:
    for job in range(len(device)):
        at = device[job]
        if at == UNPLACED:
            continue
        busy_s = seconds[job][at] / slots[at]
        load[at] += busy_s
        if gone[job]:
            best_s = math.inf
            for need_s in seconds[job]:
                best_s = min(best_s, need_s)
            if mean[1]:
                best_s, busy_s = min(best_s, _OUTLIER * mean[0]), min(busy_s, _OUTLIER * mean[0])
            mean[1] += 1
            mean[0] += max(_NEWEST, 1 / mean[1]) * (best_s - mean[0])
            # It decays over the horizon: so its sum is the mean a second.
            once = 1 / (_HORIZON * mean[0] * share)
            rate[at] += once
            busy[at] += once * busy_s
