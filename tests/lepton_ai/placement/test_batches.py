from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.placement.batches import Batches, Group, batched
from lepton_ai.placement.policies.earliest_finish import EarliestFinish
from lepton_ai.placement.policies.externality import Externality
from lepton_ai.placement.problem import Problem

CPU, GPU = 0, 1
#: A launch costs nothing on the one and 20 ms on the other; a job 1 ms here and 10 us there.
LAUNCH = np.array([0.0, 0.02])
EACH = np.array([1e-3, 1e-5])


def alike(count: int, ready: tuple[float, float] = (0.0, 0.0)) -> Problem:
    return Problem(np.tile(LAUNCH + EACH, (count, 1)), np.array(ready), np.ones(2))


def joined(problem: Problem, limit: int = 256, launch: np.ndarray = LAUNCH) -> Batches:
    """All of its jobs as one group."""
    return batched(problem, np.ones(problem.jobs, np.intp), [Group(np.arange(problem.jobs), launch, limit)])


@pytest.mark.parametrize("policy", [EarliestFinish(), Externality()], ids=lambda policy: policy.name)
def test_one_small_job_goes_to_the_processor_and_200_go_to_the_accelerator(
    policy: EarliestFinish | Externality,
) -> None:
    assert policy.place(joined(alike(1)).problem).device.tolist() == [CPU]
    batches = joined(alike(200))
    device = batches.plan(policy.place(batches.problem)).device
    assert (device == GPU).sum() >= 170
    # One by one each of them pays its own launch: then the accelerator has no part in it.
    assert (policy.place(alike(20)).device == CPU).all()


def test_together_they_are_done_in_a_tenth_of_the_time() -> None:
    batches = joined(alike(200))
    together = EarliestFinish().place(batches.problem).makespan_s(batches.problem)
    assert together == pytest.approx(0.0216, rel=0.05)  # 0.2 s on the processor alone, 0.022 on the accelerator


def test_equal_devices_share_what_is_long_and_not_what_is_short() -> None:
    launch = np.array([1e-3, 1e-3])
    long = Problem(np.full((100, 2), 2e-3), np.zeros(2), np.ones(2))
    assert joined(long, launch=launch).size.tolist() == [50, 50]
    short = Problem(np.full((10, 2), 1e-3 + 1e-6), np.zeros(2), np.ones(2))
    assert sorted(joined(short, launch=launch).size.tolist()) == [5, 5]
    busy = Problem(np.full((10, 2), 1e-3 + 1e-6), np.array([0.0, 1e-3]), np.ones(2))
    assert joined(busy, launch=launch).size.tolist() == [10]


def test_a_batch_has_no_more_jobs_than_it_may() -> None:
    assert max(joined(alike(5000), limit=64).size) <= 64


def test_other_jobs_stay_as_they_are_and_where_they_were() -> None:
    seconds = np.array([[5.0, 6.0], *(LAUNCH + EACH).reshape(1, 2).repeat(3, axis=0).tolist(), [7.0, np.inf]])
    problem = Problem(seconds, np.array([0.0, 9.0]), np.ones(2))
    found = batched(problem, np.ones(5, np.intp), [Group(np.array([1, 2, 3]), LAUNCH, 256)])
    assert found.row.tolist() == [0, 1, 1, 1, 2]
    assert found.problem.weight is not None
    assert found.problem.weight.tolist() == [1.0, 3.0, 1.0]
    assert found.problem.seconds.tolist() == [[5.0, 6.0], pytest.approx((LAUNCH + 3 * EACH).tolist()), [7.0, np.inf]]
    assert found.each_s[1].tolist() == pytest.approx((LAUNCH / 3 + EACH).tolist())


def test_messages_of_several_jobs_count_as_so_many() -> None:
    count = np.array([100, 100, 1])
    problem = Problem((LAUNCH + EACH) * count[:, np.newaxis], np.zeros(2), np.ones(2))
    found = batched(problem, count, [Group(np.array([0, 1, 2]), LAUNCH, 256)])
    assert found.size.tolist() == [200, 1]
    assert found.row.tolist() == [0, 0, 1]
    assert found.problem.seconds[0].tolist() == pytest.approx((LAUNCH + 200 * EACH).tolist())


def test_jobs_that_no_device_can_run_are_one_row() -> None:
    nowhere = Problem(np.full((3, 2), np.inf), np.zeros(2), np.ones(2))
    found = joined(nowhere)
    assert np.isinf(found.problem.seconds).all()
    assert found.plan(EarliestFinish().place(found.problem)).device.tolist() == [-1, -1, -1]


times = st.floats(1e-6, 10.0)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Problem, np.ndarray, int]:
    devices, count = draw(st.integers(1, 5)), draw(st.integers(1, 300))

    def row(values: st.SearchStrategy[float]) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=devices, max_size=devices)))

    launch, each, slots = row(st.just(0.0) | times), row(times), row(st.sampled_from([1.0, 2.0, 4.0]))
    able = row(st.sampled_from([0.0, 0.0, np.inf]))
    seconds = np.tile(launch + each + able, (count, 1))
    return Problem(seconds, row(st.just(0.0) | times), slots), launch, draw(st.sampled_from([1, 7, 256]))


@given(groups())
def test_every_job_is_in_one_batch_which_costs_less_than_its_jobs_would(
    case: tuple[Problem, np.ndarray, int],
) -> None:
    problem, launch, limit = case
    found = joined(problem, limit, launch)
    assert found.size.sum() == problem.jobs
    assert np.bincount(found.row).tolist() == found.size.tolist()
    assert found.size.max() <= max(limit, 1) or np.isinf(problem.seconds).all()
    apart = problem.seconds[0] * found.size[:, None]
    assert (found.problem.seconds <= apart * (1 + 1e-9)).all()
    assert (np.isfinite(found.problem.seconds) == np.isfinite(apart)).all()


@given(groups())
def test_together_they_are_done_no_later_than_on_one_device(case: tuple[Problem, np.ndarray, int]) -> None:
    problem, launch, _ = case
    problem = Problem(problem.seconds, problem.ready, np.ones(problem.devices))
    one = problem.seconds[0]
    if np.isinf(one).all():
        return
    found = joined(problem, problem.jobs, launch)
    alone = np.min(problem.ready + launch + (one - launch) * problem.jobs)
    longest = float(np.max(np.where(np.isfinite(one), one, 0.0)))  # what cannot be shared equally
    assert EarliestFinish().place(found.problem).makespan_s(found.problem) <= alone + longest
