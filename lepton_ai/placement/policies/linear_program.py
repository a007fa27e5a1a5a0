"""The linear program's optimum, in which jobs may be shared out among devices, rounded to whole jobs.

Lenstra, Shmoys and Tardos, "Approximation algorithms for scheduling unrelated parallel machines", Math. Programming 46,
1990; solved by HiGHS (`placement/relaxation.py`), rounded in `placement/rounding.py`. Devices of a class are one in the
program. Beyond some size the program's prices are found without solving it (`placement/prices.py`), and every job goes
where it costs least at them; those that several columns cost the same fill them evenly.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from lepton_ai.errors import InvalidSettings
from lepton_ai.placement.prices import bound_s, clearing_prices
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Plan, Problem, planned
from lepton_ai.placement.relaxation import Relaxation, cheapest, relaxed
from lepton_ai.placement.rounding import improved, placed, spread

__all__ = ["LinearProgram"]

#: Costs of jobs on columns up to which the program itself is solved.
_SOLVED = 200_000
#: And then a plan this near to the bound is left as it is.
_ENOUGH = 1e-3


class LinearProgram:
    """Least makespan, or least cost.

    With `objective="cost"`, where a Problem has rates: what costs least of the plans that end at most by the part
    `slack` later than the best that is found.
    """

    name = "linear_program"
    by_class = True

    def __init__(self, objective: Literal["makespan", "cost"] = "makespan", slack: float = 0.05) -> None:
        if objective not in ("makespan", "cost"):
            raise InvalidSettings(f"the objective is makespan or cost, and not {objective!r}", "objective")
        if not slack >= 0:
            raise InvalidSettings(f"slack is a part of the makespan, 0 or more, and not {slack!r}", "slack")
        self.objective = objective
        self.slack = slack

    def place(self, problem: Problem) -> Plan:
        if not problem.jobs or not problem.devices:
            return planned(problem, np.full(problem.jobs, UNPLACED, np.intp))
        problem = problem.served()
        if self.objective == "cost" and problem.rate is not None:
            return planned(problem, _least_cost(_by_rate(problem), _soonest(problem), self.slack))
        return planned(problem, _soonest(problem))


def _soonest(problem: Problem) -> Indices:
    """[job]: a device."""
    if problem.seconds.size <= _SOLVED:
        return _rounded(problem, relaxed(problem))
    prices = clearing_prices(problem)
    end_s = bound_s(problem, prices)
    return improved(problem, spread(problem, prices, end_s), (1 + _ENOUGH) * end_s)


def _rounded(problem: Problem, optimum: Relaxation, until_s: float = 0.0) -> Indices:
    """[job]: a device; of `until_s` see `placed`."""
    column = np.full(problem.jobs, UNPLACED, np.intp)
    whole = optimum.share > 1 - 1e-6
    column[optimum.job[whole]] = optimum.column[whole]
    return improved(problem, placed(problem, column, optimum.prices, optimum.makespan_s, until_s), until_s)


def _least_cost(problem: Problem, soonest: Indices, slack: float) -> Indices:
    """[job]: a device; `soonest`: those of the best plan that is known. Every column of the problem has one rate."""
    assert problem.rate is not None
    assert problem.class_of is not None
    end_s = (1 + slack) * planned(problem, soonest).makespan_s(problem)
    if end_s <= 0:
        return soonest
    optimum = relaxed(problem)
    rate = np.zeros(problem.seconds.shape[1])
    # A job on a device of several slots takes its part of the device's seconds.
    rate[problem.class_of] = problem.rate / problem.slots
    cheap = _rounded(problem, cheapest(problem, rate, end_s, optimum), end_s)
    in_time = [found for found in (cheap, soonest) if planned(problem, found).makespan_s(problem) <= end_s]
    return min(in_time, key=lambda found: _cost(problem, found))


def _cost(problem: Problem, device: Indices) -> float:
    """What the seconds of all placed jobs cost."""
    assert problem.rate is not None
    here = device != UNPLACED
    at = device[here]
    spent: Floats = problem.seconds_on(device)[here] * problem.rate[at] / problem.slots[at]
    return float(spent.sum())


def _by_rate(problem: Problem) -> Problem:
    """The same with a column for each class and rate of its devices."""
    assert problem.rate is not None
    column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
    kinds, class_of = np.unique(np.stack([column, problem.rate / problem.slots]), axis=1, return_inverse=True)
    return msgspec.structs.replace(
        problem, seconds=problem.seconds[:, kinds[0].astype(np.intp)], class_of=class_of.reshape(-1), tail=None
    )
