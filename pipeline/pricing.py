"""From claimed jobs to a Problem: which devices could run each job, and what it would cost there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from lepton_ai import wire
from lepton_ai.job import Candidate, Estimate
from lepton_ai.kernel import KernelSpec, Work
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import Problem
from lepton_ai.signature import Signature, shapes_of
from lepton_ai.succession import inherit
from lepton_ai.tensor import DTYPES
from pipeline.cluster import Cluster, ServedDevice
from pipeline.window import ClaimedJob

__all__ = ["Pricing", "price"]

#: A body larger than this is not opened for its shapes; its job is priced as if it had no work.
_OPEN_LIMIT_BYTES = 1 << 20
_UNKNOWN_WORK = Work(0.0, 0.0)


class Pricing(msgspec.Struct, frozen=True):
    """The Problem of some jobs, and the candidates behind its numbers: `candidates[job][device]`, without waits."""

    problem: Problem
    candidates: list[tuple[Candidate, ...]]


def price(jobs: Sequence[ClaimedJob], cluster: Cluster, model: CostModel) -> Pricing:
    """What each job would cost on each device of the cluster."""
    devices = cluster.devices
    rows = [_candidates(job, devices, cluster.spec(job.kernel), model) for job in jobs]
    seconds = np.array([[_seconds(candidate.estimate) for candidate in row] for row in rows], np.float64).reshape(
        len(jobs), len(devices)
    )
    slots = np.array([device.slots for device in devices], np.float64)
    ready = np.array([cluster.outstanding_s(device.name) / device.slots for device in devices], np.float64)
    return Pricing(Problem(seconds, ready, slots), rows)


def _seconds(estimate: Estimate | None) -> float:
    return math.inf if estimate is None else estimate.transfer_s + estimate.run_s


def _candidates(
    job: ClaimedJob,
    devices: tuple[ServedDevice, ...],
    known: tuple[KernelSpec, Signature] | None,
    model: CostModel,
) -> tuple[Candidate, ...]:
    work, transfer_bytes = _UNKNOWN_WORK, 0.0
    if known is not None:
        work, transfer_bytes = _work(job, *known)
    found = []
    for device in devices:
        if job.kernel not in device.kernels:
            found.append(Candidate(device.name, excluded=f"announces no {job.kernel}"))
        elif not device.matches(job.options.device):
            found.append(Candidate(device.name, excluded=f"the job is pinned to {job.options.device}"))
        else:
            estimate = model.predict(job.kernel, device.name, work, device.peaks, transfer_bytes)
            found.append(Candidate(device.name, estimate))
    return tuple(found)


def _work(job: ClaimedJob, spec: KernelSpec, signature: Signature) -> tuple[Work, float]:
    """The Work of a job and the bytes of its arrays. What cannot be told here is the worker's to refuse."""
    try:
        shapes = job.options.shapes or _shapes_in_body(job.message, signature)
        dims = signature.dims(shapes)
        size = 0.0
        for name, argument in signature.inputs.items():
            if argument.dims is not None:
                size += math.prod(shapes[name]) * DTYPES[argument.dtype].itemsize
        return spec.work(dims), size
    # Declared sizes may be beyond any number; whatever they are, they must not stop the router.
    except Exception:  # noqa: BLE001
        return _UNKNOWN_WORK, 0.0


def _shapes_in_body(message: bytes, signature: Signature) -> dict[str, Any]:
    body = wire.read_body(wire.read_envelope(message), limit_bytes=_OPEN_LIMIT_BYTES)
    return shapes_of(inherit(signature, body))
