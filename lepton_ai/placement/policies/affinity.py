"""Each job where it runs fastest, however much waits there: what a hard-coded `queue="gpu"` does.

The baseline of fixed routing. Devices on which a job takes exactly as long serve one queue, as workers of one make do:
the one that has worked off its backlog first takes the job.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem, planned

__all__ = ["Affinity"]


class Affinity:
    """A fixed table: of the device that runs each job fastest, or given.

    With `table`, devices in order of preference, each job goes to the first that can run it, and those that none of
    them can run where they run fastest.
    """

    name = "affinity"

    def __init__(self, table: Sequence[int] = ()) -> None:
        self.table = np.array(table, np.intp)

    def place(self, problem: Problem) -> Plan:
        if not problem.devices:
            return planned(problem, np.full(problem.jobs, UNPLACED, np.intp))
        column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
        return planned(problem, _place(problem.seconds, column, problem.ready, problem.slots, self.table))


@compiled
def _place(seconds: Floats, column: Indices, ready: Floats, slots: Floats, table: Indices) -> Indices:
    jobs, devices = len(seconds), len(ready)
    ready = ready.copy()
    device = np.full(jobs, UNPLACED, np.intp)
    for job in range(jobs):
        for at in table:
            if seconds[job, column[at]] < np.inf:
                device[job] = at
                break
        if device[job] == UNPLACED:
            fastest = np.inf
            for at in range(devices):
                need = seconds[job, column[at]]
                if need < fastest or (need == fastest < np.inf and ready[at] < ready[device[job]]):
                    device[job], fastest = at, need
        at = device[job]
        if at != UNPLACED:
            ready[at] += seconds[job, column[at]] / slots[at]
    return device
