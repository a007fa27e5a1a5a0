"""With a fake of the library: no machine of ours has what it asks."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_ai.device import DeviceState
from tasks.nvml import gpu_state


class NotSupported(Exception): ...


class Nvml:
    """As much of pynvml as is asked, of two GPUs."""

    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1
    NVMLError_NotSupported = NotSupported

    def __init__(self) -> None:
        self.opened = 0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        return uuid

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> Any:
        return SimpleNamespace(used=int(gpu[-1]) + 1, total=100)

    def nvmlDeviceGetUtilizationRates(self, _: str) -> Any:
        return SimpleNamespace(gpu=75, memory=1)

    def nvmlDeviceGetTemperature(self, _: str, sensor: int) -> int:
        return 60 + sensor

    def nvmlDeviceGetTemperatureThreshold(self, _: str, which: int) -> int:
        return 89 + which

    def nvmlDeviceGetPowerUsage(self, _: str) -> int:
        return 350_500

    def nvmlDeviceGetEnforcedPowerLimit(self, _: str) -> int:
        return 700_000


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    return found


def test_a_gpu_tells_of_its_load_memory_temperature_and_power(nvml: Nvml) -> None:
    assert gpu_state("GPU-0")() == DeviceState(0.75, 1, 100, 60.0, 90.0, 350.5, 700.0)


def test_the_gpu_is_the_one_of_that_uuid(nvml: Nvml) -> None:
    assert gpu_state("GPU-abc7")().memory_used_bytes == 8


def test_what_a_model_has_no_sensor_for_is_left_out(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> int:
        raise NotSupported

    monkeypatch.setattr(nvml, "nvmlDeviceGetPowerUsage", missing, raising=False)
    found = gpu_state("GPU-0")()
    assert (found.power_w, found.power_limit_w, found.temperature_c) == (None, 700.0, 60.0)


def test_the_library_is_loaded_with_the_first_reading_and_once(nvml: Nvml) -> None:
    reading = gpu_state("GPU-0")
    assert nvml.opened == 0
    assert reading() == reading()
    assert nvml.opened == 1


def test_without_the_library_the_reading_says_which_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ModuleNotFoundError, match="pynvml"):
        gpu_state("GPU-0")()
