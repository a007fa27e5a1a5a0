"""From the catalogue to what this worker serves: each variant built, compiled, and found equal to its reference."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np
import structlog

from lepton_ai.errors import DeviceLost, InvalidKernel
from lepton_ai.kernel import Kernel, Outputs, Run
from lepton_ai.signature import Dims, Signature
from tasks.caches import Lock, choose, compiling, lock_of
from tasks.driver import Driver

__all__ = ["IdleContext", "Repertoire", "build", "difference", "launch", "warm"]

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
    others serve. What another process compiles at this moment comes last: by then it is in the cache.
    """
    found = Repertoire({}, {}, dict(refused))
    for name, reason in refused.items():
        log.error("kernel_refused", kernel=name, reason=reason)
    wanted = [kernel for kernel in kernels if driver.kind in kernel.kinds]
    sources = {kernel.name: kernel.source(driver.kind) for kernel in wanted}
    choose(each for each in sources.values() if each is not None)
    locks = [(kernel, lock_of(kernel.name, driver.kind, sources[kernel.name])) for kernel in wanted]
    later = [(kernel, lock) for kernel, lock in locks if not _warm_one(kernel, driver, lock, found, wait=False)]
    for kernel, lock in later:
        _warm_one(kernel, driver, lock, found, wait=True)
    order = [kernel.name for kernel in wanted if kernel.name in found.runs]
    return Repertoire({name: found.kernels[name] for name in order}, found.runs, found.refused)


def _warm_one(kernel: Kernel, driver: Driver, lock: Lock, found: Repertoire, *, wait: bool) -> bool:
    """Adds a kernel to what was found; False where another process compiles it."""
    start = time.perf_counter()
    if not lock.take(wait=wait):
        return False
    try:
        found.runs[kernel.name] = _built(kernel, driver)
        found.kernels[kernel.name] = kernel
        log.info("kernel_warm", kernel=kernel.name, seconds=round(time.perf_counter() - start, 3))
    except DeviceLost:  # there is nothing to serve with, and it is no kernel's fault
        raise
    # Not even by sys.exit(): a broken kernel must not take the others with it.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        found.refused[kernel.name] = f"{type(error).__name__}: {error}"
        log.error("kernel_refused", kernel=kernel.name, reason=found.refused[kernel.name])
    finally:
        lock.give()
    return True


def build(kernel: Kernel, driver: Driver) -> Run:
    """One variant, built, compiled and found equal to its reference. Raises what a broken one raises."""
    with compiling(lock_of(kernel.name, driver.kind, kernel.source(driver.kind))):
        return _built(kernel, driver)


def launch(run: Run, inputs: dict[str, Any], driver: Driver, context: Any) -> dict[str, np.ndarray[Any, Any]]:
    """One launch from host arrays to host arrays."""
    uploaded = {
        name: driver.upload(value) if isinstance(value, np.ndarray) else value for name, value in inputs.items()
    }
    outputs = driver.launch(run, uploaded, context)
    return {name: driver.download(value) for name, value in outputs.items()}


def difference(found: Outputs, expected: Outputs) -> float:
    """The largest difference of two sets of outputs, relative to the larger of 1 and what was expected.

    Infinite where names, dtypes, shapes or the places of NaN and infinity differ.
    """
    if found.keys() != expected.keys():
        return np.inf
    worst = 0.0
    for name, value in expected.items():
        a, b = np.asarray(found[name]), np.asarray(value)
        if a.shape != b.shape or a.dtype != b.dtype:
            return np.inf
        if a.dtype.kind in "iu":  # the largest are not all different as floats
            apart = np.where(a > b, a - b, b - a).astype(f"u{a.dtype.itemsize}", copy=False).astype(np.float64)
            b = b.astype(np.float64)
        else:
            a, b = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(b)
            if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
                return np.inf
            with np.errstate(over="ignore"):
                b = b[finite]
                apart = np.abs(a[finite] - b)
        if apart.size:
            worst = max(worst, float((apart / np.maximum(1.0, np.abs(b))).max()))
    return worst


def _built(kernel: Kernel, driver: Driver) -> Run:
    signature, kind = kernel.signature, driver.kind
    run = kernel.build(kind, driver)
    samples = kernel.sample_dims()
    if not samples:
        raise InvalidKernel(f"its samples are none: nobody can tell that its {kind} variant is right")
    for number, (sample, dims) in enumerate(samples):
        expected, found = kernel.refer(sample), launch(run, sample, driver, IdleContext())
        _check(signature, expected, dims, f"its reference, on sample {number},")
        _check(signature, found, dims, f"its {kind} variant, on sample {number},")
        apart = difference(found, expected)
        if apart > kernel.spec.tolerance:
            raise InvalidKernel(
                f"its {kind} variant differs from its reference by {apart:.3g} on sample {number}, "
                f"the tolerance is {kernel.spec.tolerance:g}"
            )
    return run


def _check(signature: Signature, outputs: Outputs, dims: Dims, who: str) -> None:
    try:
        signature.check_outputs(outputs, dims)
    except InvalidKernel as error:
        raise InvalidKernel(f"{who} {error.message}", error.field) from None
