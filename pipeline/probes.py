"""Probes: launches of a kernel on a device to which no prediction would have sent them, so that it is known.

Who only goes where it is predicted to be quickest never learns that it is quicker elsewhere. Two launches on each
device and greedy choice after them end 3.4 % above an oracle, greedy choice alone 8.7 %. One more each time that all
launches have doubled finds what the first two got wrong (`CostModel.enough`, decision 21).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from lepton_ai import topology
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import UNPLACED, Problem
from pipeline.cluster import Cluster
from pipeline.window import ClaimedJob

__all__ = ["Probes"]

#: Launches after which a kernel counts as measured on a device.
ENOUGH: Final = 2
#: A job is a probe where it would end within so many times its best, or within so many seconds.
_TIMES: Final = 4.0
_CHEAP_S: Final = 0.002
#: So many jobs of a kernel are looked at in a step.
_LOOKED_AT: Final = 8
#: A first prediction may be out by this much: a job with a deadline must be in time even so.
_CAUTION: Final = 10.0


class Probes:
    """Which jobs of a step go where a kernel has not been measured. Used by the router's thread."""

    def __init__(self, cluster: Cluster, model: CostModel) -> None:
        self._cluster = cluster
        self._model = model
        self._open: dict[str, tuple[str, str]] = {}
        """Probes under way, by job: their kernel and device."""
        self._measured: dict[str, int] = {}
        """Kernels of which no device needs to be told more, and how many launches of each were enough."""

    def refresh(self) -> None:
        """The fleet has changed."""
        self._measured.clear()

    def ended(self, jobs: Iterable[str]) -> None:
        """These jobs are no longer under way, whatever they taught."""
        if self._open:
            for job in jobs:
                self._open.pop(job, None)

    def choose(
        self,
        jobs: Sequence[ClaimedJob],
        problem: Problem,
        device: Sequence[int],
        now: float,
        has_room: Callable[[int], bool],
    ) -> dict[int, int]:
        """Of jobs with the devices that a policy gives them: which are probes, by their number, and of which device.

        Nobody's job is one that is urgent, that might miss its deadline, or that would end much later than it could.
        What the policy chose must have been measured: else that is where something is to be learned.
        """
        found: dict[int, int] = {}
        enough = {kernel: self._model.enough(kernel) for kernel in {job.kernel for job in jobs}}
        wanted = {
            kernel: self._lacking(kernel, count)
            for kernel, count in enough.items()
            if self._measured.get(kernel, 0) < count
        }
        if not any(wanted.values()):
            return found
        ready = problem.ready
        looked = dict.fromkeys(wanted, 0)
        for at, job in enumerate(jobs):
            lacking = wanted.get(job.kernel)
            if not lacking or device[at] == UNPLACED or looked[job.kernel] >= _LOOKED_AT:
                continue
            looked[job.kernel] += 1
            if not self._can_afford(job) or self._launches(job.kernel, device[at]) < ENOUGH:
                continue
            finish = ready + problem.seconds[at]
            most_s = max(_TIMES * finish.min(), _CHEAP_S)
            left_s = (job.deadline_at - now) / _CAUTION if job.deadline_at is not None else most_s
            for other in lacking:
                if other != device[at] and finish[other] <= min(most_s, left_s) and has_room(other):
                    found[at] = other
                    lacking[other] -= 1
                    if not lacking[other]:
                        del lacking[other]
                    break
        return found

    def sent(self, job: ClaimedJob, device: str) -> None:
        """A probe is under way."""
        self._open[job.id] = (job.kernel, device)

    def _can_afford(self, job: ClaimedJob) -> bool:
        return not job.alone and job.options.urgency <= topology.DEFAULT_PRIORITY

    def _lacking(self, kernel: str, enough: int) -> dict[int, int]:
        """How many more launches each device lacks, by its number; what is under way counts as launched."""
        under_way = list(self._open.values())
        found, is_measured = {}, True
        for at, device in enumerate(self._cluster.devices):
            if kernel not in device.kernels:
                continue
            launches = self._launches(kernel, at)
            is_measured &= launches >= enough
            if (lacks := enough - launches - under_way.count((kernel, device.name))) > 0:
                found[at] = lacks
        if is_measured:
            self._measured[kernel] = enough
        return found

    def _launches(self, kernel: str, device: int) -> int:
        return self._model.launches(kernel, self._cluster.devices[device].name)
