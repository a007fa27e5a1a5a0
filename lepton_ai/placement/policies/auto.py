"""The plan that ends soonest of what the time and the packages that are there allow.

With Numba that is `priced`, and without it the best of the simple policies. Those that are cheap enough for the
problem's size are looked at in either case, until a plan ends when a lower bound says that none could end sooner.
"""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.compiled import IS_COMPILED
from lepton_ai.placement.policies import load
from lepton_ai.placement.problem import Plan, Policy, Problem

__all__ = ["Auto"]

#: Costs up to which each of the simple ones is looked at: tenths of a second. The first always is.
_SIMPLE = {"min_min": 1_000_000, "earliest_finish": 1_000_000, "sufferage": 300_000}
#: As plain Python they take a hundred times as long.
_UNCOMPILED = 100
_ENOUGH = 1 + 1e-9


class Auto:
    """Never later than the best of `earliest_finish`, `min_min` and `sufferage`, up to some size.

    That is 300,000 jobs times devices for `sufferage` and a million for the others; above, it is as `priced` says, and
    without Numba (a hundredth of those sizes) what `earliest_finish` does.
    """

    name = "auto"
    #: The devices of a class are priced as one.
    by_class = True

    def __init__(self, budget_s: float = 0.01, seed: int = 0) -> None:
        self._search = load("priced", budget_s=budget_s, seed=seed) if IS_COMPILED else None
        self._simple = {name: load(name) for name in _SIMPLE}

    def place(self, problem: Problem) -> Plan:
        best = None if self._search is None else self._search.place(problem)
        ends_s = np.inf if best is None else best.makespan_s(problem)
        bound_s = _bound_s(problem)
        for policy in self._affordable(problem):
            if ends_s <= bound_s * _ENOUGH:
                break
            plan = policy.place(problem)
            if best is None or plan.makespan_s(problem) < ends_s:
                best, ends_s = plan, plan.makespan_s(problem)
        return self._simple["earliest_finish"].place(problem) if best is None else best

    def _affordable(self, problem: Problem) -> list[Policy]:
        costs = problem.jobs * problem.devices * (1 if IS_COMPILED else _UNCOMPILED)
        # `priced` has looked at min-min.
        skipped = {"min_min"} if self._search is not None else set()
        return [self._simple[name] for name, most in _SIMPLE.items() if costs <= most and name not in skipped]


def _bound_s(problem: Problem) -> float:
    """When the job that takes longest even where it ends soonest would end, alone on the device.

    In classes, the soonest ready and the one of most slots are taken for one device.
    """
    if not problem.jobs or not problem.devices:
        return 0.0
    columns = problem.seconds.shape[1]
    column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
    ready, slots = np.full(columns, np.inf), np.ones(columns)
    np.minimum.at(ready, column, problem.ready)
    np.maximum.at(slots, column, problem.slots)
    soonest = (problem.seconds / slots + ready).min(axis=1)
    return float(soonest[np.isfinite(soonest)].max(initial=0.0))
