from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lepton_ai.placement import policies
from lepton_ai.placement.demand import Demand
from lepton_ai.placement.problem import Plan, Problem, planned
from lepton_ai.placement.schedule import Schedule
from lepton_ai.placement.supply import Supply

IDLE = {"used": 0.0, "total": 1.0}


def schedule(
    resources: dict[str, dict[str, Any]], tasks: dict[str, dict[str, Any]], policy: str = "earliest_finish"
) -> Schedule:
    supplies = [Supply.read(name, IDLE | each) for name, each in resources.items()]
    demands = [Demand.read(name, {"priority": 1} | each) for name, each in tasks.items()]
    return Schedule(supplies, demands, policies.load(policy))


def test_priority_one_starts_first_and_equals_in_the_order_in_which_they_came() -> None:
    given = {"c": {"seconds": 1, "priority": 3}, "a": {"seconds": 1}, "b": {"seconds": 1}}
    bars = schedule({"GPU": {}}, given).bars()
    assert [(bar.task, bar.start_s, bar.end_s) for bar in bars] == [("a", 0, 1), ("b", 1, 2), ("c", 2, 3)]


def test_slots_run_at_once_each_as_fast_as_one_alone() -> None:
    found = schedule({"CPU": {"slots": 2}}, {name: {"seconds": 2} for name in "abc"})
    assert {(bar.task, bar.slot, bar.start_s) for bar in found.bars()} == {("a", 1, 0), ("b", 2, 0), ("c", 1, 2)}
    assert found.makespan_s == 4
    assert found.utilization() == {"CPU": pytest.approx(0.75)}
    assert found.slots() == {"CPU": 2}


def test_the_bars_of_a_slot_never_overlap() -> None:
    found = schedule({"CPU": {"slots": 3}, "GPU": {}}, {str(n): {"seconds": 1 + n % 4} for n in range(20)})
    free: dict[tuple[str, int], float] = {}
    for bar in sorted(found.bars(), key=lambda bar: bar.start_s):
        assert bar.start_s >= free.get((bar.resource, bar.slot), 0)
        free[bar.resource, bar.slot] = bar.end_s
    assert max(free.values()) == pytest.approx(found.makespan_s)


def test_waits_of_those_passed_over_are_what_goes_before_on_their_freest_slot() -> None:
    given = {"a": {"seconds": {"cpu": 3}}, "b": {"seconds": {"cpu": 5}}, "c": {"seconds": {"cpu": 9, "gpu": 1}}}
    found = schedule({"CPU": {"slots": 2}, "GPU": {}}, given).explain("c")
    waits = {each.device: each.estimate.wait_s for each in found.candidates if each.estimate}
    assert (found.resource, waits) == ("GPU", {"CPU": 3, "GPU": 0})


def test_whether_a_deadline_is_met_counts_the_wait() -> None:
    given = {"first": {"seconds": 2, "deadline_s": 3}, "second": {"seconds": 2, "deadline_s": 3, "priority": 2}}
    found = schedule({"GPU": {}}, given)
    assert [found.explain(task).in_time for task in found.tasks()] == [True, False]


@pytest.mark.parametrize(
    ("gpu_s", "reason"),
    [
        (1.0, "GPU ends it first: 1 s against 3 s on CPU"),
        (3.0, "no other ends it sooner than CPU: 3 s against 3 s on GPU"),
    ],
)
def test_the_reason_compares_with_the_next_best(gpu_s: float, reason: str) -> None:
    found = schedule({"CPU": {}, "GPU": {}}, {"t": {"seconds": {"cpu": 3, "gpu": gpu_s}}})
    assert found.explain("t").reason == reason


def test_the_only_resource_that_can_run_a_task_is_called_so() -> None:
    found = schedule({"CPU": {}, "GPU": {}}, {"t": {"seconds": {"gpu": 1}}})
    assert found.explain("t").reason == "only GPU can run it, and ends it after 1 s"


class First:
    name = "first"

    def place(self, problem: Problem) -> Plan:
        return planned(problem, np.zeros(problem.jobs, np.intp))


def test_the_reason_is_open_about_a_choice_that_does_not_end_a_task_first() -> None:
    demands = [Demand.read("t", {"priority": 1, "type": "high"})]
    found = Schedule([Supply.read("CPU", IDLE), Supply.read("GPU", IDLE)], demands, First())
    assert found.explain("t").reason == (
        "the policy first chose CPU, which does not end it first: 20 s against 1 s on GPU"
    )


@pytest.mark.parametrize("policy", policies.names())
def test_no_policy_beats_the_lower_bound(policy: str) -> None:
    given: dict[str, dict[str, Any]] = {
        f"t{n}": {"type": ("high", "medium", "low")[n % 3], "size": 1 + n} for n in range(9)
    }
    found = schedule({"CPU": {"slots": 2}, "GPU": {}, "TPU": {}}, given, policy)
    assert 0 < found.lower_bound_s <= found.makespan_s * (1 + 1e-9)
