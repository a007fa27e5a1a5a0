from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import theory
from lepton_ai.placement import policies
from lepton_ai.placement.problem import UNPLACED, Floats, Plan, Problem, planned
from lepton_ai.placement.simulate import Fleet, Stream, poisson, simulate

EARLIEST = policies.load("earliest_finish")
MIXED = Fleet(np.array([[1.0, 3.0, np.inf], [2.0, 1.0, 4.0]]), np.array([1.0, 2.0, 1.0]))


class Watching:
    """Earliest finish, and what it was asked."""

    name = "watching"

    def __init__(self) -> None:
        self.asked: list[Problem] = []

    def place(self, problem: Problem) -> Plan:
        self.asked.append(problem)
        return EARLIEST.place(problem)


class First:
    """Everything on the first device."""

    name = "first"

    def place(self, problem: Problem) -> Plan:
        return planned(problem, np.zeros(problem.jobs, np.intp))


def stream(at_s: list[float], row: list[int] | None = None, factor: list[float] | None = None) -> Stream:
    count = len(at_s)
    return Stream(np.array(at_s), np.array(row or [0] * count), np.array(factor or [1.0] * count))


def one_device(slots: float = 1.0) -> Fleet:
    return Fleet(np.ones((1, 1)), np.array([slots]))


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.01, 3)), min_size=1, max_size=50))
def test_one_device_ends_each_job_by_lindleys_recursion(gaps: list[tuple[float, float]]) -> None:
    at_s = np.cumsum([gap for gap, _ in gaps])
    found = simulate(EARLIEST, one_device(), stream(at_s.tolist(), factor=[real for _, real in gaps]))
    free_s, expected = 0.0, []
    for arrived_s, (_, real_s) in zip(at_s, gaps, strict=True):
        free_s = max(free_s, arrived_s) + real_s
        expected.append(free_s - arrived_s)
    np.testing.assert_allclose(found.response_s, expected, rtol=1e-9)


def test_one_queue_waits_as_erlang_says() -> None:
    assert theory.single_queue(0.5, 200_000).off == pytest.approx(0, abs=0.02)
    assert theory.shared_queue(0.8, 4, 200_000).off == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("load", [0.5, 0.9])
def test_the_better_of_two_queues_is_as_long_as_mitzenmacher_says(load: float) -> None:
    assert theory.two_choices(load, 200, 50_000).off == pytest.approx(0, abs=0.02)


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    one, same, other = (poisson(3.0, np.array([0.3, 0.7]), 500, seed, 0.2) for seed in (1, 1, 2))
    found = [simulate(policies.load("externality"), MIXED, each).response_s for each in (one, same, other)]
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_stream_comes_at_its_rate_with_its_shares_and_its_spread() -> None:
    found = poisson(4.0, np.array([0.25, 0.75]), 40_000, 1, spread=0.5)
    assert len(found.at_s) / found.at_s[-1] == pytest.approx(4.0, rel=0.02)
    assert found.row.mean() == pytest.approx(0.75, abs=0.01)
    assert found.factor.mean() == pytest.approx(1.0, abs=0.02)
    assert np.log(found.factor).std() == pytest.approx(0.5, rel=0.02)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 1000),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5, 5.0]),
    st.sampled_from([0.0, 1.0, np.inf]),
    st.booleans(),
)
def test_every_job_runs_once_where_it_can_and_no_slot_runs_two(
    seed: int, routers: int, stale_s: float, credit_s: float, elapsed: bool
) -> None:
    jobs = poisson(2.5, np.array([0.5, 0.5]), 200, seed, spread=0.3)
    found = simulate(
        policies.load("externality"), MIXED, jobs, routers=routers, stale_s=stale_s, credit_s=credit_s, elapsed=elapsed
    )
    real_s = MIXED.seconds[jobs.row, found.device] * jobs.factor
    assert np.isfinite(real_s).all()
    ended_s = jobs.at_s + found.response_s
    began_s = ended_s - real_s
    assert (began_s >= jobs.at_s - 1e-9).all()
    for at, slots in enumerate(MIXED.slots):
        here = found.device == at
        running = [np.sum(here & (began_s <= now + 1e-9) & (ended_s > now + 1e-6)) for now in began_s[here]]
        assert max(running, default=0) <= slots
    np.testing.assert_allclose(
        found.busy, np.bincount(found.device, real_s, 3) / (ended_s.max() * MIXED.slots), atol=1e-9
    )


def test_jobs_of_one_instant_are_placed_as_one_window() -> None:
    policy = Watching()
    simulate(policy, MIXED, stream([0.0, 0.0, 0.0, 1.0], [0, 1, 0, 1]))
    assert [problem.jobs for problem in policy.asked] == [3, 1]
    np.testing.assert_array_equal(policy.asked[0].seconds, MIXED.seconds[[0, 1, 0]])


def test_a_job_that_no_device_can_run_never_ends() -> None:
    found = simulate(EARLIEST, Fleet(np.array([[np.inf]]), np.ones(1)), stream([0.0]))
    assert found.device[0] == UNPLACED
    assert found.response_s[0] == np.inf


def readies(policy_jobs: Stream, fleet: Fleet, **options: float) -> list[Floats]:
    policy = Watching()
    simulate(policy, fleet, policy_jobs, **options)  # type: ignore[arg-type]
    return [problem.ready for problem in policy.asked]


def test_what_has_run_counts_no_more_where_that_is_known() -> None:
    jobs = stream([0.0, 0.25, 0.5])
    np.testing.assert_allclose(np.ravel(readies(jobs, one_device())), [0.0, 0.75, 1.5])
    np.testing.assert_allclose(np.ravel(readies(jobs, one_device(), elapsed=False)), [0.0, 1.0, 2.0])


def test_several_slots_work_off_what_waits_so_many_times_as_fast() -> None:
    np.testing.assert_allclose(np.ravel(readies(stream([0.0, 0.5, 0.5]), one_device(2.0))[1]), [0.25])


def test_a_router_takes_the_others_to_give_as_much_as_itself_until_it_looks_again() -> None:
    # Two routers in turn: the first looks at 0 and at 10, and gives a job at 0, 2, 4; the second one at 1, 3, 5.
    found = np.ravel(readies(stream([0.0, 0.1, 0.2, 0.3, 0.4, 10.0]), one_device(), routers=2, stale_s=8.0))
    assert found[0] == 0.0
    assert found[2] == pytest.approx(2.0 - 0.2)
    assert found[4] == pytest.approx(4.0 - 0.4)


def test_beyond_its_credit_a_device_is_given_nothing_and_the_job_is_placed_again() -> None:
    policy = Watching()
    found = simulate(policy, one_device(), stream([0.0, 0.0, 0.0]), credit_s=0.0)
    np.testing.assert_allclose(found.response_s, [1.0, 2.0, 3.0])
    assert [problem.jobs for problem in policy.asked] == [3, 2, 1]


def test_a_window_of_thousands_is_placed_in_pieces() -> None:
    policy = Watching()
    found = simulate(policy, one_device(), stream([0.0] * 2500))
    assert sum(problem.jobs for problem in policy.asked) == 2500
    assert max(problem.jobs for problem in policy.asked) <= 1024
    assert found.response_s.max() == pytest.approx(2500)


def test_a_policy_that_knows_no_speed_is_seen_to_lose() -> None:
    jobs = poisson(0.9, np.array([1.0, 0.0]), 2000, 1)
    best, worst = (simulate(policy, MIXED, jobs).response_s.mean() for policy in (EARLIEST, First()))
    assert best < worst / 2
