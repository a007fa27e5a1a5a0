"""Some of the scenarios in small: what was acknowledged ends, and ends once, whatever dies meanwhile."""

from __future__ import annotations

import secrets

import pytest

from tests.faults.scenario import Scenario, perform
from tests.faults.table import TESTED


@pytest.mark.slow
@pytest.mark.parametrize("scenario", TESTED, ids=lambda scenario: scenario.name)
def test_nothing_is_lost_and_nothing_done_twice(scenario: Scenario) -> None:
    assert scenario.tested is not None
    row = perform(scenario, scenario.tested, secrets.randbelow(1 << 31), print)
    if row.verdict == "skipped":
        pytest.skip(row.reasons[0])
    assert not row.reasons, f"play it again: ./lepton bench faults --only {row.name} --seed {row.seed}"
    assert (row.lost, row.duplicate_effects, row.phantom) == (0, 0, 0)
