"""How soon any plan could end: lower bounds of a Problem's makespan, so that a plan can say how near it came.

A Plan's makespan is that of a fluid model: a device of s slots works its backlog off s times as fast. So what is
bounded here is the largest `ready + seconds / slots` of the devices that a plan uses, and a job alone needs
`seconds / slots`.
Jobs that nobody can run are left out, as in `Plan.makespan_s`.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from lepton_ai.errors import MissingPackage
from lepton_ai.placement.prices import bound_s, clearing_prices
from lepton_ai.placement.problem import Floats, Problem

__all__ = ["Bound", "longest_job_s", "lower_bound"]

#: `auto` solves the linear program up to so many costs: above, where kernels tie, it takes seconds and gains 0.02 %.
_LP_MOST = 100_000


class Bound(msgspec.Struct, frozen=True):
    """Seconds that no plan ends before, and how that is known."""

    seconds: float
    method: Literal["lp", "dual", "job"]
    """`lp`: the optimum of the linear program, in which jobs may be shared out among devices. `dual`: what prices of
    the devices prove, at most 0.02 % below it on all that was tried. `job`: one job alone takes so long."""
    prices: Floats | None = None
    """[column of `seconds`]: what a second of a slot is worth; None where one job decides."""


def lower_bound(problem: Problem, method: Literal["lp", "dual", "auto"] = "auto") -> Bound:
    """The best lower bound of the makespan that the method finds.

    `auto` is the linear program where the problem is small enough and HiGHS is there, else the dual.
    """
    problem = problem.served()
    alone = Bound(longest_job_s(problem), "job")
    if alone.seconds == 0:
        return alone
    if method == "lp" or (method == "auto" and problem.seconds.size <= _LP_MOST):
        try:
            from lepton_ai.placement.relaxation import relaxed
        except ModuleNotFoundError:
            if method == "lp":
                raise MissingPackage(
                    "the linear program needs the package highspy: pip install 'lepton-ai[solvers]'", "method"
                ) from None
        else:
            found = relaxed(problem)
            return max(Bound(found.bound_s, "lp", found.prices), alone, key=_seconds)
    prices = clearing_prices(problem)
    return max(Bound(bound_s(problem, prices), "dual", prices), alone, key=_seconds)


def _seconds(bound: Bound) -> float:
    return bound.seconds


def longest_job_s(problem: Problem) -> float:
    """When the job that takes longest even where it ends soonest would end, if it were alone.

    Of the devices of a class the soonest ready and the one of most slots are taken for one.
    """
    if not problem.jobs or not problem.devices:
        return 0.0
    columns = problem.seconds.shape[1]
    column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
    ready, slots = np.full(columns, np.inf), np.ones(columns)
    np.minimum.at(ready, column, problem.ready)
    np.maximum.at(slots, column, problem.slots)
    ends = (problem.seconds / slots + ready).min(axis=1)
    return float(ends[np.isfinite(ends)].max(initial=0.0))
