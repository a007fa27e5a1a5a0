"""From claimed jobs to a Problem: which devices could run each job, and what it would cost there."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from lepton_ai.job import Options
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import Floats, Problem
from pipeline.candidates import Candidates, candidates
from pipeline.cluster import Cluster
from pipeline.sized import Sized, sized
from pipeline.window import ClaimedJob

__all__ = ["Pricing", "price", "quickest_s"]


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


def price(jobs: Sequence[ClaimedJob], cluster: Cluster, model: CostModel) -> Pricing:
    """What each job would cost on each device of the cluster."""
    devices, offer_of = cluster.devices, cluster.offer
    kinds: dict[Sized, int] = {}
    kind_of: list[int] = []
    for job in jobs:
        mine, offer = job.sized, offer_of(job.kernel)
        if mine is None or mine.offer is not offer:
            mine = job.sized = sized(job.kernel, job.options, job.message, offer, cluster.sized)
        kind_of.append(kinds.setdefault(mine, len(kinds)))
    found = candidates(list(kinds), devices, model)
    jobs_in = np.array([len(job.ids) for job in jobs], np.float64)
    seconds = found.seconds(kind_of)
    seconds *= jobs_in[:, np.newaxis]
    # A device that may be given less works its backlog off as if it had fewer slots; one that may be given nothing
    # has no finite cost.
    slots = [device.capacity or device.slots for device in devices]
    ready = [cluster.outstanding_s(device.name) / each for device, each in zip(devices, slots, strict=True)]
    problem = Problem(seconds, np.array(ready, np.float64), np.array(slots, np.float64))
    return Pricing(problem, kind_of, found, jobs_in)


def quickest_s(kernel: str, options: Options, cluster: Cluster, model: CostModel) -> float | None:
    """What a job of these declared shapes takes on the device that runs it fastest.

    None where none can run it, or that is not known: it has not been measured there twice.
    """
    offer = cluster.offer(kernel)
    if offer is None or options.shapes is None:
        return None
    found = candidates([sized(kernel, options, b"", offer, cluster.sized)], cluster.devices, model)
    seconds = found.seconds([0])[0]
    if not np.isfinite(seconds).any():
        return None
    fastest = int(seconds.argmin())
    estimate = found[0][fastest].estimate
    return seconds.item(fastest) if estimate is not None and estimate.spread else None
