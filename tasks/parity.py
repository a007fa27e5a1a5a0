"""Parity: a share of the jobs is computed a second time in the background, by another variant or the reference.

It must never be felt: one thread, niced where the system lets a thread be; one job in hand, and whatever else is drawn
meanwhile is passed over; nothing large is copied and nothing long is computed. What an accelerator computed is compared
with the kernel's cpu variant, and where they differ the reference says which of them is wrong. What a cpu computed is
compared with the reference. A difference counts only where it is far beyond what rounding does to this job's inputs.
"""

from __future__ import annotations

import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import msgspec
import numpy as np
import structlog

from lepton_ai.device import Peaks
from lepton_ai.kernel import Kernel, Outputs, Run, Work
from lepton_ai.quarantine import Quarantined
from lepton_ai.settings import Settings
from tasks.batching import TakenJob
from tasks.devices.cpu import CpuDriver
from tasks.warmup import IdleContext, build, difference, launch

__all__ = ["Check", "Parity"]

#: The longest that a cpu variant is predicted to run for a job that is compared.
_VARIANT_S: Final = 1.0
#: And a reference, which is clear and not fast: ten times as long is taken for granted.
_REFERENCE_S: Final = 0.1
_NICE: Final = 10
#: How much further than rounding explains, as the largest of so many trials shows it, a variant that is wrong is away.
_CLEAR: Final = 16.0
_TRIALS: Final = 3

log = structlog.get_logger()


class Check(msgspec.Struct, frozen=True):
    """A job that was computed, with copies of what went in and came out."""

    job: str
    kernel: Kernel
    inputs: dict[str, Any]
    outputs: dict[str, np.ndarray[Any, Any]]
    work: Work


class Parity:
    """Compares what a worker computes. `found` is told of a variant that differs by more than its tolerance."""

    def __init__(
        self,
        settings: Settings,
        device: str,
        kind: str,
        peaks: Peaks,
        found: Callable[[Quarantined], object],
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.compared = 0
        """How many jobs have been compared, or could not be."""
        self._share = settings.parity_share
        self._most_bytes = settings.parity_bytes
        self._device = device
        self._kind = kind
        self._peaks = peaks if kind == "cpu" else None
        self._found = found
        self._chance = chance
        self._runs: dict[str, Run] = {}
        self._cpu = CpuDriver(1)
        self._check: Check | None = None
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="parity", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What it is at is left as it is."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def draws(self, job: TakenJob) -> bool:
        """Whether a job is to be compared: asked for every one that succeeds, so the draw comes first."""
        if self._chance() >= self._share or self._check is not None or not job.kernel.parity:
            return False
        # What a job of a state key was given by the one before it is not among its own inputs.
        return job.options.state_key is None and self._is_short(job.work)

    def copied(self, job: TakenJob, outputs: Mapping[str, np.ndarray[Any, Any]]) -> Check | None:
        """A job with copies of its arrays; None where they are too large."""
        arrays = [each for each in (*job.inputs.values(), *outputs.values()) if isinstance(each, np.ndarray)]
        if sum(each.nbytes for each in arrays) > self._most_bytes:
            return None
        inputs = {name: _copy(value) for name, value in job.inputs.items()}
        return Check(job.id, job.kernel, inputs, {name: _copy(value) for name, value in outputs.items()}, job.work)

    def offer(self, check: Check) -> bool:
        """Compares it later; False where another is in hand."""
        with self._changed:
            if self._check is not None or self._stopping:
                return False
            self._check = check
            self._changed.notify_all()
            return True

    # -- in the background --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        _be_nice()
        if self._peaks is None:
            self._peaks = self._cpu.peaks()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._check is not None or self._stopping)
                if self._stopping or self._check is None:
                    return
                check = self._check
            try:
                for each in self._compare(check):
                    log.error("variant_differs", kernel=each.kernel, device=each.device, reason=each.reason)
                    self._found(each)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - of the second opinion, which says nothing then
                log.warning("job_not_compared", job=check.job, kernel=check.kernel.name, reason=repr(error)[:300])
            with self._changed:
                self._check = None
                self.compared += 1
                self._changed.notify_all()

    def _compare(self, check: Check) -> list[Quarantined]:
        """The variants that a job shows to be wrong."""
        kernel = check.kernel
        if self._kind == "cpu" or "cpu" not in kernel.kinds:
            expected = kernel.refer(check.inputs)
            return self._verdict(check, self._device, check.outputs, expected, kernel.refer, "the reference")

        def compute(inputs: Mapping[str, Any]) -> Outputs:
            return launch(self._cpu_run(kernel), dict(inputs), self._cpu, IdleContext())

        second = compute(check.inputs)
        if _apart(kernel, check.outputs, second) <= kernel.spec.tolerance:
            return []
        if self._seconds(check.work) > _REFERENCE_S:
            told = "the cpu variant; the reference takes too long to say which is wrong, so this is a precaution"
            return self._verdict(check, self._device, check.outputs, second, compute, told)
        expected = kernel.refer(check.inputs)
        ours = self._verdict(check, self._device, check.outputs, expected, kernel.refer, "the reference")
        return [*ours, *self._verdict(check, "cpu", second, expected, kernel.refer, "the reference")]

    @staticmethod
    def _verdict(
        check: Check,
        device: str,
        found: Outputs,
        expected: Outputs,
        compute: Callable[[Mapping[str, Any]], Outputs],
        against: str,
    ) -> list[Quarantined]:
        """What is to be said of a variant that found something else than `compute` does."""
        tolerance = check.kernel.spec.tolerance
        apart = _apart(check.kernel, found, expected)
        if apart <= tolerance:
            return []
        doubt = _doubt(check, expected, compute)
        if not apart > _CLEAR * doubt:  # also where both are infinite
            log.info("variant_in_doubt", kernel=check.kernel.name, device=device, difference=apart, doubt=doubt)
            return []
        told = f"it differs by {apart:.3g} (tolerance {tolerance:g}) from {against}, in job {check.job}"
        shapes = {name: list(value.shape) for name, value in check.inputs.items() if isinstance(value, np.ndarray)}
        at = time.time()
        return [Quarantined(check.kernel.name, device, told, apart, tolerance, "", check.job, shapes, at)]

    def _is_short(self, work: Work) -> bool:
        most_s = _REFERENCE_S if self._kind == "cpu" else _VARIANT_S
        return self._seconds(work) <= most_s

    def _seconds(self, work: Work) -> float:
        """How long one thread of a cpu needs at least; infinite while that has not been measured."""
        peaks = self._peaks
        return math.inf if peaks is None else work.flops / peaks.flops_per_s + work.bytes / peaks.bytes_per_s

    def _cpu_run(self, kernel: Kernel) -> Run:
        if (run := self._runs.get(kernel.name)) is None:
            run = self._runs[kernel.name] = build(kernel, self._cpu)
        return run


def _apart(kernel: Kernel, found: Outputs, expected: Outputs) -> float:
    """How far two variants are apart, in the outputs that must agree."""
    return difference(*({name: each[name] for name in kernel.parity if name in each} for each in (found, expected)))


def _doubt(check: Check, expected: Outputs, compute: Callable[[Mapping[str, Any]], Outputs]) -> float:
    """How far the outputs move where inputs move by their last bits: so much no variant can be blamed for.

    Sums that nearly cancel, values that nearly tie, and thresholds that are nearly met.
    """
    random = np.random.default_rng(0)
    worst = 0.0
    for _ in range(_TRIALS):
        moved = {name: _moved(value, random) for name, value in check.inputs.items()}
        worst = max(worst, _apart(check.kernel, compute(moved), expected))
    return worst


def _moved(value: Any, random: np.random.Generator) -> Any:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        return value
    with np.errstate(all="ignore"):
        return (value * (1 + 2 * np.finfo(value.dtype).eps * random.uniform(-1, 1, value.shape))).astype(value.dtype)


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


def _be_nice() -> None:
    """Linux gives every thread a niceness of its own; elsewhere it would be the whole process's."""
    if sys.platform.startswith("linux"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
