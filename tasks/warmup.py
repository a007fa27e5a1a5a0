"""From the catalogue to what this worker serves: each variant built, compiled, and found equal to its reference."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import structlog

from lepton_ai.errors import InvalidKernel
from lepton_ai.kernel import Kernel, Outputs, Run
from tasks.driver import Driver

__all__ = ["IdleContext", "Repertoire", "difference", "launch", "warm"]

log = structlog.get_logger()


class IdleContext:
    """The Context of a run that nobody waits for: warm-up, conformance, benches."""

    cancelled = False
    deadline = None
    stream = None

    def progress(self, fraction: float) -> None:
        """Nobody listens."""


class Repertoire(msgspec.Struct, frozen=True):
    """What a worker can run, and what it refuses with the reason."""

    kernels: dict[str, Kernel]
    runs: dict[str, Run]
    refused: dict[str, str]


def warm(kernels: Iterable[Kernel], driver: Driver, refused: dict[str, str]) -> Repertoire:
    """Builds and compiles every variant for the driver's kind and runs it on the kernel's own samples.

    A kernel that raises, or whose variant differs from its reference by more than its tolerance, is refused; the
    others serve.
    """
    found = Repertoire({}, {}, dict(refused))
    for name, reason in refused.items():
        log.error("kernel_refused", kernel=name, reason=reason)
    for kernel in kernels:
        if driver.kind not in kernel.kinds:
            continue
        start = time.perf_counter()
        try:
            found.runs[kernel.name] = _built(kernel, driver)
        # Not even by sys.exit(): a broken kernel must not take the others with it.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            found.refused[kernel.name] = f"{type(error).__name__}: {error}"
            log.error("kernel_refused", kernel=kernel.name, reason=found.refused[kernel.name])
            continue
        found.kernels[kernel.name] = kernel
        log.info("kernel_warm", kernel=kernel.name, seconds=round(time.perf_counter() - start, 3))
    return found


def launch(run: Run, inputs: dict[str, Any], driver: Driver, context: Any) -> dict[str, np.ndarray[Any, Any]]:
    """One launch from host arrays to host arrays."""
    uploaded = {
        name: driver.upload(value) if isinstance(value, np.ndarray) else value for name, value in inputs.items()
    }
    outputs = driver.launch(run, uploaded, context)
    return {name: driver.download(value) for name, value in outputs.items()}


def difference(found: Outputs, expected: Outputs) -> float:
    """The largest difference of two sets of outputs, relative to the larger of 1 and what was expected.

    Infinite where names, shapes or the places of NaN and infinity differ.
    """
    if found.keys() != expected.keys():
        return np.inf
    worst = 0.0
    for name, value in expected.items():
        a, b = np.asarray(found[name]), np.asarray(value)
        if a.shape != b.shape:
            return np.inf
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
            return np.inf
        if finite.any():
            a, b = a[finite], b[finite]
            with np.errstate(over="ignore"):
                worst = max(worst, float((np.abs(a - b) / np.maximum(1.0, np.abs(b))).max()))
    return worst


def _built(kernel: Kernel, driver: Driver) -> Run:
    run = kernel.build(driver.kind, driver)
    for number, sample in enumerate(kernel.sample_inputs()):
        found = launch(run, sample, driver, IdleContext())
        apart = difference(found, kernel.refer(sample))
        if apart > kernel.spec.tolerance:
            raise InvalidKernel(
                f"its {driver.kind} variant differs from its reference by {apart:.3g} on sample {number}, "
                f"the tolerance is {kernel.spec.tolerance:g}"
            )
    return run
