from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.placement.policies.min_min import MinMin
from lepton_ai.placement.problem import UNPLACED, Problem


@given(st.integers(0, 2**32))
def test_it_is_the_published_rule_written_out(seed: int) -> None:
    random = np.random.default_rng(seed)
    jobs, devices = random.integers(1, 12), random.integers(1, 5)
    seconds = random.uniform(1, 10, (jobs, devices))
    seconds[random.random(seconds.shape) < 0.2] = np.inf
    problem = Problem(seconds, random.uniform(0, 5, devices), random.integers(1, 3, devices).astype(float))
    end, expected = problem.ready.copy(), np.full(jobs, UNPLACED)
    while True:
        ends = np.where((expected == UNPLACED)[:, np.newaxis], end + seconds, np.inf)
        job, at = np.unravel_index(ends.argmin(), ends.shape)
        if ends[job, at] == np.inf:
            break
        expected[job] = at
        end[at] += seconds[job, at] / problem.slots[at]
    assert MinMin().place(problem).device.tolist() == expected.tolist()
