from __future__ import annotations

import pytest

from bench import instances
from lepton_ai.placement import policies
from lepton_ai.placement.policies.genetic import Genetic

PROBLEM = instances.braun("i", "hi", "hi", (96, 8)).problem


def makespan_s(name: str, **options: int) -> float:
    return policies.load(name, **options).place(PROBLEM).makespan_s(PROBLEM)


@pytest.mark.parametrize("rule", ["min_min", "sufferage", "earliest_finish"])
def test_it_is_never_worse_than_what_it_starts_from(rule: str) -> None:
    assert makespan_s("genetic", generations=1) <= makespan_s(rule)


def test_more_generations_find_more() -> None:
    assert makespan_s("genetic", generations=60) < makespan_s("genetic", generations=1)


def test_a_seed_has_one_plan() -> None:
    one, other = (Genetic(generations=40, seed=seed).place(PROBLEM).device.tolist() for seed in (1, 2))
    assert one == Genetic(generations=40, seed=1).place(PROBLEM).device.tolist()
    assert one != other
