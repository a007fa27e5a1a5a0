"""From claimed jobs to a device for each: prices, the terms that jobs and devices set, and the policy for the occasion.

Two policies are at hand. The online one places what has just come. The deep one is asked where more waits than devices
take for now, and not all of one kind, so that which jobs go where matters more than which goes next.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import numpy as np
import structlog

from lepton_ai import topology
from lepton_ai.errors import InvalidSettings
from lepton_ai.placement import policies
from lepton_ai.placement.batches import Group, batched
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.deadlines import in_time
from lepton_ai.placement.problem import Floats, Plan, Policy, Problem
from lepton_ai.placement.tolls import Tolls
from lepton_ai.settings import Settings
from pipeline.cluster import Cluster
from pipeline.pricing import Pricing, price
from pipeline.window import ClaimedJob
from queues.broker import Kind

__all__ = ["Decision", "Planner"]

#: A window is deep from so many jobs on.
DEEP: Final = 256
#: The deep policy may take one part of so many of a router's time.
_PART: Final = 5
#: So many groups of jobs that are alike are looked at as batches, each for 0.05 ms.
_MOST_GROUPS: Final = 4
#: From so many costs on (jobs times devices) a compiled loop is worth loading Numba for, and until it is there the same
#: loop runs plain: 0.7 s and 80 MB against 0.3 ms a window (docs/decisions/0023).
_WORTH_COMPILING: Final = 512
#: The policy that runs compiled or plain, as asked.
_COMPILED: Final = "externality"
#: Messages after which the mean of the jobs in them has forgotten two thirds of the ones before.
_REMEMBERED: Final = 1000

log = structlog.get_logger()


class Decision(msgspec.Struct, frozen=True):
    """What was known of some messages, and the device for each."""

    pricing: Pricing
    problem: Problem
    """The pricing's, with the terms that the jobs set."""
    plan: Plan
    policy: str
    seconds: Floats
    """[message, device]: what it takes there, with its share of the launch."""
    together: Sequence[int]
    """[message]: how many jobs go along in its batch, or the 1 that it is."""


class Planner:
    """Chooses policies and asks them. Used by one thread."""

    def __init__(
        self,
        settings: Settings,
        model: CostModel,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._model = model
        self._clock = clock
        self._online = policy or _plain(settings.policy)
        self._wanted = [] if policy is not None else _later(settings)
        """What is loaded once windows are large enough to pay for it."""
        self._compiled: Policy | None = None
        self._is_plain = True
        """Whether the tolls' loops are."""
        self._deep: Policy | None = None
        self._deep_at = -math.inf
        self.share = 1.0
        """The part of all jobs that is placed here, of several routers side by side."""
        self._devices: list[str] = []
        self._tolls = Tolls(0, is_compiled=False)
        """Of these devices."""
        self._jobs_each = 1.0
        """Running mean of the jobs in a message."""

    @property
    def name(self) -> str:
        """The policy for what has just come."""
        return self._online.name

    @property
    def typical_s(self) -> float:
        """What a job lately takes on the device best for it, on the mean; 0 before the first."""
        return (self._tolls.typical_s or 0.0) / self._jobs_each

    def wants(self, waiting: int, room: int) -> bool:
        """Whether the deep policy should look at what waits: more jobs than there is room for, and hundreds."""
        if waiting < DEEP or waiting <= room:
            return False
        self._warm()
        return self._deep is not None and self._clock() >= self._deep_at

    def decide(self, jobs: Sequence[ClaimedJob], cluster: Cluster, now: float, *, is_deep: bool = False) -> Decision:
        """Prices jobs and places them; `now` is in seconds since the epoch."""
        self._look_at(cluster)
        pricing = price(jobs, cluster, self._model)
        problem = self._with_terms(pricing, jobs, now)
        is_deep &= len(pricing.candidates) > 1
        groups = self._groups(pricing, jobs, cluster)
        if not groups:
            plan, name = self._place(problem, is_deep=is_deep)
            return Decision(pricing, problem, plan, name, pricing.problem.seconds, [1] * len(jobs))
        count = np.array([len(job.ids) for job in jobs], np.intp)
        batches = batched(problem, count, groups)
        seconds = batches.each_s[batches.row] * count[:, np.newaxis]
        plan, name = self._place(batches.problem, is_deep=is_deep)
        return Decision(pricing, problem, batches.plan(plan), name, seconds, batches.size[batches.row].tolist())

    def placed(self, jobs: Sequence[ClaimedJob], decision: Decision, device: Sequence[int], gone: list[bool]) -> None:
        """These jobs went to these devices, but for those that wait to be placed again: it is learned from."""
        problem = msgspec.structs.replace(decision.pricing.problem, seconds=decision.seconds)
        if self._compiled is not None and self._is_plain:
            self._tolls, self._is_plain = self._tolls.compiled(), False
        self._tolls.placed(problem, np.array(device, np.intp), gone)
        if jobs:
            kept = math.exp(-len(jobs) / _REMEMBERED)
            self._jobs_each = kept * self._jobs_each + (1 - kept) * sum([len(job.ids) for job in jobs]) / len(jobs)

    def _place(self, problem: Problem, *, is_deep: bool) -> tuple[Plan, str]:
        """What the policy for a problem says, and its name."""
        tolls = self._tolls
        problem = msgspec.structs.replace(problem, typical_s=tolls.typical_s, pressure=tolls.pressure, toll=tolls.toll)
        policy = self._policy(problem, is_deep)
        if policy is self._online:
            return policy.place(problem), policy.name
        started = self._clock()
        try:
            plan = policy.place(problem)
        except Exception:  # the next window would be claimed for nothing too, and the one after it
            log.exception("policy_left_out", policy=policy.name)
            self._leave_out(policy)
            return self._online.place(problem), self._online.name
        if policy is self._deep:
            ended = self._clock()
            self._deep_at = ended + (_PART - 1) * (took_s := ended - started)
            if took_s > self._settings.lease_s / 2:  # once more so long, and what was claimed is another router's
                log.warning("policy_left_out", policy=policy.name, took_s=round(took_s, 2), reason="half the lease")
                self._leave_out(policy)
        return plan, policy.name

    def _leave_out(self, policy: Policy) -> None:
        if policy is self._deep:
            self._deep = None
        else:
            self._compiled = None

    def _look_at(self, cluster: Cluster) -> None:
        """Brings the tolls up to now; of other devices they are learned anew."""
        devices = [device.name for device in cluster.devices]
        if devices != self._devices:
            self._devices, self._is_plain = devices, self._compiled is None
            self._tolls = Tolls(len(devices), is_compiled=not self._is_plain)
        self._tolls.share = self.share
        self._tolls.advance(self._clock())

    def _policy(self, problem: Problem, is_deep: bool) -> Policy:
        """The policy for a problem; one kind goes anywhere in its turn, and deadlines are the online policy's."""
        if self._deep is not None and is_deep and problem.deadline is None:
            return self._deep
        if problem.seconds.size < _WORTH_COMPILING:
            return self._online
        self._warm()
        return self._compiled or self._online

    def _groups(self, pricing: Pricing, jobs: Sequence[ClaimedJob], cluster: Cluster) -> list[Group]:
        """Which of these jobs may share launches, and are alike: the largest groups."""
        if len(jobs) == 1 and len(jobs[0].ids) == 1:
            return []  # it goes at once, and alone
        offers = {kernel: cluster.offer(kernel) for kernel in {job.kernel for job in jobs}}
        sharing = {kernel for kernel, offer in offers.items() if offer is not None and offer.spec.batch is not None}
        if not sharing:
            return []
        found: dict[tuple[int, int], list[int]] = {}
        for at, (job, kind) in enumerate(zip(jobs, pricing.kinds, strict=True)):
            if job.kernel in sharing and job.deadline_at is None and job.claim.kind is not Kind.ALONE:
                found.setdefault((kind, job.line[0]), []).append(at)
        groups = []
        launch: dict[str, Floats] = {}
        for members in sorted(found.values(), key=len, reverse=True)[:_MOST_GROUPS]:
            job = jobs[members[0]]
            if len(members) == 1 and len(job.ids) == 1:
                continue
            if job.kernel not in launch:
                launch[job.kernel] = np.array(
                    [self._model.launch_s(job.kernel, device.name, device.peaks) for device in cluster.devices]
                )
            groups.append(Group(np.array(members), launch[job.kernel], self._settings.batch_jobs))
        return groups

    def _warm(self) -> None:
        """Has what is wanted loaded and compiled, while the plain loop serves."""
        if self._wanted:
            threading.Thread(target=self._load, args=[self._wanted], name="compile", daemon=True).start()
            self._wanted = []

    def _load(self, wanted: Sequence[str]) -> None:
        from lepton_ai.placement.compiled import IS_COMPILED  # this is what takes its time

        if not IS_COMPILED:  # the plain loops over lists are quicker than what would be loaded
            log.info("policies_run_plain", without="numba")
            return
        for name in wanted:
            try:
                policy = policies.load(name)
                for _ in range(3):  # what comes last has no time left while a call compiles
                    policy.place(_uneven())
            except Exception as error:  # noqa: BLE001 - without it goes on as it does
                log.warning("policy_left_out", policy=name, reason=str(error))
                continue
            if name == self._online.name:
                self._compiled = policy
            else:
                self._deep = policy

    def _with_terms(self, pricing: Pricing, jobs: Sequence[ClaimedJob], now: float) -> Problem:
        problem = pricing.problem
        changed: dict[str, object] = {}
        if any(job.options.priority is not None for job in jobs):
            urgencies = np.array([job.options.urgency for job in jobs], np.float64)
            changed["weight"] = urgencies / topology.DEFAULT_PRIORITY
        if any(job.deadline_at is not None for job in jobs):
            left = [math.inf if job.deadline_at is None else job.deadline_at - now for job in jobs]
            changed["deadline"] = np.array(left, np.float64)
            changed["tail"] = pricing.tail()
            return in_time(msgspec.structs.replace(problem, **changed))
        return msgspec.structs.replace(problem, **changed) if changed else problem


def _uneven() -> Problem:
    """One of which no plan is proven to be the best, so that a policy takes every step that it has."""
    costs = 1 + np.modf(np.arange(2.0 * DEEP) * math.sqrt(2))[0]
    return Problem(costs.reshape(DEEP, 2), np.zeros(2), np.ones(2))


def _plain(name: str) -> Policy:
    return policies.load(name, is_compiled=False) if name == _COMPILED else policies.load(name)


def _later(settings: Settings) -> list[str]:
    """The policies that are worth their start in large windows only; InvalidSettings where there is none of a name."""
    deep = settings.deep_policy
    if deep and deep not in policies.names():
        raise InvalidSettings(f"no policy {deep!r}; there are {', '.join(policies.names())}", "deep_policy")
    return [
        *([_COMPILED] if settings.policy == _COMPILED else []),
        *([deep] if deep not in ("", settings.policy) else []),
    ]
