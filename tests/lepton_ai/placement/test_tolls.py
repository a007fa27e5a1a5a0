from __future__ import annotations

import numpy as np
import pytest

from lepton_ai.placement.problem import UNPLACED, Problem
from lepton_ai.placement.tolls import Tolls


def one_job(seconds: list[float], ready: list[float] | None = None) -> Problem:
    devices = len(seconds)
    return Problem(np.array([seconds]), np.array(ready or [0.0] * devices), np.ones(devices))


def play(tolls: Tolls, *, every_s: float, jobs: int, seconds: list[float], ready: list[float], at: int = 0) -> None:
    """A job on a device at a steady rate, which each finds with so much to do."""
    for turn in range(1, jobs + 1):
        tolls.advance(turn * every_s)
        tolls.placed(one_job(seconds, ready), np.array([at]), [True])


def test_before_anything_was_placed_nothing_is_known() -> None:
    tolls = Tolls(2)
    tolls.advance(5.0)
    assert tolls.typical_s is None
    assert not tolls.pressure.any()
    assert not tolls.toll.any()


@pytest.mark.parametrize("is_compiled", [True, False])
def test_pressure_is_the_rate_over_what_is_left_of_the_device(is_compiled: bool) -> None:
    tolls = Tolls(2, is_compiled=is_compiled)
    play(tolls, every_s=2.0, jobs=1000, seconds=[1.0, 3.0], ready=[0.0, 0.0])
    assert tolls.typical_s == pytest.approx(1.0)
    assert tolls.pressure.tolist() == pytest.approx([0.5 / (1 - 0.5), 0.0], rel=0.03)


def test_the_toll_is_pressure_times_what_lately_waited() -> None:
    tolls = Tolls(1)
    # From 4 s each time, with the job itself 5, down to 3 s when the next comes: 4 s in the mean.
    play(tolls, every_s=2.0, jobs=2000, seconds=[1.0], ready=[4.0])
    assert tolls.toll[0] == pytest.approx(1.0 * 4.0, rel=0.05)


def test_a_device_that_is_given_nothing_loses_its_toll() -> None:
    tolls = Tolls(2)
    play(tolls, every_s=1.0, jobs=500, seconds=[1.0, 1.0], ready=[5.0, 5.0])
    before = tolls.toll[0]
    tolls.advance(500 + 2000)
    assert 0 < tolls.toll[0] < 0.01 * before
    assert tolls.pressure[0] < 0.01


def test_no_pressure_is_without_bounds_however_much_is_placed() -> None:
    tolls = Tolls(1)
    play(tolls, every_s=0.1, jobs=5000, seconds=[1.0], ready=[0.0])
    assert tolls.pressure[0] == pytest.approx(10 / 0.03, rel=0.05)


def test_one_of_two_routers_takes_the_other_to_place_as_much() -> None:
    alone, shared = Tolls(1), Tolls(1, share=0.5)
    play(alone, every_s=2.0, jobs=1000, seconds=[1.0], ready=[0.0])
    play(shared, every_s=4.0, jobs=1000, seconds=[1.0], ready=[0.0])
    assert shared.pressure[0] == pytest.approx(alone.pressure[0], rel=0.05)


def test_what_still_waits_to_be_placed_counts_as_waiting_and_not_as_given() -> None:
    gone, waits = Tolls(1), Tolls(1)
    for tolls, has_gone in ((gone, True), (waits, False)):
        tolls.placed(one_job([1.0]), np.array([0]), [True])
        tolls.placed(one_job([1.0], [10.0]), np.array([0]), [has_gone])
        tolls.advance(0.5)
        tolls.advance(1.0)
    assert 0 < waits.pressure[0] < gone.pressure[0]
    assert waits.toll[0] > 0


def test_the_plain_loops_learn_what_the_compiled_ones_do() -> None:
    compiled, plain = Tolls(3), Tolls(3, is_compiled=False)
    random = np.random.default_rng(1)
    for turn in range(200):
        jobs = int(random.integers(1, 4))
        asked = Problem(random.random((jobs, 3)) + 0.1, random.random(3), np.array([1.0, 2.0, 4.0]))
        device = random.integers(UNPLACED, 3, jobs)
        gone = (random.random(jobs) < 0.7).tolist()
        for tolls in (compiled, plain):
            tolls.advance(turn * 0.2)
            tolls.placed(asked, device, gone)
    np.testing.assert_allclose(compiled.pressure, plain.pressure)
    np.testing.assert_allclose(compiled.toll, plain.toll)
    assert compiled.typical_s == pytest.approx(plain.typical_s)


def test_a_job_that_would_take_for_ever_does_not_make_all_others_seem_short_for_long() -> None:
    tolls = Tolls(1)
    for turn in range(400):
        tolls.advance(turn * 2.0)
        tolls.placed(one_job([1.0]), np.array([0]), [True])
    tolls.placed(one_job([1e290]), np.array([0]), [True])
    for turn in range(3000):
        tolls.advance(800 + turn * 2.0)
        tolls.placed(one_job([1.0]), np.array([0]), [True])
    assert tolls.typical_s == pytest.approx(1.0, rel=0.01)
