"""What batching gains: many small jobs in one launch, beside one launch each.

A batch is joined and split as a worker does it (tasks/batching.py), and both ways bring the inputs to the device and
the outputs back. Jobs are alike in size and have arrays of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from bench import report
from bench.contest import say
from bench.contestants import Pace, digits, play
from lepton_ai.job import Options
from lepton_ai.kernel import Kernel, Run
from tasks.batching import Group, TakenJob, split
from tasks.driver import Driver
from tasks.warmup import IdleContext, launch

__all__ = ["COUNTS", "gains", "tables"]

COUNTS = (1, 16, 64, 256)
#: The arrays of a batch are no larger together.
_MOST_BYTES = 2**28


class _Timed:
    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def once(self) -> float:
        start = time.perf_counter()
        self._call()
        return time.perf_counter() - start


def gains(kernel: Kernel, given: Mapping[str, Any], driver: Driver, run: Run, pace: Pace) -> Iterator[dict[str, Any]]:
    """A row a size of batch: seconds a job, batched and one by one, told as they are measured."""
    context = IdleContext()
    bound, dims = kernel.signature.bind(given)
    size_bytes = sum(each.nbytes for each in bound.values() if isinstance(each, np.ndarray))
    each_s = 0.0
    for count in COUNTS:
        row: dict[str, Any] = {"kernel": kernel.name, "device": driver.kind, "emulated": driver.emulated, "jobs": count}
        if count * size_bytes > _MOST_BYTES:
            yield {**row, "left_out": f"left out: {count * size_bytes / 2**20:,.0f} MiB"}
            continue
        if (due_s := each_s * count) > pace.limit_s:
            yield {**row, "left_out": f"left out: would take {due_s:,.1f} s"}
            continue
        jobs = [_job(kernel, bound, dims) for _ in range(count)]

        def batched(jobs: list[TakenJob] = jobs) -> None:
            group = Group(kernel, jobs)
            split(group, launch(run, group.inputs, driver, context))

        def one_by_one(jobs: list[TakenJob] = jobs) -> None:
            for job in jobs:
                launch(run, job.inputs, driver, context)

        timed = {"batched": _Timed(batched), "one_by_one": _Timed(one_by_one)}
        warm_s = {name: min(each.once(), each.once()) for name, each in timed.items()}
        each_s = sum(warm_s.values()) / count
        rounds = play(timed, warm_s, pace)
        found = {
            **row,
            "batched_seconds": digits(rounds["batched"].median / count),
            "one_by_one_seconds": digits(rounds["one_by_one"].median / count),
            "gain": digits(rounds["one_by_one"].over(rounds["batched"]).median),
        }
        say(f"{kernel.name} on {driver.kind}, {count} in a launch: {found['gain']:.3g} times as fast")
        yield found


def _job(kernel: Kernel, bound: Mapping[str, Any], dims: Mapping[str, Any]) -> TakenJob:
    inputs = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in bound.items()}
    return TakenJob("", kernel, inputs, kernel.spec.work(dict(dims)), Options(), tensors=True, keep=True, message=b"")


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """A line a kernel and device."""
    lines: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        device = f"{row['device']}, emulated" if row["emulated"] else row["device"]
        lines.setdefault((row["kernel"], device), {})[row["jobs"]] = row
    columns = ("", "device", *(f"us alone, {COUNTS[0]}" if count == 1 else f"in {count}" for count in COUNTS))
    yield report.table(
        "microseconds a job, so many in one launch, and times as fast as one by one",
        columns,
        [(*name, *(_told(by_count.get(count)) for count in COUNTS)) for name, by_count in lines.items()],
    )


def _told(row: Mapping[str, Any] | None) -> str:
    if row is None or "left_out" in row:
        return "" if row is None else str(row["left_out"])
    return f"{row['batched_seconds'] * 1e6:,.3g} ({row['gain']:.3g})"
