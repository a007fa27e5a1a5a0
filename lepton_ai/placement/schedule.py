"""A Schedule: which task runs on which resource, from when to when, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import msgspec
import numpy as np

from lepton_ai.job import Candidate, Estimate
from lepton_ai.placement.bounds import lower_bound
from lepton_ai.placement.demand import Demand
from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Policy, Problem, planned
from lepton_ai.placement.supply import Supply

__all__ = ["Bar", "Explanation", "Schedule"]


class Bar(msgspec.Struct, frozen=True):
    """A task as a Gantt chart shows it."""

    task: str
    resource: str
    slot: int
    """Which of the resource's slots, from 1."""
    priority: int
    start_s: float
    end_s: float


class Explanation(msgspec.Struct, frozen=True):
    """Where a task goes and why."""

    task: str
    resource: str | None
    """None where it waits, because no resource can run it."""
    reason: str
    candidates: tuple[Candidate, ...]
    """Every resource, and what the task was predicted to need there; `excluded` says why one could not run it."""
    in_time: bool
    """Whether it is predicted to have ended by its deadline; true where it has none, false where it waits."""


class Schedule:
    """Tasks on resources, worked out by a policy. What goes first stands first.

    A slot is a device of the Problem, so that what starts when is exact: a Problem's own slots are an approximation.
    """

    def __init__(self, supplies: Sequence[Supply], demands: Sequence[Demand], policy: Policy) -> None:
        self.policy = policy.name
        self._supplies = list(supplies)
        # Equal priorities in the order in which they were added: the sort is stable.
        self._demands = sorted(demands, key=lambda demand: demand.priority)
        self._offers = [[demand.on(supply) for supply in self._supplies] for demand in self._demands]
        slots = np.array([supply.slots for supply in self._supplies], np.intp)
        self._resource_of = np.repeat(np.arange(len(slots)), slots)
        self._first: Indices = np.cumsum(slots) - slots
        self.problem = self._problem()
        # The policy's own waits may follow the order in which it placed; here whoever is more urgent starts first.
        self._plan = planned(self.problem, policy.place(self.problem).device)
        self._row = {demand.name: row for row, demand in enumerate(self._demands)}

    def _problem(self) -> Problem:
        costs = [[_seconds(offer) for offer in offers] for offers in self._offers]
        seconds = np.array(costs, np.float64).reshape(len(self._demands), len(self._supplies))
        devices = len(self._resource_of)
        return Problem(
            seconds,
            np.zeros(devices),
            np.ones(devices),
            class_of=self._resource_of,
            rate=np.array([supply.rate / supply.slots for supply in self._supplies], np.float64)[self._resource_of],
            weight=np.array([1 / demand.priority for demand in self._demands], np.float64),
            deadline=np.array([demand.deadline_s for demand in self._demands], np.float64),
        )

    def resource(self, task: str) -> str | None:
        """The resource that a task is placed on; None where no resource can run it."""
        device = self._plan.device[self._row[task]]
        return None if device == UNPLACED else self._supplies[self._resource_of[device]].name

    @property
    def makespan_s(self) -> float:
        """Seconds until the last task has ended; 0 where none is placed."""
        return self._plan.makespan_s(self.problem)

    @cached_property
    def lower_bound_s(self) -> float:
        """Seconds below which no plan's makespan can be."""
        return lower_bound(self.problem).seconds

    @property
    def cost(self) -> float:
        """What the placed tasks cost by the rates of their resources."""
        assert self.problem.rate is not None
        return float(self._plan.load(self.problem) @ self.problem.rate)

    def tasks(self) -> list[str]:
        """Every task, the urgent first."""
        return list(self._row)

    def slots(self) -> dict[str, int]:
        """How many tasks each resource runs at once."""
        return {supply.name: supply.slots for supply in self._supplies}

    def utilization(self) -> dict[str, float]:
        """The share of the makespan in which each resource works, over all its slots."""
        load, whole_s = self._plan.load(self.problem), self.makespan_s
        busy = [load[self._resource_of == at].mean() / whole_s if whole_s else 0.0 for at in range(len(self._supplies))]
        return {supply.name: float(share) for supply, share in zip(self._supplies, busy, strict=True)}

    def bars(self) -> list[Bar]:
        """Every placed task, the urgent first."""
        found = []
        for row, demand in enumerate(self._demands):
            device = self._plan.device[row]
            if device != UNPLACED:
                at, start_s = self._resource_of[device], float(self._plan.wait[row])
                end_s = start_s + float(self.problem.seconds[row, at])
                slot = int(device - self._first[at]) + 1
                found.append(Bar(demand.name, self._supplies[at].name, slot, demand.priority, start_s, end_s))
        return found

    def explain(self, task: str) -> Explanation:
        """Where a task goes, why, and what it would have cost elsewhere."""
        row = self._row[task]
        waits = self._free_s[row]
        chosen = None
        if (device := self._plan.device[row]) != UNPLACED:
            chosen = int(self._resource_of[device])
            waits = waits.copy()
            waits[chosen] = self._plan.wait[row]
        candidates = tuple(_after(offer, float(wait_s)) for offer, wait_s in zip(self._offers[row], waits, strict=True))
        if chosen is None:
            told = "; ".join(f"{each.device}: {each.excluded}" for each in candidates)
            return Explanation(task, None, f"no resource can run it: {told}", candidates, in_time=False)
        in_time = _finish_s(candidates[chosen]) <= self._demands[row].deadline_s
        return Explanation(
            task, candidates[chosen].device, self._reason(candidates, chosen), candidates, in_time=in_time
        )

    def _reason(self, candidates: Sequence[Candidate], chosen: int) -> str:
        here = candidates[chosen]
        others = [each for at, each in enumerate(candidates) if at != chosen and each.excluded is None]
        if not others:
            return f"only {here.device} can run it, and ends it after {_finish_s(here):.3g} s"
        next_best = min(others, key=_finish_s)
        compared = f"{_finish_s(here):.3g} s against {_finish_s(next_best):.3g} s on {next_best.device}"
        if _finish_s(here) < _finish_s(next_best):
            return f"{here.device} ends it first: {compared}"
        if _finish_s(here) == _finish_s(next_best):
            return f"no other ends it sooner than {here.device}: {compared}"
        return f"the policy {self.policy} chose {here.device}, which does not end it first: {compared}"

    @cached_property
    def _free_s(self) -> Floats:
        """[task, resource]: seconds until a slot of it has worked off the tasks that go before."""
        free = np.empty((len(self._demands), len(self._supplies)))
        load = np.zeros(len(self._resource_of))
        for row in range(len(self._demands)):
            free[row] = np.minimum.reduceat(load, self._first)
            if (device := self._plan.device[row]) != UNPLACED:
                load[device] += self.problem.seconds[row, self._resource_of[device]]
        return free


def _seconds(offer: Candidate) -> float:
    return math.inf if offer.estimate is None or offer.excluded else offer.estimate.finish_s


def _finish_s(candidate: Candidate) -> float:
    return math.inf if candidate.estimate is None else candidate.estimate.finish_s


def _after(offer: Candidate, wait_s: float) -> Candidate:
    if offer.estimate is None:
        return offer
    estimate = Estimate(wait_s, offer.estimate.transfer_s, offer.estimate.run_s)
    return msgspec.structs.replace(offer, estimate=estimate)
