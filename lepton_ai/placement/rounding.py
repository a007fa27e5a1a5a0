"""From jobs shared out among columns, or from prices, to a device for each job; and what small changes still gain.

Of a linear program's optimum at most as many jobs are shared out as there are columns, less one (Lenstra, Shmoys and
Tardos, Math. Programming 46, 1990). They are placed last, the longest first, each where it then ends soonest. The
devices of a class get their jobs longest first, each to the one that is free first (Graham, "Bounds on multiprocessing
timing anomalies", SIAM J. Appl. Math. 17, 1969). At the end jobs of the device that ends last are moved, or swapped
with others, as long as that helps.
"""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.prices import sums
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Problem

__all__ = ["improved", "placed", "spread"]

#: How much later than the optimum a column may end and be left alone; how much dearer what counts as the same may be,
#: at first and at last, and how often all jobs are gone through at each.
_EVEN = 5e-4
_NEARLY = (1.0003, 1.001, 1.003, 1.01, 1.03, 1.1)
_SWEEPS = 4
#: Pairs of jobs that the search for swaps looks at, in all: some 0.2 s.
_LOOKED_AT = 1 << 27
#: And before a change is made: all of them, where they are no more.
_FOR_A_STEP = 1 << 16


def placed(problem: Problem, column: Indices, prices: Floats, end_s: float, until_s: float) -> Indices:
    """[job]: a device of its column; where that is UNPLACED, of that where it then ends soonest.

    Or, of those where it then ends before `until_s`, where it costs least at these prices. `end_s`: devices that are
    ready only later are left alone.
    """
    column = column.copy()
    columns = problem.seconds.shape[1]
    slots, begun_s = _begun(problem, end_s)
    given = np.flatnonzero(column != UNPLACED)
    begun_s += sums(column[given], problem.seconds[given, column[given]], columns)
    open_ = np.flatnonzero(column == UNPLACED)
    least = problem.seconds[open_].min(axis=1, initial=np.inf)
    longest_first = open_[np.argsort(-least, kind="stable")]
    _choose(problem.seconds, longest_first, prices, until_s, begun_s, slots, column)
    return _within_classes(problem, column)


def spread(problem: Problem, prices: Floats, end_s: float) -> Indices:
    """[job]: a device of the column that costs it least at these prices, or little more where that one is too full.

    Columns that end after `end_s` give jobs away to others on which these cost nearly as little, at first those on
    which they cost the same.
    """
    slots, begun_s = _begun(problem, end_s)
    return _within_classes(problem, _spread(problem.seconds, prices, end_s * (1 + _EVEN), begun_s, slots))


def _begun(problem: Problem, end_s: float) -> tuple[Floats, Floats]:
    """[column]: the slots of its devices that are ready by then, and the seconds of work that these have."""
    of = np.arange(problem.devices) if problem.class_of is None else problem.class_of
    columns, usable = problem.seconds.shape[1], problem.ready <= end_s
    slots = problem.slots[usable]
    return sums(of[usable], slots, columns), sums(of[usable], slots * problem.ready[usable], columns)


def improved(problem: Problem, device: Indices, until_s: float = 0.0) -> Indices:
    """[job]: devices as given, or others that end sooner; not looked for further once all ends by `until_s`."""
    column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
    device = device.copy()
    _improve(problem.seconds, column, problem.ready, problem.slots, device, until_s, _LOOKED_AT)
    return device


def _within_classes(problem: Problem, column: Indices) -> Indices:
    """[job]: of its column's devices."""
    if problem.class_of is None:
        return column
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
def _least_cost(seconds: Floats, prices: Floats, slots: Floats) -> float:
    least = np.inf
    for at in range(len(prices)):
        if slots[at] > 0 and seconds[at] < np.inf:
            least = min(least, prices[at] * seconds[at])
    return least


@compiled
def _choose(
    seconds: Floats, jobs: Indices, prices: Floats, until_s: float, begun_s: Floats, slots: Floats, column: Indices
) -> None:
    columns = seconds.shape[1]
    for job in jobs:
        is_served = _least_cost(seconds[job], prices, slots) < np.inf
        best, soonest, cheapest, affordable = UNPLACED, np.inf, UNPLACED, np.inf
        for at in range(columns):
            need = seconds[job, at]
            if need < np.inf and (slots[at] > 0 or not is_served):
                end = (begun_s[at] + need) / max(slots[at], 1.0)
                if end < soonest:
                    best, soonest = at, end
                if end <= until_s and prices[at] * need < affordable:
                    cheapest, affordable = at, prices[at] * need
        if cheapest != UNPLACED:
            best = cheapest
        if best != UNPLACED:
            column[job] = best
            begun_s[best] += seconds[job, best]


@compiled
def _spread(seconds: Floats, prices: Floats, end_s: float, begun_s: Floats, slots: Floats) -> Indices:
    jobs, columns = seconds.shape
    column = np.full(jobs, UNPLACED, np.intp)
    least = np.full(jobs, np.inf)
    second = np.full(jobs, np.inf)
    for job in range(jobs):
        for at in range(columns):
            if slots[at] > 0 and seconds[job, at] < np.inf:
                cost = prices[at] * seconds[job, at]
                if cost < least[job]:
                    least[job], second[job] = cost, least[job]
                elif cost < second[job]:
                    second[job] = cost
        for at in range(columns):
            # Where nothing is ready in time, the first that can run it has to wait for it.
            if seconds[job, at] < np.inf and (
                least[job] == np.inf or (slots[at] > 0 and prices[at] * seconds[job, at] <= least[job])
            ):
                column[job] = at
                begun_s[at] += seconds[job, at]
                break
    for within in _NEARLY:
        for _ in range(_SWEEPS):
            fullest = 0.0
            for at in range(columns):
                if slots[at] > 0:
                    fullest = max(fullest, begun_s[at] / slots[at])
            if fullest <= end_s:
                return column
            for job in range(jobs):
                mine = column[job]
                if (
                    second[job] > within * least[job]
                    or mine == UNPLACED
                    or slots[mine] == 0
                    or begun_s[mine] <= end_s * slots[mine]
                ):
                    continue
                best, soonest = UNPLACED, begun_s[mine] / slots[mine]
                for at in range(columns):
                    need = seconds[job, at]
                    if at != mine and slots[at] > 0 and need < np.inf and prices[at] * need <= within * least[job]:
                        end = (begun_s[at] + need) / slots[at]
                        if end < soonest:
                            best, soonest = at, end
                if best != UNPLACED:
                    begun_s[mine] -= seconds[job, mine]
                    begun_s[best] += seconds[job, best]
                    column[job] = best
    return column


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
    # Gone through each time: for the devices of a class that is quicker than a heap.
    end = ready[devices]
    part = 1 / slots[devices]
    for job in jobs:
        mine = column[job]
        free = first[mine]
        for at in range(first[mine] + 1, first[mine + 1]):
            if end[at] < end[free]:
                free = at
        device[job] = devices[free]
        end[free] += need[job] * part[free]


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
