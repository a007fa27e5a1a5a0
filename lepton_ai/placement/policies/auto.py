"""The plan that ends soonest of what the time and the packages that are there allow.

With Numba that is `priced`, and without it the best of the simple policies. Those that are cheap enough for the
problem's size are looked at in either case, until a plan ends when a lower bound says that none could end sooner.
"""

from __future__ import annotations

import math

from lepton_ai.placement.bounds import longest_job_s
from lepton_ai.placement.compiled import IS_COMPILED
from lepton_ai.placement.policies import load
from lepton_ai.placement.problem import Plan, Policy, Problem

__all__ = ["Auto"]

#: Jobs times devices up to which each is looked at: tens of milliseconds. Above, where there is something better.
_SIMPLE = {"min_min": 300_000, "earliest_finish": 100_000_000, "sufferage": 300_000}
#: As plain Python they take up to a hundred times as long.
_UNCOMPILED = 100
_ENOUGH = 1 + 1e-9


class Auto:
    """Never later than the best of `earliest_finish`, `min_min` and `sufferage`, up to some size.

    That is 300,000 jobs times devices, and for `earliest_finish` 100 million. Above, it is what `priced` does, which
    looks at min-min wherever it ends 1 % or more above its bound. Without Numba, from 3,000 jobs times devices on, it
    is what `earliest_finish` does.
    """

    name = "auto"
    #: The devices of a class are priced as one.
    by_class = True

    def __init__(self, budget_s: float = 0.01, seed: int = 0) -> None:
        self._search = load("priced", budget_s=budget_s, seed=seed) if IS_COMPILED else None
        self._simple = {name: load(name) for name in _SIMPLE}

    def place(self, problem: Problem) -> Plan:
        # One job has one place where it ends first, for which there is nothing to search.
        best = None if self._search is None or problem.jobs == 1 else self._search.place(problem)
        simple = self._affordable(problem)
        if best is not None and not simple:
            return best
        ends_s = math.inf if best is None else best.makespan_s(problem)
        # Of many jobs no plan ends with the longest of them, and to look for it takes longer than earliest finish.
        bound_s = longest_job_s(problem) if len(simple) > 1 else 0.0
        for policy in simple:
            if ends_s <= bound_s * _ENOUGH:
                break
            plan = policy.place(problem)
            if best is None or plan.makespan_s(problem) < ends_s:
                best, ends_s = plan, plan.makespan_s(problem)
        return self._simple["earliest_finish"].place(problem) if best is None else best

    def _affordable(self, problem: Problem) -> list[Policy]:
        cells = problem.jobs * problem.devices
        if self._search is None or problem.jobs == 1:
            return list(self._simple.values()) if cells * _UNCOMPILED <= _SIMPLE["min_min"] else []
        # `priced` has looked at min-min.
        return [policy for name, policy in self._simple.items() if name != "min_min" and cells <= _SIMPLE[name]]
