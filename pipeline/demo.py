"""`lepton demo`: a whole Lepton for a minute, fed with real data through its three doors, and what came of it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from lepton_ai import Client, JobHandle, services
from lepton_ai.errors import LeptonError, ResultTimeout, Unavailable
from lepton_ai.settings import Settings
from pipeline.machine import Found, look_for_devices
from pipeline.signals import Signals
from pipeline.supervisor import Fleet, run_fleet
from queues.addresses import celery_addresses
from queues.connection import Connection
from queues.event_stream import EventStream

__all__ = ["main"]

#: Without a second kind of device a second processor, so that the router has a choice on any machine.
_WORKERS = {"cpu": 2, "fpga": 1}
_WORKERS_WITHOUT = {"cpu": 2, "cpu.little": 1}
#: Of each ten jobs, how many come through the Celery producer and through HTTP; the client brings the rest.
_CELERY_SHARE, _HTTP_SHARE = 0.1, 0.3
_IN_FLIGHT = 24
_JOB_S = 60.0
_PREDICTED = "(wait and run are predictions made when the job was placed; a model that has seen few jobs is far off)"

Job = tuple[str, dict[str, Any]]


class _Ended(msgspec.Struct, frozen=True):
    """One job as its submitter saw it end."""

    kernel: str
    succeeded: bool
    seconds: float
    handle: JobHandle | None = None


class _Tally:
    """What the doors report, from their threads."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.ended: list[_Ended] = []
        self._advance = advance
        self._lock = threading.Lock()

    def add(self, ended: _Ended) -> None:
        with self._lock:
            self.ended.append(ended)
        self._advance()


def main(arguments: Sequence[str]) -> int:
    """Runs the demo; the exit code is 0 only where every job succeeded, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="lepton demo")
    parser.add_argument("--jobs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    console = Console(stderr=options.json)
    found = {each.kind: each for each in look_for_devices()}
    with Signals() as signals:
        try:
            return _run(options, console, found.get("fpga"), signals.check)
        except KeyboardInterrupt:
            console.print("stopped; nothing is left running")
            return 130
        except LeptonError as error:
            console.print(f"lepton demo: {error}", style="red", markup=False)
            return 1


def _run(options: argparse.Namespace, console: Console, fpga: Found | None, check: Callable[[], None]) -> int:
    """Everything, in the main thread; `check` raises KeyboardInterrupt where it is to stop."""

    def tell(step: str) -> None:
        console.print(f"  {step}", highlight=False, markup=False)

    # The demo is a world of its own: a broker or port that the environment names is somebody else's.
    settings = msgspec.structs.replace(Settings.read(), redis_url=None)
    data = services.root() / "examples" / "data"
    stream: list[Job] = list(importlib.import_module("examples.workload").jobs(data, options.jobs, options.seed))
    if fpga is None or not fpga.available:
        why = "python -m tasks does not know of one" if fpga is None else fpga.missing
        tell(f"no fpga worker: {why}")
    workers = _WORKERS if fpga is not None and fpga.available else _WORKERS_WITHOUT
    with run_fleet(settings, workers, tell, check) as fleet:
        tell(f"feeding {len(stream)} jobs on real data through HTTP, the client and a plain Celery producer")
        bar = (TextColumn("  jobs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*bar, console=console) as progress:
            task = progress.add_task("jobs", total=len(stream))
            tally = _Tally(lambda: progress.advance(task))
            start = time.perf_counter()
            doors = _Doors(fleet, data, tally, lambda done: progress.advance(task, done))
            produced = doors.feed(stream, check)
            seconds = time.perf_counter() - start
        summary = _summary(fleet, tally.ended, produced, seconds)
        _print(console, summary, _explained(tally.ended, len(workers)))
    if options.json:
        print(json.dumps(summary))  # noqa: T201 - the one line that scripts read
    return 0 if summary["succeeded"] == summary["submitted"] else 1


# -- the three doors ------------------------------------------------------------------------------------------------


class _Doors:
    """Feeds a stream of jobs through HTTP, the client and a plain Celery producer, all three at once."""

    def __init__(self, fleet: Fleet, data: Path, tally: _Tally, advance: Callable[[int], None]) -> None:
        self._fleet = fleet
        self._data = data
        self._tally = tally
        self._advance = advance
        self._stopping = threading.Event()
        self._producer: subprocess.Popen[str] | None = None

    def feed(self, stream: Sequence[Job], check: Callable[[], None]) -> dict[str, Any]:
        """Returns once every job has ended, with what the Celery producer reports; `check` may raise and stop it."""
        plain = int(len(stream) * _CELERY_SHARE)
        posted = plain + int(len(stream) * _HTTP_SHARE)
        with ThreadPoolExecutor(3) as pool:
            doors: list[Future[Any]] = [
                pool.submit(self._through_celery, plain),
                pool.submit(self._through, self._fleet.http_url, stream[plain:posted]),
                pool.submit(self._through, self._fleet.broker_url, stream[posted:]),
            ]
            try:
                while not all(door.done() for door in doors):
                    self._fleet.check()
                    check()
                    time.sleep(0.05)
            except BaseException:
                self._stop()
                raise
            produced, _, _ = [door.result() for door in doors]
        return produced  # type: ignore[no-any-return]

    def _stop(self) -> None:
        self._stopping.set()
        if self._producer is not None:
            self._producer.kill()

    def _through(self, url: str, stream: Sequence[Job]) -> None:
        """Submits through a Client, a bounded number in flight, as a service with concurrent requests would."""
        with Client(url) as client:
            waiting: deque[tuple[JobHandle, float]] = deque()
            for kernel, arguments in stream:
                if len(waiting) >= _IN_FLIGHT:
                    self._finish(*waiting.popleft())
                if self._stopping.is_set():
                    return
                waiting.append((client.submit(kernel, arguments), time.perf_counter()))
            for handle, submitted in waiting:
                self._finish(handle, submitted)

    def _finish(self, handle: JobHandle, submitted: float) -> None:
        succeeded = False
        while not self._stopping.is_set() and time.perf_counter() - submitted < _JOB_S:
            try:
                handle.result(timeout=0.5)
                succeeded = True
            except ResultTimeout:
                continue
            except LeptonError:
                succeeded = False  # the summary and the exit code say so
            break
        self._tally.add(_Ended(handle.kernel or "", succeeded, time.perf_counter() - submitted, handle))

    def _through_celery(self, count: int) -> dict[str, Any]:
        """Lets the example producer, which knows only Celery, send its share; returns its report."""
        if count == 0:
            return {"submitted": 0, "succeeded": 0, "failed": 0, "latencies_s": []}
        broker, backend = celery_addresses(self._fleet.broker_url)
        producer = services.root() / "examples" / "producer" / "tasks.py"
        environ = {**os.environ, "BROKER_URL": broker, "RESULT_BACKEND": backend}
        environ.pop("PYTHONPATH", None)  # it must not find our modules, least of all our `tasks`
        self._producer = subprocess.Popen(
            [sys.executable, str(producer), "--count", str(count), "--data", str(self._data)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,
        )
        output, errors = self._producer.communicate()
        if self._producer.returncode != 0:
            raise Unavailable(f"the Celery producer failed: {errors.strip()[-2000:]}")
        report: dict[str, Any] = json.loads(output.splitlines()[-1])
        self._advance(count)
        return report


# -- what came of it ------------------------------------------------------------------------------------------------


def _summary(fleet: Fleet, ended: Sequence[_Ended], produced: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    devices: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for kernel, device, jobs in _succeeded_events(fleet):
        devices[device] += jobs
        kernels[kernel] += jobs
    latencies = [each.seconds for each in ended if each.succeeded] + list(produced["latencies_s"])
    p50, p99 = np.percentile(latencies, [50, 99]).tolist() if latencies else (0.0, 0.0)
    submitted = len(ended) + produced["submitted"]
    succeeded = sum(each.succeeded for each in ended) + produced["succeeded"]
    return {
        "submitted": submitted,
        "succeeded": succeeded,
        "failed": submitted - succeeded,
        "by_device": dict(sorted(devices.items())),
        "by_kernel": dict(sorted(kernels.items())),
        "jobs_per_s": round(submitted / seconds, 1),
        "p50_ms": round(p50 * 1e3, 2),
        "p99_ms": round(p99 * 1e3, 2),
    }


def _succeeded_events(fleet: Fleet) -> Iterator[tuple[str, str, int]]:
    """Kernel, device and number of jobs of every launch, from the event stream: all three doors' jobs are in it."""
    stream = EventStream(Connection(fleet.broker_url, "demo"), "0-0")
    while events := stream.read(block_ms=1):
        for _, each in events:
            if each.type == "job.succeeded" and each.kernel and each.device:
                yield each.kernel, each.device, len(each.jobs)
    stream.connection.close()


def _explained(ended: Sequence[_Ended], devices: int) -> list[JobHandle]:
    """Three jobs whose placements are worth a look: one a device, and the one that was slowest."""
    found: dict[str, JobHandle] = {}
    having = [each for each in ended if each.succeeded and each.handle is not None]
    for each in reversed(having):  # the later ones: by then the cost model had learned
        assert each.handle is not None
        placement = each.handle.why()
        if placement is not None and placement.device is not None:
            found.setdefault(placement.device, each.handle)
        if len(found) == devices:
            break
    slowest = max(having, key=lambda each: each.seconds, default=None)
    others = [slowest.handle] if slowest is not None and slowest.handle is not None else []
    return [*found.values(), *others][:3]


def _print(console: Console, summary: Mapping[str, Any], explained: Sequence[JobHandle]) -> None:
    console.print(f"{summary['succeeded']} of {summary['submitted']} jobs succeeded", highlight=False)
    for heading in ("kernel", "device"):
        table = Table(heading, Column("jobs", justify="right"))
        for name, jobs in summary[f"by_{heading}"].items():
            table.add_row(escape(name), str(jobs))
        console.print(table)
    console.print(
        f"{summary['jobs_per_s']} jobs/s, latency p50 {summary['p50_ms']} ms, p99 {summary['p99_ms']} ms "
        f"(submit to result in hand, up to {3 * _IN_FLIGHT} jobs in flight)",
        highlight=False,
    )
    for handle in explained:
        record = handle.record()
        if record.placement is None or record.placement.estimate is None:
            continue
        placed = record.placement
        console.print(f"\nwhy {handle.kernel} {handle.id} ran on {placed.device}: {placed.reason}", markup=False)
        why = Table("device", "wait ms", "transfer ms", "run ms", "finish ms", "spread")
        for candidate in record.placement.candidates:
            if candidate.estimate is None:
                why.add_row(candidate.device, escape(candidate.excluded or ""))
                continue
            e = candidate.estimate
            times = [f"{s * 1e3:.2f}" for s in (e.wait_s, e.transfer_s, e.run_s, e.finish_s)]
            why.add_row(candidate.device, *times, f"{e.spread:.2f}")
        if record.cost is not None:
            c = record.cost
            times = [f"{s * 1e3:.2f}" for s in (c.wait_s, c.transfer_s, c.run_s, c.wait_s + c.transfer_s + c.run_s)]
            why.add_row("[bold]really[/bold]", *times, f"batch {c.batch}")
        console.print(why)
    if explained:
        console.print(_PREDICTED, style="dim", highlight=False, soft_wrap=True)
