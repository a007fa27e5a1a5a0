"""Each job, in order, where its own finish and the delay that it causes to those after it cost least together.

The score of a device is `weight (W + p) + p (pressure (W / 4 + p / 2) + 3 / 4 price)`: W its wait, p the job's time there.
What stands first is earliest finish. The rest is what the jobs after it wait longer: it grows with the work that it
puts there, with the work that waits there now, and with what a second of that device has lately cost (`Prices`, and the
sources there). Without it a fleet of mixed speeds is not stable: slow devices are given what fast ones could have done,
and the backlog grows although the fleet could carry the load.

Where nobody has learned a pressure it is `k` over the mean best time, and W stands for the price.
"""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem

__all__ = ["Externality"]

#: How far the price of a device goes by what waits there now; the rest is what it has lately been.
_NOW = 0.25


class Externality:
    """The default online.

    A job with a deadline goes by this score among the devices whose tail makes it, and to the least late where none
    does.
    """

    name = "externality"

    def __init__(self, k: float = 10.0) -> None:
        self.k = k

    def place(self, problem: Problem) -> Plan:
        problem = problem.expanded()
        seconds, devices = problem.seconds, problem.devices
        if problem.pressure is None or problem.price is None:
            pressure = np.full(devices, self.k / (problem.typical_s or _typical_s(seconds)))
            price, now = np.zeros(devices), 1.0
        else:
            pressure, price, now = problem.pressure, problem.price, _NOW
        weight = _ONE if problem.weight is None else problem.weight
        deadline = _NEVER if problem.deadline is None else problem.deadline
        tail = seconds if problem.tail is None else problem.tail
        ready = problem.ready.astype(np.float64)
        device, wait = _place(seconds, ready, problem.slots, pressure, price, now, weight, deadline, tail)
        return Plan(device, wait)


#: What stands for every job where a problem says nothing of them.
_ONE, _NEVER = np.ones(1), np.full(1, np.inf)


def _typical_s(seconds: Floats) -> float:
    best = seconds.min(axis=1, initial=np.inf)
    best = best[np.isfinite(best)]
    return max(float(best.mean()), 1e-12) if best.size else 1.0


@compiled
def _place(
    seconds: Floats,
    ready: Floats,
    slots: Floats,
    pressure: Floats,
    price: Floats,
    now: float,
    weight: Floats,
    deadline: Floats,
    tail: Floats,
) -> tuple[Indices, Floats]:
    jobs, devices = seconds.shape
    device = np.full(jobs, UNPLACED, np.intp)
    wait = np.full(jobs, np.inf)
    # Both per second that a job keeps the device, and not only a slot of it.
    each = pressure / slots
    dear = (1 - now) * price / slots
    for job in range(jobs):
        own = weight[job % len(weight)]
        until = deadline[job % len(deadline)]
        best, least, late = UNPLACED, np.inf, np.inf
        for at in range(devices):
            need = seconds[job, at]
            if need < np.inf:
                over = max(0.0, ready[at] + tail[job, at] - until)
                score = own * (ready[at] + need) + need * (each[at] * (now * ready[at] + need / 2) + dear[at])
                if over < late or (over == late and score < least):
                    best, least, late = at, score, over
        if best != UNPLACED:
            device[job] = best
            wait[job] = ready[best]
            ready[best] += seconds[job, best] / slots[best]
    return device, wait
