"""The linear program of a Problem, in which a job may be shared out among devices: its optimum and its prices.

    minimise T  over x >= 0,  sum over c of x[j, c] = 1  for each job j,
    sum over j of x[j, c] seconds[j, c]  <=  sum over the devices d of c of slots[d] (T - ready[d])  for each column c

Devices of a class are merged, which changes nothing where jobs may be shared out. A device that is not ready before T
takes nothing: the program is solved over those that are, and they are found again until that is true of all.

Ten thousand jobs on 64 devices are 640,000 variables, and all but some ten thousand are 0 in every optimum. So the
program is solved (by HiGHS; Huangfu and Hall, "Parallelizing the dual revised simplex method", Math. Prog. Comp. 10,
2018) with the variables that cost least at the clearing prices, and those that its own prices then show to be missing
are added until none is (column generation; Gilmore and Gomory, "A linear programming approach to the cutting-stock
problem", Operations Research 9, 1961). A job with one column left needs no row.
"""

from __future__ import annotations

from typing import Any

import highspy
import msgspec
import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.prices import bound_s, clearing_prices, priced, sums
from lepton_ai.placement.problem import Floats, Indices, Problem

__all__ = ["Relaxation", "cheapest", "relaxed"]

#: Columns that are dearer than a job's cheapest by more are left out at first.
_NEAR = 0.01
#: Jobs that more than one column is left to at first: those whose second column is nearest to the first.
_UNDECIDED = 4_000
#: When optimum and bound are taken to be the same: the solver's own tolerances, where kernels tie by the thousand.
_SAME = 1e-5
#: The price of devices that are not ready in time, beside the highest of the others.
_TOO_DEAR = 1e9
#: A smaller share of a job is the solver's rounding.
_NOTHING = 1e-9


class Relaxation(msgspec.Struct, frozen=True):
    """The optimum with jobs shared out. The pairs are sorted by job and have all jobs that can be run."""

    makespan_s: float
    bound_s: float
    """What the prices prove; below `makespan_s` by rounding only, unless the search was cut short."""
    prices: Floats
    """[column]"""
    job: Indices
    """[pair]"""
    column: Indices
    """[pair]"""
    share: Floats
    """[pair]: how much of the job goes there; more than 0, together 1 for each job."""


def relaxed(problem: Problem) -> Relaxation:
    """The linear program's optimum. Jobs that nobody can run are left out.

    Where the solver gives up, as it may where costs are a hundred powers of ten apart, each job goes whole to the
    column that costs it least at the clearing prices, and the bound is what those prove.
    """
    best = prices = clearing_prices(problem)
    bound = bound_s(problem, prices)
    pairs = _Pairs(np.empty(0, np.intp), np.empty(0, np.intp))
    if bound <= 0:
        return Relaxation(0.0, 0.0, prices, pairs.job, pairs.column, np.empty(0))
    while True:
        program, before = _Program.of(problem, bound), (bound, pairs.job.size)
        pairs = program.near(prices).joined(pairs, problem.seconds.shape[1])
        try:
            makespan_s, prices, share = program.solve(pairs)
        except _Unsolved:
            return _each_at_its_cheapest(problem, best, bound)
        proven = min(bound_s(problem, prices), program.next_ready_s)
        if proven > bound:
            bound, best = proven, prices
        if makespan_s <= bound * (1 + _SAME) or (bound, pairs.job.size) == before:
            break
    taken = share > _NOTHING
    return Relaxation(makespan_s, bound, best, pairs.job[taken], pairs.column[taken], share[taken])


def cheapest(problem: Problem, rate: Floats, end_s: float, start: Relaxation) -> Relaxation:
    """As `start`, but what costs least of all that ends by then, which has to be no sooner than `start` does.

    `rate`: [column] what a second of work costs there. The prices are those that decide: with the rates.
    """
    program, prices = _Program.of(problem, end_s), rate
    pairs = program.near(start.prices).joined(_Pairs(start.job, start.column), rate.size)
    while True:
        before = pairs.job.size
        pairs = pairs.joined(program.near(prices), rate.size)
        try:
            _, prices, share = program.solve(pairs, rate)
        except _Unsolved:
            return start
        if pairs.job.size == before:
            break
    taken = share > _NOTHING
    return Relaxation(end_s, start.bound_s, prices, pairs.job[taken], pairs.column[taken], share[taken])


class _Unsolved(Exception):
    """The solver found no optimum."""


def _each_at_its_cheapest(problem: Problem, prices: Floats, bound: float) -> Relaxation:
    column, _ = _two_cheapest(problem.seconds, prices)
    job = np.flatnonzero(column >= 0)
    return Relaxation(bound, bound, prices, job, column[job], np.ones(job.size))


class _Pairs(msgspec.Struct, frozen=True):
    """Which columns are left to which jobs, sorted by job and then column."""

    job: Indices
    column: Indices

    def joined(self, others: _Pairs, columns: int) -> _Pairs:
        keys = np.union1d(self.job * columns + self.column, others.job * columns + others.column)
        return _Pairs(keys // columns, keys % columns)


class _Program(msgspec.Struct, frozen=True):
    """The program over the devices that are ready before some time, which is a bound."""

    problem: Problem
    from_s: float
    """The time; what is solved is in its units."""
    slots: Floats
    """[column]: slots of its devices that are ready; 0 where none is."""
    begun_s: Floats
    """[column]: seconds of work that those have."""
    least_s: float
    """When the last of them is ready."""
    next_ready_s: float
    """When the first of the others is."""

    @classmethod
    def of(cls, problem: Problem, from_s: float) -> _Program:
        # A device that a job cannot do without is ready exactly at a bound, which is told a little lower.
        ready = problem.ready <= from_s * (1 + 1e-9)
        columns = problem.seconds.shape[1]
        column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
        slots = problem.slots[ready]
        return cls(
            problem,
            from_s,
            sums(column[ready], slots, columns),
            sums(column[ready], slots * problem.ready[ready], columns),
            float(problem.ready[ready].max(initial=0.0)),
            float(problem.ready[~ready].min(initial=np.inf)),
        )

    def near(self, prices: Floats) -> _Pairs:
        """The pairs that cost a job least, and those that cost little more."""
        usable = np.where(self.slots > 0, prices, np.inf)
        best, gap = _two_cheapest(self.problem.seconds, usable)
        jobs = np.flatnonzero(best >= 0)
        near = jobs[gap[jobs] <= _NEAR]
        if near.size > _UNDECIDED:
            near = np.sort(near[np.argpartition(gap[near], _UNDECIDED)[:_UNDECIDED]])
        cost = priced(self.problem.seconds[near], usable)
        row, column = np.nonzero(cost <= (1 + _NEAR) * cost[np.arange(near.size), best[near], np.newaxis])
        return _Pairs(jobs, best[jobs]).joined(_Pairs(near[row], column), prices.size)

    def solve(self, pairs: _Pairs, rate: Floats | None = None) -> tuple[float, Floats, Floats]:
        """The optimum in seconds, [column] its prices, [pair] the shares; the jobs of no pair are left out.

        With rates, what costs least and ends at the time of this program; the prices have them in.
        """
        need = self.problem.seconds[pairs.job, pairs.column] / self.from_s
        first = np.diff(pairs.job, prepend=-1) != 0
        last = np.append(first[1:], True)
        alone = first & last
        fixed = sums(pairs.column[alone], need[alone], self.slots.size) + self.begun_s / self.from_s
        open_ = np.flatnonzero(~alone)
        row = np.cumsum(first[open_]) - 1
        rows = int(row[-1]) + 1 if open_.size else 0
        used = np.flatnonzero(self.slots > 0)
        row_of = np.zeros(self.slots.size, np.intp)
        row_of[used] = rows + np.arange(used.size)

        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = 1 + open_.size, rows + used.size
        lp.col_cost_ = np.append(1.0, np.zeros(open_.size) if rate is None else rate[pairs.column[open_]] * need[open_])
        lp.col_lower_ = np.append(self.least_s / self.from_s if rate is None else 1.0, np.zeros(open_.size))
        lp.col_upper_ = np.append(np.inf if rate is None else 1.0, np.full(open_.size, np.inf))
        lp.row_lower_ = np.append(np.ones(rows), np.full(used.size, -np.inf))
        lp.row_upper_ = np.append(np.ones(rows), -fixed[used])
        entries = np.empty(2 * open_.size, np.int32)
        entries[0::2], entries[1::2] = row, row_of[pairs.column[open_]]
        values = np.ones(2 * open_.size)
        values[1::2] = need[open_]
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_ = np.append(0, used.size + 2 * np.arange(open_.size + 1)).astype(np.int32)
        lp.a_matrix_.index_ = np.append(row_of[used], entries).astype(np.int32)
        lp.a_matrix_.value_ = np.append(-self.slots[used], values)
        solution = _solved(lp)
        amounts, duals = np.array(solution.col_value), np.array(solution.row_dual)
        share = np.ones(pairs.job.size)
        share[open_] = amounts[1:]
        price = np.maximum(-duals[rows:], 0.0) + (0.0 if rate is None else rate[used])
        # Nobody is to be sent where no device is ready in time.
        prices = np.full(self.slots.size, _TOO_DEAR * max(float(price.max(initial=0.0)), 1.0))
        prices[used] = price
        return float(amounts[0]) * self.from_s, prices, share


def _solved(lp: Any) -> Any:
    # The class above it prints a banner when it is made, before it can be told to be silent.
    solver = highspy.highs._Highs()
    solver.setOptionValue("output_flag", False)
    # Not by `threads`: the number is the whole process's, and with another than somebody set before it solves nothing.
    solver.setOptionValue("parallel", "off")
    solver.passModel(lp)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise _Unsolved
    return solver.getSolution()


@compiled
def _two_cheapest(seconds: Floats, prices: Floats) -> tuple[Indices, Floats]:
    """[job]: the column that costs least, or -1; by what part the second costs more (an infinite price: none)."""
    jobs, columns = seconds.shape
    best = np.full(jobs, -1, np.intp)
    gap = np.full(jobs, np.inf)
    for job in range(jobs):
        least, second = np.inf, np.inf
        for column in range(columns):
            if prices[column] < np.inf and seconds[job, column] < np.inf:
                cost = seconds[job, column] * prices[column]
                if cost < least:
                    best[job], least, second = column, cost, least
                elif cost < second:
                    second = cost
        if second < np.inf:
            gap[job] = second / least - 1 if least > 0 else 0.0
    return best, gap
