"""Jobs where they are cheapest, at prices of the devices that make all of them end together; then a short search.

Columns that are multiples of others are made one (`multiples.py`). Then, each compiled by Numba: prices in equilibrium
(`equilibrium.py`), their rounding to a plan (`filling.py`), each job's few cheap choices (`nearby.py`), moves and swaps
of those by simulated annealing (`exchange.py`), and moves away from the device that ends last. The plan of min-min is
taken where it ends sooner. Each file names the source of its method.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lepton_ai.placement.compiled import IS_COMPILED, compiled
from lepton_ai.placement.equilibrium import Equilibrium, Supply, equilibrium
from lepton_ai.placement.exchange import LONG_SEARCH, exchanged
from lepton_ai.placement.filling import eased, filled
from lepton_ai.placement.multiples import without_multiples
from lepton_ai.placement.nearby import nearby
from lepton_ai.placement.policies.min_min import MinMin
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem

if not IS_COMPILED:
    raise ModuleNotFoundError("as plain Python the search would take minutes", name="numba")

__all__ = ["Priced"]

#: Choices that waste more than this part of the mean job's work are left out: the second if the search is long.
_WASTE, _WASTE_IF_LONG = 0.5, 2.0
#: What a step of the search takes, by which time becomes a number of steps; the second where the caches are too small.
_STEP_S, _STEP_S_OF_MANY = 2e-7, 5e-7
_CHOICES_IN_CACHE = 50_000
#: What comes before the search takes: at all, and for each cost.
_BEFORE_S, _BEFORE_A_COST_S = 1.5e-3, 1.2e-7
#: Steps for each choice, at most: a small problem is done long before its budget.
_STEPS_A_CHOICE = 2_000
#: Choices of devices that a search looks at, about, and of columns a job: with fewer there is no search. What so many
#: jobs leave to be found is next to nothing.
_MOST_CHOICES, _MOST_PAIRS, _FEWEST_PAIRS = 1_500_000, 16, 3
#: Costs up to which min-min is always looked at; above, where the plan is further from its bound than this.
_MOST_FOR_MIN_MIN, _FAR = 400_000, 0.01
#: The part of a budget after which the clock ends a search: what comes then takes time as well.
_PART = 0.9
#: What min-min takes for each cost.
_MIN_MIN_A_COST_S = 6e-8
_ENOUGH = 1 + 1e-9


class Priced:
    """Near the optimum in milliseconds, and never later than min-min.

    The search is given what `budget_s` leaves when the size of the problem tells, not the clock: so a problem has one
    plan for a budget and a seed, on every machine of one instruction set. Only where the budget ends before the steps
    do, because the core is slow or busy, does the clock shorten the search and the plan depend on it; a `now` that
    stands still prevents that. What comes before the search is always done, also if it takes longer than the budget.

    Min-min sorts all costs, which for many takes longer than all else here. Above 400,000 costs it is looked at only
    where the plan is 1 % or more above its bound: on so many jobs min-min was 5 % above and more wherever devices
    differ, and where they do not it ends about its longest job too late, which the filling makes its shortest.
    """

    name = "priced"
    #: The devices of a class are priced as one.
    by_class = True

    def __init__(self, budget_s: float = 0.01, seed: int = 0, now: Callable[[], float] = time.perf_counter) -> None:
        self.budget_s = budget_s
        self.seed = seed
        self.now = now

    def place(self, problem: Problem) -> Plan:
        until_s = self.now() + _PART * self.budget_s
        if problem.seconds.size <= _MOST_FOR_MIN_MIN:
            until_s -= _MIN_MIN_A_COST_S * problem.seconds.size
        seconds, column = _columns_with_devices(problem)
        ready, slots = problem.ready.astype(np.float64), problem.slots.astype(np.float64)
        device = np.full(problem.jobs, UNPLACED, np.intp)
        able = _able(seconds)
        if able.all() and problem.jobs:
            device = self._placed(seconds, ready, slots, column, until_s)
        elif able.any():
            device[able] = self._placed(seconds[able], ready, slots, column, until_s)
        return Plan(device, _waits(seconds, device, column, ready, slots))

    def _placed(self, seconds: Floats, ready: Floats, slots: Floats, column: Indices, until_s: float) -> Indices:
        """[job]: the device, for jobs that each have one."""
        problem = Problem(seconds, ready, slots, column)
        seconds, column, slots = without_multiples(seconds, column, slots)
        supply = Supply(ready, slots, column, seconds.shape[1])
        market = equilibrium(seconds, supply)
        if market.bound_s <= 0:
            return MinMin().place(problem).device
        device, ends = filled(seconds, market, supply)
        if ends > _ENOUGH:
            device, ends = self._searched(seconds, market, supply, device, ends, until_s)
            # Not before: where all devices are full, a search finds no job that can go where it wastes less.
            device, ends = eased(seconds, market, supply, device)
        if ends > _ENOUGH and (problem.seconds.size <= _MOST_FOR_MIN_MIN or ends > 1 + _FAR):
            other = MinMin().place(problem)
            if other.makespan_s(problem) < ends * market.bound_s:
                return other.device
        return device

    def _searched(
        self, seconds: Floats, market: Equilibrium, supply: Supply, device: Indices, ends: float, until_s: float
    ) -> tuple[Indices, float]:
        """[job] the device, and when the plan ends in units of the bound, for a plan that is to end sooner."""
        jobs, columns = seconds.shape
        steps_s = 0.8 * (self.budget_s - _BEFORE_S - _BEFORE_A_COST_S * seconds.size)
        if steps_s <= 0:
            return device, ends
        waste = _WASTE_IF_LONG if steps_s > 2 * LONG_SEARCH * _STEP_S * jobs else _WASTE
        few = min(_MOST_PAIRS, int(_MOST_CHOICES * columns / (jobs * supply.ready.size)))
        if few < _FEWEST_PAIRS:
            return device, ends
        near = nearby(seconds, market.most, market.prices, market.bound_s, waste / jobs, few, supply.column[device])
        usable = np.flatnonzero(supply.ready < ends * market.bound_s)
        near = near.on_devices(supply.column, supply.slots, usable)
        choices = near.place.size
        steps = int(steps_s / (_STEP_S if choices <= _CHOICES_IN_CACHE else _STEP_S_OF_MANY))
        steps = min(steps, _STEPS_A_CHOICE * choices)
        pair = near.pairs_of(device)
        load = _load(device, near.time[pair], supply.ready / market.bound_s)
        worth = market.prices[supply.column] * supply.slots
        pair, ends = exchanged(near, pair, load, worth, steps, self.seed, _ENOUGH, until_s, self.now)
        return near.place[pair], ends


def _load(device: Indices, time: Floats, ready: Floats) -> Floats:
    load: Floats = ready + np.bincount(device, time, ready.size)
    return load


def _columns_with_devices(problem: Problem) -> tuple[Floats, Indices]:
    """[job, column] seconds, [device] the column; in the one form for which the loops are compiled."""
    seconds, column = problem.seconds, np.arange(problem.devices)
    if problem.class_of is not None:
        used, column = np.unique(problem.class_of, return_inverse=True)
        if used.size < seconds.shape[1]:
            seconds = seconds[:, used]
    found = np.ascontiguousarray(seconds, np.float64)
    return found if found.flags.writeable else found.copy(), column.astype(np.intp)


@compiled
def _able(seconds: Floats) -> NDArray[np.bool_]:
    """[job]: whether any column can run it."""
    able = np.zeros(seconds.shape[0], np.bool_)
    for job in range(seconds.shape[0]):
        for column in range(seconds.shape[1]):
            if seconds[job, column] < np.inf:
                able[job] = True
                break
    return able


@compiled
def _waits(seconds: Floats, device: Indices, column: Indices, ready: Floats, slots: Floats) -> Floats:
    """[job]: its wait, as `planned` tells it, which for a million jobs takes half a second."""
    load = ready.copy()
    wait = np.full(device.size, np.inf)
    for job in range(device.size):
        to = device[job]
        if to != UNPLACED:
            wait[job] = load[to]
            load[to] += seconds[job, column[to]] / slots[to]
    return wait
