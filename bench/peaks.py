"""What one thread of this machine can do at best, and what each driver says of its device: the roofs of the rooflines.

Copies are of 128 MiB from one array to another, far beyond the caches, and count what is read and what is written. The
copy of the C library writes past the caches; a kernel's plain stores read each line first, which these figures do not
count. Products are of 1,024 by 1,024 matrices by NumPy's BLAS. All are the best of a few runs, as a roof should be.
"""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
import numpy as np

from lepton_ai.device import Peaks
from lepton_ai.kernel import Kernel, Work
from tasks.driver import Driver

__all__ = ["Copy", "Roof", "float_type", "roof_of"]

_COPY_BYTES = 128 * 2**20
_SIDE = 1024
_SHARE_OF_DOUBLES = 0.5


class Roof(msgspec.Struct, frozen=True):
    """What a device can do at best."""

    bytes_per_s: float
    """Read and written."""
    float32_flops_per_s: float
    float64_flops_per_s: float
    how: str

    def fraction(self, work: Work, dtype: str, seconds: float) -> float:
        """The least time that this work could take, over what it took; above 1 where its bytes fit the caches."""
        flops_per_s = self.float64_flops_per_s if dtype == "float64" else self.float32_flops_per_s
        return max(work.flops / flops_per_s, work.bytes / self.bytes_per_s) / seconds


class Copy:
    """A copy in memory, to be timed beside a kernel that streams."""

    BYTES = 2 * _COPY_BYTES
    """Read and written."""

    def __init__(self) -> None:
        self._source = np.ones(_COPY_BYTES, np.uint8)
        self._target = np.ones(_COPY_BYTES, np.uint8)

    def once(self) -> float:
        start = time.perf_counter()
        np.copyto(self._target, self._source)
        return time.perf_counter() - start


def roof_of(driver: Driver, runs: int) -> Roof:
    """Of the processor one thread's, the best of so many runs; of another device what its driver measures."""
    if driver.kind == "cpu":
        copy = Copy()
        return Roof(
            Copy.BYTES / min(copy.once() for _ in range(runs)),
            _flops_per_s(np.float32, runs),
            _flops_per_s(np.float64, runs),
            "one thread: sgemm and dgemm of BLAS, copies of 128 MiB, read and written",
        )
    peaks: Peaks = driver.peaks()
    how = "the driver's own peaks; double precision taken to be half as fast"
    return Roof(peaks.bytes_per_s, peaks.flops_per_s, peaks.flops_per_s * _SHARE_OF_DOUBLES, how)


def float_type(kernel: Kernel) -> str:
    """`float64` where the kernel computes in it, as its arrays tell; else `float32`, whole numbers too."""
    arguments = [*kernel.signature.inputs.values(), *kernel.signature.outputs.values()]
    return "float64" if any(each.dtype == "float64" and each.dims is not None for each in arguments) else "float32"


def _flops_per_s(dtype: Any, runs: int) -> float:
    square = np.ones((_SIDE, _SIDE), dtype)
    product = np.empty_like(square)
    shortest_s = math.inf
    for _ in range(runs):
        start = time.perf_counter()
        np.matmul(square, square, out=product)
        shortest_s = min(shortest_s, time.perf_counter() - start)
    return 2 * _SIDE**3 / shortest_s
