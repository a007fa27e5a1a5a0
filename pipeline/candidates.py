"""Candidates: what jobs of a few or of many sizes would cost on each device.

One or a few sizes are predicted one by one: arrays take 100 us to set up, which is the price of the first size and of
the next thousand. Many are predicted together.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, Final

import numpy as np

from lepton_ai.job import Candidate, Estimate
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import Floats
from lepton_ai.placement.size import Sizes
from pipeline.cluster import ServedDevice
from pipeline.sized import Sized

__all__ = ["Candidates", "candidates"]

#: Up to so many sizes, and so many costs (sizes times devices), each is predicted by itself: 14 us where it was
#: predicted before, 70 where it is new, against 75 to 85 together; of four sizes 35 and 250, against 85 and 115.
_FEW: Final = (2, 32)


def candidates(sizes: Sequence[Sized], devices: Sequence[ServedDevice], model: CostModel) -> Candidates:
    """What each device would need for each of these sizes."""
    if len(sizes) <= _FEW[0] and len(sizes) * len(devices) <= _FEW[1]:
        return _Few(sizes, devices, model)
    return _Many(sizes, devices, model)


class Candidates(Sequence[tuple[Candidate, ...]]):
    """[size]: the devices that were looked at, made when they are asked for: few of them are ever noted."""

    def __init__(self, sizes: Sequence[Sized], devices: Sequence[ServedDevice]) -> None:
        self.sizes = sizes
        """What its jobs share."""
        self._devices = devices
        self._made: dict[int, tuple[Candidate, ...]] = {}

    @abstractmethod
    def seconds(self, sizes: Sequence[int]) -> Floats:
        """[job, device]: transfer and run, of jobs of these sizes; infinite where the device cannot run it."""

    @abstractmethod
    def tail(self, sizes: Sequence[int]) -> Floats:
        """[job, device]: what these exceed once in twenty."""

    @abstractmethod
    def _alone(self, size: int, device: int) -> Estimate:
        """The estimate of a size on a device that can run it, and does nothing else."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, size: Any) -> Any:
        """The candidates of one size."""
        if not 0 <= size < len(self.sizes):
            raise IndexError(size)
        if (found := self._made.get(size)) is None:
            found = self._made[size] = tuple([self._candidate(size, at) for at in range(len(self._devices))])
        return found

    def _candidate(self, size: int, at: int) -> Candidate:
        kernel, pin, device = self.sizes[size].kernel, self.sizes[size].pin, self._devices[at]
        if device.can_run(kernel, pin):
            estimate = self._alone(size, at)
            if device.speed != 1:
                transfer_s, run_s = estimate.transfer_s / device.speed, estimate.run_s / device.speed
                estimate = Estimate(0.0, transfer_s, run_s, estimate.spread)
            return Candidate(device.name, estimate)
        return Candidate(device.name, excluded=device.excludes(kernel, pin))


class _Few(Candidates):
    """Each predicted by itself."""

    def __init__(self, sizes: Sequence[Sized], devices: Sequence[ServedDevice], model: CostModel) -> None:
        super().__init__(sizes, devices)
        self._estimates: list[dict[int, Estimate]] = []
        """[size]: by device, of those that can run it."""
        for each in sizes:
            able = [at for at, device in enumerate(devices) if device.can_run(each.kernel, each.pin)]
            served = [(devices[at].name, devices[at].peaks) for at in able]
            found = model.predict_on(each.kernel, served, each.size)
            self._estimates.append(dict(zip(able, found, strict=True)))

    def seconds(self, sizes: Sequence[int]) -> Floats:
        return self._table([{at: each.finish_s for at, each in row.items()} for row in self._estimates], sizes)

    def tail(self, sizes: Sequence[int]) -> Floats:
        return self._table([{at: each.tail_s for at, each in row.items()} for row in self._estimates], sizes)

    def _table(self, seconds: list[dict[int, float]], sizes: Sequence[int]) -> Floats:
        rows = [
            [row[at] / device.speed if at in row else math.inf for at, device in enumerate(self._devices)]
            for row in seconds
        ]
        return np.array([rows[size] for size in sizes], np.float64).reshape(len(sizes), len(self._devices))

    def _alone(self, size: int, device: int) -> Estimate:
        return self._estimates[size][device]


class _Many(Candidates):
    """Predicted together: those of one kernel, and of one pin, so that all have the same devices."""

    def __init__(self, sizes: Sequence[Sized], devices: Sequence[ServedDevice], model: CostModel) -> None:
        super().__init__(sizes, devices)
        together: dict[Hashable, list[int]] = {}
        for at, each in enumerate(sizes):
            if (group := together.get(each.alike)) is None:
                group = together[each.alike] = []
            group.append(at)
        served = [(device.name, device.peaks) for device in devices]
        self._parts, self._speeds = [], []
        self._row = np.empty(len(sizes), np.intp)
        """[size]: its row in all parts, one after the other."""
        start = 0
        for group in together.values():
            here = [sizes[at] for at in group]
            one = here[0]
            joined = Sizes.joined([each.key for each in here], [each.row for each in here])
            self._parts.append(model.predict_many(one.kernel, served, joined))
            # What a device cannot run takes it for ever: a nought of its speed.
            can_run = [device.speed if device.can_run(one.kernel, one.pin) else 0.0 for device in devices]
            self._speeds.append(np.array(can_run, np.float64))
            self._row[group] = range(start, start + len(group))
            start += len(group)

    def seconds(self, sizes: Sequence[int]) -> Floats:
        return self._where_able([part.seconds for part in self._parts], sizes)

    def tail(self, sizes: Sequence[int]) -> Floats:
        return self._where_able([part.tail_s for part in self._parts], sizes)

    def _where_able(self, parts: Sequence[Floats], sizes: Sequence[int]) -> Floats:
        """At the speeds that the devices have beside what else their hosts do."""
        with np.errstate(divide="ignore"):
            for part, speeds in zip(parts, self._speeds, strict=True):
                np.divide(part, speeds, out=part)
        found: Floats = np.concatenate(parts).take(self._row[sizes], 0)
        return found

    def _alone(self, size: int, device: int) -> Estimate:
        row = self._row.item(size)
        for part in self._parts:
            if row < len(part.run_s):
                return part.one(row, device)
            row -= len(part.run_s)
        raise IndexError(size)
