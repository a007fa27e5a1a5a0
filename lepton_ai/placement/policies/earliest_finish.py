"""Each job, in order, on the device where it finishes first, counting what was placed before it.

The on-line rule known as MCT, minimum completion time (Maheswaran et al., "Dynamic mapping of a class of independent
tasks onto heterogeneous computing systems", J. Parallel Distrib. Comput. 59, 1999, section 3.1).
"""

from __future__ import annotations

import math

import numpy as np

from lepton_ai.placement.problem import UNPLACED, Plan, Problem

__all__ = ["EarliestFinish"]


class EarliestFinish:
    """Greedy by completion time. A device of several slots works its backlog off that many times as fast."""

    name = "earliest_finish"

    def place(self, problem: Problem) -> Plan:
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
