"""From jobs shared out among columns, or from prices, to a device for each job; and what small changes still gain.

Of a linear program's optimum at most as many jobs are shared out as there are columns, less one (Lenstra, Shmoys and
Tardos, Math. Programming 46, 1990). They are placed last, the longest first, each where it then ends soonest. The
devices of a class get their jobs longest first, each to the one that is free first (Graham, "Bounds on multiprocessing
timing anomalies", SIAM J. Appl. Math. 17, 1969). At the end jobs of the device that ends last are moved, or swapped
with others, as long as that helps.
"""

from __future__ import annotations

import heapq

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.prices import sums
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Problem

__all__ = ["improved", "placed"]

#: Pairs of jobs that the search for swaps looks at, in all: some 0.3 s.
_LOOKED_AT = 1 << 28
#: And before a change is made: all of them, where they are no more.
_FOR_A_STEP = 1 << 16


def placed(problem: Problem, column: Indices, prices: Floats, within: float, end_s: float, until_s: float) -> Indices:
    """[job]: a device of its column; where that is UNPLACED, one of any column that costs it least at these prices.

    Among those that cost no more than by the part `within`, where it then ends soonest; or, of those where it then
    ends before `until_s`, where it costs least. `end_s`: devices that are ready only later are left alone.
    """
    column = column.copy()
    of = np.arange(problem.devices) if problem.class_of is None else problem.class_of
    columns = problem.seconds.shape[1]
    usable = problem.ready <= end_s
    slots = sums(of[usable], problem.slots[usable], columns)
    begun_s = sums(of[usable], problem.slots[usable] * problem.ready[usable], columns)
    given = np.flatnonzero(column != UNPLACED)
    begun_s += sums(column[given], problem.seconds[given, column[given]], columns)
    open_ = np.flatnonzero(column == UNPLACED)
    least = problem.seconds[open_].min(axis=1, initial=np.inf)
    choices = _choices(problem.seconds, open_, prices, slots, within)
    order = open_[np.lexsort((-least, choices > 1))]
    _choose(problem.seconds, order, prices, within, until_s, begun_s, slots, column)
    if problem.class_of is None:
        return column
    return _within_classes(problem, column)


def improved(problem: Problem, device: Indices, until_s: float = 0.0) -> Indices:
    """[job]: devices as given, or others that end sooner; not looked for further once all ends by `until_s`."""
    column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
    device = device.copy()
    _improve(problem.seconds, column, problem.ready, problem.slots, device, until_s, _LOOKED_AT)
    return device


def _within_classes(problem: Problem, column: Indices) -> Indices:
    assert problem.class_of is not None
    need = np.where(column == UNPLACED, 0.0, problem.seconds[np.arange(problem.jobs), column])
    jobs = np.argsort(-need, kind="stable")
    jobs = jobs[np.argsort(column[jobs], kind="stable")]
    jobs = jobs[column[jobs] != UNPLACED]
    devices = np.argsort(problem.class_of, kind="stable")
    first = np.searchsorted(problem.class_of[devices], np.arange(problem.seconds.shape[1] + 1))
    device = np.full(problem.jobs, UNPLACED, np.intp)
    _share_out(jobs, column, need, devices, first, problem.ready, problem.slots, device)
    return device


@compiled
def _choices(seconds: Floats, jobs: Indices, prices: Floats, slots: Floats, within: float) -> Indices:
    """[of these jobs]: how many columns cost it no more than by that part."""
    found = np.zeros(len(jobs), np.intp)
    for place, job in enumerate(jobs):
        least = _least_cost(seconds[job], prices, slots)
        for at in range(len(prices)):
            if slots[at] > 0 and seconds[job, at] < np.inf and prices[at] * seconds[job, at] <= (1 + within) * least:
                found[place] += 1
    return found


@compiled
def _least_cost(seconds: Floats, prices: Floats, slots: Floats) -> float:
    least = np.inf
    for at in range(len(prices)):
        if slots[at] > 0 and seconds[at] < np.inf:
            least = min(least, prices[at] * seconds[at])
    return least


@compiled
def _choose(
    seconds: Floats,
    jobs: Indices,
    prices: Floats,
    within: float,
    until_s: float,
    begun_s: Floats,
    slots: Floats,
    column: Indices,
) -> None:
    columns = seconds.shape[1]
    for job in jobs:
        least = _least_cost(seconds[job], prices, slots)
        best, soonest, cheapest, affordable = UNPLACED, np.inf, UNPLACED, np.inf
        for at in range(columns):
            need = seconds[job, at]
            if need < np.inf and (slots[at] > 0 or least == np.inf):
                cost = prices[at] * need
                if cost <= (1 + within) * least or least == np.inf:
                    end = (begun_s[at] + need) / max(slots[at], 1.0)
                    if end < soonest:
                        best, soonest = at, end
                    if end <= until_s and cost < affordable:
                        cheapest, affordable = at, cost
        if cheapest != UNPLACED:
            best = cheapest
        if best != UNPLACED:
            column[job] = best
            begun_s[best] += seconds[job, best]


@compiled
def _share_out(
    jobs: Indices,
    column: Indices,
    need: Floats,
    devices: Indices,
    first: Indices,
    ready: Floats,
    slots: Floats,
    device: Indices,
) -> None:
    at = 0
    while at < len(jobs):
        mine = column[jobs[at]]
        free = [(ready[each], each) for each in devices[first[mine] : first[mine + 1]]]
        heapq.heapify(free)
        while at < len(jobs) and column[jobs[at]] == mine:
            job = jobs[at]
            end, each = free[0]
            device[job] = each
            heapq.heapreplace(free, (end + need[job] / slots[each], each))
            at += 1


@compiled
def _improve(
    seconds: Floats, column: Indices, ready: Floats, slots: Floats, device: Indices, until_s: float, most: int
) -> None:
    jobs, devices = len(device), len(ready)
    end = ready.copy()
    for job in range(jobs):
        if device[job] != UNPLACED:
            end[device[job]] += seconds[job, column[device[job]]] / slots[device[job]]
    used = np.zeros(devices, np.bool_)
    looked_at = 0
    while True:
        used[:] = False
        for job in range(jobs):
            if device[job] != UNPLACED:
                used[device[job]] = True
        worst = UNPLACED
        for at in range(devices):
            if used[at] and (worst == UNPLACED or end[at] > end[worst]):
                worst = at
        if worst == UNPLACED or end[worst] <= until_s:
            return
        enough = looked_at + _FOR_A_STEP
        lowest, mover, target, other = end[worst] * (1 - 1e-12), UNPLACED, UNPLACED, UNPLACED
        for job in range(jobs):
            if device[job] != worst:
                continue
            if mover != UNPLACED and looked_at > enough:
                break
            looked_at += jobs + devices
            if looked_at > most:
                return
            left = end[worst] - seconds[job, column[worst]] / slots[worst]
            for at in range(devices):
                if at != worst:
                    highest = max(left, end[at] + seconds[job, column[at]] / slots[at])
                    if highest < lowest:
                        lowest, mover, target, other = highest, job, at, UNPLACED
            for swapped in range(jobs):
                at = device[swapped]
                if at in (worst, UNPLACED):
                    continue
                back = left + seconds[swapped, column[worst]] / slots[worst]
                if back < lowest:
                    there = end[at] + (seconds[job, column[at]] - seconds[swapped, column[at]]) / slots[at]
                    if there < lowest:
                        lowest, mover, target, other = max(back, there), job, at, swapped
        if mover == UNPLACED:
            return
        end[worst] -= seconds[mover, column[worst]] / slots[worst]
        end[target] += seconds[mover, column[target]] / slots[target]
        device[mover] = target
        if other != UNPLACED:
            end[target] -= seconds[other, column[target]] / slots[target]
            end[worst] += seconds[other, column[worst]] / slots[worst]
            device[other] = worst
