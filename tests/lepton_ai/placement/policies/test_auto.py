"""Never later than the simple policies, with Numba or without."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ai.placement import policies
from lepton_ai.placement.policies import auto
from lepton_ai.placement.policies.auto import Auto
from lepton_ai.placement.problem import Problem

SIMPLE = ["earliest_finish", "min_min", "sufferage"]


def problem_of(seed: int, jobs: int, devices: int) -> Problem:
    random = np.random.default_rng(seed)
    seconds = random.choice([0.5, 1.0, 2.0, 5.0, 50.0, np.inf], (jobs, devices))
    return Problem(seconds, random.choice([0.0, 1.0, 9.0], devices), random.choice([1.0, 2.0], devices))


def ends_s(policy: str, problem: Problem) -> float:
    return policies.load(policy).place(problem).makespan_s(problem)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), jobs=st.integers(0, 30), devices=st.integers(1, 5))
def test_no_simple_policy_ends_sooner(seed: int, jobs: int, devices: int) -> None:
    problem = problem_of(seed, jobs, devices)
    best = min(ends_s(name, problem) for name in SIMPLE)
    assert Auto(budget_s=0.001).place(problem).makespan_s(problem) <= best * (1 + 1e-12)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), jobs=st.integers(0, 30), devices=st.integers(1, 5))
def test_without_numba_it_is_the_best_of_the_simple_ones(seed: int, jobs: int, devices: int) -> None:
    problem = problem_of(seed, jobs, devices)
    best = min(ends_s(name, problem) for name in SIMPLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "IS_COMPILED", False)
        assert Auto().place(problem).makespan_s(problem) == pytest.approx(best, rel=1e-9)


def test_earliest_finish_ends_no_sooner_on_a_large_problem() -> None:
    problem = problem_of(2, 20_000, 40)
    assert Auto(budget_s=0.001).place(problem).makespan_s(problem) <= ends_s("earliest_finish", problem)


def test_without_numba_a_large_problem_is_placed_by_earliest_finish() -> None:
    problem = problem_of(1, 4_000, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "IS_COMPILED", False)
        found = Auto().place(problem)
    np.testing.assert_array_equal(found.device, policies.load("earliest_finish").place(problem).device)


def test_it_works_where_there_is_no_numba() -> None:
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from lepton_ai.placement import policies\n"
        "from lepton_ai.placement.problem import Problem\n"
        "problem = Problem(np.array([[1.0, 3.0], [1.0, 3.0], [9.0, 3.0]]), np.zeros(2), np.ones(2))\n"
        "print(policies.load('auto').place(problem).makespan_s(problem))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3.0"
