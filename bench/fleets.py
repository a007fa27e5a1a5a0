"""The fleets of `bench online`: how they are drawn, the measured one, and what each can carry.

**Drawn** (`drawn(number)`, the number is the seed): two to four kinds of device; of each kind four to eight devices,
for who balances load has several of each; all devices of a kind with one, two or four slots. The jobs are of twelve
rows (a kernel at a size): log-uniform from 1 to 100 ms on a slot of the slowest possible kind, their shares of the
stream from a flat Dirichlet law. A kind is faster than that by a factor log-uniform from 1 to 5, the spread between the
devices of the measured fleet. Even numbers are consistent: that factor holds for every row. Odd numbers are
inconsistent: each row and kind has a further log-normal factor (deviation 0.7), and of such pairs 0.15 cannot run.

**Measured** (`measured(folder, copies)`): the columns of `network_timings.csv` as kinds, so many devices of one slot of
each, its rows equally likely.

The capacity of a fleet is the largest arrival rate that some fixed split of each row over the kinds can carry: a linear
program. A load is a share of it.
"""

from __future__ import annotations

import csv
from pathlib import Path

import highspy
import msgspec
import numpy as np

from lepton_ai.placement.problem import Floats, Indices
from lepton_ai.placement.simulate import Fleet

__all__ = ["Mix", "drawn", "measured"]

_ROWS = 12
_FASTEST = 5.0
_AFFINITY, _CANNOT = 0.7, 0.15


class Mix(msgspec.Struct, frozen=True):
    """A fleet, and the jobs that come to it."""

    name: str
    fleet: Fleet
    share: Floats
    """[row]: its part of the jobs."""
    kind: Indices
    """[device]"""

    @property
    def best_s(self) -> float:
        """Mean seconds of a job on the device best for it: what responses are measured by."""
        return float(self.share @ self.fleet.seconds.min(axis=1))

    def capacity_hz(self) -> float:
        """Jobs a second that the best fixed split can carry."""
        return _best_split(self)

    def floor(self, load: float, capacity_hz: float) -> float:
        """The least mean time of a job over `best_s`, were there no waiting at all, of any split that carries this."""
        return _best_split(self, load * capacity_hz) / self.best_s


def drawn(number: int) -> Mix:
    """The fleet of a number, by the law above."""
    random = np.random.default_rng(number)
    kinds = int(random.integers(2, 5))
    devices = random.integers(4, 9, kinds)
    slots = random.choice([1.0, 2.0, 4.0], kinds)
    seconds = 1e-3 * 100 ** random.random((_ROWS, 1)) / _FASTEST ** random.random(kinds)
    share = random.dirichlet(np.ones(_ROWS))
    is_consistent = number % 2 == 0
    if not is_consistent:
        seconds *= np.exp(_AFFINITY * random.standard_normal(seconds.shape))
        cannot = random.random(seconds.shape) < _CANNOT
        cannot[np.arange(_ROWS), seconds.argmin(axis=1)] = False
        seconds[cannot] = np.inf
    kind = np.repeat(np.arange(kinds), devices)
    name = f"{'consistent' if is_consistent else 'inconsistent'}-{number}"
    return Mix(name, Fleet(seconds[:, kind], slots[kind]), share, kind)


def measured(folder: Path, copies: int) -> Mix:
    """Real devices by their measured times for 3,000 networks, so many devices of each."""
    with (folder / "network_timings.csv").open(encoding="utf-8") as lines:
        rows = list(csv.reader(lines))[1:]
    seconds = np.array([row[1:] for row in rows], np.float64) / 1000
    kind = np.repeat(np.arange(seconds.shape[1]), copies)
    fleet = Fleet(seconds[:, kind], np.ones(len(kind)))
    return Mix(f"measured-x{copies}", fleet, np.full(len(rows), 1 / len(rows)), kind)


def _best_split(mix: Mix, rate_hz: float | None = None) -> float:
    """The largest rate that a split can carry; at a given rate, the least mean seconds of a job.

    Columns are flow[row, kind], jobs a second, and without a given rate the rate itself.
    """
    first = np.unique(mix.kind, return_index=True)[1]
    seconds = mix.fleet.seconds[:, first]
    slots = np.bincount(mix.kind, mix.fleet.slots)
    row, kind = np.nonzero(np.isfinite(seconds))
    need_s = seconds[row, kind]
    rows, kinds = seconds.shape
    lp = highspy.HighsLp()
    lp.num_row_ = rows + kinds
    cost, index, value = [need_s / (rate_hz or 1.0)], [np.column_stack([row, rows + kind]).ravel()], []
    value = [np.column_stack([np.ones_like(need_s), need_s]).ravel()]
    starts = np.arange(len(need_s) + 1) * 2
    flow = mix.share * (rate_hz or 0.0)
    if rate_hz is None:
        cost = [np.zeros_like(need_s), np.array([-1.0])]
        index.append(np.arange(rows))
        value.append(-mix.share)
        starts = np.append(starts, starts[-1] + rows)
    lp.col_cost_ = np.concatenate(cost)
    lp.num_col_ = len(lp.col_cost_)
    lp.col_lower_, lp.col_upper_ = np.zeros(lp.num_col_), np.full(lp.num_col_, np.inf)
    lp.row_lower_ = np.concatenate([flow, np.full(kinds, -np.inf)])
    lp.row_upper_ = np.concatenate([flow, slots])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = starts, np.concatenate(index), np.concatenate(value)
    # The class above it prints a banner when it is made, before it can be told to be silent.
    solver = highspy.highs._Highs()
    solver.setOptionValue("output_flag", False)
    solver.passModel(lp)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise RuntimeError(f"{mix.name}: no split found at {rate_hz} jobs/s: {solver.getModelStatus()}")
    return abs(float(solver.getInfo().objective_function_value))
