"""Near the optimum, never later than min-min, the same each time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ai.placement.bounds import lower_bound
from lepton_ai.placement.policies.min_min import MinMin
from lepton_ai.placement.policies.priced import Priced
from lepton_ai.placement.problem import UNPLACED, Problem


def braun(consistency: str, jobs_spread: float, devices_spread: float, jobs: int = 256, devices: int = 12) -> Problem:
    """By the law of Braun et al. (2001), in small."""
    random = np.random.default_rng([*consistency.encode(), int(jobs_spread), int(devices_spread)])
    seconds = random.uniform(1, jobs_spread, (jobs, 1)) * random.uniform(1, devices_spread, (jobs, devices))
    if consistency == "consistent":
        seconds.sort(axis=1)
    if consistency == "semi-consistent":
        seconds[:, ::2] = np.sort(seconds[:, ::2], axis=1)
    return idle(seconds)


def idle(seconds: np.ndarray) -> Problem:
    return Problem(seconds, np.zeros(seconds.shape[1]), np.ones(seconds.shape[1]))


def classes(jobs: int, of_each: int, columns: int = 4) -> Problem:
    """So many devices of each class, some with several slots and some busy at first."""
    random = np.random.default_rng(jobs)
    seconds = random.lognormal(0, 1, (jobs, 1)) * random.lognormal(0, 1, (jobs, columns))
    class_of = np.repeat(np.arange(columns), of_each)
    ready = random.uniform(0, 0.1, class_of.size)
    return Problem(seconds, ready, np.array([4.0, 1.0, 1.0, 2.0])[class_of % 4], class_of=class_of)


def gap(problem: Problem, budget_s: float = 0.05) -> float:
    plan = Priced(budget_s=budget_s).place(problem)
    return plan.makespan_s(problem) / lower_bound(problem).seconds - 1


@pytest.mark.parametrize("consistency", ["consistent", "semi-consistent", "inconsistent"])
@pytest.mark.parametrize(("jobs_spread", "devices_spread"), [(100, 10), (100, 1000), (3000, 10), (3000, 1000)])
def test_a_plan_is_within_three_percent_of_the_bound_where_twenty_jobs_share_a_device(
    consistency: str, jobs_spread: float, devices_spread: float
) -> None:
    assert gap(braun(consistency, jobs_spread, devices_spread)) < 0.03


@pytest.mark.parametrize("consistency", ["consistent", "semi-consistent", "inconsistent"])
def test_the_more_jobs_the_nearer(consistency: str) -> None:
    assert gap(braun(consistency, 100, 10, jobs=4_000)) < 0.005


def test_classes_of_devices_are_filled_without_a_column_for_each() -> None:
    assert gap(classes(20_000, of_each=16)) < 0.005


def kernels(jobs: int, models: int, of_each: int, *, exact: bool) -> Problem:
    """Jobs of ten kernels, which differ only in size, on models whose devices differ by a tenth in their clocks.

    Not `exact`: and by a thousandth from job to job, so no device's times are those of another.
    """
    random = np.random.default_rng([jobs, models, of_each])
    kernel, model = random.integers(0, 10, jobs), np.arange(models * of_each) % models
    speed = random.lognormal(0, 1, models) * random.lognormal(0, 0.7, (10, models))
    seconds = random.lognormal(0, 0.5, (jobs, 1)) * (random.lognormal(0, 1, (10, 1)) / speed)[kernel][:, model]
    seconds *= random.lognormal(0, 0.1, model.size)
    if not exact:
        seconds *= random.lognormal(0, 1e-3, seconds.shape)
    return idle(seconds)


@pytest.mark.parametrize("exact", [True, False])
def test_jobs_that_cost_the_same_on_dozens_of_devices_are_near_the_bound_without_a_search(exact: bool) -> None:
    assert gap(kernels(6_000, 12, 8, exact=exact), budget_s=0.0) < 0.02


def test_the_more_such_jobs_the_nearer() -> None:
    assert gap(kernels(30_000, 4, 24, exact=False), budget_s=0.0) < 0.005


def test_more_jobs_than_are_searched_are_placed_near_the_bound_too() -> None:
    assert gap(classes(260_000, of_each=64)) < 0.005


@settings(max_examples=50)
@given(
    seconds=st.integers(1, 40).flatmap(
        lambda jobs: st.lists(
            st.lists(st.sampled_from([0.001, 1.0, 1.0, 2.0, 3.0, 1000.0, np.inf]), min_size=4, max_size=4),
            min_size=jobs,
            max_size=jobs,
        )
    )
)
def test_no_plan_ends_later_than_that_of_min_min(seconds: list[list[float]]) -> None:
    problem = idle(np.array(seconds))
    plan = Priced(budget_s=0.0).place(problem)
    assert plan.makespan_s(problem) <= MinMin().place(problem).makespan_s(problem) * (1 + 1e-12)


def test_a_seed_has_one_plan() -> None:
    problem = braun("inconsistent", 3000, 1000)
    one, same = (Priced(budget_s=0.02, seed=3, now=lambda: 0.0).place(problem) for _ in range(2))
    np.testing.assert_array_equal(one.device, same.device)


def test_a_search_is_ended_by_the_clock() -> None:
    readings = itertools.count(step=10.0)
    problem = braun("inconsistent", 3000, 1000)
    plan = Priced(budget_s=5.0, now=lambda: next(readings)).place(problem)
    assert (plan.device != UNPLACED).all()
    assert next(readings) < 50


def test_a_longer_search_ends_no_later() -> None:
    problem = braun("consistent", 3000, 1000)
    short, long = (Priced(budget_s=budget_s).place(problem).makespan_s(problem) for budget_s in (0.002, 0.1))
    assert long <= short


def test_equal_jobs_on_equal_devices_are_shared_out_evenly() -> None:
    plan = Priced().place(idle(np.ones((12, 4))))
    assert np.bincount(plan.device).tolist() == [3, 3, 3, 3]


def test_a_job_does_not_go_where_it_alone_takes_longer_than_all_together() -> None:
    seconds = np.full((100, 4), 1.0)
    seconds[0] = [1000.0, 1000.0, 1000.0, 26.0]
    plan = Priced().place(idle(seconds))
    assert plan.device[0] == 3
    assert plan.makespan_s(idle(seconds)) <= 34


def test_a_device_that_is_ready_too_late_gets_nothing() -> None:
    problem = Problem(np.ones((30, 3)), np.array([0.0, 0.0, 1e6]), np.ones(3))
    plan = Priced().place(problem)
    assert np.bincount(plan.device, minlength=3).tolist() == [15, 15, 0]


def test_a_device_of_four_slots_takes_four_times_as_much() -> None:
    problem = Problem(np.ones((50, 2)), np.zeros(2), np.array([1.0, 4.0]))
    assert np.bincount(Priced().place(problem).device).tolist() == [10, 40]


def test_a_job_that_no_device_of_the_fleet_can_run_is_left_out() -> None:
    seconds = np.array([[1.0, 2.0], [np.inf, 1.0], [3.0, 1.0]])
    plan = Priced().place(Problem(seconds, np.zeros(2), np.ones(2), class_of=np.array([0, 0])))
    assert (plan.device == UNPLACED).tolist() == [False, True, False]


def test_jobs_that_take_no_time_are_placed() -> None:
    seconds = np.zeros((5, 3))
    assert (Priced().place(idle(seconds)).device != UNPLACED).all()
