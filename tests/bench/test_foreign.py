from __future__ import annotations

import msgspec
import pytest

from bench import foreign
from lepton_ai.device import Announcement, Peaks, ResourceState
from lepton_ai.event import Event, Observation

WORKER = Announcement("w", "w", "cpu", "cpu", 1, False, Peaks(1e9, 1e9, 1e9, 0.0, 0.0), (), 0.0)


def launched(run_s: float) -> Event:
    return Event("job.succeeded", "w", observation=Observation("k", "cpu", 1, 1e6, 0.0, 0.0, run_s, dims=(1e6,)))


def told(speed: float) -> Event:
    state = msgspec.structs.replace(ResourceState(1, 1.0, 1.0, 0, 1), speed=speed)
    return Event("device.heartbeat", "w", data={"state": msgspec.to_builtins(state)})


def test_a_launch_that_slows_down_as_told_is_predicted_where_that_is_corrected_for() -> None:
    seen = [(at / 10, launched(0.01)) for at in range(50)]
    seen += [(10.0, told(0.5)), *((10 + at / 10, launched(0.02)) for at in range(1, 4))]
    corrected, blind = (
        foreign._replayed(seen, WORKER, (0.0, 10.0, 20.0), speed_of)
        for speed_of in (lambda state: state.speed, lambda state: 1.0)
    )
    assert [each["launches"] for each in corrected.values()] == [50, 3]
    *_, after = corrected.values()
    *_, unaware = blind.values()
    assert after["error"] == pytest.approx(0, abs=0.01)
    assert unaware["error"] > 0.1
