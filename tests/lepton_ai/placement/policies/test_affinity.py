from __future__ import annotations

import numpy as np

from lepton_ai.placement.policies.affinity import Affinity
from lepton_ai.placement.problem import Problem


def busy(seconds: list[list[float]], ready: list[float]) -> Problem:
    return Problem(np.array(seconds), np.array(ready), np.ones(len(ready)))


def test_jobs_go_where_they_run_fastest_whatever_waits_there() -> None:
    plan = Affinity().place(busy([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]], [1000.0, 0.0]))
    assert plan.device.tolist() == [0, 1, 0]


def test_devices_on_which_a_job_takes_as_long_share_its_queue() -> None:
    plan = Affinity().place(busy([[1.0, 1.0, 9.0]] * 4, [0.0, 0.5, 0.0]))
    assert plan.device.tolist() == [0, 1, 0, 1]


def test_a_table_says_which_device_comes_first() -> None:
    plan = Affinity(table=[2, 1]).place(busy([[1.0, 5.0, 9.0], [1.0, 5.0, np.inf], [1.0, np.inf, np.inf]], [0.0] * 3))
    assert plan.device.tolist() == [2, 1, 0]
