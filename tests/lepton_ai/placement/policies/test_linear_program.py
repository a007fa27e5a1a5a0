from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bench import instances
from lepton_ai.errors import InvalidSettings
from lepton_ai.placement.bounds import lower_bound
from lepton_ai.placement.policies import linear_program
from lepton_ai.placement.policies.linear_program import LinearProgram
from lepton_ai.placement.problem import Plan, Problem


def gap(plan: Plan, problem: Problem) -> float:
    return plan.makespan_s(problem) / lower_bound(problem).seconds - 1


@pytest.mark.parametrize("consistency", ["c", "i", "s"])
def test_it_is_within_three_percent_of_the_bound_on_brauns_classes(consistency: str) -> None:
    problem = instances.braun(consistency, "hi", "hi").problem  # type: ignore[arg-type]
    assert gap(LinearProgram().place(problem), problem) < 0.03


def test_a_fleet_of_classes_is_filled_evenly() -> None:
    problem = instances.fleet(20_000, 96, 8, shared=True).problem
    assert gap(LinearProgram().place(problem), problem) < 0.01


def test_what_is_too_large_to_be_solved_goes_by_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = instances.braun("i", "hi", "hi").problem
    monkeypatch.setattr(linear_program, "_SOLVED", 0)
    assert gap(LinearProgram().place(problem), problem) < 0.03


def priced(problem: Problem) -> Problem:
    return msgspec.structs.replace(problem, rate=np.linspace(1.0, 9.0, problem.devices))


def cost(plan: Plan, problem: Problem) -> float:
    assert problem.rate is not None
    return float(((plan.load(problem) - problem.ready) * problem.rate).sum())


@pytest.mark.parametrize("shared", [False, True])
def test_the_more_time_there_is_the_less_it_costs(shared: bool) -> None:
    problem = priced(instances.fleet(400, 12, 4, shared=shared).problem)
    soonest = LinearProgram().place(problem)
    before = cost(soonest, problem)
    for slack in (0.1, 0.5, 2.0):
        plan = LinearProgram(objective="cost", slack=slack).place(problem)
        assert plan.makespan_s(problem) <= (1 + slack) * soonest.makespan_s(problem) * (1 + 1e-9)
        assert cost(plan, problem) < before
        before = cost(plan, problem)


def test_without_rates_the_cost_is_the_makespan() -> None:
    problem = instances.braun("i", "lo", "lo", (64, 8)).problem
    one, other = LinearProgram(objective="cost").place(problem), LinearProgram().place(problem)
    assert one.device.tolist() == other.device.tolist()


@pytest.mark.parametrize("options", [{"objective": "money"}, {"slack": -0.1}, {"slack": float("nan")}])
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidSettings, match=f"{next(iter(options.values()))!r}"):
        LinearProgram(**options)  # type: ignore[arg-type]
