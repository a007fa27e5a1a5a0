from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from bench.fleets import Mix, drawn, measured
from lepton_ai.placement.simulate import Fleet


def mix(seconds: list[list[float]], slots: list[float], share: list[float]) -> Mix:
    kind = np.arange(len(slots))
    return Mix("made", Fleet(np.array(seconds), np.array(slots)), np.array(share), kind)


def test_one_device_carries_what_its_slots_can_compute() -> None:
    assert mix([[0.5]], [2.0], [1.0]).capacity_hz() == pytest.approx(4.0)


def test_specialists_carry_what_their_best_split_does() -> None:
    # Each device takes its own row; to share would be slower.
    assert mix([[1.0, 3.0], [3.0, 1.0]], [1.0, 1.0], [0.5, 0.5]).capacity_hz() == pytest.approx(2.0)


def test_a_device_that_cannot_run_a_row_is_given_none_of_it() -> None:
    assert mix([[1.0, np.inf]], [1.0, 9.0], [1.0]).capacity_hz() == pytest.approx(1.0)


def test_the_floor_rises_with_the_load_from_the_best_devices_time() -> None:
    found = mix([[1.0, 4.0]], [1.0, 4.0], [1.0])
    assert found.capacity_hz() == pytest.approx(2.0)
    assert found.floor(0.5, 2.0) == pytest.approx(1.0)
    assert found.floor(0.75, 2.0) == pytest.approx((1.0 * 1 + 0.5 * 4) / 1.5)


@pytest.mark.parametrize("number", range(6))
def test_a_number_draws_one_fleet_by_the_law(number: int) -> None:
    found, again = drawn(number), drawn(number)
    np.testing.assert_array_equal(found.fleet.seconds, again.fleet.seconds)
    kinds, devices = np.unique(found.kind, return_counts=True)
    assert 2 <= len(kinds) <= 4
    assert ((devices >= 4) & (devices <= 8)).all()
    assert np.isfinite(found.fleet.seconds).any(axis=1).all()
    assert found.share.sum() == pytest.approx(1.0)
    ratio = found.fleet.seconds / found.fleet.seconds[:, :1]
    assert np.allclose(ratio, ratio[0]) == (number % 2 == 0)


@pytest.mark.skipif("TEST_DATA" not in os.environ, reason="TEST_DATA names no folder with network_timings.csv")
def test_the_measured_fleet_has_so_many_devices_of_each_column() -> None:
    found = measured(Path(os.environ["TEST_DATA"]), 2)
    assert found.fleet.seconds.shape == (3000, 14)
    assert (found.fleet.seconds > 0).all()
