"""What the cost model has learned after how many launches: its error, what its choices cost, and how it notices drift.

`./lepton bench learning [--data DIR] [--rounds N] [--quick] [--json]`. Each round is a fleet made up by the law in
`bench/truth.py`, every launch 5 % noise (log-normal); `--data` takes the public timings of DIR in their place. All
figures are medians over rounds, kernels and devices, unless they say otherwise.

- `error_after_N`: |predicted / measured - 1| of launches of new sizes, after N launches of other sizes each once;
  `..._repeated`: of launches that are drawn, as those before, from 20 sizes. The noise alone is 3.4 %.
- `excess_after_1500`: jobs, each sent to the device with the least predicted seconds but for the probes: two of each
  device, and one more each time that all launches have doubled (`CostModel.enough`). What the 500 jobs after the first
  1,500 took together beyond the truly fastest device for each; `..._mean` and `..._worst` of all rounds and kernels.
  `excess_each_after_1500` is the mean over jobs, in which small ones count as much as large ones; `excess_by_jobs`
  shows how it came there; `excess_of_all` counts every job from the first, probes too.
- `drift_delay`: launches until a device that has become 20 % slower is noticed; `drift_delay_worst` over all rounds,
  `drift_delay_new_sizes` where no size comes twice. `false_alarms`: of a device that has not changed, in 20,000.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench import report
from bench.truth import Case, Truth, generated, measured
from lepton_ai.event import Observation
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.drift import has_adwin

_NOISE = 0.05
_SLOWER = 1.2
_SIZES = 20
_COUNTS = (1, 5, 10, 20, 50, 100)
_BLOCKS = ((0, 100), (100, 500), (500, 1500), (1500, 2000))
_AFFORDABLE = 4.0
"""A probe may take so many times what the fastest device is predicted to, as of the router's."""
_LATE = 200
"""A drift that is not noticed within so many launches counts as so late."""


def main() -> int:
    parser = report.parser(__doc__, rounds=5)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the public timings there, in place of made-up fleets")
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    rounds = 1 if options.quick else options.rounds
    truths = [
        (at, truth) for at in range(rounds) for truth in (measured(options.data) if options.data else generated(at))
    ]
    found: dict[str, Any] = {}
    for count in _COUNTS:
        found[f"error_after_{count}"] = _error(truths, count, repeated=False)
        found[f"error_after_{count}_repeated"] = _error(truths, count, repeated=True)
    found |= _excess(truths)
    found |= _drift(truths)
    found["false_alarms"] = _false_alarms(truths[:: 5 if options.quick else 1], 2000 if options.quick else 20_000)
    return found | {"rounds": rounds, "truths": [truth.name for _, truth in truths], "adwin": has_adwin()}


class _Stream:
    """Launches of one truth, told to a model."""

    def __init__(self, truth: Truth, seed: int, cases: int | None = None) -> None:
        self.truth = truth
        self.model = CostModel()
        self._random = np.random.default_rng(seed)
        order = self._random.permutation(len(truth.cases))[:cases]
        self._cases = [truth.cases[at] for at in order]

    def new(self, at: int) -> Case:
        """Size number `at`, each once."""
        return self._cases[at]

    def any(self) -> Case:
        """One of the sizes."""
        return self._cases[int(self._random.integers(len(self._cases)))]

    def launched_s(self, case: Case, device: int) -> float:
        """What a launch takes, with its noise."""
        return case.seconds[device] * float(np.exp(self._random.normal(0.0, _NOISE)))

    def run(self, case: Case, device: int, slower: float = 1.0) -> bool:
        """A launch, of which the model is told; whether it notices a drift from it."""
        name, peaks = self.truth.devices[device]
        size, seconds = case.size, slower * self.launched_s(case, device)
        return self.model.learn(
            Observation(self.truth.name, name, 1, size.flops, size.bytes, 0.0, seconds, 0.0, size.dims), peaks
        )

    def predicted(self, case: Case, device: int) -> float:
        """The predicted seconds on one device."""
        name, peaks = self.truth.devices[device]
        return self.model.predict(self.truth.name, name, case.size, peaks).run_s

    def chosen(self, case: Case) -> int:
        """The device to launch on: one that lacks launches, where that is affordable, or the fastest as predicted."""
        estimates = self.model.predict_on(self.truth.name, self.truth.devices, case.size)
        predicted = np.array([each.run_s for each in estimates])
        fastest = int(predicted.argmin())
        launches = [self.model.launches(self.truth.name, name) for name, _ in self.truth.devices]
        fewest = int(np.argmin(launches))
        if launches[fewest] < 2:
            return fewest
        enough, affordable = self.model.enough(self.truth.name), _AFFORDABLE * predicted[fastest]
        lacking = [at for at, count in enumerate(launches) if count < enough and predicted[at] <= affordable]
        return min(lacking, key=lambda at: (launches[at], predicted[at])) if lacking else fastest


def _error(truths: list[tuple[int, Truth]], count: int, *, repeated: bool, tests: int = 30) -> float:
    errors = []
    for seed, truth in truths:
        if not repeated and not truth.is_sized:
            continue
        stream = _Stream(truth, seed, _SIZES if repeated else None)
        for device in range(len(truth.devices)):
            for at in range(count):
                stream.run(stream.any() if repeated else stream.new(at), device)
            for at in range(count, count + tests):
                case = stream.any() if repeated else stream.new(at)
                errors.append(abs(stream.predicted(case, device) / stream.launched_s(case, device) - 1))
    return round(statistics.median(errors), 4)


def _excess(truths: list[tuple[int, Truth]]) -> dict[str, Any]:
    blocks: dict[tuple[int, int], list[float]] = {each: [] for each in _BLOCKS}
    whole, each_job = [], []
    for seed, truth in truths:
        taken, best = _chosen(truth, seed, _BLOCKS[-1][1])
        for begin, end in _BLOCKS:
            blocks[begin, end].append(taken[begin:end].sum() / best[begin:end].sum() - 1)
        whole.append(taken.sum() / best.sum() - 1)
        each_job.append((taken / best)[_BLOCKS[-1][0] :].mean() - 1)
    by_jobs = {f"{begin}-{end}": round(statistics.median(each), 4) for (begin, end), each in blocks.items()}
    last = blocks[_BLOCKS[-1]]
    return {
        "excess_after_1500": round(statistics.median(last), 4),
        "excess_after_1500_mean": round(statistics.mean(last), 4),
        "excess_after_1500_worst": round(max(last), 4),
        "excess_each_after_1500": round(statistics.median(each_job), 4),
        "excess_by_jobs": by_jobs,
        "excess_of_all": round(statistics.median(whole), 4),
    }


def _chosen(truth: Truth, seed: int, jobs: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[job]: the true seconds on the device chosen for it, and on the fastest."""
    stream = _Stream(truth, seed)
    taken, best = np.zeros(jobs), np.zeros(jobs)
    for at in range(jobs):
        case = stream.any()
        chosen = stream.chosen(case)
        stream.run(case, chosen)
        taken[at], best[at] = case.seconds[chosen], min(case.seconds)
    return taken, best


def _drift(truths: list[tuple[int, Truth]]) -> dict[str, Any]:
    sized = [(seed, truth) for seed, truth in truths if truth.is_sized]
    delays = {
        "repeated": [_delay(truth, seed, "repeated") for seed, truth in truths],
        "new": [_delay(truth, seed, "new") for seed, truth in sized],
    }
    return {
        "drift_delay": statistics.median(delays["repeated"]),
        "drift_delay_worst": max(delays["repeated"]),
        "drift_delay_new_sizes": statistics.median(delays["new"]),
        "drift_delay_new_sizes_worst": max(delays["new"]),
    }


def _delay(truth: Truth, seed: int, kind: str) -> int:
    """Launches until a device that became slower is noticed."""
    device = seed % len(truth.devices)
    stream = _Stream(truth, seed, _SIZES if kind == "repeated" else None)
    before = 300 if kind == "repeated" else min(300, len(truth.cases) - _LATE // 2)
    for at in range(before):
        stream.run(stream.any() if kind == "repeated" else stream.new(at), device)
    for at in range(before, before + _LATE):
        if kind == "new" and at >= len(truth.cases):
            break
        case = stream.any() if kind == "repeated" else stream.new(at)
        if stream.run(case, device, _SLOWER):
            return at - before + 1
    return _LATE


def _false_alarms(truths: list[tuple[int, Truth]], launches: int) -> int:
    """The most that one device had."""
    most = 0
    for seed, truth in truths:
        stream = _Stream(truth, seed, _SIZES)
        device = seed % len(truth.devices)
        most = max(most, sum(stream.run(stream.any(), device) for _ in range(launches)))
    return most


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    errors = [(count, found[f"error_after_{count}"], found[f"error_after_{count}_repeated"]) for count in _COUNTS]
    yield report.table("median error of a prediction", ("launches", "new sizes", "repeated"), errors)
    rows = [*found["excess_by_jobs"].items(), ("all", found["excess_of_all"])]
    yield report.table("beyond the fastest device for each", ("jobs", "excess"), rows)
    names = ("drift_delay", "drift_delay_worst", "drift_delay_new_sizes", "drift_delay_new_sizes_worst", "false_alarms")
    yield report.table("drift of 20 %, in launches", ("", "figure"), [(name, found[name]) for name in names])
