"""A plan from prices: the shares in which jobs divide themselves, rounded one job after the other.

A job whose turn has come goes where its waste and the square of what columns are off their share of the work are least
together; those behind it still count as divided (the method of conditional expectations: Raghavan, "Probabilistic
construction of deterministic algorithms", J. Computer and System Sciences 37, 1988). The longest come first, so what
is off in the end is about one of the shortest.

Within a column, jobs go longest first to the device that is free first (LPT: Graham, "Bounds on multiprocessing timing
anomalies", SIAM J. Appl. Math. 17, 1969), which leaves its devices apart by about one of the shortest jobs.
"""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.nearby import Nearby
from lepton_ai.placement.prices import sums
from lepton_ai.placement.problem import Floats, Indices

__all__ = ["filled"]


#: What the square costs beside waste, for the mean job's share of the work.
_LATE = 5.0
#: How sharply jobs divide themselves: as in the equilibrium.
_SHARPNESS = 256.0
#: Jobs from which sorting them costs more than it gains.
_MANY = 100_000
#: Who is ready later, in units of the bound, gets nothing.
_LAST_READY = 1.05


def filled(
    near: Nearby, length: Floats, prices: Floats, ready: Floats, slots: Floats, column: Indices, *, divided: bool
) -> tuple[Indices, Indices]:
    """[job] the pair of `near` that it gets; [job] the device. `length` is what jobs are sorted by, longest first.

    `ready` is in the units of the pairs' times, `prices` [column] in those of the pairs' waste.
    """
    order = _longest_to_shortest(length)
    by_ready = np.lexsort((ready, column))
    begins = np.searchsorted(column[by_ready], np.arange(prices.size + 1))
    open_ = np.where(ready < _LAST_READY, slots, 0.0)
    width = sums(column, open_, prices.size)
    work = sums(column, open_ * ready, prices.size)
    late_costs = _LATE * length.size / prices.size
    pair = _evened(order, near.first, near.place, near.waste, near.time, work, width, prices, late_costs, divided)
    device = _longest_first(order, near.place[pair], near.time[pair], ready.copy(), slots, by_ready, begins)
    return pair, device


def _longest_to_shortest(length: Floats) -> Indices:
    """Jobs by length; of many only to a factor of 1.4, which is found faster and leaves memory read nearly in order."""
    if length.size < _MANY:
        return np.argsort(-length, kind="stable")
    octave = np.log2(np.maximum(length, 1e-300))
    return np.argsort((-2 * octave).astype(np.int16), kind="stable")


@compiled
def _evened(
    order: Indices,
    first: Indices,
    place: Indices,
    waste: Floats,
    time: Floats,
    work: Floats,
    width: Floats,
    prices: Floats,
    late_costs: float,
    divided: bool,
) -> Indices:
    """[job]: its pair. `width` is a column's slots, and `work` over `width` when they would all be done at once."""
    pair = first[:-1].copy()
    share = np.empty(place.size)
    for job in range(pair.size):
        begin, end = first[job], first[job + 1]
        cost = max(prices[place[begin]] * time[begin], 1e-300)
        total = 0.0
        for one in range(begin, end):
            share[one] = prices[place[one]] * width[place[one]] * np.exp(-_SHARPNESS * waste[one] / cost)
            total += share[one]
        for one in range(begin, end):
            share[one] *= (divided or end == begin + 1) / max(total, 1e-300)
            work[place[one]] += share[one] * time[one]
    for at in range(pair.size):
        job = order[at]
        begin, end = first[job], first[job + 1]
        if end == begin + 1:
            continue
        for one in range(begin, end):
            work[place[one]] -= share[one] * time[one]
        least = np.inf
        for one in range(begin, end):
            to = place[one]
            more = time[one] / width[to]
            off = work[to] / width[to] - 1
            was, becomes = max(0.0, off), max(0.0, off + more)
            costs = waste[one] + late_costs * prices[to] * width[to] * (becomes * becomes - was * was)
            if costs < least:
                pair[job], least = one, costs
        work[place[pair[job]]] += time[pair[job]]
    return pair


@compiled
def _longest_first(
    order: Indices, place: Indices, time: Floats, load: Floats, slots: Floats, heap: Indices, begins: Indices
) -> Indices:
    """[job]: its device. `heap` has each column's devices from `begins` on, as a heap by load."""
    device = np.empty(place.size, np.intp)
    for at in range(order.size):
        job = order[at]
        top, end = begins[place[job]], begins[place[job] + 1]
        chosen = heap[top]
        device[job] = chosen
        load[chosen] += time[job] / slots[chosen]
        hole = 0
        while True:
            child = 2 * hole + 1
            if top + child >= end:
                break
            if top + child + 1 < end and load[heap[top + child + 1]] < load[heap[top + child]]:
                child += 1
            if load[heap[top + child]] >= load[chosen]:
                break
            heap[top + hole] = heap[top + child]
            hole = child
        heap[top + hole] = chosen
    return device
