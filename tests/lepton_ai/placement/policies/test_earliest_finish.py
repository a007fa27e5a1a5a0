"""Many jobs are placed as few are, only faster."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_ai.placement.policies import earliest_finish
from lepton_ai.placement.policies.earliest_finish import EarliestFinish
from lepton_ai.placement.problem import Problem


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), jobs=st.integers(0, 30), devices=st.integers(1, 6), shared=st.booleans())
def test_the_plan_of_the_compiled_loop_is_that_of_the_plain_one(
    seed: int, jobs: int, devices: int, shared: bool
) -> None:
    random = np.random.default_rng(seed)
    seconds = random.choice([0.0, 0.1, 1.0, 2.0, np.inf], (jobs, devices))
    class_of = random.integers(0, devices, devices) if shared else None
    problem = Problem(
        seconds, random.choice([0.0, 0.3, 3.0], devices), random.choice([1.0, 3.0], devices), class_of=class_of
    )
    plain = EarliestFinish().place(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(earliest_finish, "_MANY", 0)
        found = EarliestFinish().place(problem)
    np.testing.assert_array_equal(found.device, plain.device)
    np.testing.assert_array_equal(found.wait, plain.wait)
