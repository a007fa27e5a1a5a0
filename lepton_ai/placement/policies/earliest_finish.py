"""Each job, in order, on the device where it finishes first, counting what was placed before it.

The on-line rule known as MCT, minimum completion time (Maheswaran et al., "Dynamic mapping of a class of independent
tasks onto heterogeneous computing systems", J. Parallel Distrib. Comput. 59, 1999, section 3.1).
"""

from __future__ import annotations

import math

import numpy as np

from lepton_ai.placement.compiled import IS_COMPILED, compiled
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem

__all__ = ["EarliestFinish"]

#: Jobs times devices from which arrays in a compiled loop are the faster: a hundred times, where there are many.
_MANY = 20_000


class EarliestFinish:
    """Greedy by completion time. A device of several slots works its backlog off that many times as fast."""

    name = "earliest_finish"

    def place(self, problem: Problem) -> Plan:
        if IS_COMPILED and problem.jobs * problem.devices >= _MANY:
            column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
            return Plan(*_place(problem.seconds, column, problem.ready, problem.slots))
        problem = problem.expanded()
        # Plain lists: for the few devices of a fleet an array a job costs ten times as much.
        ready, slots = problem.ready.tolist(), problem.slots.tolist()
        device: list[int] = []
        wait: list[float] = []
        for seconds in problem.seconds.tolist():
            best, soonest = UNPLACED, math.inf
            for at, need in enumerate(seconds):
                if ready[at] + need < soonest:
                    best, soonest = at, ready[at] + need
            device.append(best)
            wait.append(math.inf if best == UNPLACED else ready[best])
            if best != UNPLACED:
                ready[best] += seconds[best] / slots[best]
        return Plan(np.array(device, np.intp), np.array(wait, np.float64))


@compiled
def _place(seconds: Floats, column: Indices, ready: Floats, slots: Floats) -> tuple[Indices, Floats]:
    jobs, devices = len(seconds), len(ready)
    ready = ready.copy()
    device = np.full(jobs, UNPLACED, np.intp)
    wait = np.full(jobs, np.inf)
    for job in range(jobs):
        best, soonest = UNPLACED, np.inf
        for at in range(devices):
            end = ready[at] + seconds[job, column[at]]
            if end < soonest:
                best, soonest = at, end
        if best != UNPLACED:
            device[job], wait[job] = best, ready[best]
            ready[best] += seconds[job, column[best]] / slots[best]
    return device, wait
