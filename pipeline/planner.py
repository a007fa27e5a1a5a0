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
from lepton_ai.placement import policies
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.deadlines import in_time
from lepton_ai.placement.problem import Floats, Plan, Policy, Problem
from lepton_ai.settings import Settings
from pipeline.cluster import Cluster
from pipeline.pricing import Pricing, price
from pipeline.window import ClaimedJob

__all__ = ["Decision", "Planner"]

#: A window is deep from so many jobs on.
DEEP: Final = 256
#: The deep policy may take one part of so many of a router's time.
_PART: Final = 5
#: From so many costs on (jobs times devices) a compiled loop is worth loading Numba for, and until it is there the same
#: loop runs plain: 0.7 s and 80 MB against 0.3 ms a window (docs/decisions/0023).
_WORTH_COMPILING: Final = 512
#: The policy that runs compiled or plain, as asked.
_COMPILED: Final = "externality"
#: Jobs after which the mean of what jobs take on their best device has forgotten two thirds of the ones before.
_REMEMBERED: Final = 1000

log = structlog.get_logger()


class Decision(msgspec.Struct, frozen=True):
    """What was known of some jobs, and the device for each."""

    pricing: Pricing
    problem: Problem
    """The pricing's, with the terms of jobs and devices in it."""
    plan: Plan
    policy: str


class Planner:
    """Chooses policies and asks them. Used by one thread."""

    def __init__(
        self,
        settings: Settings,
        model: CostModel,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._clock = clock
        self._online = policy or _plain(settings.policy)
        self._wanted = [] if policy is not None else _later(settings)
        """What is loaded once windows are large enough to pay for it."""
        self._compiled: Policy | None = None
        self._deep: Policy | None = None
        self._deep_at = -math.inf
        self._typical_s = 0.0

    @property
    def name(self) -> str:
        """The policy for what has just come."""
        return self._online.name

    @property
    def typical_s(self) -> float:
        """What a job lately takes on the device best for it, on the mean; 0 before the first."""
        return self._typical_s

    def wants(self, waiting: int, room: int) -> bool:
        """Whether the deep policy should look at what waits: more jobs than there is room for, and hundreds."""
        if waiting < DEEP or waiting <= room:
            return False
        self._warm()
        return self._deep is not None and self._clock() >= self._deep_at

    def decide(self, jobs: Sequence[ClaimedJob], cluster: Cluster, now: float, *, is_deep: bool = False) -> Decision:
        """Prices jobs and places them; `now` is in seconds since the epoch."""
        pricing = price(jobs, cluster, self._model)
        problem = self._with_terms(pricing, jobs, now)
        # One kind goes anywhere in its turn, and deadlines are the online policy's.
        if self._deep is not None and is_deep and len(pricing.candidates) > 1 and problem.deadline is None:
            started = self._clock()
            plan = self._deep.place(problem)
            ended = self._clock()
            self._deep_at = ended + (_PART - 1) * (ended - started)
            return Decision(pricing, problem, plan, self._deep.name)
        policy = self._online
        if problem.seconds.size >= _WORTH_COMPILING:
            self._warm()
            policy = self._compiled or policy
        return Decision(pricing, problem, policy.place(problem), policy.name)

    def _warm(self) -> None:
        """Has what is wanted loaded and compiled, while the plain loop serves."""
        if self._wanted:
            threading.Thread(target=self._load, args=[self._wanted], name="compile", daemon=True).start()
            self._wanted = []

    def _load(self, wanted: Sequence[str]) -> None:
        for name in wanted:
            try:
                policy = policies.load(name)
                policy.place(Problem(np.ones((DEEP, 2)), np.zeros(2), np.ones(2)))
            except Exception as error:  # noqa: BLE001 - without it goes on as it does
                log.warning("policy_left_out", policy=name, reason=str(error))
                continue
            if name == self._online.name:
                self._compiled = policy
            else:
                self._deep = policy

    def _with_terms(self, pricing: Pricing, jobs: Sequence[ClaimedJob], now: float) -> Problem:
        problem = pricing.problem
        changed: dict[str, object] = {"typical_s": self._learn_typical(problem.seconds)}
        if any(job.options.priority is not None for job in jobs):
            urgencies = np.array([job.options.urgency for job in jobs], np.float64)
            changed["weight"] = urgencies / topology.DEFAULT_PRIORITY
        if any(job.deadline_at is not None for job in jobs):
            left = [math.inf if job.deadline_at is None else job.deadline_at - now for job in jobs]
            changed["deadline"] = np.array(left, np.float64)
            changed["tail"] = pricing.tail()
        problem = msgspec.structs.replace(problem, **changed)
        return problem if problem.deadline is None else in_time(problem)

    def _learn_typical(self, seconds: Floats) -> float | None:
        """The running mean of what jobs take on the device best for each, these among them."""
        best = seconds.min(axis=1, initial=math.inf)
        best = best[best < math.inf]
        if best.size:
            mean_s = float(best.mean())
            kept = math.exp(-best.size / _REMEMBERED) if self._typical_s else 0.0
            self._typical_s = max(kept * self._typical_s + (1 - kept) * mean_s, 1e-12)
        return self._typical_s or None


def _plain(name: str) -> Policy:
    return policies.load(name, is_compiled=False) if name == _COMPILED else policies.load(name)


def _later(settings: Settings) -> list[str]:
    """The policies that are worth their start in large windows only."""
    deep = settings.deep_policy
    return [
        *([_COMPILED] if settings.policy == _COMPILED else []),
        *([deep] if deep not in ("", settings.policy) else []),
    ]
