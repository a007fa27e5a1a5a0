"""Learned: what launches of one kernel have taught of one device, in four terms.

Each term is learned from what the one before it leaves unexplained:

- *base*: seconds = launch + flops / P + bytes / B, none below nought, from relative errors, so that a job of 50 us
  weighs as much as one of 50 ms. Before anything was measured: the announced launch, and a tenth of the peaks.
- *residual*: log(seconds / base) over the logs of the jobs in the launch and of each of its dims, with forgetting.
- *history*: what launches of exactly this size, or of sizes near it, took beyond base and residual (`history.py`).
- *spread*: the running variance of log(measured / predicted), apart for sizes that were launched before and for those
  that were not; from it follows what is exceeded once in twenty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from lepton_ai.device import Peaks
from lepton_ai.placement.problem import Floats
from lepton_ai.placement.product import product
from lepton_ai.placement.regression import Regression
from lepton_ai.placement.size import FEATURES, Size

__all__ = ["SHORTEST_S", "UNKNOWN", "Known", "Learned", "Rates", "line"]

#: No launch is shorter or longer.
SHORTEST_S: Final = 1e-9
_LONGEST_S: Final = 1e7
#: And none is predicted to be longer than a number can be.
_LONGEST_LOG: Final = 700.0
#: A launch many times slower or faster than predicted counts as one so many times: it may have been somebody else's
#: fault. The residual, too, makes a prediction no more than so many times the base.
_MOST: Final = 10.0
_LIMIT: Final = math.log(_MOST)

#: What flops and bytes cost where nothing was measured yet: ten times what they would at the announced peaks.
_SLOWNESS: Final = 10.0
#: What decoding and encoding take where nothing was measured yet: about a gigabyte a second.
_CODEC_BYTES_PER_S: Final = 1e9
#: The unit of a launch's fixed cost, so that all coefficients are of the order of 1.
_FIXED_S: Final = 1e-4
#: Variance of a relative error that is no news, of the prior in the units above, and of the drift of each coefficient
#: from one launch to the next, relative to its square.
_NOISE: Final = 0.1
_PRIOR: Final = 4.0
_WANDER: Final = 0.0005
#: The same of the residual, and what a launch weighs beside the one after it.
_RESIDUAL_NOISE: Final = 0.05
_RESIDUAL_PRIOR: Final = 0.05
_FORGETTING: Final = 0.995
#: A launch takes at least a hundredth of what the peaks allow: they are measured, not theory.
_LEAST: Final = (0.0, 0.001, 0.001)
_LEAST_TRANSFER: Final = (0.0, 0.01)
#: What is between message and device is done by the host, which now and then is busy for milliseconds: a transfer that
#: misses by more standard deviations is an outlier. One of a small job was taken for what a byte costs, and large jobs
#: never went there again (docs/decisions/0028-transfers.md).
_OUTLIER: Final = 4.0
#: Coefficients of the transfer below this drift as if they were as large: one that an outlier sent to nought stayed.
_UNIT_TRANSFER: Final = 1.0
#: `Learned.shrink` before enough is known, and the least that it becomes.
_SHRINK: Final = 0.15
_LEAST_SHRINK: Final = 0.01
#: Weight of the newest launch in the spread.
_WEIGHT: Final = 0.02
#: The variance of a first prediction, which weighs as much as one launch.
_FIRST_VARIANCE: Final = 0.0625
#: A spread of less is taken for noise of the clock, and so many launches it takes until the spread is known.
_QUIET: Final = 0.02
_SETTLED: Final = 20
#: What is doubted of everything after a drift, in shares of the prior.
_DOUBT: Final = 0.25


class Known(msgspec.Struct, frozen=True):
    """What the history says of a size on a device."""

    log_s: float = 0.0
    """The mean of its launches."""
    weight: float = 0.0
    """Of that, beside base and residual: 0 where the size was not launched there."""
    near: float = 0.0
    """By how much, in log seconds, launches of sizes near it took longer than base and residual say."""


UNKNOWN: Final = Known()


class Rates(msgspec.Struct, frozen=True):
    """The coefficients of some devices in plain units."""

    work: Floats
    """[device]: seconds of a launch, of a flop, of a byte."""
    residual: Floats
    """[device, FEATURES]"""
    moved: Floats
    """[device]: seconds of a transfer, and of a byte in it."""

    @classmethod
    def of(cls, devices: int) -> Rates:
        """For so many devices, to be filled in by `Learned.write`."""
        return cls(np.zeros((devices, 3)), np.zeros((devices, FEATURES)), np.zeros((devices, 2)))


def line(rates: Rates, work: Floats, features: Floats) -> Floats:
    """[size, device]: the log seconds of launches by base and residual, from their [size, (1, flops, bytes)]."""
    base = product(work, rates.work.T)
    np.log(np.maximum(base, SHORTEST_S, out=base), out=base)
    residual = product(features, rates.residual.T)
    base += np.clip(residual, -_LIMIT, _LIMIT, out=residual)
    return base


class Learned(msgspec.Struct):
    """The terms of one (kernel, device), but for the history, from `n` launches."""

    n: int
    base: Regression
    residual: Regression
    transfer: Regression
    variance: float = _FIRST_VARIANCE
    """Of log(measured / predicted), where the size had not been launched before."""
    again: int = 0
    """The launches whose size had been."""
    variance_again: float = 0.0
    """And the variance of these."""

    @classmethod
    def nothing(cls, peaks: Peaks) -> Learned:
        """What is expected before anything was measured."""
        return cls(
            0,
            Regression.at((peaks.launch_s / _FIXED_S, 1.0, 1.0), _PRIOR),
            Regression.at((), _RESIDUAL_PRIOR),
            Regression.at((peaks.transfer_latency_s / _FIXED_S, 1.0), _PRIOR),
        )

    @property
    def launch_s(self) -> float:
        """What a launch takes however many jobs are in it, in seconds."""
        return self.base.coefficients[0] * _FIXED_S

    @property
    def shrink(self) -> float:
        """How many launches of a size count as much as what the line says of it.

        That is the noise of one launch over the error of the line, both variances (empirical Bayes; W. James and
        C. Stein, "Estimation with quadratic loss", 1961).
        """
        if self.again < _SETTLED:
            return _SHRINK
        return min(1.0, max(_LEAST_SHRINK, self.variance_again / max(self.variance, _QUIET**2)))

    @property
    def is_settled(self) -> bool:
        """Whether the spread is known well enough to tell drift from noise."""
        return self.n > _SETTLED

    def spread(self, *, known: bool) -> float:
        """Standard deviation of log(measured / predicted), of sizes that were launched before or not.

        0 before two launches.
        """
        if self.n < 2:
            return 0.0
        return math.sqrt(self.variance_again if known and self.again else self.variance)

    def run_s(self, size: Size, peaks: Peaks, known: Known = UNKNOWN) -> float:
        """The predicted seconds of a launch."""
        return math.exp(min(_LONGEST_LOG, self._expected(size, _work(size, peaks), known)))

    def transfer_s(self, size_bytes: float, peaks: Peaks) -> float:
        """The predicted seconds between message and device, for a job with arguments of this size."""
        return max(SHORTEST_S, self.transfer.value(_moved(size_bytes, peaks)))

    def write(self, rates: Rates, row: int, peaks: Peaks) -> None:
        """Fills in the row of this device."""
        rates.work[row] = [*map(float.__mul__, self.base.coefficients, _work(_UNIT, peaks))]
        rates.moved[row] = [*map(float.__mul__, self.transfer.coefficients, _moved(1.0, peaks))]
        rates.residual[row] = 0
        rates.residual[row, : len(self.residual.coefficients)] = self.residual.coefficients

    def learn(self, size: Size, peaks: Peaks, known: Known, measured_s: float) -> float | None:
        """Folds in one launch; returns by how many standard deviations it took longer than predicted.

        None where the numbers are none of a launch, from which nothing is learned.
        """
        work = _work(size, peaks)
        if not (_is_time(measured_s) and _is_time(SHORTEST_S + sum(work))):
            return None
        log_s = math.log(measured_s)
        miss = _within(log_s - self._expected(size, work, known))
        deviations = miss / max(self.spread(known=known.weight > 0), _QUIET)
        self._learn_spread(miss, again=known.weight > 0)
        self.n += 1

        expected_s = max(SHORTEST_S, self.base.value(work))
        self.base.wander(_WANDER)
        self.base.learn([each / expected_s for each in work], min(_MOST, measured_s / expected_s) - 1, _NOISE)
        self.base.keep_above(_LEAST)

        features = size.features
        if len(features) != len(self.residual.coefficients):
            self.residual = Regression.at([0.0] * len(features), _RESIDUAL_PRIOR)
        left = _within(log_s - math.log(max(SHORTEST_S, self.base.value(work))))
        self.residual.forget(_FORGETTING)
        self.residual.learn(features, left - self.residual.value(features), _RESIDUAL_NOISE)
        return deviations

    def learn_transfer(self, size_bytes: float, peaks: Peaks, measured_s: float) -> None:
        """Folds in what was between message and device for one job with arguments of this size."""
        moved = _moved(size_bytes, peaks)
        if not (_is_time(measured_s) and _is_time(SHORTEST_S + moved[1])):
            return
        expected_s = self.transfer_s(size_bytes, peaks)
        self.transfer.wander(_WANDER, _UNIT_TRANSFER)
        miss = min(_MOST, measured_s / expected_s) - 1
        self.transfer.learn([each / expected_s for each in moved], miss, _NOISE, _OUTLIER)
        self.transfer.keep_above(_LEAST_TRANSFER)

    def doubt(self) -> None:
        """The device has changed: what is measured next counts for more than what was learned."""
        self.base.doubt(_DOUBT)
        self.residual.doubt(_DOUBT)

    def is_possible(self) -> bool:
        """Whether launches could have taught this."""
        return (
            self.n > 0
            and all(each.is_possible() for each in (self.base, self.residual, self.transfer))
            and len(self.base.coefficients) == len(_LEAST)
            and len(self.transfer.coefficients) == len(_LEAST_TRANSFER)
            and len(self.residual.coefficients) <= FEATURES
            and all(map(float.__ge__, self.base.coefficients, _LEAST))
            and all(map(float.__ge__, self.transfer.coefficients, _LEAST_TRANSFER))
            and 0 <= self.again <= self.n
            and 0 <= self.variance < math.inf
            and 0 <= self.variance_again < math.inf
        )

    def _expected(self, size: Size, work: Sequence[float], known: Known) -> float:
        """The log of the predicted seconds: `line`, of one size on one device, and the history."""
        found = math.log(max(SHORTEST_S, self.base.value(work)))
        if self.residual.coefficients:
            found += _within(self.residual.value(size.features))
        return found + known.weight * (known.log_s - found) if known.weight else found + known.near

    def _learn_spread(self, miss: float, *, again: bool) -> None:
        if again:
            self.again += 1
            self.variance_again += max(_WEIGHT, 1 / self.again) * (miss * miss - self.variance_again)
        elif self.n > 0:  # the first is what the prior says
            self.variance += max(_WEIGHT, 1 / (self.n - self.again + 1)) * (miss * miss - self.variance)


_UNIT: Final = Size(1.0, 1.0)


def _within(log: float) -> float:
    """Within what is believed of one launch."""
    return min(_LIMIT, max(-_LIMIT, log))


def _is_time(seconds: float) -> bool:
    return SHORTEST_S <= seconds <= _LONGEST_S


def _work(size: Size, peaks: Peaks) -> tuple[float, float, float]:
    """The features of the base, in seconds."""
    return _FIXED_S, _SLOWNESS * size.flops / peaks.flops_per_s, _SLOWNESS * size.bytes / peaks.bytes_per_s


def _moved(size_bytes: float, peaks: Peaks) -> tuple[float, float]:
    """The features of the transfer, in seconds."""
    return _FIXED_S, size_bytes / peaks.transfer_bytes_per_s + size_bytes / _CODEC_BYTES_PER_S
