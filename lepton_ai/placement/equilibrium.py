"""Prices of devices' time in a millisecond: the equilibrium of a market in which every job buys where it is cheapest.

A job divides itself among the columns by `price slots (price seconds) ** -sharpness`, so evenly where all cost the
same, which is the entropic form of the linear
program's dual (for the market's side of it: Cole and Devanur et al., "Convex program duality, Fisher markets, and Nash
social welfare", EC 2017). Prices are in equilibrium where every column is asked for as much as it can do by one time.
Newton's method in the prices' logarithms follows the equilibrium while the sharpness grows. `prices.py` is the careful
way to a bound; this is for whoever has to decide in the meantime, and ends a few hundredths of a percent below it.
"""

from __future__ import annotations

import msgspec
import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.prices import sums
from lepton_ai.placement.problem import Floats, Indices

__all__ = ["Equilibrium", "Supply", "equilibrium"]

#: Sharpness of each stage: each twice the one before. The coarse ones look at a sample of the jobs.
_COARSE = (8.0, 16.0, 32.0)
_FINE = (64.0, 128.0, 256.0)
#: The fine ones look at so many; what more there are only take part in the last steps.
_MANY, _LAST_STEPS = 25_000, 2
_SAMPLE, _SAMPLE_A_COLUMN = 512, 32
#: Jobs that choose among more columns than that are alike enough that so many of them tell how the prices of the
#: columns change what is asked for.
_FEW = 8
_SLOPES, _SLOPES_A_COLUMN = 256, 16
#: Newton steps of a stage at most.
_STEPS = 12
#: Of the slope of a price alone: what is added to it.
_DAMPING = 0.1
#: Times the sharpness: the longest step of a price's logarithm, and the one after which the next stage begins.
_REACH, _NEAR = 3.0, 0.5
#: Beside what all need together: how long a job may take alone.
_ROOM = 1.05
#: Times the sharpness: the longest step of a price's logarithm, and the one after which the next stage begins.
_REACH, _NEAR = 1.5, 0.5


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
    jobs, columns = seconds.shape
    sample = _evenly(seconds, max(_SAMPLE, _SAMPLE_A_COLUMN * columns))
    many = _evenly(seconds, _MANY)
    level = before = _where_no_column_is_preferred(sample)
    longest_job_s = _longest_job_s(seconds, *supply.soonest())
    most = np.full(columns, np.inf)
    level, before = _cleared(sample, jobs, supply, most, level, before, _COARSE, _STEPS)
    ready, slots = supply.soonest()
    limit_s = _ROOM * max(longest_job_s, supply.end_s(_cost(seconds, most, level), np.exp(level)))
    most = np.maximum(limit_s - ready, 0.0) * slots
    level, before = _cleared(many, jobs, supply, most, level, before, _FINE, _STEPS)
    if len(many) < jobs:
        level, _ = _cleared(seconds, jobs, supply, most, level, level, _FINE[-1:], _LAST_STEPS)
    proven_s = supply.end_s(_cost(seconds, most, level), np.exp(level))
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
    before: Floats,
    stages: tuple[float, ...],
    steps: int,
) -> tuple[Floats, Floats]:
    """[column] log prices after the stages, and before the last of them."""
    share = jobs / len(seconds)
    width = sums(supply.column, supply.slots, supply.columns)
    thin = max(1, len(seconds) // max(_SLOPES, _SLOPES_A_COLUMN * level.size))
    for sharpness in stages:
        # What is left of the way to the sharpest prices halves from stage to stage.
        level, before = level + (level - before) / 2, level
        for _ in range(steps):
            asked, change, cost = _asked(seconds, most, np.exp(level), width, sharpness, thin)
            if not asked.any():
                return level, before
            proven_s = supply.end_s(share * cost, np.exp(level))
            step = _newton(share * asked, share * change, *supply.by(proven_s), _REACH / sharpness)
            level = level + step
            if np.abs(step).max() * sharpness < _NEAR:
                break
    return level, before


def _cost(seconds: Floats, most: Floats, level: Floats) -> float:
    """What the jobs pay at the least."""
    _, _, cost = _asked(seconds, most, np.exp(level), most, np.inf, len(seconds))
    return cost


def _where_no_column_is_preferred(seconds: Floats) -> Floats:
    """[column]: log prices at which, on the mean of those who can run there, every column costs as much."""
    logs = np.log(np.maximum(seconds, 1e-300))
    can = np.isfinite(logs)
    mean: Floats = -np.where(can, logs, 0.0).sum(axis=0) / np.maximum(can.sum(axis=0), 1)
    level: Floats = mean - mean.mean()
    return level


def _newton(asked: Floats, change: Floats, offered: Floats, slots: Floats, reach: float) -> Floats:
    """[column]: the step of the log prices towards `asked + change step = offered + slots later`, for one `later`.

    All prices times a factor change nothing, so the steps sum to 0.
    """
    columns = asked.size
    matrix = np.zeros((columns + 1, columns + 1))
    matrix[:columns, :columns] = change
    matrix[:columns, columns] = -slots
    matrix[columns, :columns] = 1
    # Who is asked by nobody has no slope; this much keeps the system regular and such a price falling.
    matrix[np.arange(columns), np.arange(columns)] -= 1e-6 * asked.sum() / columns + _DAMPING * asked
    matrix[:columns] /= max(float(asked.sum()), 1e-300)
    excess = (offered - asked) / max(float(asked.sum()), 1e-300)
    return np.clip(np.linalg.solve(matrix, np.append(excess, 0.0))[:columns], -reach, reach)


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
def _asked(
    seconds: Floats, most: Floats, prices: Floats, width: Floats, sharpness: float, thin: int
) -> tuple[Floats, Floats, float]:
    """[column] seconds asked for; [column, column] how they change with log prices; what the jobs pay at the least.

    Of the jobs that choose among more than a few columns, one in `thin` tells the second.
    """
    jobs, columns = seconds.shape
    asked = np.zeros(columns)
    change = np.zeros((columns, columns))
    cost = 0.0
    # Columns dearer than that get less than a hundredth of the job.
    dear = np.exp(5.0 / sharpness)
    at = np.empty(columns, np.intp)
    part = np.empty(columns)
    for job in range(jobs):
        least = np.inf
        for column in range(columns):
            if seconds[job, column] <= most[column]:
                least = min(least, prices[column] * seconds[job, column])
        cost += least
        few, total = 0, 0.0
        for column in range(columns):
            its = prices[column] * seconds[job, column]
            if its <= least * dear and seconds[job, column] <= most[column]:
                at[few] = column
                part[few] = prices[column] * width[column]
                if its > least:
                    part[few] *= np.exp(sharpness * np.log(least / its))
                total += part[few]
                few += 1
        for one in range(few):
            column = at[one]
            takes = seconds[job, column] * part[one] / total
            asked[column] += takes
            if 1 < few <= _FEW or (few > 1 and job % thin == 0):
                takes *= sharpness if few <= _FEW else thin * sharpness
                change[column, column] -= takes
                takes /= total
                for other in range(few):
                    change[column, at[other]] += takes * part[other]
    return asked, change, cost
