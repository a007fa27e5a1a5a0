"""Prices of devices' time in a millisecond: the equilibrium of a market in which every job buys where it is cheapest.

A job divides what it pays among the columns by `worth (price seconds) ** -sharpness`, so evenly where all cost the
same, and pays the CES cost `(sum of these) ** (-1 / sharpness)`, which its least cost becomes as the sharpness grows
(Arrow, Chenery, Minhas and Solow, Rev. Economics and Statistics 43, 1961). What it asks for is that cost's derivative
(Shephard's lemma), so where every column is asked for as much as it can do by one time, the smoothed dual of the
linear program, that time, is highest. Newton's method in the prices' logarithms climbs it while the sharpness grows: a
step after which the time is no later is taken back. `prices.py` is the careful way to a bound; this is for whoever has
to decide in the meantime, and ends a few hundredths to a tenth of a percent below it.
"""

from __future__ import annotations

import msgspec
import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.prices import sums
from lepton_ai.placement.problem import Floats, Indices

__all__ = ["Equilibrium", "Supply", "equilibrium", "power_of_two"]

#: Each stage: the sharpness is 2 to this power; jobs looked at for each column, evenly chosen.
_COARSE = ((3, 8), (4, 8), (5, 8))
_FINE = ((6, 32), (7, 32))
#: The sharpest comes last, at first for so many jobs, then for all.
_LAST, _MANY = 8, 25_000
#: Fewest jobs that a stage looks at, if there are as many; times that it looks at them, at most, and at all of very
#: many.
_SAMPLE = 512
_STEPS, _STEPS_OF_ALL = 9, 3
#: A stage ends where what is asked for is so far off what there is, in value; the last ones where it is the second.
_OFF, _LAST_OFF = 0.03, 0.005
#: Jobs that choose among more columns than that are alike enough that so many of them tell how the prices of the
#: columns change what is asked for.
_FEW = 8
_SLOPES, _SLOPES_A_COLUMN = 256, 16
#: Beside what all need together: how long a job may take alone.
_ROOM = 1.05
#: The first step of a stage is about as long as such a part of what doubles a price's share, and the next ones so many
#: times as long, or as short where the step before was too long.
_REACH, _LONGER, _FARTHEST = 8.0, 4.0, 128.0
_REGULAR = 1e-9


class Supply(msgspec.Struct, frozen=True):
    """What the devices of each column can do. A device of s slots works s seconds off in one."""

    ready: Floats
    """[device]: seconds, as in a Problem; so too the next two."""
    slots: Floats
    column: Indices
    columns: int

    def by(self, end_s: float) -> tuple[Floats, Floats]:
        """[column]: seconds of work that can be done until then; slots of those that are ready by then."""
        left = end_s - self.ready
        open_ = np.where(left > 0, self.slots, 0.0)
        return (
            sums(self.column, open_ * left, self.columns),
            sums(self.column, open_, self.columns),
        )

    def soonest(self) -> tuple[Floats, Floats]:
        """[column]: when the first of its devices is ready, and the most slots that one has."""
        ready, slots = np.full(self.columns, np.inf), np.zeros(self.columns)
        np.minimum.at(ready, self.column, self.ready)
        np.maximum.at(slots, self.column, self.slots)
        return ready, slots

    def end_s(self, cost: float, prices: Floats) -> float:
        """When work of this cost could at the soonest have been done, at these prices."""
        order = np.argsort(self.ready)
        ready = self.ready[order]
        worth = (prices[self.column] * self.slots)[order]
        rate = np.cumsum(worth)
        ends = (cost + np.cumsum(worth * ready)) / np.maximum(rate, 1e-300)
        # The first device whose successors are not ready any sooner than those before them are done.
        return float(ends[np.argmax(ends <= np.append(ready[1:], np.inf))])


class Equilibrium(msgspec.Struct, frozen=True):
    """Prices, and what they prove."""

    prices: Floats
    """[column]: of a second, such that the slots ready by `bound_s` are worth 1 together."""
    bound_s: float
    """No plan ends sooner."""
    most: Floats
    """[column]: seconds; a job that takes longer there is not to be placed there."""


def equilibrium(seconds: Floats, supply: Supply) -> Equilibrium:
    """Prices for jobs that each have a column that can run them.

    A job that alone would take longer than all need together is not to be bought where it does (Lenstra, Shmoys and
    Tardos, "Approximation algorithms for scheduling unrelated parallel machines", Math. Programming 46, 1990).
    """
    columns = seconds.shape[1]
    level = _where_no_column_is_preferred(_evenly(seconds, _SAMPLE))
    longest_job_s = _longest_job_s(seconds, *supply.soonest())
    most = np.full(columns, np.inf)
    for doublings, a_column in _COARSE:
        rows = _evenly(seconds, max(_SAMPLE, a_column * columns))
        level = _cleared(rows, len(seconds), supply, most, level, doublings, _STEPS, _OFF)
    ready, slots = supply.soonest()
    limit_s = _ROOM * max(longest_job_s, supply.end_s(_paid(seconds, most, np.exp(level)), np.exp(level)))
    most = np.maximum(limit_s - ready, 0.0) * slots
    for doublings, a_column in _FINE:
        rows = _evenly(seconds, max(_SAMPLE, a_column * columns))
        level = _cleared(rows, len(seconds), supply, most, level, doublings, _STEPS, _OFF)
    many = _evenly(seconds, _MANY)
    level = _cleared(many, len(seconds), supply, most, level, _LAST, _STEPS, _LAST_OFF)
    if len(many) < len(seconds):
        level = _cleared(seconds, len(seconds), supply, most, level, _LAST, _STEPS_OF_ALL, _LAST_OFF, _FARTHEST)
    proven_s = supply.end_s(_paid(seconds, most, np.exp(level)), np.exp(level))
    # No plan that ends by the limit ends sooner than what is proven for those, and the others end later.
    bound_s = max(min(proven_s, limit_s), longest_job_s)
    _, slots = supply.by(bound_s)
    prices = np.exp(level)
    return Equilibrium(prices / max(float(prices @ slots), 1e-300), bound_s, most)


def _evenly(seconds: Floats, rows: int) -> Floats:
    """That many of the rows or up to twice as many, evenly chosen; all where there are no more."""
    every = len(seconds) // rows
    return np.ascontiguousarray(seconds[::every]) if every > 1 else seconds


def _cleared(
    seconds: Floats,
    jobs: int,
    supply: Supply,
    most: Floats,
    level: Floats,
    doublings: int,
    steps: int,
    enough: float,
    reach: float = _REACH,
) -> Floats:
    """[column] log prices near the equilibrium for so many jobs as these."""
    share = jobs / len(seconds)
    sharpness = 2.0**doublings
    thin = max(1, len(seconds) // max(_SLOPES, _SLOPES_A_COLUMN * level.size))
    weight = np.exp(level) * sums(supply.column, supply.slots, supply.columns)
    weight /= weight.sum()
    best_s = 0.0
    step = excess = volume = slots = np.zeros(level.size)
    slope = np.diag(step)
    for turn in range(steps):
        prices = np.exp(level + step)
        asked, change, cost = _asked(seconds, most, prices, weight, doublings, thin)
        end_s = supply.end_s(share * cost, prices)
        if end_s > best_s:
            level, best_s, reach = level + step, end_s, min(_FARTHEST, reach * (_LONGER if turn else 1))
            offered, slots = supply.by(end_s)
            excess, volume, slope = share * asked - offered, share * asked + offered, share * change
            if prices @ np.abs(excess) < enough * share * cost:
                break
        elif turn:
            reach /= _LONGER
        else:
            break
        step = _newton(excess, slope, volume, slots, sharpness / reach)
    return level


def _where_no_column_is_preferred(seconds: Floats) -> Floats:
    """[column]: log prices at which, on the mean of those who can run there, every column costs as much."""
    logs = np.log(np.maximum(seconds, 1e-300))
    can = np.isfinite(logs)
    mean: Floats = -np.where(can, logs, 0.0).sum(axis=0) / np.maximum(can.sum(axis=0), 1)
    level: Floats = mean - mean.mean()
    return level


def _newton(excess: Floats, change: Floats, volume: Floats, slots: Floats, damping: float) -> Floats:
    """[column]: the step of the log prices towards `excess + change step = slots later`, for one `later`.

    All prices times a factor change nothing, so the steps sum to 0. Damped as by Levenberg and Marquardt, with what is
    asked and offered as the measure: so the price of a column that nobody asks for falls by at most 1 / damping.
    """
    columns = excess.size
    # What is neither asked for nor to be had has no slope; this much keeps the system regular.
    volume = volume + _REGULAR * volume.sum()
    matrix = np.zeros((columns + 1, columns + 1))
    matrix[:columns, :columns] = change - np.diag(damping * volume)
    matrix[:columns, columns] = -slots
    matrix[columns, :columns] = 1
    # In parts of all there is: times may be of any size.
    matrix[:columns] /= volume.sum()
    step: Floats = np.linalg.solve(matrix, np.append(-excess / volume.sum(), 0.0))[:columns]
    return step


@compiled
def _longest_job_s(seconds: Floats, ready: Floats, slots: Floats) -> float:
    """When the job that takes longest even where it ends soonest would end, if it were alone."""
    longest = 0.0
    for job in range(seconds.shape[0]):
        soonest = np.inf
        for column in range(seconds.shape[1]):
            soonest = min(soonest, ready[column] + seconds[job, column] / slots[column])
        longest = max(longest, soonest)
    return longest


@compiled
def power_of_two(ratio: float, doublings: int) -> float:
    """The ratio to the power of `2 ** doublings`: a tenth of what logarithm and exponential take."""
    for _ in range(doublings):
        ratio *= ratio
    return ratio


@compiled
def _paid(seconds: Floats, most: Floats, prices: Floats) -> float:
    """What the jobs pay at the least."""
    cost = 0.0
    for job in range(seconds.shape[0]):
        least = np.inf
        for column in range(seconds.shape[1]):
            if seconds[job, column] <= most[column]:
                least = min(least, prices[column] * seconds[job, column])
        cost += least
    return cost


@compiled
def _asked(
    seconds: Floats, most: Floats, prices: Floats, weight: Floats, doublings: int, thin: int
) -> tuple[Floats, Floats, float]:
    """[column] seconds asked for; [column, column] how they change with log prices; what the jobs pay.

    Of the jobs that choose among more than a few columns, one in `thin` tells the second.
    """
    jobs, columns = seconds.shape
    asked = np.zeros(columns)
    change = np.zeros((columns, columns))
    cost = 0.0
    sharpness = 2.0**doublings
    # Columns dearer than that get less than a hundredth of the job.
    dear = np.exp(5.0 / sharpness)
    at = np.empty(columns, np.intp)
    part = np.empty(columns)
    for job in range(jobs):
        least = np.inf
        for column in range(columns):
            if seconds[job, column] <= most[column]:
                least = min(least, prices[column] * seconds[job, column])
        few, total = 0, 0.0
        for column in range(columns):
            its = prices[column] * seconds[job, column]
            if its <= least * dear and seconds[job, column] <= most[column]:
                at[few] = column
                part[few] = weight[column]
                if its > least:
                    part[few] *= power_of_two(least / its, doublings)
                total += part[few]
                few += 1
        pays = least * total ** (-1 / sharpness)
        cost += pays
        for one in range(few):
            column = at[one]
            takes = pays / prices[column] * part[one] / total
            asked[column] += takes
            if 1 < few <= _FEW or (few > 1 and job % thin == 0):
                takes *= sharpness if few <= _FEW else thin * sharpness
                change[column, column] -= takes
                takes /= total
                for other in range(few):
                    change[column, at[other]] += takes * part[other]
    return asked, change, cost
