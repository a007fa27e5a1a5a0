"""The benches that need no fleet, in small."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.truth import generated

pytestmark = pytest.mark.slow


def told(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """What a bench says in JSON; its tables are drawn too."""
    bench = importlib.import_module(f"bench.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--json", *arguments])
    assert bench.main() == 0
    found = json.loads(capsys.readouterr().out)
    with Path(os.devnull).open("w") as nowhere:
        for table in bench._tables(found):
            Console(file=nowhere).print(table)
    return found


def test_learning_tells_errors_excess_and_drift(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = told("learning", capsys, monkeypatch)
    assert 0 < found["error_after_50"] < found["error_after_1"]
    assert 0 < found["error_after_50_repeated"] < found["error_after_1_repeated"]
    assert found["excess_after_1500"] >= 0
    assert 0 < found["drift_delay"] <= found["drift_delay_worst"]
    assert found["false_alarms"] == 0


def test_decision_tells_what_pricing_and_the_policy_take(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = told("decision", capsys, monkeypatch, "--jobs", "50", "--devices", "8")
    assert found["pricing_ms"] > 0
    assert found["policy_ms"] > 0
    assert found["different"]["kinds"] > found["alike"]["kinds"]


def test_made_up_fleets_are_the_same_for_the_same_seed() -> None:
    assert generated(3, devices=2, cases=5) == generated(3, devices=2, cases=5) != generated(4, devices=2, cases=5)


def test_made_up_seconds_go_up_in_steps_and_are_a_time() -> None:
    for truth in generated(1, devices=4, cases=50):
        assert len({case.size.dims for case in truth.cases}) == len(truth.cases)
        assert all(1e-7 < seconds < 1e4 for case in truth.cases for seconds in case.seconds)
