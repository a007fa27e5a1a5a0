"""What a second of each device costs the jobs after it, learned from what a router places: for `externality`.

A device is taken for a queue that jobs reach at random. While W seconds wait there, one more second of work delays,
until the queue is next empty, about `rate / (1 - busy) * W` jobs: the first step of policy iteration from a random
split (Krishnan, "Joining the right queue: a state-dependent decision rule", IEEE Trans. Automatic Control 35, 1990; for
known sizes Hyytiä, Penttinen and Aalto, "Size- and state-aware dispatching problem with queue-specific job sizes",
European J. Operational Research 217, 2012). That factor is the pressure. Its mean product with W is the price, and plays
the part of a dual price of the linear program: a device that few jobs are good at stays dear to the others while it
happens to be idle.

Why, and what was measured: docs/decisions/0022-prices-online.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Problem

__all__ = ["Prices"]

#: The running means remember so many typical jobs' times.
_HORIZON = 200.0
#: The running means begin as if this part of what they remember had been idle: the first jobs are no measure. (From all of
#: it the prices came too late, and at 0.95 of what a fleet can carry the backlog of the start stayed for a long time.)
_IDLE = 0.05
#: No device is taken to be busier: what is left of 1 divides.
_BUSIEST = 0.97
#: Weight of the newest job in the typical one's time.
_NEWEST = 0.005


class Prices:
    """Learned by one router, of the devices in their order. Its clock is the caller's, in seconds.

    `share` is the part of all jobs that it places: of several routers side by side each takes the others to do as it
    does itself.
    """

    def __init__(self, devices: int, share: float = 1.0) -> None:
        self.pressure: Floats = np.zeros(devices)
        """[device]: `Problem.pressure`."""
        self.price: Floats = np.zeros(devices)
        """[device]: `Problem.price`."""
        self._share = share
        self._typical = np.zeros(2)
        """The mean time of a job on its best device, and how many jobs it is the mean of."""
        self._seen = np.full(1, _IDLE)
        """The part of what the running means remember that there has been."""
        self._rate = np.zeros(devices)
        self._busy = np.zeros(devices)
        self._load = np.zeros(devices)
        self._now_s = 0.0

    @property
    def typical_s(self) -> float | None:
        """`Problem.typical_s`."""
        return float(self._typical[0]) or None

    def advance(self, now_s: float) -> None:
        """Time has passed: what waited is worked off, and what is long ago counts less."""
        span_s, self._now_s = now_s - self._now_s, now_s
        if self._typical[0] > 0 and span_s > 0:
            horizon_s = _HORIZON * self._typical[0]
            _advance(self.pressure, self.price, self._rate, self._busy, self._load, self._seen, span_s, horizon_s)

    def placed(self, problem: Problem, device: Indices, gone: NDArray[np.bool_]) -> None:
        """A plan gives these jobs to these devices; those that are not `gone` wait to be placed again."""
        problem = problem.expanded()
        self._load = problem.ready.astype(np.float64)
        _placed(
            problem.seconds, problem.slots, device, gone, self._rate, self._busy, self._load, self._typical, self._share
        )


@compiled
def _advance(
    pressure: Floats,
    price: Floats,
    rate: Floats,
    busy: Floats,
    load: Floats,
    seen: Floats,
    span_s: float,
    horizon_s: float,
) -> None:
    kept = np.exp(-span_s / horizon_s)
    before = seen[0]
    seen[0] = 1 - kept * (1 - before)
    for at in range(len(price)):
        # The mean of what waited in this time, all of it worked off at one second a second.
        worked_s = min(span_s, load[at])
        waited_s = (load[at] - worked_s / 2) * worked_s / span_s
        load[at] -= worked_s
        price[at] = (kept * before * price[at] + (1 - kept) * pressure[at] * waited_s) / seen[0]
        rate[at] *= kept
        busy[at] *= kept
        pressure[at] = rate[at] / seen[0] / (1 - min(busy[at] / seen[0], _BUSIEST))


@compiled
def _placed(
    seconds: Floats,
    slots: Floats,
    device: Indices,
    gone: NDArray[np.bool_],
    rate: Floats,
    busy: Floats,
    load: Floats,
    typical: Floats,
    share: float,
) -> None:
    for job in range(len(device)):
        at = device[job]
        if at == UNPLACED:
            continue
        busy_s = seconds[job, at] / slots[at]
        load[at] += busy_s
        if gone[job]:
            best_s = np.inf
            for need_s in seconds[job]:
                best_s = min(best_s, need_s)
            typical[1] += 1
            typical[0] += max(_NEWEST, 1 / typical[1]) * (best_s - typical[0])
            # `advance` lets it decay over the horizon: so the sum is the mean a second.
            once = 1 / (_HORIZON * typical[0] * share)
            rate[at] += once
            busy[at] += once * busy_s
