"""Each job, in order, on the device where it finishes first, counting what was placed before it.

The on-line rule known as MCT, minimum completion time (Maheswaran et al., "Dynamic mapping of a class of independent
tasks onto heterogeneous computing systems", J. Parallel Distrib. Comput. 59, 1999, section 3.1).
"""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.problem import UNPLACED, Plan, Problem

__all__ = ["EarliestFinish"]


class EarliestFinish:
    """Greedy by completion time. A device of several slots works its backlog off that many times as fast."""

    name = "earliest_finish"

    def place(self, problem: Problem) -> Plan:
        jobs = len(problem.seconds)
        device = np.full(jobs, UNPLACED, np.intp)
        wait = np.full(jobs, np.inf)
        ready = problem.ready.astype(np.float64, copy=True)
        for job, seconds in enumerate(problem.seconds if ready.size else ()):
            finish = ready + seconds
            best = int(finish.argmin())
            if np.isfinite(finish[best]):
                device[job], wait[job] = best, ready[best]
                ready[best] += seconds[best] / problem.slots[best]
        return Plan(device, wait)
