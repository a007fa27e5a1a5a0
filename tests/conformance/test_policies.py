"""What every policy keeps. A new file in `lepton_ai/placement/policies/` is found here by itself."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ai.errors import InvalidSettings, MissingPackage
from lepton_ai.placement import policies
from lepton_ai.placement.bounds import lower_bound
from lepton_ai.placement.policies.earliest_finish import EarliestFinish
from lepton_ai.placement.problem import UNPLACED, Plan, Policy, Problem


def _discovered() -> Iterator[type[Policy]]:
    for found in pkgutil.iter_modules(policies.__path__):
        module = importlib.import_module(f"{policies.__name__}.{found.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and isinstance(getattr(cls, "name", None), str):
                yield cls


POLICIES = list(_discovered())
#: So that a search ends soon; each keeps all that is asked here whatever it is given.
QUICK: dict[str, dict[str, Any]] = {"genetic": {"generations": 3}, "priced": {"budget_s": 0.001}}
FOUND = [cls(**QUICK.get(cls.name, {})) for cls in POLICIES]
each_policy = pytest.mark.parametrize("policy", FOUND, ids=lambda policy: policy.name)
each_that_looks_at_costs = pytest.mark.parametrize(
    "policy", [policy for policy in FOUND if getattr(policy, "looks_at_costs", True)], ids=lambda policy: policy.name
)
each_that_sees_devices_one_by_one = pytest.mark.parametrize(
    "policy", [policy for policy in FOUND if not getattr(policy, "by_class", False)], ids=lambda policy: policy.name
)
some = settings(max_examples=20)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Of few jobs and devices, with anything that a Problem may have but classes of devices."""
    jobs, devices = draw(st.integers(0, 12)), draw(st.integers(0, 5))

    def table(of: st.SearchStrategy[float], *shape: int) -> np.ndarray:
        count = math.prod(shape)
        return np.array(draw(st.lists(of, min_size=count, max_size=count)), np.float64).reshape(shape)

    needs = table(st.floats(1e-6, 1e4) | st.just(np.inf) | st.sampled_from([1.0, 2.0]), jobs, devices)
    return Problem(
        needs,
        table(st.floats(0, 1e4), devices),
        table(st.integers(1, 64).map(float), devices),
        weight=draw(st.sampled_from([None, np.arange(1.0, jobs + 1)])),
        deadline=draw(st.sampled_from([None, np.full(jobs, 1.0), np.full(jobs, np.inf)])),
        tail=draw(st.sampled_from([None, needs * 2])),
        rate=draw(st.sampled_from([None, np.arange(1.0, devices + 1)])),
    )


@st.composite
def fleets(draw: st.DrawFn) -> Problem:
    """The same with classes of devices: a class may have any number of them, and none."""
    problem = draw(problems().filter(lambda found: found.devices > 0))
    class_of = np.array(draw(st.lists(st.integers(0, problem.devices - 1), min_size=1, max_size=6)))
    return msgspec.structs.replace(
        problem, ready=problem.ready[class_of], slots=problem.slots[class_of], rate=None, class_of=class_of
    )


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


@pytest.mark.parametrize(("name", "package"), [("linear_program", "highspy"), ("genetic", "pymoo")])
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [each for each in sys.modules if each.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    for loaded in (f"{policies.__name__}.{name}", "lepton_ai.placement.relaxation"):
        monkeypatch.delitem(sys.modules, loaded, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"{name} needs the package {package}: .*lepton-ai\[solvers\]"):
        policies.load(name)


@each_policy
@some
@given(problem=problems() | fleets())
def test_a_plan_has_an_entry_for_each_job(policy: Policy, problem: Problem) -> None:
    plan = policy.place(problem)
    assert plan.device.shape == plan.wait.shape == (problem.jobs,)
    assert all(-1 <= device < problem.devices for device in plan.device)


@each_policy
@some
@given(problem=problems() | fleets())
def test_no_job_goes_where_it_cannot_run(policy: Policy, problem: Problem) -> None:
    plan = policy.place(problem)
    assert all(np.isfinite(problem.expanded().seconds[at]) for at in placed(plan))


@each_policy
@some
@given(problem=problems() | fleets())
def test_a_job_is_unplaced_only_if_no_device_can_run_it(policy: Policy, problem: Problem) -> None:
    unplaced = policy.place(problem).device == UNPLACED
    np.testing.assert_array_equal(unplaced, ~np.isfinite(problem.expanded().seconds).any(axis=1))


@each_policy
@some
@given(problem=problems() | fleets())
def test_a_placed_job_waits_a_finite_time_and_an_unplaced_one_for_ever(policy: Policy, problem: Problem) -> None:
    plan = policy.place(problem)
    np.testing.assert_array_equal(np.isinf(plan.wait), plan.device == UNPLACED)


@each_policy
@some
@given(problem=problems() | fleets())
def test_no_job_starts_before_its_device_has_done_what_it_was_given(policy: Policy, problem: Problem) -> None:
    plan = policy.place(problem)
    assert all(plan.wait[job] >= problem.ready[device] for job, device in placed(plan))


@each_policy
@some
@given(problem=problems() | fleets())
def test_jobs_of_one_device_wait_for_those_placed_before_them(policy: Policy, problem: Problem) -> None:
    plan = policy.place(problem)
    seconds = problem.seconds_on(plan.device)
    for device in range(problem.devices):
        jobs = sorted((plan.wait[job], job) for job, at in placed(plan) if at == device)
        work = sum(seconds[job] for _, job in jobs[:-1])
        if jobs:
            last_s = jobs[-1][0]
            assert last_s == pytest.approx(problem.ready[device] + work / problem.slots[device])


@each_policy
@some
@given(problem=problems() | fleets())
def test_no_plan_ends_before_a_bound(policy: Policy, problem: Problem) -> None:
    makespan_s = policy.place(problem).makespan_s(problem)
    for method in ("lp", "dual"):
        assert makespan_s >= lower_bound(problem, method).seconds * (1 - 1e-9)  # type: ignore[arg-type]


@each_that_sees_devices_one_by_one
@some
@given(problem=fleets())
def test_classes_of_devices_change_no_plan(policy: Policy, problem: Problem) -> None:
    expanded = problem.expanded()
    one, other = policy.place(problem).makespan_s(problem), policy.place(expanded).makespan_s(expanded)
    assert one == pytest.approx(other)


@each_that_looks_at_costs
@pytest.mark.parametrize("fastest", range(3))
def test_a_lone_job_goes_where_it_runs_fastest(policy: Policy, fastest: int) -> None:
    seconds = np.array([[5.0, 5.0, 5.0]])
    seconds[0, fastest] = 1.0
    assert policy.place(Problem(seconds, np.zeros(3), np.ones(3))).device.tolist() == [fastest]


@each_policy
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1)])
def test_a_problem_without_jobs_or_devices_has_a_plan(policy: Policy, shape: tuple[int, int]) -> None:
    plan = policy.place(Problem(np.ones(shape), np.zeros(shape[1]), np.ones(shape[1])))
    assert plan.device.tolist() == [0 if shape[1] else UNPLACED] * shape[0]


@each_policy
def test_jobs_that_nobody_can_run_are_left_unplaced(policy: Policy) -> None:
    plan = policy.place(Problem(np.full((4, 3), np.inf), np.zeros(3), np.ones(3)))
    assert plan.device.tolist() == [UNPLACED] * 4


@each_policy
@some
@given(problem=problems() | fleets())
def test_a_problem_is_left_as_it_was(policy: Policy, problem: Problem) -> None:
    before = copy.deepcopy(problem)
    policy.place(problem)
    for name in Problem.__struct_fields__:
        np.testing.assert_array_equal(getattr(problem, name), getattr(before, name))


@each_policy
@some
@given(problem=problems() | fleets())
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


@pytest.mark.parametrize("name", policies.names())
def test_an_option_that_a_policy_does_not_take_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidSettings, match=f"the policy {name} takes .*, not sneed"):
        policies.load(name, sneed=1)
