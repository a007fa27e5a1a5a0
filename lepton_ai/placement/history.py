"""History: what launches of a kernel took before, for sizes that come again, and for those near them.

A line over the dims cannot know that 1,025 columns need one tile more than 1,024; a second launch of the same size can,
and of a new size those that were near it still know more than the line. Kept for each kernel as tables, a row a size
and a column a device, so that a whole window is looked up at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np

from lepton_ai.placement.problem import Floats, Indices
from lepton_ai.placement.product import product
from lepton_ai.placement.size import FEATURES, Key, Size

__all__ = ["History", "Line", "Past"]

#: The log seconds of launches on devices, [size, device], from their [size, (1, flops, bytes)] and their features.
Line = Callable[[Floats, Floats], Floats]

#: Sizes that are kept for a kernel; a new one takes the place of the oldest.
_MOST: Final = 4096
#: Sizes, the last that were launched, by which new ones near them go. With 40 the median error of a new size goes from
#: 10.5 to 11.5 % (public timings), and 1,000 of them on 64 devices take 0.2 ms less.
_RECENT: Final = 64
#: A launch `distance` away in the logs of the dims weighs (1 + (distance / _REACH)^2)^-2 of one of the size itself (a
#: Student kernel, as good as a Gaussian, and nothing to exponentiate); _DOUBT is the weight of the line.
_REACH: Final = 0.6
_DOUBT: Final = 0.3
#: The newest launch weighs at least so much among those of its size, so that slow changes are followed.
_WEIGHT: Final = 0.1


class Past(msgspec.Struct, array_like=True):
    """What launches of one size took on one device, as it stands in a snapshot."""

    size: Size
    log_s: float
    launches: float

    def is_possible(self) -> bool:
        """Whether launches could have taught this."""
        return self.size.is_possible() and math.isfinite(self.log_s) and 0 < self.launches < math.inf


class History:
    """What sizes of one kernel took, by device."""

    def __init__(self) -> None:
        self._rows: dict[Key, int] = {}
        self._sizes: dict[int, Size] = {}
        """By row."""
        self._columns: dict[str, int] = {}
        self._recent: dict[int, None] = {}
        """Rows, the last learned of last."""
        self._near: _Recent | None = None
        """These, laid out."""
        self._work: Floats = np.zeros((0, 3))
        """[size]: 1, and its flops and bytes."""
        self._features: Floats = np.zeros((0, FEATURES))
        self._log_s: Floats = np.zeros((0, 0))
        """[size, device]: mean log seconds of its launches."""
        self._launches: Floats = np.zeros((0, 0))

    def column(self, device: str) -> int:
        """The column of a device."""
        return self._columns.setdefault(device, len(self._columns))

    def known(self, key: Key, column: int) -> tuple[float, float]:
        """The mean log seconds of the launches of a size on a device, and how many those were."""
        row = self._rows.get(key)
        if row is None or column >= self._log_s.shape[1]:
            return 0.0, 0.0
        return self._log_s.item(row, column), self._launches.item(row, column)

    def known_many(self, keys: Sequence[Key], columns: Indices) -> tuple[Floats, Floats]:
        """[size, device]: as `known`."""
        self._grow(0, int(columns.max(initial=-1)) + 1)
        # The last row is nobody's.
        rows = np.fromiter(map(self._rows.get, keys, itertools.repeat(-1)), np.intp, len(keys))
        log_s, launches = (each.take(rows, 0).take(columns, 1) for each in (self._log_s, self._launches))
        return log_s, launches

    def near(self, features: Floats, columns: Indices, line: Line) -> Floats:
        """[size, device]: by how much, in log seconds, launches near these sizes took longer than the line says."""
        recent = self._looked_at()
        launches, log_s = (each.take(recent.rows, 0).take(columns, 1) for each in (self._launches, self._log_s))
        # The line's misses on the left, and where there are any on the right, for one product of both.
        ran = launches > 0
        log_s -= line(recent.work, recent.features)
        log_s *= ran
        weight = recent.apart(features)
        np.square(weight, out=weight)
        np.reciprocal(weight, out=weight)
        sums = product(weight, np.concatenate([log_s, ran], 1))
        found, weights = sums[:, : len(columns)], sums[:, len(columns) :]
        weights += _DOUBT
        found /= weights
        return found

    def learn(self, size: Size, column: int, log_s: float) -> bool:
        """Folds in one launch of a size on a device; True where new sizes go by it that did not before."""
        row, is_new = self._row(size, column)
        launches = self._launches[row, column] + 1
        self._launches[row, column] = launches
        self._log_s[row, column] += max(_WEIGHT, 1 / launches) * (log_s - self._log_s[row, column])
        return is_new

    def drop(self, column: int) -> None:
        """Forgets what is known of a device."""
        self._launches[:, column : column + 1] = 0

    def past(self, column: int, most: int) -> list[Past]:
        """What is known of a device, the last `most` sizes that were new, the oldest first."""
        found: list[Past] = []
        for row in reversed(self._rows.values()):
            if len(found) == most:
                break
            if column < self._launches.shape[1] and self._launches[row, column]:
                log_s, launches = self._log_s.item(row, column), self._launches.item(row, column)
                found.append(Past(self._sizes[row], log_s, launches))
        return found[::-1]

    def take_over(self, past: Past, column: int) -> None:
        """Goes on from what another has learned of a size on a device."""
        if not past.is_possible():
            return
        row, _ = self._row(past.size, column)
        self._log_s[row, column], self._launches[row, column] = past.log_s, past.launches

    def _row(self, size: Size, column: int) -> tuple[int, bool]:
        """The row of a size, which is the last learned of from now on, and whether it was not among the last."""
        key = size.key
        row = self._rows.get(key)
        is_new = row is None or row not in self._recent
        if row is None:
            row = len(self._rows)
            if row == _MOST:
                row = self._rows.pop(next(iter(self._rows)))
            self._rows[key], self._sizes[row] = row, size
            self._grow(row + 1, column + 1)
            self._launches[row] = 0
            self._work[row] = 1, size.flops, size.bytes
            features = size.features
            self._features[row, : len(features)] = features
            self._features[row, len(features) :] = 0
        self._grow(0, column + 1)
        self._recent.pop(row, None)
        self._recent[row] = None
        if len(self._recent) > _RECENT:
            del self._recent[next(iter(self._recent))]
        if is_new:
            self._near = None
        return row, is_new

    def _looked_at(self) -> _Recent:
        if self._near is None:
            rows = np.fromiter(self._recent, np.intp, len(self._recent))
            self._near = _Recent.of(rows, self._work[rows], self._features[rows])
        return self._near

    def _grow(self, rows: int, columns: int) -> None:
        have = self._log_s.shape
        if rows < have[0] and columns <= have[1]:
            return
        if rows >= have[0]:  # many at a time, so that each new size does not copy the tables
            rows = 2 * rows + 16
            self._work = _grown(self._work, rows, 3)
            self._features = _grown(self._features, rows, FEATURES)
        self._log_s, self._launches = (_grown(each, rows, columns) for each in (self._log_s, self._launches))


class _Recent(msgspec.Struct, frozen=True):
    """The sizes that new ones near them go by."""

    rows: Indices
    work: Floats
    features: Floats
    _far: Floats
    """What (features, their squared length, 1) of a size are multiplied by."""

    @classmethod
    def of(cls, rows: Indices, work: Floats, features: Floats) -> _Recent:
        far = np.ones((FEATURES + 2, len(rows)))
        far[:FEATURES] = -2 * features.T
        far[-1] = (features * features).sum(1) + _REACH**2
        far /= _REACH**2
        return cls(rows, work, features, far)

    def apart(self, features: Floats) -> Floats:
        """[size, one of these]: 1 + (distance / _REACH)^2."""
        left = np.ones((len(features), FEATURES + 2))
        left[:, :FEATURES] = features
        left[:, FEATURES] = (features * features).sum(1)
        return product(left, self._far)


def _grown(table: Floats, rows: int, columns: int) -> Floats:
    """The table with more rows or columns of noughts."""
    have = table.shape
    return np.pad(table, ((0, max(0, rows - have[0])), (0, max(0, columns - have[1]))))
