"""Columns that are multiples of others are one column, and the problem is still the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ai.placement.multiples import without_multiples

ONES = np.ones(4)


def test_a_device_that_always_takes_twice_as_long_has_half_the_slots_of_the_same_column() -> None:
    base = np.random.default_rng(0).uniform(1, 9, (50, 2))
    seconds, column, slots = without_multiples(base[:, [0, 1, 0, 1]] * [1, 1, 2, 4], np.arange(4), ONES)
    np.testing.assert_array_equal(seconds, base)
    assert column.tolist() == [0, 1, 0, 1]
    assert slots.tolist() == [1, 1, 0.5, 0.25]


def test_one_job_that_differs_makes_it_another_column() -> None:
    seconds = np.random.default_rng(0).uniform(1, 9, (5_000, 1)) * [1, 2, 3, 4]
    seconds[4_321, 2] *= 1.001
    found, column, _ = without_multiples(seconds, np.arange(4), ONES)
    assert found.shape == (5_000, 2)
    assert column.tolist() == [0, 0, 1, 0]


def test_what_cannot_run_is_a_multiple_only_of_what_cannot_run_either() -> None:
    seconds = np.array([[1.0, 2.0, np.inf, 2.0], [np.inf, np.inf, 4.0, 3.0], [3.0, 6.0, np.inf, 6.0]])
    _, column, _ = without_multiples(seconds, np.arange(4), ONES)
    assert column.tolist() == [0, 0, 1, 2]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), jobs=st.integers(1, 40), columns=st.integers(1, 4), devices=st.integers(1, 8))
def test_every_job_adds_to_the_backlog_of_every_device_what_it_did(
    seed: int, jobs: int, columns: int, devices: int
) -> None:
    random = np.random.default_rng(seed)
    base = random.choice([0.0, 0.3, 1.0, 2.0, np.inf], (jobs, columns))
    with np.errstate(invalid="ignore"):
        given_ = base[:, random.integers(0, columns, devices)] * random.uniform(0.5, 2, devices)
    slots = random.choice([1.0, 4.0], devices)
    seconds, column, fewer = without_multiples(given_, np.arange(devices), slots)
    assert seconds.shape[1] <= devices
    np.testing.assert_allclose(seconds[:, column] / fewer, given_ / slots, rtol=1e-11)
