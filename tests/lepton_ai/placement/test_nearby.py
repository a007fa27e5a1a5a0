"""The few choices of a job that cost little more than its cheapest."""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.nearby import Nearby, nearby

ANY = np.full(3, 1e9)


def pairs(
    seconds: np.ndarray,
    bound_s: float,
    most_waste: float,
    *,
    most: np.ndarray = ANY,
    few: int = 16,
    chosen: np.ndarray | None = None,
) -> Nearby:
    """Where all columns are worth the same, and jobs are where they are cheapest."""
    now = np.where(seconds <= most, seconds, np.inf).argmin(axis=1) if chosen is None else chosen
    return nearby(seconds, most, np.full(3, 1 / 3), bound_s, most_waste, few, now)


def test_the_cheapest_comes_first_and_wastes_nothing() -> None:
    found = pairs(np.array([[3.0, 1.0, 2.0]]), 10.0, 1.0)
    assert found.place.tolist() == [1, 2, 0]
    np.testing.assert_allclose(found.waste, [0, 1 / 30, 2 / 30])
    np.testing.assert_allclose(found.time, [0.1, 0.2, 0.3])


def test_a_short_job_has_no_choice_that_wastes_more_than_allowed() -> None:
    found = pairs(np.array([[3.0, 1.0, 1.1]]), 1_000.0, 1e-4)
    assert found.place.tolist() == [1, 2]


def test_a_long_job_has_all_choices() -> None:
    found = pairs(np.array([[30.0, 10.0, 90.0]]), 100.0, 0.0)
    assert found.place.tolist() == [1, 0, 2]


def test_no_choice_takes_longer_than_its_column_allows() -> None:
    found = pairs(np.array([[3.0, 1.0, 2.0]]), 10.0, 1.0, most=np.array([9.0, 0.5, 9.0]))
    assert found.place.tolist() == [2, 0]


def test_where_the_job_is_remains_a_choice_however_dear_it_is_and_however_few_there_are() -> None:
    seconds = np.array([[3.0, 1.0, 1.1]])
    assert pairs(seconds, 1_000.0, 1e-4, chosen=np.array([0])).place.tolist() == [1, 2, 0]
    assert pairs(seconds, 1_000.0, 1e-4, few=2, chosen=np.array([0])).place.tolist() == [1, 0]


def test_on_devices_there_is_a_pair_for_each_usable_device_of_the_column() -> None:
    near = pairs(np.array([[3.0, 1.0, 2.0], [1.0, np.inf, 1.0]]), 10.0, 1.0)
    column = np.array([0, 1, 1, 2, 1])
    found = near.on_devices(column, np.array([1.0, 1.0, 2.0, 1.0, 1.0]), np.array([0, 1, 2, 3]))
    assert found.place[:4].tolist() == [1, 2, 3, 0]
    assert sorted(found.place[4:]) == [0, 3]
    assert found.first.tolist() == [0, 4, 6]
    np.testing.assert_allclose(found.time[:4], [0.1, 0.05, 0.2, 0.3])
    assert found.place[found.pairs_of(np.array([3, 0]))].tolist() == [3, 0]
