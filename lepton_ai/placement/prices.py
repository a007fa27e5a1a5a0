"""What a second of each device is worth: the prices at which every device has as much to do as the others.

Let jobs go where their time costs least. If devices are priced so that all are then busy for the same time, nothing
can be moved to end sooner, and the prices are those of the linear program's dual. Prices are by column of a Problem's
`seconds`, so the devices of a class share one, and a second of a device of s slots costs s times as much.

Whatever the prices, `bound_s` holds (Lagrange's weak duality; for this problem Lenstra, Shmoys and Tardos,
"Approximation algorithms for scheduling unrelated parallel machines", Math. Programming 46, 1990): a plan that ends
at T gives a device d no more than slots[d] max(0, T - ready[d]) seconds of work, so with l >= 0

    sum over j of min over c of l[c] seconds[j, c]  <=  sum over d of l[c(d)] slots[d] max(0, T - ready[d]).

Good prices are found by smoothing the minimum to (sum over c of (l[c] p[j, c]) ** (-1 / tau)) ** (-tau), which is
concave in l, and by Newton's method in log(l), at first with a large tau and on a sample of the jobs, then with small
ones on more of them and on each job's few cheapest columns.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import Floats, Indices, Problem

__all__ = ["bound_s", "clearing_prices", "priced", "sums"]

#: Smoothing of each stage.
_COARSE = (1.0, 0.3, 0.1)
_FINE = (0.03, 0.01, 0.003, 0.001, 0.0003)
_STEPS = 12
_ROUNDS = 8
#: Whoever is paid a smaller part of all is priced out.
_NOTHING = 1e-6
#: Jobs looked at, coarsely (so many a column, but at least and at most) and finely.
_COARSE_A_COLUMN, _COARSE_LEAST, _COARSE_MOST = 24, 1_000, 3_000
_FINE_MOST = 30_000
#: And so many of each one's cheapest columns that together they are this many. Those behind get nothing at so small
#: a tau; but kernels whose jobs differ only in size have dozens of columns that are equally cheap.
_FINE_CELLS = 1 << 21
#: How often they are chosen anew in a stage, where others have become cheaper; by what part a bound then differs.
_LOOKS, _UNSEEN = 2, 1e-6
#: Cells of `seconds` that one pass works on: what fits into a processor's cache.
_CELLS = 1 << 17
#: What a sum of so many numbers may be off by, relatively: a bound is told that much lower.
_ROUNDING = 1e-12


def bound_s(problem: Problem, prices: Floats) -> float:
    """Seconds that no plan's makespan is below, by these prices of the columns (finite, none negative).

    Jobs that nobody can run are left out.
    """
    return _Supply.of(problem).end_s(_least_paid(problem.seconds, prices), prices) * (1 - _ROUNDING)


def clearing_prices(problem: Problem) -> Floats:
    """[column]: prices whose bound is close to the best there is; those of devices that nobody needs are near 0."""
    columns = problem.seconds.shape[1]
    able = np.flatnonzero(_can_run(problem.seconds))
    if not able.size:
        return np.ones(columns)
    supply = _Supply.of(problem)
    rows = _sample(able, min(_COARSE_MOST, max(_COARSE_LEAST, _COARSE_A_COLUMN * columns)))
    coarse = _Market(_logs(problem.seconds[rows]), None, able.size / rows.size, supply)
    # Where every device's price is its speed, no job prefers one: the mean over those who can run there.
    can = np.isfinite(coarse.logs)
    start = -np.where(can, coarse.logs, 0.0).sum(axis=0) / np.maximum(can.sum(axis=0), 1)
    prices, end_s = _coarsely(coarse, np.exp(start))
    return _finely(problem, able, coarse, prices, end_s)


def _finely(problem: Problem, able: Indices, coarse: _Market, prices: Floats, end_s: float) -> Floats:
    """The best of the prices that are found with less and less smoothing, by what they prove of the whole problem."""
    rows = _sample(able, _FINE_MOST)
    best_s, best, market = -1.0, prices, None
    for tau in _FINE:
        for _ in range(_LOOKS):
            if market is None:
                near = _nearest(problem.seconds, rows, prices, _FINE_CELLS // rows.size)
                logs = _logs(problem.seconds[rows[:, np.newaxis], near])
                market = _Market(logs, near, able.size / rows.size, coarse.supply)
            prices, _, seen_s = market.cleared(prices, coarse.supply.by(end_s), tau, coarse)
            end_s = bound_s(problem, prices)
            if end_s > best_s:
                best_s, best = end_s, prices
            if end_s > seen_s * (1 - _UNSEEN) or market.logs.shape[1] == prices.size:
                break
            # Other columns have become cheaper than those that were looked at.
            market = None
        end_s = best_s
    return best


def _coarsely(market: _Market, prices: Floats) -> tuple[Floats, float]:
    """Prices found coarsely, and when the work then ends.

    Who is not ready before the end has nothing to offer, and when that is depends on the prices: looked for between
    what they prove and what a plan would reach that fills every device by the same part of its time.
    """
    supply = market.supply
    lower_s, by_s = 0.0, 2 * max(float(supply.ready[-1]), market.cleared(prices, supply.in_all(), _COARSE[0])[2])
    for _ in range(_ROUNDS):
        offered = supply.by(by_s)
        for tau in _COARSE[:-1] if lower_s == 0 else ():
            prices, _, _ = market.cleared(prices, offered, tau)
        prices, part, lower_s = market.cleared(prices, offered, _COARSE[-1])
        begun = supply.ready[supply.ready < by_s]
        upper_s = float((begun + part * (by_s - begun)).max(initial=0.0))
        if upper_s - lower_s <= _COARSE[-1] * upper_s:
            break
        by_s = (lower_s + upper_s) / 2
    return prices, lower_s


class _Supply(msgspec.Struct, frozen=True):
    """What devices can still do, soonest first."""

    ready: Floats
    slots: Floats
    column: Indices
    columns: int

    @classmethod
    def of(cls, problem: Problem) -> _Supply:
        column = np.arange(problem.devices) if problem.class_of is None else problem.class_of
        order = np.argsort(problem.ready, kind="stable")
        return cls(problem.ready[order], problem.slots[order], column[order], problem.seconds.shape[1])

    def by(self, end_s: float) -> Floats:
        """[column]: seconds of work that can be done until then."""
        return sums(self.column, self.slots * np.maximum(0.0, end_s - self.ready), self.columns)

    def in_all(self) -> Floats:
        """[column]: slots."""
        return sums(self.column, self.slots, self.columns)

    def end_s(self, cost: float, prices: Floats) -> float:
        """When work of this cost could at the soonest have been done."""
        if cost <= 0:
            return 0.0
        weight = np.cumsum(prices[self.column] * self.slots)
        begun = np.cumsum(prices[self.column] * self.slots * self.ready)
        # The cost of all that could be done until each device joins in; it never falls from one to the next.
        until = np.append(self.ready[1:], np.inf)
        with np.errstate(invalid="ignore"):
            last = int(np.argmax(weight * until - begun >= cost))
        return float((cost + begun[last]) / weight[last]) if weight[last] > 0 else 0.0


class _Market(msgspec.Struct, frozen=True):
    """Jobs that choose among columns: all of them, or the few near ones of each."""

    logs: Floats
    """[job, choice]: logarithm of the seconds."""
    near: Indices | None
    """[job, choice]: the column; None where the choices are the columns."""
    share: float
    """For how many jobs each of these stands."""
    supply: _Supply

    def cleared(
        self, prices: Floats, offered: Floats, tau: float, alike: _Market | None = None
    ) -> tuple[Floats, float, float]:
        """[column] prices at which of all that is offered the same part is taken; that part; the end they prove.

        How demand answers to prices is told by other jobs that are alike, where given: fewer, or of all columns.
        """
        best_s, best, highest, longest = -1.0, prices, -1.0, 3 * max(tau, 0.05)
        level = from_level = np.log(prices)
        move = np.zeros_like(level)
        for _ in range(_STEPS):
            prices = np.exp(level)
            hard, paid, share = self._paid(level, tau)
            if (proven_s := self.supply.end_s(hard, prices)) > best_s:
                best_s, best = proven_s, prices
            taken = self._taken(paid)
            total = float(taken.sum())
            part = total / float(prices @ offered)
            if part < highest:  # too far: half the way
                move, longest = move / 2, longest / 2
            else:
                highest, from_level = part, level
                excess = taken - part * prices * offered
                if np.abs(excess).max() * excess.size < tau * total:
                    break
                slope = _slope(*(alike._paid(level, tau)[1:] if alike else (paid, share)), tau)
                damping = 1e-3 * taken / tau + 1e-12 * total
                move = np.linalg.solve(slope + np.diag(damping), excess)
                move *= min(1.0, longest / max(float(np.abs(move).max()), longest))
                # Who offers nothing is priced out at once: Newton's steps would take long over it.
                move = np.where(offered > 0, move, np.where(taken > _NOTHING * total, longest, 0.0))
            level = from_level + move
            level = np.maximum(level - level.max(), -_LOWEST)
        return best, highest, best_s

    def _paid(self, level: Floats, tau: float) -> tuple[float, Floats, Floats]:
        """What all jobs pay at least; [job, choice] what each pays, smoothed, and which part of it that is."""
        cost = self.logs + (level if self.near is None else level[self.near])
        least = cost.min(axis=1)
        # What is 0 but for its last digits would make the products a hundred times slower.
        share = np.exp(np.maximum((least[:, np.newaxis] - cost) / tau, -_FAR))
        total = share.sum(axis=1)
        share /= total[:, np.newaxis]
        hard = np.exp(least) * self.share
        return float(hard.sum()), (hard * total**-tau)[:, np.newaxis] * share, share

    def _taken(self, paid: Floats) -> Floats:
        """[column]: what it is paid by all."""
        return paid.sum(axis=0) if self.near is None else sums(self.near.ravel(), paid.ravel(), self.supply.columns)


def _slope(paid: Floats, share: Floats, tau: float) -> Floats:
    """[column, column]: minus how what is paid changes with the logarithms of prices; the choices are the columns."""
    found: Floats = (np.diag(paid.sum(axis=0)) - paid.T @ share) / tau
    return found


def sums(group: Indices, values: Floats, groups: int) -> Floats:
    """[group]: the sum of its values."""
    return np.asarray(np.bincount(group, values, groups), np.float64)


#: Beyond so many smoothings a column is as good as not there.
_FAR = 60.0
#: Logarithm of the least price beside the highest: nobody needs that device.
_LOWEST = 300.0


@compiled
def _least_paid(seconds: Floats, prices: Floats) -> float:
    """What all jobs pay together, each where it pays least; in parts, so that little is lost to rounding."""
    jobs, columns = seconds.shape
    total = part = 0.0
    for job in range(jobs):
        least = np.inf
        for at in range(columns):
            # At a price of 0 what cannot run would be no number.
            if seconds[job, at] < np.inf:
                least = min(least, prices[at] * seconds[job, at])
        if least < np.inf:
            part += least
        if job % 1024 == 0:
            total += part
            part = 0.0
    return total + part


@compiled
def _can_run(seconds: Floats) -> NDArray[np.bool_]:
    """[job]: whether any column can."""
    jobs, columns = seconds.shape
    found = np.zeros(jobs, np.bool_)
    for job in range(jobs):
        for at in range(columns):
            if seconds[job, at] < np.inf:
                found[job] = True
                break
    return found


def _sample(able: Indices, most: int) -> Indices:
    """That many of the jobs, evenly chosen; the same ones each time."""
    if able.size <= most:
        return able
    return np.sort(np.random.default_rng(0).choice(able, most, replace=False))


def _logs(seconds: Floats) -> Floats:
    """Logarithms, also of no time at all."""
    return np.log(np.maximum(seconds, 1e-300))


def priced(seconds: Floats, prices: Floats) -> Floats:
    """[job, column]: cost. What a job cannot run on costs infinitely much at any price, and at none."""
    with np.errstate(invalid="ignore"):
        found = seconds * prices
    found[np.isnan(found)] = np.inf
    return found


def _nearest(seconds: Floats, rows: Indices, prices: Floats, most: int) -> Indices:
    """[row, choice]: the columns that cost each job least, so many at most."""
    if prices.size <= most:
        return np.tile(np.arange(prices.size), (rows.size, 1))
    near = np.empty((rows.size, most), np.intp)
    step = max(1, _CELLS // prices.size)
    for first in range(0, rows.size, step):
        some = priced(seconds[rows[first : first + step]], prices)
        near[first : first + step] = np.argpartition(some, most, axis=1)[:, :most]
    return near
