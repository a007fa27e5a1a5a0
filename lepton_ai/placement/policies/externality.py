"""Each job, in order, where its own finish and the delay that it causes to those after it cost least together.

The score of a device is `W + p + k (p / mean best p) (W + p / 2)`: W its wait, p the job's time there. The first two
terms are earliest finish; the third is what the jobs after it wait longer, which grows with the work that it puts there
and with the work that waits there already. Without it a fleet of mixed speeds is not stable: slow devices are given
what fast ones could have done, and the backlog grows although the fleet could carry the load.
"""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem

__all__ = ["Externality"]


class Externality:
    """The default online. `k` is the weight of others' delay beside a job's own."""

    name = "externality"

    def __init__(self, k: float = 10.0) -> None:
        self.k = k

    def place(self, problem: Problem) -> Plan:
        problem = problem.expanded()
        typical_s = problem.typical_s or _typical_s(problem.seconds)
        ready = problem.ready.astype(np.float64)
        device, wait = _place(problem.seconds, ready, problem.slots.astype(np.float64), self.k / typical_s)
        return Plan(device, wait)


def _typical_s(seconds: Floats) -> float:
    best = seconds.min(axis=1, initial=np.inf)
    best = best[np.isfinite(best)]
    return max(float(best.mean()), 1e-12) if best.size else 1.0


@compiled
def _place(seconds: Floats, ready: Floats, slots: Floats, k: float) -> tuple[Indices, Floats]:
    jobs, devices = seconds.shape
    device = np.full(jobs, UNPLACED, np.intp)
    wait = np.full(jobs, np.inf)
    for job in range(jobs):
        best, least = UNPLACED, np.inf
        for at in range(devices):
            need = seconds[job, at]
            if need < np.inf:
                score = ready[at] + need + k * need / slots[at] * (ready[at] + need / 2)
                if score < least:
                    best, least = at, score
        if best != UNPLACED:
            device[job] = best
            wait[job] = ready[best]
            ready[best] += seconds[job, best] / slots[best]
    return device, wait
