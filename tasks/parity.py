"""Parity: a share of the jobs is computed a second time in the background, by another variant or the reference.

It must never be felt: one thread, niced where the system lets a thread be; one job in hand, and whatever else is drawn
meanwhile is passed over; nothing large is copied and nothing long is computed. What an accelerator computed is compared
with the kernel's cpu variant, and where they differ the reference says which of them is wrong. What a cpu computed is
compared with the reference. A difference counts only where it is far beyond its tolerance and beyond what rounding does
to this job's inputs and to the operations behind its outputs, and only numbers of ordinary size are compared. One
difference is a suspicion: the next jobs of that kernel are compared too, until one shows no fault or three in a row do.
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
#: And than its tolerance: a trial moves what is given, and not what a variant in float32 rounds inside of a system of
#: equations that is nearly singular (recommend.als_step, 64 factors, confidences up to 1e4: 13 tolerances).
_CLEAR: Final = 16.0
_TRIALS: Final = 3
#: So many jobs in a row must differ before a variant is wrong.
_JOBS: Final = 3
#: Above this, and below one by it, products of numbers overflow or vanish, in one order of the operations or another.
_LARGEST: Final = {"float64": 1e150}
_LARGEST_NARROW: Final = 1e15

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
        self._suspicions: dict[tuple[str, str], tuple[str, ...]] = {}
        """The jobs that differed in a row, by kernel and device. Of the thread's alone."""
        self._suspected: frozenset[str] = frozenset()
        """Their kernels. Replaced as a whole: it is read from every slot's thread."""
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
        if self._chance() >= self._share and job.kernel.name not in self._suspected:
            return False
        if self._check is not None or not job.kernel.parity:
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
                for device, found in self._compare(check).items():
                    self._weigh(check, device, found)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - of the second opinion, which says nothing then
                log.warning("job_not_compared", job=check.job, kernel=check.kernel.name, reason=repr(error)[:300])
            with self._changed:
                self._check = None
                self.compared += 1
                self._changed.notify_all()

    def _weigh(self, check: Check, device: str, found: Quarantined | None) -> None:
        """What a comparison adds to a suspicion, or that it ends it."""
        kernel = check.kernel.name
        before = self._suspicions.pop((kernel, device), ())
        jobs = before if found is None or check.job in before else (*before, check.job)
        is_wrong = len(jobs) >= _JOBS
        if found is not None and not is_wrong:
            self._suspicions[kernel, device] = jobs
        self._suspected = frozenset(name for name, _ in self._suspicions)
        if found is None:
            return
        if is_wrong:
            log.error("variant_differs", kernel=kernel, device=device, reason=found.reason, jobs=jobs)
            self._found(found)
        elif jobs != before:
            log.warning("variant_suspected", kernel=kernel, device=device, reason=found.reason, jobs=jobs)

    def _compare(self, check: Check) -> dict[str, Quarantined | None]:
        """How the variant of each device differs, None where it does not; without those of which a job says nothing."""
        kernel = check.kernel
        if not _is_ordinary(check):
            log.info("job_not_compared", job=check.job, kernel=kernel.name, reason="its numbers are too large or small")
            return {}
        if self._kind == "cpu" or "cpu" not in kernel.kinds:
            expected = kernel.refer(check.inputs)
            told = "the reference"
            return {self._device: _verdict(check, self._device, check.outputs, expected, kernel.refer, told)}

        def compute(inputs: Mapping[str, Any]) -> Outputs:
            return launch(self._cpu_run(kernel), dict(inputs), self._cpu, IdleContext())

        second = compute(check.inputs)
        if _apart(kernel, check.outputs, second) <= kernel.spec.tolerance:
            return {self._device: None, "cpu": None}
        if self._seconds(check.work) > _REFERENCE_S:
            told = "the cpu variant; the reference takes too long to say which is wrong, so this is a precaution"
            return {self._device: _verdict(check, self._device, check.outputs, second, compute, told)}
        expected = kernel.refer(check.inputs)
        return {
            device: _verdict(check, device, found, expected, kernel.refer, "the reference")
            for device, found in ((self._device, check.outputs), ("cpu", second))
        }

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


def _verdict(
    check: Check,
    device: str,
    found: Outputs,
    expected: Outputs,
    compute: Callable[[Mapping[str, Any]], Outputs],
    against: str,
) -> Quarantined | None:
    """What is to be said of a variant that found something else than `compute` does; None where that is no fault."""
    tolerance = check.kernel.spec.tolerance
    apart = _apart(check.kernel, found, expected)
    if apart <= tolerance:
        return None
    doubt = _doubt(check, expected, compute)
    if not apart > _CLEAR * max(doubt, tolerance):  # also where both are infinite
        log.info("variant_in_doubt", kernel=check.kernel.name, device=device, difference=apart, doubt=doubt)
        return None
    told = f"it differs by {apart:.3g} (tolerance {tolerance:g}) from {against}, in job {check.job}"
    shapes = {name: list(value.shape) for name, value in check.inputs.items() if isinstance(value, np.ndarray)}
    return Quarantined(check.kernel.name, device, told, apart, tolerance, "", check.job, shapes, time.time())


def _apart(kernel: Kernel, found: Outputs, expected: Outputs) -> float:
    """How far two variants are apart, in the outputs that must agree."""
    return difference(*({name: each[name] for name in kernel.parity if name in each} for each in (found, expected)))


def _doubt(check: Check, expected: Outputs, compute: Callable[[Mapping[str, Any]], Outputs]) -> float:
    """How far rounding may move the outputs: so much no variant can be blamed for.

    As far as they move where inputs move by their last bits (sums that nearly cancel, values that nearly tie,
    thresholds that are nearly met), by the root of how many operations are behind an output number, as each rounds.
    """
    random = np.random.default_rng(0)
    worst = 0.0
    for _ in range(_TRIALS):
        moved = {name: _moved(value, random) for name, value in check.inputs.items()}
        worst = max(worst, _apart(check.kernel, compute(moved), expected))
    if worst == 0 and any(argument.dtype.startswith("float") for argument in check.kernel.signature.inputs.values()):
        worst = _coarsest(check)
    numbers = sum(value.size for value in check.outputs.values())
    return worst * math.sqrt(max(1.0, check.work.flops / max(1, numbers)))


def _coarsest(check: Check) -> float:
    """The last bit of 1 in the least exact of a job's floating-point numbers."""
    signature = check.kernel.signature
    arguments = (*signature.inputs.values(), *signature.outputs.values())
    return max(float(np.finfo(each.dtype).eps) for each in arguments if each.dtype.startswith("float"))


def _is_ordinary(check: Check) -> bool:
    """Whether products of the inputs neither overflow nor vanish, which hangs on the order of the operations."""
    for name, argument in check.kernel.signature.inputs.items():
        if name not in check.inputs or not argument.dtype.startswith("float"):
            continue
        sizes = np.abs(np.asarray(check.inputs[name]))
        sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
        largest = _LARGEST.get(argument.dtype, _LARGEST_NARROW)
        if sizes.size and not 1 / largest <= float(sizes.min()) <= float(sizes.max()) <= largest:
            return False
    return True


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
