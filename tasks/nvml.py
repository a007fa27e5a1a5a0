"""What an NVIDIA GPU says of itself, by NVML (package nvidia-ml-py, which is loaded here and nowhere else)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lepton_ai.device import DeviceState

__all__ = ["gpu_state"]


def gpu_state(uuid: str) -> Callable[[], DeviceState]:
    """The reading of the GPU of this UUID (CUDA and NVML number the GPUs of a machine differently).

    Nothing is loaded before the reading is first taken; it raises what NVML raises, and ModuleNotFoundError without it.
    """
    opened: list[tuple[Any, Any]] = []

    def read() -> DeviceState:
        if not opened:
            opened.append(_open(uuid))
        return _read(*opened[0])

    return read


def _open(uuid: str) -> tuple[Any, Any]:
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)


def _read(nvml: Any, gpu: Any) -> DeviceState:
    memory = _told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(gpu))
    busy = _told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(gpu))
    slowdown = nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    return DeviceState(
        utilization=None if busy is None else busy.gpu / 100,
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        temperature_c=_told(nvml, lambda: float(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))),
        temperature_limit_c=_told(nvml, lambda: float(nvml.nvmlDeviceGetTemperatureThreshold(gpu, slowdown))),
        power_w=_told(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3),
        power_limit_w=_told(nvml, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3),
    )


def _told(nvml: Any, ask: Callable[[], Any]) -> Any:
    """None where the GPU does not tell: not every model has every sensor."""
    try:
        return ask()
    except nvml.NVMLError_NotSupported:
        return None
