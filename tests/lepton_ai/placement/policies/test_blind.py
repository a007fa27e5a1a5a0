"""The two policies that do not look at costs."""

from __future__ import annotations

import numpy as np

from lepton_ai.placement.policies.least_loaded import LeastLoaded
from lepton_ai.placement.policies.round_robin import RoundRobin
from lepton_ai.placement.problem import Problem


def test_round_robin_takes_devices_in_turn_and_passes_over_those_that_cannot() -> None:
    seconds = np.array([[1.0, 99.0, 1.0], [1.0, np.inf, 1.0], [1.0, 1.0, 1.0], [np.inf, 99.0, np.inf]])
    assert RoundRobin().place(Problem(seconds, np.zeros(3), np.ones(3))).device.tolist() == [0, 2, 0, 1]


def test_least_loaded_counts_jobs_and_not_their_time() -> None:
    seconds = np.array([[1.0, 99.0]] * 4)
    assert LeastLoaded().place(Problem(seconds, np.zeros(2), np.ones(2))).device.tolist() == [0, 1, 0, 1]


def test_least_loaded_counts_what_waits_by_what_jobs_take_there() -> None:
    problem = Problem(np.array([[1.0, 10.0]] * 3), np.array([3.0, 10.0]), np.ones(2))
    assert LeastLoaded().place(problem).device.tolist() == [1, 1, 0]


def test_least_loaded_fills_slots_evenly() -> None:
    problem = Problem(np.ones((6, 2)), np.zeros(2), np.array([2.0, 1.0]))
    assert np.bincount(LeastLoaded().place(problem).device).tolist() == [4, 2]
