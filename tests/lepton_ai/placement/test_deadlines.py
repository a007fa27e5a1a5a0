from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.placement.deadlines import in_time
from lepton_ai.placement.policies.earliest_finish import EarliestFinish
from lepton_ai.placement.problem import Problem

times = st.floats(1e-3, 1e3) | st.just(np.inf)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    jobs, devices = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    table = st.lists(st.lists(times, min_size=devices, max_size=devices), min_size=jobs, max_size=jobs)
    seconds = np.array(draw(table))
    ready = np.array(draw(st.lists(st.floats(0, 100), min_size=devices, max_size=devices)))
    deadline = np.array(draw(st.lists(st.floats(0, 1e3) | st.just(np.inf), min_size=jobs, max_size=jobs)))
    tail = seconds * draw(st.floats(1, 3))
    return Problem(seconds, ready, np.ones(devices), deadline=deadline, tail=tail)


def two_devices(*, deadline: float) -> Problem:
    """The first is likelier to be soon, the second surer."""
    return Problem(
        np.array([[1.0, 2.0]]),
        np.zeros(2),
        np.ones(2),
        deadline=np.array([deadline]),
        tail=np.array([[9.0, 3.0]]),
    )


def test_a_job_goes_where_it_makes_its_deadline_by_p95_though_it_is_likelier_to_be_sooner_elsewhere() -> None:
    policy = EarliestFinish()
    assert policy.place(in_time(two_devices(deadline=10.0))).device.tolist() == [0]
    assert policy.place(in_time(two_devices(deadline=4.0))).device.tolist() == [1]


def test_a_job_that_makes_its_deadline_nowhere_goes_all_the_same() -> None:
    assert EarliestFinish().place(in_time(two_devices(deadline=0.5))).device.tolist() == [0]


def test_what_a_device_has_to_do_already_counts() -> None:
    found = in_time(msgspec.structs.replace(two_devices(deadline=4.0), ready=np.array([0.0, 2.0])))
    assert found.seconds.tolist() == [[1.0, 2.0]]


@given(problems())
def test_only_devices_that_are_too_late_are_left_out_and_never_all(problem: Problem) -> None:
    found = in_time(problem)
    assert problem.deadline is not None
    assert problem.tail is not None
    left_out = np.isinf(found.seconds) & np.isfinite(problem.seconds)
    too_late = problem.ready + problem.tail > problem.deadline[:, None]
    assert not (left_out & ~too_late).any()
    able = np.isfinite(problem.seconds).any(axis=1)
    assert np.isfinite(found.seconds).any(axis=1).tolist() == able.tolist()
    in_reach = (np.isfinite(problem.seconds) & ~too_late).any(axis=1)
    assert not (np.isfinite(found.seconds) & too_late)[in_reach].any()
