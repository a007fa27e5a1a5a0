"""In rounds, each device to the job that would suffer most without it.

Sufferage (Maheswaran et al., "Dynamic mapping of a class of independent tasks onto heterogeneous computing systems",
J. Parallel Distrib. Comput. 59, 1999, section 3.2): what a job loses where it does not get the device on which it would
finish first, but the second. In a round every job asks for its first, and of those that ask for one device the one with
the highest loss gets it; the others ask again in the next round, when the backlogs are known.
"""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem, planned

__all__ = ["Sufferage"]


class Sufferage:
    """A job that only one device can run suffers infinitely."""

    name = "sufferage"

    def place(self, problem: Problem) -> Plan:
        problem = problem.expanded()
        return planned(problem, _place(problem.seconds, problem.ready, problem.slots))


@compiled
def _place(seconds: Floats, ready: Floats, slots: Floats) -> Indices:
    jobs, devices = seconds.shape
    ready = ready.copy()
    device = np.full(jobs, UNPLACED, np.intp)
    left = np.arange(jobs)
    count = jobs
    while count:
        asking = np.full(devices, UNPLACED, np.intp)
        loss = np.zeros(devices)
        for place in range(count):
            job = left[place]
            best, first, second = UNPLACED, np.inf, np.inf
            for at in range(devices):
                end = ready[at] + seconds[job, at]
                if end < first:
                    best, first, second = at, end, first
                elif end < second:
                    second = end
            if best != UNPLACED and (asking[best] == UNPLACED or second - first > loss[best]):
                asking[best], loss[best] = job, second - first
        for at in range(devices):
            if asking[at] != UNPLACED:
                device[asking[at]] = at
                ready[at] += seconds[asking[at], at] / slots[at]
        kept = 0
        for place in range(count):
            if device[left[place]] == UNPLACED:
                left[kept] = left[place]
                kept += 1
        if kept == count:
            break
        count = kept
    return device
