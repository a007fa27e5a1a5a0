"""Regression: recursive least squares over a handful of features, one measurement at a time.

The update is the Kalman filter's (S. Haykin, "Adaptive Filter Theory", ch. 10). What it learned ages in one of two
ways: each coefficient drifts as a random walk, or everything is forgotten exponentially (RLS with a forgetting
factor). Plain lists, because at three to eight features they are as fast as arrays and are bytes without ado.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

import msgspec

__all__ = ["Regression"]

#: Rounding must not make a variance nought.
_CERTAIN = 1e-14


class Regression(msgspec.Struct):
    """Coefficients with their covariance. `prior` is the variance of a coefficient of which nothing is known."""

    coefficients: list[float]
    covariance: list[list[float]]
    prior: float

    @classmethod
    def at(cls, coefficients: Sequence[float], prior: float) -> Regression:
        """One that has seen nothing and expects these coefficients."""
        count = len(coefficients)
        return cls([*coefficients], [[prior * (row == at) for at in range(count)] for row in range(count)], prior)

    def value(self, features: Sequence[float]) -> float:
        """What is expected of these features."""
        return float(sum(map(mul, self.coefficients, features)))

    def learn(self, features: Sequence[float], miss: float, noise: float, outlier: float = math.inf) -> None:
        """Folds in one measurement, `miss` above the value; a miss of the variance `noise` says nothing.

        One of more than `outlier` standard deviations is taken to have had as much more noise as makes it just so many.
        """
        along = [sum(map(mul, row, features)) for row in self.covariance]
        scale = 1 / max(noise + max(0.0, sum(map(mul, along, features))), (miss / outlier) ** 2)
        gains = [scale * each for each in along]
        self.coefficients = [have + gain * miss for have, gain in zip(self.coefficients, gains, strict=True)]
        self.covariance = [
            [have - gain * each for have, each in zip(row, along, strict=True)]
            for row, gain in zip(self.covariance, gains, strict=True)
        ]
        for at, row in enumerate(self.covariance):
            row[at] = max(_CERTAIN, row[at])

    def wander(self, share: float, least: float = 0.0) -> None:
        """Each coefficient may have drifted by this variance, relative to its square; never beyond the prior.

        One that is nearer to nought than `least` drifts as that would: else one that has come to nought stays there.
        """
        for at, each in enumerate(self.coefficients):
            row = self.covariance[at]
            row[at] = min(self.prior, row[at] + share * max(each * each, least * least))

    def forget(self, factor: float) -> None:
        """Old measurements weigh `factor` of what they did, as long as no variance goes beyond the prior.

        Without that bound what no measurement tells of for a while would become infinitely uncertain.
        """
        scales = [math.sqrt(min(1 / factor, self.prior / row[at])) for at, row in enumerate(self.covariance)]
        self.covariance = [
            [mine * other * each for each, other in zip(row, scales, strict=True)]
            for row, mine in zip(self.covariance, scales, strict=True)
        ]

    def doubt(self, share: float) -> None:
        """Something has changed: what is learned next counts as if little had been known, `share` of the prior."""
        for at, row in enumerate(self.covariance):
            row[at] = min(self.prior, row[at] + share * self.prior)

    def keep_above(self, least: Sequence[float]) -> None:
        """No coefficient may be below its least: one that is goes there, the others to what is likeliest given that."""
        for _ in least:
            below = [bound - have for bound, have in zip(least, self.coefficients, strict=True)]
            short = max(below)
            if short <= 0:
                return
            at = below.index(short)
            step = short / self.covariance[at][at]
            self.coefficients = [
                have + step * row[at] for have, row in zip(self.coefficients, self.covariance, strict=True)
            ]
            self.coefficients[at] = least[at]
        self.coefficients = [*map(max, self.coefficients, least)]

    def is_possible(self) -> bool:
        """Whether these are numbers that measurements could have taught."""
        count = len(self.coefficients)
        diagonal = [row[at] for at, row in enumerate(self.covariance) if len(row) == count]
        return (
            len(diagonal) == count
            and all(map(math.isfinite, self.coefficients))
            and all(0 < each <= self.prior for each in diagonal)
            and all(abs(each) <= self.prior for row in self.covariance for each in row)
        )
