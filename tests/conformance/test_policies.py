"""What every policy keeps. A new file in `lepton_ai/placement/policies/` is found here by itself."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.errors import InvalidSettings
from lepton_ai.placement import policies
from lepton_ai.placement.policies.earliest_finish import EarliestFinish
from lepton_ai.placement.problem import UNPLACED, Plan, Policy, Problem


def _discovered() -> Iterator[type[Policy]]:
    for found in pkgutil.iter_modules(policies.__path__):
        module = importlib.import_module(f"{policies.__name__}.{found.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and isinstance(getattr(cls, "name", None), str):
                yield cls


POLICIES = list(_discovered())
each_policy = pytest.mark.parametrize("policy", [cls() for cls in POLICIES], ids=lambda policy: policy.name)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    jobs, devices = draw(st.integers(0, 12)), draw(st.integers(0, 5))
    seconds = st.floats(1e-6, 1e4) | st.just(np.inf)
    rows = draw(st.lists(st.lists(seconds, min_size=devices, max_size=devices), min_size=jobs, max_size=jobs))
    ready = draw(st.lists(st.floats(0, 1e4), min_size=devices, max_size=devices))
    slots = draw(st.lists(st.integers(1, 64).map(float), min_size=devices, max_size=devices))
    return Problem(np.array(rows, np.float64).reshape(jobs, devices), np.array(ready, np.float64), np.array(slots))


def placed(plan: Plan) -> list[tuple[int, int]]:
    return [(job, int(device)) for job, device in enumerate(plan.device) if device != UNPLACED]


def test_every_module_has_a_policy_and_every_policy_a_name_of_its_own() -> None:
    modules = {found.name for found in pkgutil.iter_modules(policies.__path__)}
    assert {cls.__module__.rpartition(".")[2] for cls in POLICIES} == modules
    assert len({cls.name for cls in POLICIES}) == len(POLICIES)


@pytest.mark.parametrize("name", policies.names())
def test_every_policy_loads_by_the_name_of_its_file(name: str) -> None:
    assert policies.load(name).name == name


@pytest.mark.parametrize("name", ["fastest", "", "earliest-finish", "os"])
def test_a_policy_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(InvalidSettings, match=f"no policy {name!r}; there are .*earliest_finish") as refused:
        policies.load(name)
    assert all(known in refused.value.message for known in policies.names())


@each_policy
@given(problem=problems())
def test_a_plan_has_an_entry_for_each_job(policy: Policy, problem: Problem) -> None:
    plan = policy.place(problem)
    jobs, devices = problem.seconds.shape
    assert plan.device.shape == plan.wait.shape == (jobs,)
    assert all(-1 <= device < devices for device in plan.device)


@each_policy
@given(problem=problems())
def test_no_job_goes_where_it_cannot_run(policy: Policy, problem: Problem) -> None:
    assert all(np.isfinite(problem.seconds[at]) for at in placed(policy.place(problem)))


@each_policy
@given(problem=problems())
def test_a_job_is_unplaced_only_if_no_device_can_run_it(policy: Policy, problem: Problem) -> None:
    unplaced = policy.place(problem).device == UNPLACED
    np.testing.assert_array_equal(unplaced, ~np.isfinite(problem.seconds).any(axis=1))


@each_policy
@given(problem=problems())
def test_a_placed_job_waits_a_finite_time_and_an_unplaced_one_for_ever(policy: Policy, problem: Problem) -> None:
    plan = policy.place(problem)
    np.testing.assert_array_equal(np.isinf(plan.wait), plan.device == UNPLACED)


@each_policy
@given(problem=problems())
def test_no_job_starts_before_its_device_has_done_what_it_was_given(policy: Policy, problem: Problem) -> None:
    plan = policy.place(problem)
    assert all(plan.wait[job] >= problem.ready[device] for job, device in placed(plan))


@each_policy
@given(problem=problems())
def test_jobs_of_one_device_wait_for_those_placed_before_them(policy: Policy, problem: Problem) -> None:
    plan = policy.place(problem)
    for device in range(len(problem.ready)):
        jobs = sorted((plan.wait[job], job) for job, at in placed(plan) if at == device)
        work = sum(problem.seconds[job, device] for _, job in jobs[:-1])
        if jobs:
            last_s = jobs[-1][0]
            assert last_s == pytest.approx(problem.ready[device] + work / problem.slots[device])


@each_policy
@given(problem=problems())
def test_a_problem_is_left_as_it_was(policy: Policy, problem: Problem) -> None:
    before = copy.deepcopy(problem)
    policy.place(problem)
    for name in Problem.__struct_fields__:
        np.testing.assert_array_equal(getattr(problem, name), getattr(before, name))


@each_policy
@given(problem=problems())
def test_the_same_problem_has_the_same_plan(policy: Policy, problem: Problem) -> None:
    first, second = policy.place(problem), policy.place(copy.deepcopy(problem))
    np.testing.assert_array_equal(first.device, second.device)
    np.testing.assert_array_equal(first.wait, second.wait)


@each_policy
def test_a_problem_that_may_not_be_written_to_is_solved(policy: Policy) -> None:
    problem = Problem(np.ones((3, 2)), np.zeros(2), np.ones(2))
    for array in (problem.seconds, problem.ready, problem.slots):
        array.flags.writeable = False
    assert len(placed(policy.place(problem))) == 3


@given(problems())
def test_earliest_finish_is_the_greedy_rule_written_out(problem: Problem) -> None:
    busy = list(problem.ready)
    plan = EarliestFinish().place(problem)
    for job, row in enumerate(problem.seconds):
        able = [device for device, seconds in enumerate(row) if seconds < np.inf]
        if able:
            best = min(able, key=lambda device: busy[device] + row[device])
            assert (plan.device[job], plan.wait[job]) == (best, busy[best])
            busy[best] += row[best] / problem.slots[best]
