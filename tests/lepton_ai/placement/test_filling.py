"""Shares rounded to a plan, and columns filled evenly."""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.filling import filled
from lepton_ai.placement.nearby import nearby


def loads(seconds: np.ndarray, column: np.ndarray, *, divided: bool) -> np.ndarray:
    """[device], where all columns are worth the same."""
    jobs, columns = seconds.shape
    prices = np.full(columns, 1 / column.size)
    bound_s = seconds.min(axis=1).sum() / column.size
    near = nearby(seconds, np.full(columns, np.inf), prices, bound_s, 1.0 / jobs)
    ready, slots = np.zeros(column.size), np.ones(column.size)
    pair, device = filled(near, seconds.min(axis=1), prices, ready, slots, column, divided=divided)
    np.testing.assert_array_equal(column[device], near.place[pair])
    return np.bincount(device, near.time[pair], column.size)


def test_jobs_that_cost_the_same_everywhere_end_together() -> None:
    seconds = np.random.default_rng(0).uniform(1, 2, (400, 1)) * np.ones(4)
    for divided in (True, False):
        assert loads(seconds, np.arange(4), divided=divided).max() < 1.02


def test_devices_of_a_class_end_together() -> None:
    seconds = np.random.default_rng(0).uniform(1, 2, (400, 1)) * np.ones(2)
    assert loads(seconds, np.array([0, 1, 0, 1, 1]), divided=True).max() < 1.03
