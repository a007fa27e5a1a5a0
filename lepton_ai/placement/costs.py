"""The CostModel: what a job will cost a device, from the Work it asks for and from what was measured before.

First form: `run = fixed + slowness * bound`, where bound is the roofline max(flops / P, bytes / B) over the device's
announced peaks (Williams, Waterman and Patterson, "Roofline", CACM 52, 2009). Both numbers are learned for each
(kernel, device) by a Kalman filter over relative errors, their drift a random walk (Haykin, "Adaptive Filter Theory",
ch. 10): a job of 50 us weighs as much as one of 50 ms, and the newest launches more than the old. Transfer, which is
everything between message and device (decoding, upload, download, encoding), is learned in the same way over the bytes
of the arguments.

Tried and dropped: one factor alone (the fixed cost of small jobs went into it, and large ones were predicted a
hundredfold too slow); forgetting instead of the random walk (what no launch told of for a while blew up).
"""

from __future__ import annotations

import math

import msgspec

from lepton_ai.device import Peaks
from lepton_ai.event import Observation
from lepton_ai.job import Estimate
from lepton_ai.kernel import Work

__all__ = ["CostModel", "Line"]

#: Units in which both numbers are of the order of 1: 100 us of fixed cost, a tenth of the peak.
_FIXED_S, _SLOWNESS = 1e-4, 10.0
#: What decoding and encoding take where nothing was measured yet: about a gigabyte a second.
_CODEC_BYTES_PER_S = 1e9
#: Variance of a relative error that is no news; of the prior, in the units above; and of the drift from one launch to
#: the next, relative to the numbers themselves.
_NOISE, _PRIOR, _DRIFT = 0.05, 4.0, 0.002
#: A launch many times slower than predicted counts as one so many times slower: it may have been somebody else's fault.
_MOST = 10.0
#: A launch takes at least a hundredth of its bound: the peaks are measured, not theory.
_LEAST_SLOWNESS = 0.001
#: Rounding must not make a variance nought.
_CERTAIN = 1e-14
#: Weight of the newest launch in the spread.
_WEIGHT = 0.1
#: No launch is shorter or longer.
_SHORTEST_S, _LONGEST_S = 1e-9, 1e7


class Line(msgspec.Struct):
    """What was learned of one (kernel, device) from `n` launches: two numbers, their covariance, and the spread."""

    n: int = 0
    fixed: float = 0.0
    slowness: float = 1.0
    p00: float = _PRIOR
    p01: float = 0.0
    p11: float = _PRIOR
    variance: float = 0.0
    """Of log(measured / predicted), exponentially weighted."""

    def run_s(self, bound_s: float) -> float:
        """The predicted seconds of a launch with this bound."""
        return self.fixed * _FIXED_S + self.slowness * _SLOWNESS * bound_s

    def learn(self, bound_s: float, measured_s: float) -> None:
        """Folds in one launch."""
        expected_s = self.run_s(bound_s)
        if self.n > 0:
            error = math.log(measured_s / expected_s)
            self.variance += max(_WEIGHT, 1 / self.n) * (error * error - self.variance)
        self.n += 1
        x0, x1 = _FIXED_S / expected_s, _SLOWNESS * bound_s / expected_s
        miss = min(_MOST, measured_s / expected_s) - 1
        p00 = min(_PRIOR, self.p00 + _DRIFT * self.fixed**2)
        p11 = min(_PRIOR, self.p11 + _DRIFT * self.slowness**2)
        px0, px1 = p00 * x0 + self.p01 * x1, self.p01 * x0 + p11 * x1
        gain = 1 / (_NOISE + x0 * px0 + x1 * px1)
        self.fixed += gain * px0 * miss
        self.slowness += gain * px1 * miss
        self.p00 = max(_CERTAIN, p00 - gain * px0 * px0)
        self.p11 = max(_CERTAIN, p11 - gain * px1 * px1)
        limit = 0.999 * math.sqrt(self.p00 * self.p11)
        self.p01 = min(limit, max(-limit, self.p01 - gain * px0 * px1))
        self._stay_possible()

    def is_possible(self) -> bool:
        """Whether these are numbers that launches could have taught."""
        return (
            self.n > 0
            and 0 <= self.fixed < math.inf
            and _LEAST_SLOWNESS <= self.slowness < math.inf
            and 0 < self.p00 <= _PRIOR
            and 0 < self.p11 <= _PRIOR
            and abs(self.p01) <= _PRIOR
            and 0 <= self.variance < math.inf
        )

    def _stay_possible(self) -> None:
        """Neither number may be negative: one that is goes to its least, the other to what is likeliest given that."""
        if self.fixed < 0:
            self.slowness -= self.fixed * self.p01 / self.p00
            self.fixed = 0.0
        if self.slowness < _LEAST_SLOWNESS:
            self.fixed += (_LEAST_SLOWNESS - self.slowness) * self.p01 / self.p11
            self.slowness = _LEAST_SLOWNESS
            self.fixed = max(0.0, self.fixed)


class CostModel:
    """Predicts run and transfer time before a job, learns after it. Not shared between threads."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], Line] = {}
        self._transfers: dict[tuple[str, str], Line] = {}

    def predict(self, kernel: str, device: str, work: Work, peaks: Peaks, transfer_bytes: float) -> Estimate:
        """The estimate for one job that starts at once (`wait_s` is 0)."""
        run = self._runs.get((kernel, device)) or _first_run(peaks)
        transfer = self._transfers.get((kernel, device)) or _FIRST_TRANSFER
        return Estimate(
            0.0,
            transfer.run_s(_transfer_bound_s(transfer_bytes, peaks)),
            run.run_s(_bound_s(work, peaks)),
            math.sqrt(run.variance),
        )

    def launches(self, kernel: str, device: str) -> int:
        """How many launches of a kernel on a device were learned from."""
        return line.n if (line := self._runs.get((kernel, device))) is not None else 0

    def launch_s(self, kernel: str, device: str, peaks: Peaks) -> float:
        """What a launch takes however many jobs are in it."""
        return (self._runs.get((kernel, device)) or _first_run(peaks)).fixed * _FIXED_S

    def learn(self, seen: Observation, peaks: Peaks) -> None:
        """Folds in one launch. What is no time or no bound (nought, negative, absurd, not finite) is left out."""
        if seen.jobs < 1:
            return
        key = seen.kernel, seen.device
        bound_s = _bound_s(Work(seen.flops, seen.bytes), peaks)
        if _is_time(seen.run_s) and _is_time(bound_s):
            self._runs.setdefault(key, _first_run(peaks)).learn(bound_s, seen.run_s)
        # Per job: each has a message of its own, however many run in one launch.
        each_s, each_bytes = seen.transfer_s / seen.jobs, seen.transfer_bytes / seen.jobs
        bound_s = _transfer_bound_s(each_bytes, peaks)
        if _is_time(each_s) and _is_time(bound_s):
            line = self._transfers.setdefault(key, msgspec.structs.replace(_FIRST_TRANSFER))
            line.learn(bound_s, each_s)

    def snapshot(self) -> bytes:
        """What was learned as bytes, for another process or a later start."""
        return msgspec.msgpack.encode(
            [[(*key, line) for key, line in lines.items()] for lines in (self._runs, self._transfers)]
        )

    def restore(self, data: bytes | None) -> None:
        """Takes a snapshot over; what was learned since then is kept where it rests on more launches.

        A snapshot of another form, and what in it could not have been learned, is left out: learning starts anew.
        """
        try:
            found = msgspec.msgpack.decode(data or b"\x92\x90\x90", type=tuple[_Lines, _Lines])
        except msgspec.DecodeError:
            return
        for lines, learned in zip((self._runs, self._transfers), found, strict=True):
            for kernel, device, line in learned:
                have = lines.get((kernel, device))
                if line.is_possible() and (have is None or have.n < line.n):
                    lines[kernel, device] = line


_Lines = list[tuple[str, str, Line]]
_FIRST_TRANSFER = Line(slowness=1 / _SLOWNESS)


def _first_run(peaks: Peaks) -> Line:
    """What is expected before anything was measured: the announced launch, and a tenth of the peaks."""
    return Line(fixed=peaks.launch_s / _FIXED_S)


def _is_time(seconds: float) -> bool:
    return _SHORTEST_S <= seconds <= _LONGEST_S


def _transfer_bound_s(size_bytes: float, peaks: Peaks) -> float:
    link_s = peaks.transfer_latency_s + size_bytes / peaks.transfer_bytes_per_s
    return max(link_s + size_bytes / _CODEC_BYTES_PER_S, _SHORTEST_S)


def _bound_s(work: Work, peaks: Peaks) -> float:
    """The roofline bound in seconds, at least a nanosecond: a job of no work still has a cost to learn."""
    return max(work.flops / peaks.flops_per_s, work.bytes / peaks.bytes_per_s, _SHORTEST_S)
