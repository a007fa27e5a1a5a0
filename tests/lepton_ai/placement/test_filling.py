"""Shares rounded to a plan, columns filled evenly, and what is late at the end moved."""

from __future__ import annotations

import numpy as np
import pytest

from lepton_ai.placement.equilibrium import Equilibrium, Supply
from lepton_ai.placement.filling import eased, filled


def loads(seconds: np.ndarray, column: np.ndarray, slots: np.ndarray | None = None) -> np.ndarray:
    """[device], in units of the bound, where a slot is worth the same on every device."""
    slots = np.ones(column.size) if slots is None else slots
    columns = seconds.shape[1]
    market = Equilibrium(
        np.full(columns, 1 / slots.sum()), seconds.min(axis=1).sum() / slots.sum(), np.full(columns, np.inf)
    )
    supply = Supply(np.zeros(column.size), slots, column, columns)
    device, ends = eased(seconds, market, supply, filled(seconds, market, supply)[0])
    time = seconds[np.arange(len(seconds)), column[device]] / market.bound_s
    found = np.bincount(device, time / slots[device], column.size)
    assert ends == pytest.approx(found.max())
    return found


def drawn(jobs: int, columns: int) -> np.ndarray:
    """Jobs that take as long on every column."""
    return np.random.default_rng(0).uniform(1, 2, (jobs, 1)) * np.ones(columns)


def test_jobs_that_cost_the_same_everywhere_end_together() -> None:
    assert loads(drawn(400, 4), np.arange(4)).max() < 1.005


def test_jobs_that_cost_the_same_on_very_many_columns_end_together() -> None:
    assert loads(drawn(6_000, 96), np.arange(96)).max() < 1.01


def test_devices_of_a_class_end_together() -> None:
    assert loads(drawn(400, 2), np.array([0, 1, 0, 1, 1])).max() < 1.01


def test_devices_of_a_class_that_are_not_alike_end_together() -> None:
    assert loads(drawn(400, 1), np.zeros(4, np.intp), np.array([10.0, 5.0, 0.5, 1.5])).max() < 1.01


def test_a_job_leaves_the_device_that_ends_last_where_that_ends_sooner() -> None:
    seconds = np.array([[4.0, np.inf], [4.0, np.inf], [3.9, 4.1], [3.9, 4.1]])
    assert loads(seconds, np.arange(2)).max() * seconds.min(axis=1).sum() / 2 < 8.3
