"""What a search gives is what it says, and no later than what it was given."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ai.placement.equilibrium import Supply, equilibrium
from lepton_ai.placement.exchange import exchanged
from lepton_ai.placement.nearby import Nearby, nearby
from lepton_ai.placement.problem import Floats

DEVICES = 5


def market(seed: int, jobs: int) -> tuple[Nearby, Floats]:
    seconds = np.random.default_rng(seed).uniform(1, 10, (jobs, DEVICES))
    found = equilibrium(seconds, Supply(np.zeros(DEVICES), np.ones(DEVICES), np.arange(DEVICES), DEVICES))
    cheapest = (found.prices * np.where(seconds <= found.most, seconds, np.inf)).argmin(axis=1)
    return nearby(seconds, found.most, found.prices, found.bound_s, 0.5 / jobs, 16, cheapest), found.prices


def load_of(near: Nearby, pair: np.ndarray) -> Floats:
    return np.bincount(near.place[pair], near.time[pair], DEVICES).astype(np.float64)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), jobs=st.integers(1, 60), steps=st.integers(0, 3_000))
def test_the_end_is_that_of_the_plan_and_no_later_than_before(seed: int, jobs: int, steps: int) -> None:
    near, worth = market(seed, jobs)
    cheapest = near.first[:-1]
    pair, ends = exchanged(near, cheapest, load_of(near, cheapest), worth, steps, seed, 0.0, 1.0, now=lambda: 0.0)
    np.testing.assert_array_equal(near.job[pair], np.arange(jobs))
    assert ends == pytest.approx(load_of(near, pair).max())
    assert ends <= load_of(near, cheapest).max() * (1 + 1e-12)


def test_a_search_ends_where_it_is_good_enough() -> None:
    near, worth = market(1, 60)
    cheapest = near.first[:-1]
    _, at_once = exchanged(near, cheapest, load_of(near, cheapest), worth, 100_000, 0, 1e9, 1.0, now=lambda: 0.0)
    _, in_time = exchanged(near, cheapest, load_of(near, cheapest), worth, 100_000, 0, 1.05, 1.0, now=lambda: 0.0)
    assert at_once == load_of(near, cheapest).max()
    assert in_time <= 1.05


def test_what_is_given_is_not_changed() -> None:
    near, worth = market(2, 60)
    pair, load = near.first[:-1].copy(), load_of(near, near.first[:-1])
    exchanged(near, pair, load, worth, 1_000, 0, 0.0, 1.0, now=lambda: 0.0)
    np.testing.assert_array_equal(pair, near.first[:-1])
    np.testing.assert_array_equal(load, load_of(near, pair))
