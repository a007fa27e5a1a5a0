"""The CPU driver: kernels read host memory, one slot is one thread.

Slots are the parallelism: variants release the GIL and run on one thread each. Where one does use Numba's own
threads it gets cores / slots of them, on the omp layer (the workqueue layer aborts the process when two threads
enter it at once).
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lepton_ai.device import DeviceState, Peaks
from lepton_ai.kernel import Context, Inputs, Outputs, Run
from tasks.driver import Found, best_s, cores, processor

__all__ = ["CpuDriver", "open_device", "probe"]

_MATMUL_SIZE = 512
_COPY_BYTES = 16 * 2**20
#: The kernel's names for what measures a processor: Intel's, AMD's, and that of small boards.
_THERMOMETERS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


class CpuDriver:
    """The opened processor. Stateless, so any number of threads may call it."""

    kind = "cpu"
    emulated = False
    stream = None

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.model = processor()

    def peaks(self) -> Peaks:
        """The whole processor's matmul rate, copy bandwidth and launch cost, best of a few runs (about 50 ms)."""
        square = np.ones((_MATMUL_SIZE, _MATMUL_SIZE), np.float32)
        product = np.empty_like(square)
        source = np.ones(_COPY_BYTES, np.uint8)
        target = np.empty_like(source)
        return Peaks(
            flops_per_s=2 * _MATMUL_SIZE**3 / best_s(lambda: np.matmul(square, square, out=product)),
            bytes_per_s=2 * _COPY_BYTES / best_s(lambda: np.copyto(target, source)),
            transfer_bytes_per_s=math.inf,
            transfer_latency_s=0.0,
            launch_s=best_s(self._launch),
        )

    def _launch(self) -> None:
        one = self.upload(np.ones((1, 1), np.float32))
        self.download(np.matmul(one, one))

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """A read-only, aligned, C-contiguous view; a copy only where the array is not so already.

        Arrays off the wire start at any byte. Every kernel sees one array type, so it compiles once.
        """
        flags = array.flags
        if flags.c_contiguous and flags.aligned and not flags.writeable:
            return array
        view = np.require(array, requirements=("C", "A")).view()
        view.flags.writeable = False
        return view

    def launch(self, run: Run, inputs: Inputs, context: Context) -> Outputs:
        """What the variant returns, which has finished by then."""
        return run(inputs, context)

    def download(self, value: Any) -> NDArray[Any]:
        """The output itself, as an array."""
        return np.asarray(value)

    def synchronize(self) -> None:
        """Returns at once: variants finish before they return."""

    def close(self) -> None:
        """Nothing to give back."""

    def state(self) -> DeviceState:
        """The hottest part of the processor, beside what it may not exceed, where the system tells both."""
        found = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
        known = [
            (each.current, each.critical) for chip in _THERMOMETERS for each in found.get(chip, ()) if each.critical
        ]
        if not known:
            return DeviceState()
        current, critical = max(known, key=lambda each: each[0] / each[1])
        return DeviceState(temperature_c=current, temperature_limit_c=critical)


def open_device(device: str, slots: int) -> CpuDriver:
    """The driver for `cpu` or any `cpu.<model>`. Call it before anything imports numba, which reads these once."""
    threads = max(1, cores() // slots)
    os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")
    os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
    # NumPy is loaded by now, so its BLAS no longer reads the environment; slots that each use every core fight for
    # them (a product of 6 ms took 32).
    threadpool_limits(threads, user_api="blas")
    return CpuDriver(slots)


def probe() -> Found:
    """The processor, which is always there."""
    return Found("cpu", True, f"{processor()}, {cores()} cores", None)
