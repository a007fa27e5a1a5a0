"""Quick prices prove nearly what the linear program does, and never more than is true."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ai.placement.bounds import lower_bound
from lepton_ai.placement.equilibrium import Equilibrium, Supply, equilibrium
from lepton_ai.placement.problem import Problem, planned


def of(problem: Problem) -> Equilibrium:
    return equilibrium(
        problem.seconds, Supply(problem.ready, problem.slots, np.arange(problem.devices), problem.devices)
    )


def drawn(seed: int, jobs: int, devices: int) -> Problem:
    random = np.random.default_rng(seed)
    seconds = random.lognormal(0, 1, (jobs, 1)) * random.lognormal(0, 1, (jobs, devices))
    return Problem(seconds, random.uniform(0, jobs / devices, devices), random.choice([1.0, 4.0], devices))


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_is_close_to_that_of_the_linear_program(seed: int) -> None:
    problem = drawn(seed, 400, 8)
    assert of(problem).bound_s >= lower_bound(problem, "lp").seconds * 0.998


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), jobs=st.integers(1, 6), devices=st.integers(1, 3))
def test_no_plan_ends_before_the_bound(seed: int, jobs: int, devices: int) -> None:
    problem = drawn(seed, jobs, devices)
    every = (planned(problem, np.array(device)) for device in itertools.product(range(devices), repeat=jobs))
    soonest_s = min(plan.makespan_s(problem) for plan in every)
    assert of(problem).bound_s <= soonest_s * (1 + 1e-9)


def test_the_slots_of_all_devices_are_worth_one_together() -> None:
    problem = drawn(0, 300, 6)
    found = of(problem)
    ready = problem.ready < found.bound_s
    assert found.prices[ready] @ problem.slots[ready] == pytest.approx(1)


def test_a_faster_device_is_dearer() -> None:
    seconds = np.random.default_rng(0).uniform(1, 2, (200, 1)) * np.array([1.0, 2.0, 4.0])
    prices = of(Problem(seconds, np.zeros(3), np.ones(3))).prices
    assert prices[0] > prices[1] > prices[2]
