"""Each job on the next device in turn that can run it: what a list of workers does that knows nothing of them."""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem, planned

__all__ = ["RoundRobin"]


class RoundRobin:
    """Blind to costs: it looks only at whether a device can run the job at all. A new problem starts at the first."""

    name = "round_robin"
    looks_at_costs = False

    def place(self, problem: Problem) -> Plan:
        column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
        return planned(problem, _place(problem.seconds, column))


@compiled
def _place(seconds: Floats, column: Indices) -> Indices:
    jobs, devices = len(seconds), len(column)
    device = np.full(jobs, UNPLACED, np.intp)
    turn = 0
    for job in range(jobs):
        for step in range(devices):
            at = (turn + step) % devices
            if seconds[job, column[at]] < np.inf:
                device[job] = at
                turn = at + 1
                break
    return device
