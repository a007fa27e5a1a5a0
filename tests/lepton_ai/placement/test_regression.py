from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.placement.regression import Regression


def taught(truth: list[float], launches: int = 200, noise: float = 0.0, seed: int = 0) -> Regression:
    """One that saw values of a hidden line, at random features."""
    random = np.random.default_rng(seed)
    found = Regression.at([0.0] * len(truth), 10.0)
    for _ in range(launches):
        features = random.uniform(0, 1, len(truth)).tolist()
        measured = float(np.dot(truth, features)) + random.normal(0, noise)
        found.learn(features, measured - found.value(features), 0.01)
    return found


@pytest.mark.parametrize("truth", [[2.0], [1.0, 3.0], [0.5, 0.0, 2.0, 7.0]])
def test_a_hidden_line_is_found(truth: list[float]) -> None:
    assert taught(truth, noise=0.05).coefficients == pytest.approx(truth, abs=0.1)


def test_what_was_forgotten_gives_way_to_what_came_after() -> None:
    slow, quick = taught([1.0]), taught([1.0])
    for _ in range(100):
        quick.forget(0.9)
        for each in (slow, quick):
            each.learn([1.0], 2.0 - each.value([1.0]), 0.01)
    assert abs(quick.coefficients[0] - 2) < 0.01 < abs(slow.coefficients[0] - 2)


def test_what_no_measurement_tells_of_never_becomes_more_uncertain_than_the_prior() -> None:
    found = Regression.at([0.0, 0.0], 4.0)
    for _ in range(1000):
        found.forget(0.5)
        found.learn([1.0, 0.0], 1.0, 0.1)
    assert found.covariance[1][1] == pytest.approx(4.0)
    assert found.is_possible()


def test_an_outlier_moves_no_more_than_the_largest_miss_that_is_none() -> None:
    far, farther, believed = taught([1.0]), taught([1.0]), taught([1.0])
    most = 4 * math.sqrt(0.01 + far.covariance[0][0])
    far.learn([1.0], most, 0.01, outlier=4)
    farther.learn([1.0], 100 * most, 0.01, outlier=4)
    believed.learn([1.0], 100 * most, 0.01)
    moved = far.coefficients[0] - 1.0
    assert farther.coefficients[0] - 1.0 <= moved
    assert believed.coefficients[0] - 1.0 > 50 * moved


def test_a_coefficient_that_came_to_nought_comes_back() -> None:
    stuck, free = Regression.at([0.0], 4.0), Regression.at([0.0], 4.0)
    for each, least in ((stuck, 0.0), (free, 1.0)):
        each.covariance = [[1e-9]]
        for _ in range(100):
            each.wander(0.001, least)
            each.learn([1.0], 1.0 - each.value([1.0]), 0.1)
    assert stuck.coefficients[0] < 0.01
    assert free.coefficients[0] == pytest.approx(1.0, abs=0.1)


def test_doubt_makes_the_next_measurement_count() -> None:
    sure, doubtful = taught([1.0]), taught([1.0])
    doubtful.doubt(0.5)
    for each in (sure, doubtful):
        each.learn([1.0], 1.0, 0.1)
    assert doubtful.coefficients[0] > 1.5
    assert sure.coefficients[0] < 1.1


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(-10, 10)), max_size=30), st.floats(1e-3, 10))
def test_coefficients_stay_above_their_least(seen: list[tuple[float, float, float]], noise: float) -> None:
    found = Regression.at([1.0, 1.0], 4.0)
    for first, second, miss in seen:
        found.wander(0.01)
        found.learn([first, second], miss, noise)
        found.keep_above([0.0, 0.1])
        assert found.coefficients[0] >= 0
        assert found.coefficients[1] >= 0.1
        assert all(map(math.isfinite, found.coefficients))


@pytest.mark.parametrize(
    "wrong",
    [
        Regression([math.nan], [[1.0]], 4.0),
        Regression([1.0], [[-1.0]], 4.0),
        Regression([1.0], [[5.0]], 4.0),
        Regression([1.0, 1.0], [[1.0]], 4.0),
        Regression([1.0, 1.0], [[1.0, 9.0], [9.0, 1.0]], 4.0),
    ],
    ids=["no number", "negative variance", "above the prior", "too short", "covariance beyond the variances"],
)
def test_numbers_that_no_measurement_could_have_taught_are_known(wrong: Regression) -> None:
    assert not wrong.is_possible()
    assert taught([1.0, 2.0]).is_possible()
