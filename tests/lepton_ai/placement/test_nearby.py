"""The few choices of a job that cost little more than its cheapest."""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.nearby import nearby

ANY = np.full(3, 1e9)


def test_the_cheapest_comes_first_and_wastes_nothing() -> None:
    found = nearby(np.array([[3.0, 1.0, 2.0]]), ANY, np.full(3, 1 / 3), 10.0, 1.0)
    assert found.place.tolist() == [1, 2, 0]
    np.testing.assert_allclose(found.waste, [0, 1 / 30, 2 / 30])
    np.testing.assert_allclose(found.time, [0.1, 0.2, 0.3])


def test_a_short_job_has_no_choice_that_wastes_more_than_allowed() -> None:
    found = nearby(np.array([[3.0, 1.0, 1.1]]), ANY, np.full(3, 1 / 3), 1_000.0, 1e-4)
    assert found.place.tolist() == [1, 2]


def test_a_long_job_has_all_choices() -> None:
    found = nearby(np.array([[30.0, 10.0, 90.0]]), ANY, np.full(3, 1 / 3), 100.0, 0.0)
    assert found.place.tolist() == [1, 0, 2]


def test_no_choice_takes_longer_than_its_column_allows() -> None:
    found = nearby(np.array([[3.0, 1.0, 2.0]]), np.array([9.0, 0.5, 9.0]), np.full(3, 1 / 3), 10.0, 1.0)
    assert found.place.tolist() == [2, 0]


def test_on_devices_there_is_a_pair_for_each_usable_device_of_the_column() -> None:
    near = nearby(np.array([[3.0, 1.0, 2.0], [1.0, np.inf, 1.0]]), ANY, np.full(3, 1 / 3), 10.0, 1.0)
    column = np.array([0, 1, 1, 2, 1])
    found = near.on_devices(column, np.array([1.0, 1.0, 2.0, 1.0, 1.0]), np.array([0, 1, 2, 3]))
    assert found.place[:4].tolist() == [1, 2, 3, 0]
    assert sorted(found.place[4:]) == [0, 3]
    assert found.first.tolist() == [0, 4, 6]
    np.testing.assert_allclose(found.time[:4], [0.1, 0.05, 0.2, 0.3])
    assert found.place[found.pairs_of(np.array([3, 0]))].tolist() == [3, 0]
