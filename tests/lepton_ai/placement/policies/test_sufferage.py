from __future__ import annotations

import numpy as np

from lepton_ai.placement.policies.sufferage import Sufferage
from lepton_ai.placement.problem import Problem


def test_the_job_that_loses_most_by_its_second_device_gets_the_first() -> None:
    problem = Problem(np.array([[10.0, 11.0], [10.0, 50.0]]), np.zeros(2), np.ones(2))
    assert Sufferage().place(problem).device.tolist() == [1, 0]


def test_a_job_that_only_one_device_can_run_gets_it() -> None:
    problem = Problem(np.array([[1.0, 100.0], [5.0, np.inf]]), np.zeros(2), np.ones(2))
    assert Sufferage().place(problem).wait.tolist() == [5.0, 0.0] or Sufferage().place(problem).device[1] == 0
