"""From claimed jobs to a Problem: which devices could run each job, and what it would cost there."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from lepton_ai import wire
from lepton_ai.job import Candidate, Estimate, Options
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import Floats, Problem
from lepton_ai.signature import Signature, shapes_of
from lepton_ai.succession import inherit
from lepton_ai.tensor import DTYPES
from pipeline.cluster import Cluster, Offer, ServedDevice
from pipeline.window import ClaimedJob, Sized

__all__ = ["Candidates", "Pricing", "price", "quickest_s"]

#: A body larger than this is not opened for its shapes; its job is priced as if it had no work.
_OPEN_LIMIT_BYTES = 1 << 20
#: The row of a job of which nothing is known.
_UNKNOWN = (0.0, 0.0, 0.0)


class Pricing(msgspec.Struct, frozen=True):
    """The Problem of some jobs, and the candidates behind its numbers, once for all jobs that cost the same."""

    problem: Problem
    kinds: list[int]
    """[job]: which of the candidates are its own."""
    candidates: Candidates
    """[kind][device], without waits."""
    jobs_in: Floats
    """[job]: how many jobs its message holds."""

    def tail(self) -> Floats:
        """[job, device]: as the problem's `seconds`, but what is exceeded once in twenty."""
        return self.candidates.tail(self.kinds) * self.jobs_in[:, np.newaxis]


class Candidates(Sequence[tuple[Candidate, ...]]):
    """[kind]: the devices that were looked at, made when they are asked for: few of them are ever noted."""

    def __init__(self, kinds: Sequence[_Kind], devices: Sequence[ServedDevice], model: CostModel) -> None:
        self._kinds = kinds
        self._devices = devices
        self._made: dict[int, tuple[Candidate, ...]] = {}
        by_kernel: dict[tuple[str, int], list[int]] = {}
        for at, kind in enumerate(kinds):
            by_kernel.setdefault((kind.kernel, len(kind.row)), []).append(at)
        served = [(device.name, device.peaks) for device in devices]
        self._parts = [
            model.predict_many(kernel, served, np.array([kinds[at].row for at in here], np.float64))
            for (kernel, _), here in by_kernel.items()
        ]
        """Each kernel's, in one call."""
        self._row = np.argsort(list(chain.from_iterable(by_kernel.values())))
        """[kind]: its row in all parts, one after the other."""

    def __len__(self) -> int:
        return len(self._kinds)

    def __getitem__(self, kind: Any) -> Any:
        """The candidates of one kind."""
        if not 0 <= kind < len(self._kinds):
            raise IndexError(kind)
        if (found := self._made.get(kind)) is None:
            found = self._made[kind] = tuple([self._candidate(kind, at) for at in range(len(self._devices))])
        return found

    def row(self, kind: int) -> tuple[float, ...]:
        """What its estimates are of: flops, bytes, transfer bytes, dims."""
        return self._kinds[kind].row

    def seconds(self, kinds: Sequence[int]) -> Floats:
        """[kind, device]: transfer and run of one job; infinite where the device cannot run it."""
        return self._where_able([part.seconds for part in self._parts], kinds)

    def tail(self, kinds: Sequence[int]) -> Floats:
        """[kind, device]: what these exceed once in twenty."""
        return self._where_able([part.tail_s for part in self._parts], kinds)

    def _where_able(self, parts: Sequence[Floats], kinds: Sequence[int]) -> Floats:
        """At the speeds that the devices have beside what else their hosts do."""
        numbers: dict[tuple[str, str | None], int] = {}
        which = [numbers.setdefault((kind.kernel, kind.pin), len(numbers)) for kind in self._kinds]
        # What a device cannot run takes it for ever: a nought of its speed.
        speeds = np.array(
            [[device.speed if device.can_run(*each) else 0.0 for device in self._devices] for each in numbers]
        ).reshape(len(numbers), len(self._devices))
        if not parts:
            return np.empty((0, len(self._devices)))
        of_kind: Floats = np.concatenate(parts)[self._row]
        with np.errstate(divide="ignore"):
            of_kind /= speeds[which]
        return of_kind[kinds]

    def _alone(self, kind: int, at: int) -> Estimate:
        """The estimate of a kind on a device that does nothing else."""
        row = self._row.item(kind)
        for part in self._parts:
            if row < len(part.run_s):
                return part.one(row, at)
            row -= len(part.run_s)
        raise IndexError(kind)

    def _candidate(self, kind: int, at: int) -> Candidate:
        kernel, pin, device = self._kinds[kind].kernel, self._kinds[kind].pin, self._devices[at]
        if device.can_run(kernel, pin):
            alone = self._alone(kind, at)
            transfer_s, run_s = alone.transfer_s / device.speed, alone.run_s / device.speed
            return Candidate(device.name, Estimate(0.0, transfer_s, run_s, alone.spread))
        if kernel not in device.kernels:
            return Candidate(device.name, excluded=f"announces no {kernel}")
        if not device.matches(pin):
            return Candidate(device.name, excluded=f"the job is pinned to {pin}")
        return Candidate(device.name, excluded=device.reason)


def price(jobs: Sequence[ClaimedJob], cluster: Cluster, model: CostModel) -> Pricing:
    """What each job would cost on each device of the cluster."""
    devices = cluster.devices
    known: dict[Hashable, int] = {}
    kinds: list[_Kind] = []
    kind_of: list[int] = []
    for job in jobs:
        offer = cluster.offer(job.kernel)
        sized = job.sized
        if sized is None or sized.offer is not offer:
            sized = job.sized = _sized(job, offer)
        key = (job.kernel, job.options.device, sized.key)
        if (kind := known.get(key)) is None:
            kind = known[key] = len(kinds)
            if sized.row is None:
                sized.row = _row(sized.shapes, offer)
            kinds.append(_Kind(job.kernel, job.options.device, sized.row))
        kind_of.append(kind)
    candidates = Candidates(kinds, devices, model)
    jobs_in = np.array([len(job.ids) for job in jobs], np.float64)
    seconds = candidates.seconds(kind_of)
    seconds *= jobs_in[:, np.newaxis]
    # A device that may be given less works its backlog off as if it had fewer slots; one that may be given nothing
    # has no finite cost.
    slots = np.array([device.capacity or device.slots for device in devices], np.float64)
    ready = np.array([cluster.outstanding_s(device.name) for device in devices], np.float64) / slots
    return Pricing(Problem(seconds, ready, slots), kind_of, candidates, jobs_in)


def quickest_s(kernel: str, options: Options, cluster: Cluster, model: CostModel) -> float | None:
    """What a job of these declared shapes takes on the device that runs it fastest.

    None where none can run it, or that is not known: it has not been measured there twice.
    """
    offer = cluster.offer(kernel)
    if offer is None or options.shapes is None:
        return None
    kind = _Kind(kernel, options.device, _row(options.shapes, offer))
    candidates = Candidates([kind], cluster.devices, model)
    seconds = candidates.seconds([0])[0]
    if not np.isfinite(seconds).any():
        return None
    fastest = int(seconds.argmin())
    estimate = candidates[0][fastest].estimate
    return seconds.item(fastest) if estimate is not None and estimate.spread else None


class _Kind(msgspec.Struct, frozen=True):
    """What jobs share that cost the same."""

    kernel: str
    pin: str | None
    row: tuple[float, ...]
    """As `CostModel.predict_many` takes it: flops, bytes, transfer bytes, dims."""


def _sized(job: ClaimedJob, offer: Offer | None) -> Sized:
    """The size of a job, whose row is made where no other job of the window has the same."""
    if offer is None:
        return Sized(None, None)
    shapes, size = _shapes(job, offer)
    return Sized(offer, size, shapes)


def _shapes(job: ClaimedJob, offer: Offer | None) -> tuple[dict[str, Any] | None, Hashable]:
    """The declared shapes of a job, and of them what its cost depends on; None for both where they cannot be told."""
    if offer is None:
        return None, None
    try:
        shapes = job.options.shapes or _shapes_in_body(job.message, offer.signature)
        found = map(shapes.get, offer.sized_by)
        size = tuple([tuple(each) if type(each) is list else each for each in found])
        hash(size)
    except Exception:  # noqa: BLE001 - whatever stands there, it must not stop the router
        return None, None
    return shapes, size


def _row(shapes: Mapping[str, Any] | None, offer: Offer | None) -> tuple[float, ...]:
    """Of a job's shapes: flops, bytes, the bytes of its arrays, dims. What cannot be told is the worker's to refuse."""
    if shapes is None or offer is None:
        return _UNKNOWN
    try:
        work = offer.spec.work(offer.signature.dims(shapes))
        size = 0.0
        for name, argument in offer.signature.inputs.items():
            if argument.dims is not None:
                size += math.prod(shapes[name]) * DTYPES[argument.dtype].itemsize
        return (work.flops, work.bytes, size, *work.dims)
    # Declared sizes may be beyond any number; whatever they are, they must not stop the router.
    except Exception:  # noqa: BLE001
        return _UNKNOWN


def _shapes_in_body(message: bytes, signature: Signature) -> dict[str, Any]:
    body = wire.read_body(wire.read_envelope(message), limit_bytes=_OPEN_LIMIT_BYTES)
    return shapes_of(inherit(signature, body))
