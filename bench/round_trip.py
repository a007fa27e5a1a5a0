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

import numpy as np
from celery import Celery

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    array = np.array(A, np.float32)
    with (
        tempfile.TemporaryDirectory() as folder,
        run_fleet(Settings(), {"cpu": 2}, lambda step: print(step, file=sys.stderr)) as fleet,
        Client(fleet.broker_url) as lepton,
    ):
        broker, _ = celery_addresses(fleet.broker_url)
        (Path(folder) / "plain.py").write_text(_PLAIN)
        environ = os.environ | {"BROKER_URL": broker, "PYTHONPATH": folder}
        arguments = ["-m", "celery", "-A", "plain", "worker", "-P", "threads", "-c", "2", "--without-gossip"]
        workers = [
            subprocess.Popen(
                [sys.executable, *arguments, "-Q", queue, "-n", queue],
                env=environ,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for queue in ("plain.device", "plain.router")
        ]
        app = Celery("bench", broker=broker, backend=broker, set_as_current=False)

        def celery_one() -> None:
            app.send_task("matmul", args=[A, A], queue="plain.device").get(timeout=60)

        def celery_two() -> None:
            from celery.utils import uuid

            job = uuid()
            result = app.AsyncResult(job)
            app.send_task("decide", args=[job, A, A], queue="plain.router")
            result.get(timeout=60)

        def celery_bulk(count: int) -> None:
            for each in [app.send_task("matmul", args=[A, A], queue="plain.device") for _ in range(count)]:
                each.get(timeout=120)

        def lepton_bulk(count: int) -> None:
            for each in lepton.submit_many("linalg.matmul", [{"a": array, "b": array}] * count):
                each.result(timeout=120)

        def lepton_one() -> None:
            lepton.submit("linalg.matmul", {"a": array, "b": array}).result(timeout=60)

        singles = {"lepton": lepton_one, "celery": celery_one, "celery_two_hop": celery_two}
        bulks = {"lepton": (lepton_bulk, 5000), "celery": (celery_bulk, 300)}
        milliseconds: dict[str, list[float]] = {name: [] for name in singles}
        rates: dict[str, list[float]] = {name: [] for name in bulks}
        try:
            for call in singles.values():
                one_by_one(call, 20)  # connections, imports
            for _ in range(options.rounds):
                for name, call in singles.items():
                    milliseconds[name] += one_by_one(call, 100)
                for name, (many, count) in bulks.items():
                    rates[name].append(bulk(many, count))
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
    report = {
        "latency_ms": {
            name: dict(zip(("p50", "p99"), np.percentile(found, [50, 99]).round(2).tolist(), strict=True))
            for name, found in milliseconds.items()
        },
        "jobs_per_s": {
            name: {"median": round(statistics.median(found)), "range": [round(min(found)), round(max(found))]}
            for name, found in rates.items()
        },
    }
    if options.json:
        print(json.dumps(report))
        return
    for name, latency in report["latency_ms"].items():
        print(f"{name:16} one in flight: p50 {latency['p50']} ms, p99 {latency['p99']} ms")
    for name, rate in report["jobs_per_s"].items():
        print(f"{name:16} in bulk: {rate['median']} jobs/s (median of {options.rounds}, range {rate['range']})")


if __name__ == "__main__":
    main()
