from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.placement import policies
from lepton_ai.placement.policies.externality import Externality
from lepton_ai.placement.problem import UNPLACED, Problem, planned
from lepton_ai.placement.simulate import Fleet, poisson, simulate

EXTERNALITY = policies.load("externality")
SECONDS = st.one_of(st.floats(0.01, 100), st.just(np.inf))


def problem(seconds: list[list[float]], ready: list[float] | None = None, **more: object) -> Problem:
    devices = len(seconds[0])
    return Problem(np.array(seconds), np.array(ready or [0.0] * devices), np.ones(devices), **more)  # type: ignore[arg-type]


def chosen(*args: object, **more: object) -> list[int]:
    return EXTERNALITY.place(problem(*args, **more)).device.tolist()  # type: ignore[arg-type, no-any-return]


def test_on_an_idle_fleet_a_job_goes_where_it_takes_least() -> None:
    assert chosen([[3.0, 1.0, 2.0]]) == [1]


def test_a_job_waits_for_a_fast_device_rather_than_hold_up_a_slow_one() -> None:
    # It would end at 10 there and at 12 here; but for 10 s, ten typical jobs' time, nobody else could use that device.
    waiting = {"ready": [11.0, 0.0], "typical_s": 1.0}
    assert policies.load("earliest_finish").place(problem([[1.0, 10.0]], **waiting)).device.tolist() == [1]
    assert chosen([[1.0, 10.0]], **waiting) == [0]


def test_a_device_with_a_toll_is_left_to_those_who_are_worth_it() -> None:
    learned = {"pressure": np.zeros(2), "toll": np.array([4.0, 0.0])}
    assert chosen([[1.0, 2.0], [1.0, 5.0]], **learned) == [1, 0]


def test_under_pressure_what_waits_there_counts_for_more() -> None:
    at = {"ready": [2.0, 0.0], "toll": np.zeros(2)}
    assert chosen([[1.0, 4.0]], pressure=np.array([0.0, 0.0]), **at) == [0]
    assert chosen([[1.0, 4.0]], pressure=np.array([9.0, 0.0]), **at) == [1]


def test_a_heavy_job_goes_where_it_ends_soonest_whatever_that_costs_the_others() -> None:
    learned = {"pressure": np.zeros(2), "toll": np.array([4.0, 0.0])}
    assert chosen([[1.0, 2.0], [1.0, 2.0]], weight=np.array([1.0, 9.0]), **learned) == [1, 0]


def test_what_it_placed_before_waits_before_what_it_places_next() -> None:
    found = EXTERNALITY.place(problem([[1.0, 1.0]] * 4))
    assert sorted(found.device.tolist()) == [0, 0, 1, 1]
    assert found.wait.tolist() == [0.0, 0.0, 1.0, 1.0]


def test_a_job_that_nothing_can_run_is_left_unplaced() -> None:
    found = EXTERNALITY.place(problem([[np.inf, np.inf], [1.0, np.inf]]))
    assert found.device.tolist() == [UNPLACED, 0]
    assert found.wait[0] == np.inf


@given(st.lists(st.lists(SECONDS, min_size=3, max_size=3), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_plain_and_compiled_loops_agree_and_the_waits_are_those_of_the_plan(
    seconds: list[list[float]], is_weighted: bool, is_learned: bool
) -> None:
    more: dict[str, object] = {}
    if is_weighted:
        more["weight"] = np.linspace(0.5, 2, len(seconds))
    if is_learned:
        more |= {"pressure": np.array([3.0, 0.5, 0.0]), "toll": np.array([0.0, 1.0, 2.0])}
    asked = problem(seconds, [0.5, 0.0, 1.0], **more)
    before = asked.ready.copy()
    one, other = EXTERNALITY.place(asked), Externality(is_compiled=False).place(asked)
    np.testing.assert_array_equal(one.device, other.device)
    np.testing.assert_allclose(one.wait, other.wait)
    np.testing.assert_allclose(one.wait, planned(asked, one.device).wait)
    np.testing.assert_array_equal(asked.ready, before)


def test_devices_of_a_class_share_its_column() -> None:
    classes = Problem(
        np.array([[1.0, 2.0]] * 5),
        np.zeros(3),
        np.ones(3),
        class_of=np.array([0, 1, 0]),
        pressure=np.ones(3),
        toll=np.zeros(3),
    )
    np.testing.assert_array_equal(EXTERNALITY.place(classes).device, EXTERNALITY.place(classes.expanded()).device)


@pytest.mark.parametrize(("load", "most"), [(0.5, 1.01), (0.9, 1.01), (0.95, 0.7)])
def test_near_what_the_fleet_can_carry_it_beats_earliest_finish_and_never_loses_to_it(load: float, most: float) -> None:
    # Three devices, each alone good at one of three kernels: what a careless job takes, its owner has to do without.
    fleet = Fleet(np.array([[1.0, 3.0, 5.0], [5.0, 1.0, 3.0], [3.0, 5.0, 1.0]]), np.full(3, 4.0))
    jobs = poisson(12 * load, np.full(3, 1 / 3), 20_000, 1)
    ours, theirs = (
        simulate(policies.load(name), fleet, jobs).response_s[2000:].mean()
        for name in ("externality", "earliest_finish")
    )
    assert ours <= most * theirs
