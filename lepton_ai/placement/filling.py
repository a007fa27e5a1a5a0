"""A plan from prices: the shares in which jobs divide themselves, rounded one job after the other.

A job whose turn has come goes where its waste and the square of what columns are off their share of the work are least
together; those behind it still count as divided (the method of conditional expectations: Raghavan, "Probabilistic
construction of deterministic algorithms", J. Computer and System Sciences 37, 1988). The longest come first, so what
is off in the end is about one of the shortest. All columns are looked at, since a job can cost the same on any number.

Within a column, jobs go longest first to the device that is free first (LPT: Graham, "Bounds on multiprocessing timing
anomalies", SIAM J. Appl. Math. 17, 1969), or where devices are not alike, on which it ends first (Gonzalez, Ibarra and
Sahni, "Bounds for LPT schedules on uniform processors", SIAM J. Computing 6, 1977): they end apart by about one of the
shortest jobs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.equilibrium import Equilibrium, Supply, power_of_two
from lepton_ai.placement.prices import sums
from lepton_ai.placement.problem import Floats, Indices

__all__ = ["eased", "filled"]

#: What the square costs beside waste, for the mean job's share of the work.
_LATE = 5.0
#: How sharply jobs divide themselves, as in the equilibrium: 2 to this power, and what is so much dearer gets nothing.
_DOUBLINGS, _DEAR = 8, 1.02
#: Jobs from which sorting them exactly costs more than it gains.
_MANY = 100_000
#: Jobs up to which they are also tried without those behind them counting: with few, that is better as often as not.
_FEW = 200_000
#: Moves of a job from the device that ends last that are looked at in all: some 20 ms.
_LOOKED_AT = 1 << 24
#: Who is ready later, in units of the bound, gets nothing.
_LAST_READY = 1.05


def filled(seconds: Floats, market: Equilibrium, supply: Supply) -> tuple[Indices, float]:
    """[job] the device, for jobs that each have one; when the plan ends, in units of the bound."""
    jobs, columns = seconds.shape
    slots, column = supply.slots, supply.column
    prices, most = market.prices / market.bound_s, market.most
    by_ready = np.lexsort((supply.ready, column))
    begins = np.searchsorted(column[by_ready], np.arange(columns + 1))
    alike = np.ones(columns, np.bool_)
    alike[column[slots != slots[by_ready][begins[column]]]] = False
    open_ = np.where(supply.ready < _LAST_READY * market.bound_s, slots, 0.0)
    width, ready = sums(column, open_, columns), supply.ready / market.bound_s
    least, expected = _divided(seconds, most, prices, width)
    order = _longest_to_shortest(least)
    best, soonest = np.empty(0, np.intp), np.inf
    for is_divided in (True, False) if jobs < _FEW else (True,):
        work = sums(column, open_ * ready, columns) + is_divided * expected / market.bound_s
        late_costs = _LATE * jobs / columns * market.prices * width
        chosen = _evened(
            seconds, most, prices, width, market.bound_s, least, order, work, late_costs, is_divided
        )  # fmt: skip
        time = seconds[np.arange(jobs), chosen] / market.bound_s
        device, load = _longest_first(order, chosen, time, ready.copy(), slots, alike, by_ready.copy(), begins)
        ends = float(load[np.bincount(device, minlength=load.size) > 0].max())
        if ends < soonest:
            best, soonest = device, ends
    return best, soonest


def eased(seconds: Floats, market: Equilibrium, supply: Supply, device: Indices) -> tuple[Indices, float]:
    """The same after moves of one job from the device that ends last, as long as that helps."""
    device = device.copy()
    time = seconds[np.arange(device.size), supply.column[device]] / supply.slots[device]
    load = (supply.ready + sums(device, time, supply.ready.size)) / market.bound_s
    prices, most, column = market.prices / market.bound_s, market.most, supply.column
    ends = _eased(seconds, most, prices, column, supply.slots, market.bound_s, device, load, _LOOKED_AT)
    return device, ends


def _longest_to_shortest(length: Floats) -> Indices:
    """Jobs by length; of many only to a factor of 1.4, which is found faster and leaves memory read nearly in order."""
    if length.size < _MANY:
        return np.argsort(-length, kind="stable")
    octave = np.log2(np.maximum(length, 1e-300))
    return np.argsort((-2 * octave).astype(np.int16), kind="stable")


@compiled
def _divided(seconds: Floats, most: Floats, prices: Floats, width: Floats) -> tuple[Floats, Floats]:
    """[job] what it costs at the least; [column] the seconds that it gets where all divide themselves."""
    jobs, columns = seconds.shape
    least = np.full(jobs, np.inf)
    expected = np.zeros(columns)
    at, part = np.empty(columns, np.intp), np.empty(columns)
    for job in range(jobs):
        for column in range(columns):
            if seconds[job, column] <= most[column]:
                least[job] = min(least[job], prices[column] * seconds[job, column])
        few = _parts(seconds[job], most, prices, width, least[job], at, part)
        for one in range(few):
            expected[at[one]] += part[one] * seconds[job, at[one]]
    return least, expected


@compiled
def _parts(
    seconds: Floats, most: Floats, prices: Floats, width: Floats, least: float, at: Indices, part: Floats
) -> int:
    """How many columns share a job; which ones, and how much of it each gets, is left in `at` and `part`."""
    few, total = 0, 0.0
    for column in range(seconds.size):
        cost = prices[column] * seconds[column]
        if cost <= least * _DEAR and seconds[column] <= most[column]:
            ratio = least / cost if cost > least else 1.0
            at[few], part[few] = column, prices[column] * width[column] * power_of_two(ratio, _DOUBLINGS)
            total += part[few]
            few += 1
    for one in range(few):
        part[one] /= max(total, 1e-300)
    return few


@compiled
def _evened(
    seconds: Floats,
    most: Floats,
    prices: Floats,
    width: Floats,
    bound_s: float,
    least: Floats,
    order: Indices,
    work: Floats,
    late_costs: Floats,
    is_divided: bool,
) -> Indices:
    """[job]: its column. `width` is a column's slots, and `work` over `width` when they would all be done at once."""
    jobs, columns = seconds.shape
    chosen = np.zeros(jobs, np.intp)
    at, part = np.empty(columns, np.intp), np.empty(columns)
    for turn in range(jobs):
        job = order[turn]
        if is_divided:
            few = _parts(seconds[job], most, prices, width, least[job], at, part)
            for one in range(few):
                work[at[one]] -= part[one] * seconds[job, at[one]] / bound_s
        fewest = np.inf
        for column in range(columns):
            waste = prices[column] * seconds[job, column] - least[job]
            # Lateness only adds.
            if waste < fewest and seconds[job, column] <= most[column]:
                off = work[column] / width[column] - 1
                was, becomes = max(0.0, off), max(0.0, off + seconds[job, column] / bound_s / width[column])
                costs = waste + late_costs[column] * (becomes * becomes - was * was)
                if costs < fewest:
                    chosen[job], fewest = column, costs
        work[chosen[job]] += seconds[job, chosen[job]] / bound_s
    return chosen


@compiled
def _longest_first(
    order: Indices,
    chosen: Indices,
    time: Floats,
    load: Floats,
    slots: Floats,
    alike: NDArray[np.bool_],
    heap: Indices,
    begins: Indices,
) -> tuple[Indices, Floats]:
    """[job] its device; [device] its load then. `heap` has each column's devices from `begins` on, by load."""
    device = np.empty(chosen.size, np.intp)
    for turn in range(order.size):
        job = order[turn]
        top, end = begins[chosen[job]], begins[chosen[job] + 1]
        if alike[chosen[job]]:
            to = heap[top]
            load[to] += time[job] / slots[to]
            _sunk(heap, load, top, end)
        else:
            to, soonest = heap[top], np.inf
            for here in range(top, end):
                ends = load[heap[here]] + time[job] / slots[heap[here]]
                if ends < soonest:
                    to, soonest = heap[here], ends
            load[to] = soonest
        device[job] = to
    return device, load


@compiled
def _sunk(heap: Indices, load: Floats, top: int, end: int) -> None:
    """The first of the heap put where its load belongs."""
    sinks, hole = heap[top], 0
    while True:
        child = 2 * hole + 1
        if top + child >= end:
            break
        if top + child + 1 < end and load[heap[top + child + 1]] < load[heap[top + child]]:
            child += 1
        if load[heap[top + child]] >= load[sinks]:
            break
        heap[top + hole] = heap[top + child]
        hole = child
    heap[top + hole] = sinks


@compiled
def _eased(
    seconds: Floats,
    most: Floats,
    prices: Floats,
    column: Indices,
    slots: Floats,
    bound_s: float,
    device: Indices,
    load: Floats,
    looks: int,
) -> float:
    """When the plan then ends; it is left in `device`.

    What a move wastes, all others have to make up for: so it counts as later.
    """
    first = np.full(load.size, -1, np.intp)
    after = np.empty(device.size, np.intp)
    for job in range(device.size):
        after[job], first[device[job]] = first[device[job]], job
    while True:
        ends, last = 0.0, -1
        for at in range(load.size):
            if first[at] >= 0 and load[at] > ends:
                ends, last = load[at], at
        best, moved, behind, to = ends, -1, -1, -1
        before, job = -1, first[last] if last >= 0 else -1
        while job >= 0:
            was = seconds[job, column[last]]
            left = ends - was / bound_s / slots[last]
            for at in range(load.size):
                takes = seconds[job, column[at]]
                if at != last and takes <= most[column[at]]:
                    ends_then = max(left, load[at] + takes / bound_s / slots[at])
                    wasted = prices[column[at]] * takes - prices[column[last]] * was
                    if ends_then < ends and ends_then + max(0.0, wasted) < best:
                        best, moved, behind, to = ends_then + max(0.0, wasted), job, before, at
            looks -= load.size
            before, job = job, after[job]
        if moved < 0 or looks < 0:
            return ends
        if behind < 0:
            first[last] = after[moved]
        else:
            after[behind] = after[moved]
        after[moved], first[to] = first[to], moved
        load[last] -= seconds[moved, column[last]] / bound_s / slots[last]
        load[to] += seconds[moved, column[to]] / bound_s / slots[to]
        device[moved] = to
