"""The CostModel: what a job will cost a device, from the Work it asks for and from what was measured before.

First form: the roofline bound launch + max(flops / P, bytes / B) over the device's announced peaks (Williams, Waterman
and Patterson, "Roofline", CACM 52, 2009), times a factor that is learned for each (kernel, device): an exponentially
weighted mean of log(measured / bound), so that a factor of two too slow and one too fast weigh the same.
"""

from __future__ import annotations

import math

import msgspec

from lepton_ai.device import Peaks
from lepton_ai.event import Observation
from lepton_ai.job import Estimate
from lepton_ai.kernel import Work

__all__ = ["CostModel", "Factor"]

#: Weight of the newest observation once there are several; the first ones are averaged plainly.
_WEIGHT = 0.1
#: A variant reaches this share of the peaks before anything is known of it.
_FIRST_SHARE = 0.1


class Factor(msgspec.Struct):
    """What was learned of one (kernel, device): mean and variance of log(measured / bound), from `n` launches."""

    n: int = 0
    mean: float = -math.log(_FIRST_SHARE)
    variance: float = 0.0

    def learn(self, value: float) -> None:
        """Folds in one value; the prior counts for nothing once there is a measurement."""
        self.n += 1
        weight = max(_WEIGHT, 1 / self.n)
        step = value - self.mean
        self.mean += weight * step
        self.variance = 0.0 if self.n == 1 else (1 - weight) * (self.variance + weight * step * step)


class CostModel:
    """Predicts run and transfer time before a job, learns after it. Not shared between threads."""

    def __init__(self) -> None:
        self._factors: dict[tuple[str, str], Factor] = {}

    def predict(self, kernel: str, device: str, work: Work, peaks: Peaks, transfer_bytes: float) -> Estimate:
        """The estimate for one job that starts at once (`wait_s` is 0)."""
        factor = self._factors.get((kernel, device)) or Factor()
        run_s = peaks.launch_s + _bound_s(work, peaks) * math.exp(factor.mean)
        transfer_s = peaks.transfer_latency_s + transfer_bytes / peaks.transfer_bytes_per_s
        return Estimate(0.0, transfer_s, run_s, math.sqrt(factor.variance))

    def learn(self, seen: Observation, peaks: Peaks) -> None:
        """Folds in one launch. Times or Work that are none (nought, negative, not finite) are left out."""
        bound_s = _bound_s(Work(seen.flops, seen.bytes), peaks)
        measured_s = seen.run_s - peaks.launch_s
        if measured_s <= 0:
            measured_s = seen.run_s / 2  # the launch alone was measured faster than it was announced
        factor = measured_s / bound_s
        if not 0 < factor < math.inf:
            return
        self._factors.setdefault((seen.kernel, seen.device), Factor()).learn(math.log(factor))

    def snapshot(self) -> bytes:
        """The learned factors as bytes, for another process or a later start."""
        return msgspec.msgpack.encode([(*key, factor) for key, factor in self._factors.items()])

    def restore(self, data: bytes) -> None:
        """Takes a snapshot's factors; what was learned since then is kept where it rests on more launches."""
        for kernel, device, factor in msgspec.msgpack.decode(data, type=list[tuple[str, str, Factor]]):
            have = self._factors.get((kernel, device))
            if have is None or have.n < factor.n:
                self._factors[kernel, device] = factor


def _bound_s(work: Work, peaks: Peaks) -> float:
    """The roofline bound in seconds, at least a nanosecond: a job of no work still has a cost to learn."""
    return max(work.flops / peaks.flops_per_s, work.bytes / peaks.bytes_per_s, 1e-9)
