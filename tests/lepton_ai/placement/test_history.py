from __future__ import annotations

import math

import numpy as np
import pytest

from lepton_ai.placement import history
from lepton_ai.placement.history import History, Past
from lepton_ai.placement.problem import Floats
from lepton_ai.placement.size import FEATURES, Size

HERE, THERE = Size(1, 1, dims=(100.0,)), Size(1, 1, dims=(5000.0,))


def flat(work: Floats, features: Floats) -> Floats:
    """A line that says a second of every launch, on one device."""
    return np.zeros((len(work), 1))


def near(found: History, size: Size, column: int = 0) -> float:
    features = np.zeros((1, FEATURES))
    features[0, : len(size.features)] = size.features
    return found.near(features, np.array([column]), flat).item()


def test_a_size_is_known_by_the_mean_of_its_launches() -> None:
    found = History()
    for log_s in (1.0, 3.0):
        found.learn(HERE, 0, log_s)
    assert found.known(HERE.key, 0) == (2.0, 2.0)
    assert found.known(THERE.key, 0) == (0.0, 0.0)
    assert found.known(HERE.key, 1) == (0.0, 0.0)


def test_many_are_looked_up_as_each_is() -> None:
    found = History()
    found.learn(HERE, 1, 2.0)
    log_s, launches = found.known_many([HERE.key, THERE.key], np.array([0, 1, 5]))
    assert launches.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert log_s[0, 1] == 2.0


def test_the_last_launches_of_a_size_outweigh_those_long_ago() -> None:
    found = History()
    for log_s in [0.0] * 50 + [1.0] * 30:
        found.learn(HERE, 0, log_s)
    assert found.known(HERE.key, 0)[0] > 0.9


def test_a_launch_near_a_size_says_more_of_it_than_one_far_away() -> None:
    found = History()
    found.learn(HERE, 0, 1.0)
    close, far = near(found, Size(1, 1, dims=(110.0,))), near(found, THERE)
    assert 0.7 < close < 1
    assert 0 < far < 0.1


def test_what_is_dropped_of_a_device_is_kept_of_the_others() -> None:
    found = History()
    for column in (0, 1):
        found.learn(HERE, column, 1.0)
    found.drop(0)
    assert found.known(HERE.key, 0)[1] == 0
    assert found.known(HERE.key, 1)[1] == 1
    assert near(found, HERE, 0) == 0


def test_a_new_size_takes_the_place_of_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_MOST", 3)
    found, sizes = History(), [Size(1, 1, dims=(float(n),)) for n in range(5)]
    for size in sizes:
        found.learn(size, 0, 1.0)
    assert [found.known(size.key, 0)[1] for size in sizes] == [0, 0, 1, 1, 1]


def test_the_newest_of_the_past_is_told_and_taken_over() -> None:
    found, other = History(), History()
    for n in range(5):
        found.learn(Size(n, 1, dims=(float(n),)), 0, n)
    past = found.past(0, 3)
    assert [each.size.dims for each in past] == [(2.0,), (3.0,), (4.0,)]
    for each in past:
        other.take_over(each, 2)
    assert other.known((1, 4.0), 2) == (4.0, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        Past(HERE, math.nan, 1),
        Past(HERE, 1.0, 0),
        Past(Size(-1, 1), 1.0, 1),
        Past(Size(1, 1, dims=(math.inf,)), 1.0, 1),
    ],
)
def test_a_past_that_cannot_have_been_is_left_out(wrong: Past) -> None:
    found = History()
    found.take_over(wrong, 0)
    assert found.known(wrong.size.key, 0)[1] == 0
