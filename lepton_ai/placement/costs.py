"""The CostModel: what a job will cost a device, from the Work it asks for and from what was measured before.

What is learned of a (kernel, device) is in `learned.py`; here it is kept for all of them, and laid out in tables, so
that a whole window is priced at once. `drift.py` watches the misses: when a device has changed, what was learned is
doubted and its history dropped. Times exclude compilation, which no job waits for: a worker compiles before it
announces a kernel. `docs/costs.md` has the figures, and what was tried and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_ai.device import Peaks
from lepton_ai.event import Observation
from lepton_ai.job import TAIL, Estimate
from lepton_ai.placement.drift import Drift
from lepton_ai.placement.history import History, Past
from lepton_ai.placement.learned import SHORTEST_S, UNKNOWN, Known, Learned, Rates, line
from lepton_ai.placement.problem import Floats, Indices
from lepton_ai.placement.size import FEATURES, Size, Sizes, features_of

__all__ = ["CostModel", "Devices", "Estimates", "Size", "Sizes"]

#: Names and announced peaks.
Devices = Sequence[tuple[str, Peaks]]

#: Of the form of a snapshot: one of another version is left out, and learning starts anew.
_VERSION = 2
#: Launches of a kernel on each device that come before it is chosen by what is predicted.
_PROBES = 2
#: Kernels that are remembered; a new one takes the place of the oldest. Whoever can write events could name ever more.
_KERNELS = 4096
#: Sizes whose history is in a snapshot: of a (kernel, device), and of all of them.
_SIZES, _ALL_SIZES = 64, 16384
#: Predictions of a (kernel, device) that are kept until more is learned.
_KEPT = 1024


class Estimates(msgspec.Struct, frozen=True):
    """What many jobs take on many devices, each alone in its launch."""

    transfer_s: Floats
    """[size, device]"""
    run_s: Floats
    """[size, device]"""
    is_known: NDArray[np.bool_]
    """[size, device]: whether this size was launched there before."""
    spread_new: Floats
    """[device]: of sizes that were not."""
    spread_known: Floats
    """[device]: and of those that were."""

    @property
    def spread(self) -> Floats:
        """[size, device]: standard deviation of log(real / predicted run time)."""
        return np.where(self.is_known, self.spread_known, self.spread_new)

    @property
    def seconds(self) -> Floats:
        """[size, device]: transfer and run."""
        return self.transfer_s + self.run_s

    @property
    def tail_s(self) -> Floats:
        """[size, device]: what transfer and run exceed once in twenty."""
        return self.transfer_s + self.run_s * np.exp(TAIL * self.spread)

    def one(self, size: int, device: int) -> Estimate:
        """The estimate of one of them, without a wait."""
        here = size, device
        spread = self.spread_known if self.is_known[here] else self.spread_new
        return Estimate(0.0, self.transfer_s.item(here), self.run_s.item(here), spread.item(device))


class CostModel:
    """Predicts run and transfer time before a job, learns after it. Not shared between threads."""

    def __init__(self) -> None:
        self._books: dict[str, _Book] = {}

    def launches(self, kernel: str, device: str) -> int:
        """How many launches of a kernel on a device were learned from."""
        book = self._books.get(kernel)
        return book.learned[device].n if book is not None and device in book.learned else 0

    def launch_s(self, kernel: str, device: str, peaks: Peaks) -> float:
        """What a launch takes however many jobs are in it, in seconds."""
        book = self._books.get(kernel)
        learned = book.learned.get(device) if book is not None else None
        return peaks.launch_s if learned is None else learned.launch_s

    def enough(self, kernel: str) -> int:
        """How many launches of a kernel on a device make it measured: two, and one more each time that all double.

        Who was first launched with small jobs may be predicted ten times too slow for large ones, and would never be
        chosen again.
        """
        book = self._books.get(kernel)
        launches = [learned.n for learned in book.learned.values() if learned.n] if book is not None else []
        return _PROBES + int(math.log2(max(1.0, sum(launches) / (_PROBES * max(1, len(launches))))))

    def predict(self, kernel: str, device: str, size: Size, peaks: Peaks) -> Estimate:
        """The estimate for one launch that starts at once (`wait_s` is 0)."""
        return self._book(kernel).predict([(device, peaks)], size)[0]

    def predict_on(self, kernel: str, devices: Devices, size: Size) -> list[Estimate]:
        """[device]: as `predict`."""
        return self._book(kernel).predict(devices, size)

    def predict_many(self, kernel: str, devices: Devices, sizes: Sizes) -> Estimates:
        """[size, device]: as `predict`, but for what rounding does."""
        return self._book(kernel).predict_many(devices, sizes)

    def learn(self, seen: Observation, peaks: Peaks) -> bool:
        """Folds in one launch; True where it shows that the device has become slower or faster than it was.

        What is no time or no work (nought, negative, absurd, not finite) is left out.
        """
        if seen.jobs < 1 or not (size := Size.of(seen)).is_possible():
            return False
        # Transfer is per job: each has a message of its own, however many run in one launch.
        return self._book(seen.kernel).learn(seen.device, size, peaks, seen.transfer_s / seen.jobs, seen.run_s)

    def snapshot(self) -> bytes:
        """What was learned as bytes, for another process or a later start: a megabyte or two at most."""
        count = sum(len(book.learned) for book in self._books.values())
        most = min(_SIZES, _ALL_SIZES // max(1, count))
        kept = [
            _Kept(kernel, device, learned, book.history.past(book.history.column(device), most))
            for kernel, book in self._books.items()
            for device, learned in book.learned.items()
            if learned.n
        ]
        return msgspec.msgpack.encode((_VERSION, kept))

    def restore(self, data: bytes | None) -> None:
        """Takes a snapshot over; what was learned since then is kept where it rests on more launches.

        A snapshot of another version, and what in it could not have been learned, is left out.
        """
        try:
            version, rest = msgspec.msgpack.decode(data or b"", type=tuple[int, msgspec.Raw])
            found = msgspec.msgpack.decode(rest, type=list[_Kept]) if version == _VERSION else []
        except msgspec.DecodeError:
            return
        for each in found:
            if each.learned.is_possible() and self.launches(each.kernel, each.device) < each.learned.n:
                self._book(each.kernel).take_over(each)

    def _book(self, kernel: str) -> _Book:
        book = self._books.get(kernel)
        if book is None:
            if len(self._books) >= _KERNELS:
                del self._books[next(iter(self._books))]
            book = self._books[kernel] = _Book()
        return book


class _Kept(msgspec.Struct, array_like=True):
    """A (kernel, device) in a snapshot."""

    kernel: str
    device: str
    learned: Learned
    history: list[Past]


class _Book:
    """What was learned of one kernel, by device."""

    def __init__(self) -> None:
        self.learned: dict[str, Learned] = {}
        self.history = History()
        self._drifts: dict[str, Drift] = {}
        self._table: _Table | None = None
        self._stale: set[str] = set()
        """Devices of which more was learned than stands in the table."""
        self._kept: dict[str, dict[tuple[Size, Peaks], Estimate]] = {}
        """What was predicted of a device since it was last learned of: a lone job is like the one before it."""

    def predict(self, devices: Devices, size: Size) -> list[Estimate]:
        """[device]: what a launch of a size takes there."""
        kept = [self._kept.setdefault(device, {}) for device, _ in devices]
        found = [each.get((size, peaks)) for each, (_, peaks) in zip(kept, devices, strict=True)]
        lacking = [at for at, each in enumerate(found) if each is None]
        if lacking:
            asked = [devices[at] for at in lacking]
            for at, (device, peaks), known in zip(lacking, asked, self._known(asked, size), strict=True):
                learned = self.learned.get(device) or Learned.nothing(peaks)
                transfer_s = learned.transfer_s(size.transfer_bytes, peaks) * size.jobs
                run_s, spread = learned.run_s(size, peaks, known), learned.spread(known=known.weight > 0)
                if len(kept[at]) >= _KEPT:
                    kept[at].clear()
                found[at] = kept[at][size, peaks] = Estimate(0.0, transfer_s, run_s, spread)
        return [each for each in found if each is not None]

    def predict_many(self, devices: Devices, sizes: Sizes) -> Estimates:
        """What `predict` says of all sizes."""
        table = self._tabulated(devices)
        numbers = sizes.numbers
        features, work = features_of(numbers[:, 3:]), np.ones((len(numbers), 3))
        work[:, 1:] = numbers[:, :2]
        log_s = line(table.rates, work, features)
        past, launches = self.history.known_many(sizes.keys, table.columns)
        is_known = launches > 0
        past -= log_s
        launches /= launches + table.shrink
        past *= launches
        if not is_known.all():
            near = self.history.near(features, table.columns, lambda *of: line(table.rates, *of))
            np.copyto(near, past, where=is_known)
            past = near
        log_s += past
        moved = numbers[:, 2:3] * table.rates.moved[:, 1]
        moved += table.rates.moved[:, 0]
        np.maximum(moved, SHORTEST_S, out=moved)
        return Estimates(moved, np.exp(log_s, out=log_s), is_known, table.spread, table.spread_again)

    def learn(self, device: str, size: Size, peaks: Peaks, transfer_s: float, run_s: float) -> bool:
        """Folds in one launch; True on a drift."""
        learned = self.learned.get(device)
        if learned is None:
            learned = self.learned[device] = Learned.nothing(peaks)
        known = self._known([(device, peaks)], size)[0]
        learned.learn_transfer(size.transfer_bytes, peaks, transfer_s)
        deviations = learned.learn(size, peaks, known, run_s)
        self._changed(device)
        if deviations is None:
            return False
        column = self.history.column(device)
        has_drifted = learned.is_settled and self._drifts.setdefault(device, Drift()).notices(deviations)
        if has_drifted:
            learned.doubt()
            self.history.drop(column)
        if self.history.learn(size, column, math.log(run_s)):
            self._kept.clear()  # new sizes go by other ones now, on every device
        return has_drifted

    def take_over(self, kept: _Kept) -> None:
        """Goes on from what another has learned of a device."""
        self.learned[kept.device] = kept.learned
        self._drifts.pop(kept.device, None)
        self._changed(kept.device)
        self._kept.clear()
        column = self.history.column(kept.device)
        self.history.drop(column)
        for past in kept.history:
            self.history.take_over(past, column)

    def _changed(self, device: str) -> None:
        """More was learned of a device."""
        self._stale.add(device)
        self._kept.pop(device, None)

    def _known(self, devices: Devices, size: Size) -> list[Known]:
        """[device]: what the history says of a size there."""
        found = [UNKNOWN] * len(devices)
        new: list[tuple[int, int]] = []
        for at, (device, _) in enumerate(devices):
            learned = self.learned.get(device)
            if learned is None or not learned.n:
                continue
            column = self.history.column(device)
            log_s, launches = self.history.known(size.key, column)
            if launches:
                found[at] = Known(log_s, launches / (launches + learned.shrink))
            else:
                new.append((at, column))
        if new:
            rates = Rates.of(len(new))
            for row, (at, _) in enumerate(new):
                device, peaks = devices[at]
                self.learned[device].write(rates, row, peaks)
            features = np.zeros((1, FEATURES))
            features[0, : len(size.features)] = size.features
            near = self.history.near(features, np.array([column for _, column in new]), lambda *of: line(rates, *of))
            for (at, _), each in zip(new, near[0].tolist(), strict=True):
                found[at] = Known(near=each)
        return found

    def _tabulated(self, devices: Devices) -> _Table:
        table = self._table
        if table is None or table.devices != devices:
            columns = np.array([self.history.column(name) for name, _ in devices], np.intp)
            table = self._table = _Table(devices, columns)
            self._stale.update(name for name, _ in devices)
        if self._stale:
            # Written anew, because estimates that are still looked at share the old spreads.
            table.spread, table.spread_again = table.spread.copy(), table.spread_again.copy()
            for row, (name, peaks) in enumerate(devices):
                if name in self._stale:
                    table.write(row, self.learned.get(name) or Learned.nothing(peaks), peaks)
            self._stale.clear()
        return table


class _Table:
    """What was learned of one kernel on some devices."""

    def __init__(self, devices: Devices, columns: Indices) -> None:
        self.devices = devices
        self.columns = columns
        """[device]: its column in the history."""
        self.rates = Rates.of(len(devices))
        self.shrink = np.ones(len(devices))
        self.spread = np.zeros(len(devices))
        self.spread_again = np.zeros(len(devices))

    def write(self, row: int, learned: Learned, peaks: Peaks) -> None:
        learned.write(self.rates, row, peaks)
        self.shrink[row] = learned.shrink
        self.spread[row] = learned.spread(known=False)
        self.spread_again[row] = learned.spread(known=True)
