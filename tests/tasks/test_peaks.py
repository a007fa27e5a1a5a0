from __future__ import annotations

import math
import stat
import time
from pathlib import Path

import pytest

from lepton_ai.device import Peaks
from tasks import peaks
from tasks.peaks import peaks_of
from tests.tasks.workshop import TinyDriver


class Measured(TinyDriver):
    """A device that is twice as fast each time that it is measured, and of which nothing may be hidden."""

    def __init__(self, model: str = "m1", slots: int = 1) -> None:
        super().__init__(slots)
        self.model = model
        self.times = 0

    def peaks(self) -> Peaks:
        self.times += 1
        return Peaks(2.0**self.times, 1.0, math.inf, 0.0, 0.0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lepton" / "peaks"


def test_peaks_are_measured_once_and_kept_for_the_next_worker(cache: Path) -> None:
    first, second = Measured(), Measured()
    assert peaks_of(first) == peaks_of(second) == Peaks(2.0, 1.0, math.inf, 0.0, 0.0)
    assert (first.times, second.times) == (1, 0)


def test_they_are_measured_anew_where_that_is_asked_and_then_kept(cache: Path) -> None:
    driver = Measured()
    assert [peaks_of(driver).flops_per_s, peaks_of(driver, anew=True).flops_per_s] == [2.0, 4.0]
    assert peaks_of(driver).flops_per_s == 4.0


def test_another_device_slots_or_toolkit_has_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks_of(Measured())
    for other in (Measured("m2"), Measured(slots=2)):
        peaks_of(other)
        assert other.times == 1
    monkeypatch.setattr(peaks.metadata, "version", lambda name: "9")
    newer = Measured()
    peaks_of(newer)
    assert newer.times == 1
    assert len(list(cache.iterdir())) == 4


def test_after_a_week_they_are_measured_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, day_s, now = Measured(), 24 * 3600, time.time()
    for days, times in ((0, 1), (6.9, 1), (7.1, 2), (13, 2), (1, 3)):  # a clock that goes back says nothing
        monkeypatch.setattr(peaks.time, "time", lambda days=days: now + days * day_s)
        peaks_of(driver)
        assert driver.times == times


@pytest.mark.parametrize("text", [b"", b"nonsense", b"\x93\xa1x\x01\x02"])
def test_what_cannot_be_read_is_measured_and_written_anew(cache: Path, text: bytes) -> None:
    driver = Measured()
    peaks_of(driver)
    [file] = cache.iterdir()
    file.write_bytes(text)
    assert [peaks_of(driver).flops_per_s, peaks_of(driver).flops_per_s] == [4.0, 4.0]


def test_nobody_else_can_write_what_is_believed(cache: Path) -> None:
    driver = Measured()
    peaks_of(driver)
    [file] = cache.iterdir()
    assert (stat.S_IMODE(cache.stat().st_mode), stat.S_IMODE(file.stat().st_mode)) == (0o700, 0o600)
    cache.chmod(0o777)
    assert peaks_of(driver).flops_per_s == 4.0


def test_without_a_folder_they_are_measured_each_time(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    driver = Measured()
    assert [peaks_of(driver).flops_per_s, peaks_of(driver).flops_per_s] == [2.0, 4.0]
