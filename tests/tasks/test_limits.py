"""Whose limit ends a worker, and how long a launch may take."""

from __future__ import annotations

import pytest

from lepton_ai.job import Estimate
from lepton_ai.kernel import KernelSpec
from lepton_ai.settings import Settings
from tasks.limits import kill_after_s, own_limit_s

SETTINGS = Settings(limit_s=600.0, least_limit_s=5.0)


def spec(limit_s: float | None = None) -> KernelSpec:
    return KernelSpec("test.spin", {"n": "int64"}, {"y": "int64"}, "n", "0", limit_s=limit_s)


def predicted(run_s: float) -> Estimate:
    return Estimate(1000.0, 1000.0, run_s)


def test_a_kernel_that_says_nothing_has_the_fleets_limit() -> None:
    assert kill_after_s(None, spec(), None, SETTINGS) == (600.0, False)


@pytest.mark.parametrize("limit_s", [0.5, 6000.0])
def test_a_kernels_own_limit_stands_before_the_fleets_be_it_shorter_or_longer(limit_s: float) -> None:
    assert kill_after_s(None, spec(limit_s), None, SETTINGS) == (limit_s, False)


def test_a_jobs_own_limit_shortens_the_kernels() -> None:
    assert kill_after_s(20.0, spec(), None, SETTINGS) == (20.0, True)


@pytest.mark.parametrize("limit_s", [600.0, 601.0, 1e300])
def test_a_jobs_own_limit_never_prolongs_the_kernels(limit_s: float) -> None:
    assert kill_after_s(limit_s, spec(), None, SETTINGS) == (600.0, False)


@pytest.mark.parametrize("limit_s", [1e-9, 0.001, 4.999])
def test_nobody_ends_a_worker_sooner_than_the_least_limit(limit_s: float) -> None:
    assert kill_after_s(limit_s, spec(), None, SETTINGS) == (5.0, True)


def test_nobody_ends_a_worker_sooner_than_three_times_what_the_job_was_predicted_to_run() -> None:
    assert kill_after_s(6.0, spec(), predicted(10.0), SETTINGS) == (30.0, True)


def test_a_job_that_is_predicted_to_need_more_than_its_kernel_may_have_is_ended_by_the_kernels_limit() -> None:
    assert kill_after_s(6.0, spec(), predicted(300.0), SETTINGS) == (600.0, False)


def test_a_kernels_limit_below_the_least_is_the_operators_and_stands() -> None:
    assert kill_after_s(0.001, spec(1.0), predicted(10.0), SETTINGS) == (1.0, False)


def test_a_job_without_an_estimate_is_predicted_to_take_nothing() -> None:
    assert kill_after_s(6.0, spec(), None, SETTINGS) == (6.0, True)


@pytest.mark.parametrize(("limits", "together"), [([2.0], 2.0), ([2.0, 3.0], 5.0), ([2.0, None], None), ([None], None)])
def test_a_launch_may_take_what_its_jobs_may_take_together_or_any_time_where_one_has_no_limit(
    limits: list[float | None], together: float | None
) -> None:
    assert own_limit_s(limits) == together
