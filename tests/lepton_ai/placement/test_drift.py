from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from lepton_ai.placement import drift
from lepton_ai.placement.drift import Drift, has_adwin


def alarms(misses: list[float]) -> list[int]:
    found = Drift()
    return [at for at, miss in enumerate(misses, 1) if found.notices(miss)]


def noise(count: int, seed: int = 0, shift: float = 0.0) -> list[float]:
    return np.random.default_rng(seed).normal(shift, 1.0, count).tolist()


@pytest.fixture(params=["with river", "without"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways in which it may be installed."""
    if request.param == "without":
        monkeypatch.setitem(sys.modules, "river._river_rust.drift", None)
    drift._windows.cache_clear()
    assert has_adwin() is (request.param == "with river")
    yield str(request.param)
    drift._windows.cache_clear()


@pytest.mark.parametrize("shift", [3.0, -3.0])
def test_a_change_of_some_deviations_is_noticed_at_once(either: str, shift: float) -> None:
    assert alarms(noise(20, shift=shift))[0] <= 8


def test_a_change_of_one_deviation_is_noticed_within_a_hundred(either: str) -> None:
    assert alarms(noise(100, shift=1.0))


def test_noise_is_no_drift(either: str) -> None:
    assert not alarms(noise(20_000))


def test_a_few_outliers_are_no_drift(either: str) -> None:
    misses = noise(3000)
    misses[::100] = [50.0] * 30
    assert not alarms(misses)


def test_after_an_alarm_it_begins_anew(either: str) -> None:
    found = Drift()
    while not found.notices(3.0):
        pass
    assert not any(found.notices(miss) for miss in noise(100))


def test_the_bare_detector_alarms_when_the_one_that_river_shows_does() -> None:
    from river.drift import ADWIN

    shown, bare = ADWIN(0.002), drift._adwin()
    for miss in [*noise(500), *noise(2000, 1, 0.5)]:
        shown.update(miss)
        alarm = bare.update(miss)
        assert alarm == shown.drift_detected
        if alarm:
            return
    pytest.fail("neither alarmed")


def test_a_drift_is_looked_for_without_the_whole_of_river() -> None:
    program = "import sys; from lepton_ai.placement.drift import Drift; Drift().notices(1.0); print(len(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert int(found.stdout) < 300
