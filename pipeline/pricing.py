"""From claimed jobs to a Problem: which devices could run each job, and what it would cost there."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_ai import wire
from lepton_ai.job import Candidate, Estimate, Options
from lepton_ai.kernel import Work
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import Problem
from lepton_ai.signature import Signature, shapes_of
from lepton_ai.succession import inherit
from lepton_ai.tensor import DTYPES
from pipeline.cluster import Cluster, Offer, ServedDevice
from pipeline.window import ClaimedJob

__all__ = ["Pricing", "predicted", "price", "quickest_s"]

#: A body larger than this is not opened for its shapes; its job is priced as if it had no work.
_OPEN_LIMIT_BYTES = 1 << 20
_UNKNOWN_WORK = Work(0.0, 0.0)


class Pricing(msgspec.Struct, frozen=True):
    """The Problem of some jobs, and the candidates behind its numbers, once for all jobs that cost the same."""

    problem: Problem
    kinds: list[int]
    """[job]: which of the candidates are its own."""
    candidates: list[tuple[Candidate, ...]]
    """[kind][device], without waits."""


def price(jobs: Sequence[ClaimedJob], cluster: Cluster, model: CostModel) -> Pricing:
    """What each job would cost on each device of the cluster."""
    devices = cluster.devices
    known: dict[Hashable, int] = {}
    candidates: list[tuple[Candidate, ...]] = []
    kinds: list[int] = []
    for job in jobs:
        offer = cluster.offer(job.kernel)
        shapes, size = _shapes(job, offer)
        key = (job.kernel, job.options.device, size)
        if (kind := known.get(key)) is None:
            kind = known[key] = len(candidates)
            work, transfer_bytes = _work(shapes, offer) if offer is not None else (_UNKNOWN_WORK, 0.0)
            candidates.append(_candidates(job, devices, work, transfer_bytes, model))
        kinds.append(kind)
    table = [[_seconds(candidate.estimate) for candidate in row] for row in candidates]
    seconds = np.array(table, np.float64).reshape(len(table), len(devices))[kinds]
    seconds *= np.array([len(job.ids) for job in jobs], np.float64)[:, np.newaxis]
    # A device that may be given less works its backlog off as if it had fewer slots; one that may be given nothing
    # has no finite cost.
    slots = np.array([device.capacity or device.slots for device in devices], np.float64)
    ready = np.array([cluster.outstanding_s(device.name) for device in devices], np.float64) / slots
    return Pricing(Problem(seconds, ready, slots), kinds, candidates)


def quickest_s(kernel: str, options: Options, cluster: Cluster, model: CostModel) -> float | None:
    """What a job of these declared shapes takes on the device that runs it fastest.

    None where none can run it, or that is not known: it has not been measured there twice.
    """
    offer = cluster.offer(kernel)
    if offer is None or options.shapes is None:
        return None
    work, transfer_bytes = _work(options.shapes, offer)
    found = [
        predicted(kernel, device, work, transfer_bytes, model)
        for device in cluster.devices
        if device.can_run(kernel, options.device)
    ]
    fastest = min(found, key=_seconds, default=None)
    return None if fastest is None or not fastest.spread else _seconds(fastest)


def predicted(kernel: str, device: ServedDevice, work: Work, transfer_bytes: float, model: CostModel) -> Estimate:
    """The estimate for one job that starts at once, at the speed that the device has beside what else its hosts do."""
    alone = model.predict(kernel, device.name, work, device.peaks, transfer_bytes)
    if device.speed == 1:
        return alone
    transfer_s, run_s = alone.transfer_s / device.speed, alone.run_s / device.speed
    return Estimate(0.0, transfer_s, run_s, alone.spread)


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


def _seconds(estimate: Estimate | None) -> float:
    return math.inf if estimate is None else estimate.transfer_s + estimate.run_s


def _candidates(
    job: ClaimedJob, devices: tuple[ServedDevice, ...], work: Work, transfer_bytes: float, model: CostModel
) -> tuple[Candidate, ...]:
    found = []
    for device in devices:
        if job.kernel not in device.kernels:
            found.append(Candidate(device.name, excluded=f"announces no {job.kernel}"))
        elif not device.matches(job.options.device):
            found.append(Candidate(device.name, excluded=f"the job is pinned to {job.options.device}"))
        elif device.share <= 0:
            found.append(Candidate(device.name, excluded=device.reason))
        else:
            found.append(Candidate(device.name, predicted(job.kernel, device, work, transfer_bytes, model)))
    return tuple(found)


def _work(shapes: dict[str, Any] | None, offer: Offer) -> tuple[Work, float]:
    """The Work of a job and the bytes of its arrays. What cannot be told here is the worker's to refuse."""
    if shapes is None:
        return _UNKNOWN_WORK, 0.0
    try:
        dims = offer.signature.dims(shapes)
        size = 0.0
        for name, argument in offer.signature.inputs.items():
            if argument.dims is not None:
                size += math.prod(shapes[name]) * DTYPES[argument.dtype].itemsize
        return offer.spec.work(dims), size
    # Declared sizes may be beyond any number; whatever they are, they must not stop the router.
    except Exception:  # noqa: BLE001
        return _UNKNOWN_WORK, 0.0


def _shapes_in_body(message: bytes, signature: Signature) -> dict[str, Any]:
    body = wire.read_body(wire.read_envelope(message), limit_bytes=_OPEN_LIMIT_BYTES)
    return shapes_of(inherit(signature, body))
