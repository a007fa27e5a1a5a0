from __future__ import annotations

import numpy as np
import pytest

from lepton_ai.placement.problem import UNPLACED, Plan, Problem, limited, planned


def idle(seconds: list[list[float]], **more: np.ndarray) -> Problem:
    table = np.array(seconds)
    devices = len(more["class_of"]) if "class_of" in more else table.shape[1]
    return Problem(table, np.zeros(devices), np.ones(devices), **more)  # type: ignore[arg-type]


def test_a_makespan_is_of_the_devices_that_a_plan_uses() -> None:
    problem = Problem(np.array([[4.0, 4.0], [6.0, 6.0]]), np.array([1.0, 99.0]), np.array([2.0, 1.0]))
    assert Plan(np.array([0, 0]), np.zeros(2)).makespan_s(problem) == 1 + 10 / 2
    assert Plan(np.array([0, UNPLACED]), np.zeros(2)).makespan_s(problem) == 1 + 4 / 2
    assert Plan(np.array([UNPLACED, UNPLACED]), np.zeros(2)).makespan_s(problem) == 0


def test_jobs_of_a_device_are_planned_in_the_order_of_the_problem() -> None:
    problem = Problem(np.array([[4.0, 1.0]] * 4), np.array([1.0, 0.0]), np.array([2.0, 1.0]))
    plan = planned(problem, np.array([0, 1, 0, UNPLACED]))
    assert plan.wait.tolist() == [1.0, 0.0, 3.0, np.inf]


def test_a_class_without_devices_runs_nothing() -> None:
    problem = idle([[1.0, 2.0], [3.0, np.inf]], class_of=np.array([1, 1]))
    assert problem.served().seconds.tolist() == [[np.inf, 2.0], [np.inf, np.inf]]
    assert idle([[1.0, 2.0]]).served().seconds.tolist() == [[1.0, 2.0]]


def test_a_device_that_is_half_ours_takes_twice_as_long() -> None:
    problem = limited(idle([[1.0, 1.0, np.inf]]), share=np.array([0.5, 1.0, 0.5]))
    assert problem.seconds.tolist() == [[2.0, 1.0, np.inf]]


def test_a_device_that_is_not_ours_at_all_runs_nothing() -> None:
    assert limited(idle([[1.0, 1.0]]), share=np.array([0.0, 1.0])).seconds.tolist() == [[np.inf, 1.0]]


def test_a_job_runs_only_where_it_fits() -> None:
    problem = limited(idle([[1.0, 1.0], [1.0, 1.0]]), memory=np.array([10.0, 20.0]), memory_free=np.array([10.0, 20.0]))
    assert problem.seconds.tolist() == [[1.0, 1.0], [np.inf, 1.0]]


def test_devices_of_a_class_that_are_limited_apart_have_columns_apart() -> None:
    problem = limited(idle([[1.0, 2.0]], class_of=np.array([0, 0, 1, 0])), share=np.array([1.0, 0.5, 1.0, 1.0]))
    assert problem.expanded().seconds.tolist() == [[1.0, 2.0, 2.0, 1.0]]
    assert problem.seconds.shape == (1, 3)


def test_the_tail_is_limited_as_the_seconds_are() -> None:
    problem = idle([[1.0, 1.0]], tail=np.array([[3.0, 3.0]]))
    found = limited(problem, share=np.array([0.5, 0.0])).tail
    assert found is not None
    assert found.tolist() == [[6.0, np.inf]]


def test_a_problem_without_limits_stays_as_it_is() -> None:
    problem = idle([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(limited(problem).seconds, problem.seconds)


@pytest.mark.parametrize("device", [[0, 0, 0], [0, 1, 0]])
def test_no_job_is_planned_before_its_device_is_ready(device: list[int]) -> None:
    problem = Problem(np.array([[0.1, 0.7]] * 3), np.array([1e9 / 3, 0.1]), np.array([3.0, 7.0]))
    plan = planned(problem, np.array(device))
    assert (plan.wait >= problem.ready[plan.device]).all()
