"""Each job, in order, where its own finish and the delay that it causes to those after it cost least together.

The score of a device is `weight (W + p) + p (pressure (W + p) / 4 + 3 / 4 toll)`: W its wait, p the job's time there.
What stands first is earliest finish. The rest is what the jobs after it wait longer: it grows with the work that it
puts there, with the work that waits there now, and with what a second of that device has lately cost (`Tolls`, and the
sources there). Without it a fleet of mixed speeds is not stable: slow devices are given what fast ones could have done,
and the backlog grows although the fleet could carry the load.

Where nobody has learned a pressure it is `weight (W + p) + p (k / mean best p) (W + p / 2)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from lepton_ai.placement.problem import UNPLACED, Floats, Plan, Problem

__all__ = ["Externality"]

#: Below so many costs the loop over plain lists takes less time than arrays for the compiled one do (1 x 2: 2 against
#: 12 us; 16 x 2: 16 against 7).
_FEW_COSTS: Final = 16
#: How far the delay of others goes by what there is to do now, before the job and by itself; the rest is what it has
#: lately been.
_NOW: Final = (0.25, 0.25)
_ALL: Final = (1.0, 0.5)


class Externality:
    """The default online. Where no pressure was learned, `k` is the weight of others' delay beside a job's own.

    Without `is_compiled` its loop runs plain, however large the problem: Numba need not be loaded.
    """

    name = "externality"

    def __init__(self, k: float = 10.0, *, is_compiled: bool = True) -> None:
        self.k = k
        self._is_compiled = is_compiled

    def place(self, problem: Problem) -> Plan:
        problem = problem.expanded()
        pressure, toll, (before, itself) = problem.pressure, problem.toll, _NOW
        if pressure is None or toll is None:
            pressure = np.full(problem.devices, self.k / (problem.typical_s or _typical_s(problem.seconds)))
            toll, (before, itself) = np.zeros(problem.devices), _ALL
        # A job keeps one slot, and not the whole device.
        pressure, toll = pressure / problem.slots, (1 - before) * toll / problem.slots
        weight = _EQUAL if problem.weight is None else problem.weight
        if self._is_compiled and problem.seconds.size >= _FEW_COSTS:
            device, wait = np.full(problem.jobs, UNPLACED, np.intp), np.full(problem.jobs, np.inf)
            ready, slots = problem.ready.astype(np.float64), problem.slots.astype(np.float64)
            _loop()(problem.seconds, ready, slots, pressure, toll, before, itself, weight, device, wait)
            return Plan(device, wait)
        devices, waits = [UNPLACED] * problem.jobs, [math.inf] * problem.jobs
        ready, slots = problem.ready.tolist(), problem.slots.tolist()
        each, dear = pressure.tolist(), toll.tolist()
        _place(problem.seconds.tolist(), ready, slots, each, dear, before, itself, weight.tolist(), devices, waits)
        return Plan(np.array(devices, np.intp), np.array(waits, np.float64))


#: The weights of jobs that have none.
_EQUAL: Final = np.ones(1)


def _typical_s(seconds: Floats) -> float:
    best = seconds.min(axis=1, initial=np.inf)
    best = best[np.isfinite(best)]
    return max(float(best.mean()), 1e-12) if best.size else 1.0


@cache
def _loop() -> Callable[..., None]:
    from lepton_ai.placement.compiled import compiled  # loads Numba, which those who place few jobs do without

    return compiled(_place)


def _place(
    seconds: Any,
    ready: Any,
    slots: Any,
    pressure: Any,
    toll: Any,
    before: float,
    itself: float,
    weight: Any,
    device: Any,
    wait: Any,
) -> None:
    """Fills in `device` and `wait`; of arrays or, run plain, of lists."""
    for job in range(len(seconds)):
        row, own = seconds[job], weight[job % len(weight)]
        best, least = UNPLACED, np.inf
        for at in range(len(row)):
            need = row[at]
            if need < np.inf:
                others = pressure[at] * (before * ready[at] + itself * need) + toll[at]
                score = own * (ready[at] + need) + need * others
                if score < least:
                    best, least = at, score
        if best != UNPLACED:
            device[job] = best
            wait[job] = ready[best]
            ready[best] += row[best] / slots[best]
