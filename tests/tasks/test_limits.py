from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.job import Estimate, Placement
from lepton_ai.kernel import KernelSpec
from lepton_ai.settings import Settings
from tasks.limits import kill_after_s, own_limit_s

SETTINGS = Settings(limit_s=600.0, least_limit_s=5.0)


def spec(limit_s: float | None = None) -> KernelSpec:
    return KernelSpec("a.b", {"n": "int64"}, {"y": "int64"}, "n", "n", limit_s=limit_s)


def placed(run_s: float) -> Placement:
    return Placement("job", "a.b", "placed", "", 0.0, "router", "cpu", Estimate(100.0, 100.0, run_s))


def test_a_kernel_that_says_nothing_has_the_fleets_limit() -> None:
    assert kill_after_s(None, spec(), None, SETTINGS) == (600.0, False)


@pytest.mark.parametrize("limit_s", [1.0, 7200.0])
def test_a_kernels_own_limit_stands_for_the_fleets(limit_s: float) -> None:
    assert kill_after_s(None, spec(limit_s), None, SETTINGS) == (limit_s, False)


def test_a_jobs_limit_ends_its_worker_sooner_than_its_kernels() -> None:
    assert kill_after_s(30.0, spec(), None, SETTINGS) == (30.0, True)


@pytest.mark.parametrize("limit_s", [0.001, 4.9])
def test_a_jobs_limit_never_ends_a_worker_at_once(limit_s: float) -> None:
    assert kill_after_s(limit_s, spec(), None, SETTINGS) == (5.0, True)


def test_a_jobs_limit_never_ends_a_worker_for_what_was_predicted() -> None:
    assert kill_after_s(1.0, spec(), placed(20.0), SETTINGS) == (60.0, True)


def test_a_placement_without_an_estimate_predicts_nothing() -> None:
    assert kill_after_s(30.0, spec(), Placement("job", "a.b", "parked", "", 0.0, "r"), SETTINGS) == (30.0, True)


@pytest.mark.parametrize("limit_s", [60.0, 61.0, 1e9])
def test_a_jobs_limit_never_prolongs_its_kernels(limit_s: float) -> None:
    assert kill_after_s(limit_s, spec(60.0), None, SETTINGS) == (60.0, False)


def test_a_prediction_never_prolongs_the_kernels_limit() -> None:
    assert kill_after_s(1.0, spec(10.0), placed(100.0), SETTINGS) == (10.0, False)


@given(st.none() | st.floats(1e-6, 1e6), st.none() | st.floats(1e-6, 1e6), st.floats(0, 1e6))
def test_nobody_ever_has_longer_than_the_kernel(limit_s: float | None, kernel_s: float | None, run_s: float) -> None:
    found, own = kill_after_s(limit_s, spec(kernel_s), placed(run_s), SETTINGS)
    most = SETTINGS.limit_s if kernel_s is None else kernel_s
    assert found <= most
    assert own == (found < most)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [([2.0], 2.0), ([2.0, 3.5], 5.5), ([None], None), ([2.0, None], None), ([0.0], 0.0)],
)
def test_a_launch_has_the_time_of_all_its_jobs_or_none(limits: list[float | None], expected: float | None) -> None:
    assert own_limit_s(limits) == expected
