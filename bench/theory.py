"""What queueing theory says that the simulator must find: single queues, shared ones, the better of two at random."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import numpy as np

from lepton_ai.placement import policies
from lepton_ai.placement.problem import Floats, Plan, Policy, Problem
from lepton_ai.placement.simulate import Fleet, Stream, simulate

__all__ = ["Check", "checks", "shared_queue", "single_queue", "two_choices"]

#: The part of a run that is left out: the devices begin empty.
WARM_UP = 0.1


class Check(msgspec.Struct, frozen=True):
    name: str
    load: float
    theory: float
    """The mean response, in mean service times."""
    simulated: float

    @property
    def off(self) -> float:
        return self.simulated / self.theory - 1


class TwoChoices:
    """The shorter of two queues drawn at random; it keeps its own generator, and so is for checks only."""

    name = "two_choices"

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def place(self, problem: Problem) -> Plan:
        one, other = self._random.integers(problem.devices, size=2)
        shorter = one if problem.ready[one] <= problem.ready[other] else other
        return Plan(np.array([shorter]), problem.ready[[shorter]])


def checks(jobs: int, queues: int) -> Iterator[Check]:
    """Runs of so many jobs beside what theory says; the better of two of so many queues."""
    for load in (0.5, 0.8):
        yield single_queue(load, jobs)
        yield shared_queue(load, 4, jobs)
    for load in (0.5, 0.8, 0.9):
        yield two_choices(load, queues, jobs)


def single_queue(load: float, jobs: int, seed: int = 1) -> Check:
    """M/M/1: 1 / (1 - load)."""
    found = _mean_response(policies.load("earliest_finish"), 1, 1, load, jobs, seed)
    return Check("M/M/1", load, 1 / (1 - load), found)


def shared_queue(load: float, slots: int, jobs: int, seed: int = 1) -> Check:
    """M/M/c: 1 + C / (c (1 - load)), with C by Erlang's formula for delays (1917)."""
    offered = load * slots
    ended = offered**slots / math.factorial(slots) / (1 - load)
    delayed = ended / (sum(offered**n / math.factorial(n) for n in range(slots)) + ended)
    found = _mean_response(policies.load("earliest_finish"), 1, slots, load, jobs, seed)
    return Check(f"M/M/{slots}", load, 1 + delayed / (slots * (1 - load)), found)


def two_choices(load: float, queues: int, jobs: int, seed: int = 1) -> Check:
    """For many queues the sum over i of load^(2^i - 2).

    M. Mitzenmacher, "The power of two choices in randomized load balancing", IEEE Trans. Parallel and Distributed
    Systems 12, 2001, corollary 3.
    """
    theory = sum(load ** (2**i - 2) for i in range(1, 20))
    found = _mean_response(TwoChoices(seed), queues, 1, load, jobs, seed)
    return Check(f"the better of two of {queues}", load, theory, found)


def _mean_response(policy: Policy, devices: int, slots: int, load: float, jobs: int, seed: int) -> float:
    """Each job is predicted to take a second and takes an exponential time: what a device has is its queue's length.

    The drawn times are scaled to their mean: most of what a run of this length is off by chance is that it had a load
    of its own.
    """
    random = np.random.default_rng([seed, devices, slots])
    gaps_s, real_s = random.exponential(1.0, (2, jobs))
    at_s = np.cumsum(gaps_s / gaps_s.mean()) / (load * devices * slots)
    stream = Stream(at_s, np.zeros(jobs, np.intp), real_s / real_s.mean())
    fleet = Fleet(np.ones((1, devices)), np.full(devices, float(slots)))
    response_s: Floats = simulate(policy, fleet, stream, elapsed=False).response_s
    return float(response_s[int(WARM_UP * jobs) :].mean())
