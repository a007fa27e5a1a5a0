"""From submit to result in hand: Lepton beside plain Celery on one broker, interleaved, in one run.

`python -m bench.round_trip [--json]`, from the repository's root. Each round measures, in turn, Lepton's client one job
at a time and in bulk, and a Celery worker (threads pool, results on, its own queue) doing the same product: first
directly, then behind a task that decides and sends it on, which is what a router written as a Celery task does. The
job is a 2 x 2 product, so that the path is measured and not the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from celery import Celery
from celery.utils import uuid

from lepton_ai import Client
from lepton_ai.settings import Settings
from pipeline.supervisor import run_fleet
from queues.app import celery_addresses

A = [[1.0, 2.0], [3.0, 4.0]]
_PLAIN = """
import os
import numpy
from celery import Celery

app = Celery("plain", broker=os.environ["BROKER_URL"], backend=os.environ["BROKER_URL"])
app.conf.worker_prefetch_multiplier = 64

@app.task(name="matmul")
def matmul(a, b):
    return {"c": (numpy.array(a, "f4") @ numpy.array(b, "f4")).tolist()}

@app.task(name="decide", ignore_result=True)
def decide(job, a, b):
    app.send_task("matmul", args=[a, b], queue="plain.device", task_id=job)
"""


def one_by_one(call: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of `count` jobs, one in flight."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def bulk(call: Callable[[int], None], count: int) -> float:
    """Jobs a second for `count` jobs submitted at once."""
    start = time.perf_counter()
    call(count)
    return count / (time.perf_counter() - start)


def start_plain_workers(broker: str, folder: str) -> list[subprocess.Popen[bytes]]:
    """Two plain Celery workers on one broker: one that computes, one that decides where."""
    (Path(folder) / "plain.py").write_text(_PLAIN)
    environ = os.environ | {"BROKER_URL": broker, "PYTHONPATH": folder}
    arguments = ["-m", "celery", "-A", "plain", "worker", "-P", "threads", "-c", "2", "--without-gossip"]
    return [
        subprocess.Popen(
            [sys.executable, *arguments, "-Q", queue, "-n", queue],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for queue in ("plain.device", "plain.router")
    ]


class Contenders:
    """What is measured: each call submits and waits."""

    def __init__(self, lepton: Client, app: Celery) -> None:
        self._lepton = lepton
        self._app = app
        self._array = np.array(A, np.float32)

    def lepton_one(self) -> None:
        self._lepton.submit("linalg.matmul", {"a": self._array, "b": self._array}).result(timeout=60)

    def lepton_bulk(self, count: int) -> None:
        for each in self._lepton.submit_many("linalg.matmul", [{"a": self._array, "b": self._array}] * count):
            each.result(timeout=120)

    def celery_one(self) -> None:
        self._app.send_task("matmul", args=[A, A], queue="plain.device").get(timeout=60)

    def celery_two(self) -> None:
        job = uuid()
        result = self._app.AsyncResult(job)
        self._app.send_task("decide", args=[job, A, A], queue="plain.router")
        result.get(timeout=60)

    def celery_bulk(self, count: int) -> None:
        for each in [self._app.send_task("matmul", args=[A, A], queue="plain.device") for _ in range(count)]:
            each.get(timeout=120)


def measure(contenders: Contenders, rounds: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Every contender in turn, `rounds` times."""
    singles = {
        "lepton": contenders.lepton_one,
        "celery": contenders.celery_one,
        "celery_two_hop": contenders.celery_two,
    }
    bulks = {"lepton": (contenders.lepton_bulk, 5000), "celery": (contenders.celery_bulk, 300)}
    milliseconds: dict[str, list[float]] = {name: [] for name in singles}
    rates: dict[str, list[float]] = {name: [] for name in bulks}
    for call in singles.values():
        one_by_one(call, 20)  # connections, imports
    for _ in range(rounds):
        for name, call in singles.items():
            milliseconds[name] += one_by_one(call, 100)
        for name, (many, count) in bulks.items():
            rates[name].append(bulk(many, count))
    latency = {name: np.percentile(found, [50, 99]).round(2).tolist() for name, found in milliseconds.items()}
    return {
        "latency_ms": {name: {"p50": p50, "p99": p99} for name, (p50, p99) in latency.items()},
        "jobs_per_s": {
            name: {"median": round(statistics.median(found)), "range": [round(min(found)), round(max(found))]}
            for name, found in rates.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        run_fleet(Settings(), {"cpu": 2}, lambda step: print(step, file=sys.stderr)) as fleet,
        Client(fleet.broker_url) as lepton,
    ):
        broker, _ = celery_addresses(fleet.broker_url)
        workers = start_plain_workers(broker, folder)
        app = Celery("bench", broker=broker, backend=broker, set_as_current=False)
        try:
            report = measure(Contenders(lepton, app), options.rounds)
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
    if options.json:
        print(json.dumps(report))
        return
    for name, latency in report["latency_ms"].items():
        print(f"{name:16} one in flight: p50 {latency['p50']} ms, p99 {latency['p99']} ms")
    for name, rate in report["jobs_per_s"].items():
        print(f"{name:16} in bulk: {rate['median']} jobs/s (median of {options.rounds}, range {rate['range']})")


if __name__ == "__main__":
    main()
