"""A population of plans that is crossed, changed and selected by makespan, from the plans of simple rules on.

The genetic algorithm that did best of eleven heuristics in Braun et al., J. Parallel Distrib. Comput. 61, 2001 (section
3.7): a chromosome is the device of each job, the first population holds Min-min's plan, and the best is never lost. Run
by pymoo (Blank and Deb, "pymoo: multi-objective optimization in Python", IEEE Access 8, 2020).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem as Search
from pymoo.operators.crossover.ux import UX
from pymoo.optimize import minimize

from lepton_ai.placement.policies.earliest_finish import EarliestFinish
from lepton_ai.placement.policies.min_min import MinMin
from lepton_ai.placement.policies.sufferage import Sufferage
from lepton_ai.placement.prices import sums
from lepton_ai.placement.problem import UNPLACED, Indices, Plan, Problem, planned

__all__ = ["Genetic"]

_POPULATION = 60
#: The first population is the rules' plans, and these with such a part of the jobs somewhere else.
_SHAKEN = 0.02


class Genetic:
    """The best plan of all generations; never worse than Min-min, Sufferage and earliest finish, which it starts from.

    The same problem and seed have the same plan: the search is bounded by generations and not by a clock. One takes
    about 2 ms for 512 jobs on 16 devices.
    """

    name = "genetic"

    def __init__(self, generations: int = 150, seed: int = 0) -> None:
        self.generations = generations
        self.seed = seed

    def place(self, problem: Problem) -> Plan:
        problem = problem.expanded()
        plans = [policy.place(problem).device for policy in (MinMin(), Sufferage(), EarliestFinish())]
        open_ = np.flatnonzero(np.isfinite(problem.seconds).sum(axis=1) > 1)
        if open_.size:
            plans.append(self._searched(problem, plans, open_))
        best = min(plans, key=lambda device: planned(problem, device).makespan_s(problem))
        return planned(problem, best)

    def _searched(self, problem: Problem, plans: list[Indices], open_: Indices) -> Indices:
        """[job]: the best devices found, starting from these plans; only the open jobs are moved."""
        search = _Makespan(problem, plans[0], open_)
        first = np.array([plans[row % len(plans)][open_] for row in range(_POPULATION)])
        random = np.random.default_rng(self.seed)
        shaken = random.random(first.shape) < _SHAKEN
        first[shaken] = search.somewhere(random)[shaken]
        first[: len(plans)] = [device[open_] for device in plans]
        algorithm = GA(
            pop_size=_POPULATION, sampling=first, crossover=UX(), mutation=_Moved(), eliminate_duplicates=False
        )
        found = minimize(search, algorithm, ("n_gen", self.generations), seed=self.seed, verbose=False)
        device = plans[0].copy()
        device[open_] = found.X
        return device


class _Makespan(Search):
    """The devices of the open jobs, each one that can run it; how late the last of all devices ends."""

    def __init__(self, problem: Problem, device: Indices, open_: Indices) -> None:
        super().__init__(n_var=open_.size, n_obj=1, xl=0, xu=problem.devices - 1, vtype=int)
        self.open = open_
        can = np.isfinite(problem.seconds[open_])
        self.able = np.argsort(~can, axis=1, kind="stable")
        self.choices = can.sum(axis=1)
        self.part = problem.seconds[open_] / problem.slots
        bound = device.copy()
        bound[open_] = UNPLACED
        # Those that only one device can run stay there.
        self.end = planned(problem, bound).load(problem)
        self.used = np.bincount(bound[bound != UNPLACED], minlength=problem.devices) > 0

    def somewhere(self, random: np.random.Generator, rows: int = _POPULATION) -> Indices:
        """[row, open job]: a device that can run it, any."""
        chosen = (random.random((rows, self.open.size)) * self.choices).astype(np.intp)
        return np.take_along_axis(self.able[np.newaxis], chosen[:, :, np.newaxis], axis=2)[:, :, 0]

    def _evaluate(self, x: Any, out: dict[str, Any], *_: Any, **__: Any) -> None:
        rows, devices = len(x), self.end.size
        at = x.astype(np.intp)
        cell = (at + devices * np.arange(rows)[:, np.newaxis]).ravel()
        given = sums(cell, self.part[np.arange(self.open.size), at].ravel(), rows * devices)
        used = self.used | (np.bincount(cell, minlength=rows * devices) > 0).reshape(rows, devices)
        out["F"] = np.where(used, self.end + given.reshape(rows, devices), 0.0).max(axis=1, keepdims=True)


class _Moved(Mutation):
    """One job in a plan, on average, goes to another device that can run it."""

    def _do(self, problem: _Makespan, X: Any, *_: Any, random_state: Any = None, **__: Any) -> Any:  # noqa: N803 - pymoo's
        random = random_state or np.random.default_rng(0)
        moved = random.random(X.shape) < 1 / problem.open.size
        return np.where(moved, problem.somewhere(random, len(X)), X)
