"""The rows of `bench kernels` of one kernel: everybody checked at the small size, then timed in turns at each size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from bench.baselines import baseline_of
from bench.contest import say
from bench.contestants import Contestant, OnDevice, OnHost, Pace, Rounds, digits, grown_s, play
from bench.peaks import Copy, Roof, float_type
from lepton_ai.kernel import Kernel, Run, Work
from tasks.driver import Driver
from tasks.warmup import IdleContext, difference, launch

__all__ = ["KernelBench"]

#: An expression that is so much slower than the fastest, called once, is not called again.
_SLOWER = 3.0
#: What a first call may take without being taken for the kernel's own speed: it may have compiled.
_COMPILES_S = 5.0
#: The contestant that copies, beside kernels that stream.
_COPY = "copy"
#: Before the name of an expression, so that none is taken for a device.
_BY = "by "


class KernelBench:
    """One kernel on all devices, to be measured at one size after the other, the smallest first.

    What fails, or gives other results, is told in `problems` and left out; the rest is measured.
    """

    def __init__(self, kernel: Kernel, drivers: Mapping[str, Driver], pace: Pace, problems: list[str]) -> None:
        say(f"{kernel.name}: building")
        self._kernel = kernel
        self._drivers = drivers
        self._pace = pace
        self._problems = problems
        self._known: dict[str, tuple[Work, float]] = {}
        """What a call of each contestant took at the last size."""
        self.variants: dict[str, Run] = {}
        self.baseline = baseline_of(kernel)
        threadpool_limits(1, user_api="blas")  # that of SciPy too, which the entry may just have loaded
        for kind, driver in drivers.items():
            if kind in kernel.kinds:
                try:
                    self.variants[kind] = kernel.build(kind, driver)
                except Exception as error:  # noqa: BLE001 - told, and the others are measured
                    self._problem(f"on {kind}", error)
        self._expressions = {f"{_BY}{name}": each for name, each in self.baseline.expressions.items()}
        self._check()

    def _problem(self, who: str, error: Exception) -> None:
        told = f"{self._kernel.name} {who}: {type(error).__name__}: {error}"
        self._problems.append(told)
        say(f"PROBLEM {told}")

    def _check(self) -> None:
        """Runs everybody at the small size; who raises, or differs from the first device, is out from then on."""
        given = self.baseline.inputs("small")
        bound = self._kernel.signature.bind(given)[0]
        expected: Mapping[str, Any] | None = None
        for kind in list(self.variants):
            try:
                found = launch(self.variants[kind], bound, self._drivers[kind], IdleContext())
                self._compare(found, expected if expected is not None else found)
                expected = expected if expected is not None else found
            except Exception as error:  # noqa: BLE001 - told, and the others are measured
                del self.variants[kind]
                self._problem(f"on {kind}", error)
        for name in list(self._expressions):
            try:
                outputs = self._expressions[name](**given)
                if self.baseline.agrees and expected is not None:
                    self._compare(self._as_declared(outputs), expected)
            except Exception as error:  # noqa: BLE001 - told, and the others are measured
                del self._expressions[name]
                self._problem(name, error)

    def _as_declared(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """An expression's outputs in the kernel's dtypes: NumPy's own may be others, which is no fault."""
        declared = self._kernel.signature.outputs
        return {
            name: np.asarray(value, declared[name].dtype if name in declared else None)
            for name, value in outputs.items()
        }

    def _compare(self, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        apart, tolerance = difference(found, expected), self._kernel.spec.tolerance
        if not apart <= tolerance:
            raise ValueError(
                f"its results are {apart:.3g} apart from the first device's, the tolerance is {tolerance:g}"
            )

    def rows(self, size: str, roofs: Mapping[str, Roof]) -> Iterator[dict[str, Any]]:
        """A row a device, told as it is measured."""
        given = self.baseline.inputs(size)
        bound, dims = self._kernel.signature.bind(given)
        work = self._kernel.spec.work(dims)
        devices = {kind: OnDevice(self._drivers[kind], run, bound) for kind, run in self.variants.items()}
        hosts = {name: OnHost(expression, given) for name, expression in self._expressions.items()}
        able: dict[str, Contestant] = {**devices, **hosts}
        warm_s, left_out = self._warmed(able, size, work)
        quickest_s = min((warm_s[name] for name in self._expressions if name in warm_s), default=math.inf)
        playing = {name: able[name] for name in warm_s if name in self.variants or warm_s[name] <= _SLOWER * quickest_s}
        if self.baseline.bound == "memory" and size == "large":
            playing[_COPY] = copy = Copy()
            warm_s[_COPY] = copy.once()
        rounds = play(playing, warm_s, self._pace)
        of_numpy = {
            name: rounds[name].median if name in rounds else warm_s[name]
            for name in self._expressions
            if name in warm_s
        }
        best = min((name for name in of_numpy if name in rounds), key=lambda name: of_numpy[name], default=None)
        for kind in self.variants:
            row = {"kernel": self._kernel.name, "device": kind, "size": size, "emulated": self._drivers[kind].emulated}
            if kind in rounds:
                row |= _figures(kind, rounds, best)
                fraction = roofs[kind].fraction(work, float_type(self._kernel), rounds[kind].median)
                row |= {"roofline_fraction": digits(fraction), "bound": self.baseline.bound}
                row["transfer_seconds"] = digits(statistics.median(devices[kind].transfers_s))
                row["expressions"] = {name.removeprefix(_BY): digits(each) for name, each in of_numpy.items()}
                if absent := {name.removeprefix(_BY): left_out[name] for name in self._expressions if name in left_out}:
                    row["expressions_left_out"] = absent
                if _COPY in rounds and kind == "cpu":
                    # Copies of the same rounds: the peaks at the start were measured at another time.
                    share = rounds[_COPY].over(rounds[kind]).median * work.bytes / Copy.BYTES
                    row["bandwidth_fraction"] = digits(share)
            elif kind in left_out:
                row["left_out"] = left_out[kind]
            else:
                continue
            say(f"{self._kernel.name} {size} on {kind}: {_told(row)}")
            yield row

    def _warmed(self, able: Mapping[str, Contestant], size: str, work: Work) -> tuple[dict[str, float], dict[str, str]]:
        """What a call takes of each, by the better of two where it is not long; and who is left out, and why."""
        warm_s: dict[str, float] = {}
        left_out: dict[str, str] = {}
        pace = self._pace
        for name, contestant in able.items():
            if name in self._known:
                before, seconds = self._known[name]
                is_emulator = name in self._drivers and self._drivers[name].emulated
                if (due_s := grown_s(seconds, before, work)) > (pace.limit_s if is_emulator else pace.longest_s):
                    left_out[name] = (
                        f"left out: would take {due_s:,.0f} s" if due_s > 10 else f"left out: would take {due_s:.1f} s"
                    )
                    continue
            try:
                seconds = contestant.once()
                if seconds < max(pace.limit_s / 2, _COMPILES_S):
                    seconds = min(seconds, contestant.once())
            except Exception as error:  # noqa: BLE001 - told, and the others are measured
                self._problem(f"{name if name.startswith(_BY) else f'on {name}'}, {size}", error)
                continue
            self._known[name] = work, seconds
            warm_s[name] = seconds
        return warm_s, left_out


def _figures(kind: str, rounds: Mapping[str, Rounds], best: str | None) -> dict[str, Any]:
    """What a device took, beside the best expression and the CPU's variant."""
    own, cpu = rounds[kind], rounds.get("cpu")
    found: dict[str, Any] = {
        "seconds": digits(own.median),
        "seconds_range": own.range,
        "rounds": len(own.values),
        "numpy_seconds": None,
        "numpy_seconds_range": None,
        "numpy_expression": None,
        "speedup": None,
        "speedup_range": None,
        "cpu_seconds": digits(cpu.median) if cpu is not None else None,
    }
    if best is not None:
        numpy, speedup = rounds[best], rounds[best].over(own)
        found |= {
            "numpy_seconds": digits(numpy.median),
            "numpy_seconds_range": numpy.range,
            "numpy_expression": best.removeprefix(_BY),
            "speedup": digits(speedup.median),
            "speedup_range": speedup.range,
        }
    return found


def _told(row: Mapping[str, Any]) -> str:
    if "left_out" in row:
        return str(row["left_out"])
    beside = f", {row['speedup']:.3g} times as fast as {row['numpy_expression']}" if row["speedup"] is not None else ""
    return f"{row['seconds'] * 1e3:.4g} ms{beside}"
