"""Each job, in order, where its own finish and the delay that it causes to those after it cost least together.

The score of a device is `W + p + k (p / mean best p) (W + p / 2)`: W its wait, p the job's time there. The first two
terms are earliest finish; the third is what the jobs after it wait longer, which grows with the work that it puts there
and with the work that waits there already. Without it a fleet of mixed speeds is not stable: slow devices are given
what fast ones could have done, and the backlog grows although the fleet could carry the load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np

from lepton_ai.placement.problem import UNPLACED, Floats, Plan, Problem

__all__ = ["Externality"]

#: Below so many costs the loop over plain lists takes less time than arrays for the compiled one do (1 x 2: 2 against
#: 12 us; 16 x 2: 16 against 7).
_FEW_COSTS: Final = 16


class Externality:
    """The default online. `k` is the weight of others' delay beside a job's own.

    Without `is_compiled` its loop runs plain, however large the problem: Numba need not be loaded.
    """

    name = "externality"

    def __init__(self, k: float = 10.0, *, is_compiled: bool = True) -> None:
        self.k = k
        self._is_compiled = is_compiled

    def place(self, problem: Problem) -> Plan:
        problem = problem.expanded()
        k = self.k / (problem.typical_s or _typical_s(problem.seconds))
        device = np.full(problem.jobs, UNPLACED, np.intp)
        wait = np.full(problem.jobs, np.inf)
        if self._is_compiled and problem.seconds.size >= _FEW_COSTS:
            ready, slots = problem.ready.astype(np.float64), problem.slots.astype(np.float64)
            _loop()(problem.seconds, ready, slots, k, device, wait)
            return Plan(device, wait)
        devices, waits = device.tolist(), wait.tolist()
        _place(problem.seconds.tolist(), problem.ready.tolist(), problem.slots.tolist(), k, devices, waits)
        return Plan(np.array(devices, np.intp), np.array(waits, np.float64))


def _typical_s(seconds: Floats) -> float:
    best = seconds.min(axis=1, initial=np.inf)
    best = best[np.isfinite(best)]
    return max(float(best.mean()), 1e-12) if best.size else 1.0


@cache
def _loop() -> Callable[..., None]:
    from lepton_ai.placement.compiled import compiled  # loads Numba, which those who place few jobs do without

    return compiled(_place)


def _place(seconds: Any, ready: Any, slots: Any, k: float, device: Any, wait: Any) -> None:
    """Fills in `device` and `wait`; of arrays or, run plain, of lists."""
    for job in range(len(seconds)):
        row = seconds[job]
        best, least = UNPLACED, np.inf
        for at in range(len(row)):
            need = row[at]
            if need < np.inf:
                score = ready[at] + need + k * need / slots[at] * (ready[at] + need / 2)
                if score < least:
                    best, least = at, score
        if best != UNPLACED:
            device[job] = best
            wait[job] = ready[best]
            ready[best] += row[best] / slots[best]
