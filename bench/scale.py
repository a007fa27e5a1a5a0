"""What a job costs the router, the broker and the worker while 1,000, 100,000 or 1,000,000 more wait in the lane.

`./lepton bench scale [--quick] [--rounds N] [--jobs N] [--depth N]... [--json]`. Each turn has a fresh broker. The lane
is filled before the router starts and kept so deep while the jobs that are measured are worked off: the broker takes
as many as it gives at every depth. Bytes are the broker's own count, of a job that waits and of one that has ended
(its result, its Placement and its share of the event stream).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis
from rich.table import Table

from bench import cpu, report
from bench.contest import KERNELS, rotated, say
from bench.load import NOOP
from lepton_ai import Client, topology, wire
from lepton_ai.identity import new_id, new_ids
from lepton_ai.job import Options
from lepton_ai.settings import Settings
from pipeline.machine import planned
from pipeline.processes import Processes, environment
from pipeline.supervisor import programs
from queues.embedded import EmbeddedBroker

DEPTHS = (1_000, 100_000, 1_000_000)
_AT_ONCE = 500
_LIMIT_S = 120.0
#: Of the jobs that are measured: so many before them warm the router up.
_WARM_SHARE = 0.25
_MEASURED = ("router", "broker", "worker")
_ROW = ("us_per_job", "wall_us_per_job", "broker_bytes_per_job", "broker_bytes_per_finished_job", "router_rss_mb")


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument(
        "--jobs", type=int, default=20_000, metavar="N", help="that are measured (default: %(default)s)"
    )
    parser.add_argument("--depth", type=int, action="append", metavar="N", help="how many wait (again: more)")
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["LEPTON_KERNELS"] = KERNELS
    depths, rounds, jobs = options.depth or DEPTHS, options.rounds, options.jobs
    if options.quick:
        depths, rounds, jobs = options.depth or (1_000, 5_000), 1, 1_000
    found: dict[int, list[dict[str, Any]]] = {depth: [] for depth in depths}
    for number, name in rotated([str(depth) for depth in depths], rounds):
        with tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder:
            one = _Play(int(name), jobs, Path(folder)).measure()
        told = f"{int(name):,} deep, filled in {one['fill_s']:.1f} s: {one['us_per_job']:.1f} us a job"
        say(f"round {number + 1}/{rounds}: {told}")
        found[int(name)].append(one)
    rows = []
    for depth, own in found.items():
        row: dict[str, Any] = {"depth": depth}
        for key in _ROW:
            row[key] = round(statistics.median(each[key] for each in own), 1)
        row["us_per_job_range"] = [round(pick(each["us_per_job"] for each in own), 1) for pick in (min, max)]
        parts = own[0]["us_per_job_by_process"]
        row["us_per_job_by_process"] = {
            role: round(statistics.median(each["us_per_job_by_process"][role] for each in own), 1) for role in parts
        }
        rows.append(row)
    shallowest, deepest = found[depths[0]], found[depths[-1]]
    ratios = [one["us_per_job"] / other["us_per_job"] for one, other in zip(deepest, shallowest, strict=True)]
    return {
        "jobs": jobs,
        "rows": rows,
        "ratio_deepest": round(statistics.median(ratios), 3),
        "ratio_deepest_range": [round(pick(ratios), 3) for pick in (min, max)],
    }


class _Play:
    """One broker, filled so deep, and a worker; then a router works jobs off."""

    def __init__(self, depth: int, jobs: int, folder: Path) -> None:
        self._depth = depth
        self._jobs = jobs
        self._folder = folder
        arguments = {"x": 1.0, "y": 2.0, "n": NOOP.n, "data": np.arange(256, dtype=np.uint8)}
        mark = new_id()
        self._parts = wire.envelope(mark, NOOP.kernel, arguments, Options()).split(mark.encode())

    def measure(self) -> dict[str, Any]:
        with EmbeddedBroker(Settings.read()) as broker, self._processes(broker.url) as processes:
            self._redis: Any = redis.Redis.from_url(broker.url, socket_timeout=60)
            with Client(broker.url) as client:
                self._until(client.devices, "the worker is online")
                empty = self._bytes()
                began = time.perf_counter()
                self._push(self._depth)
                fill_s = time.perf_counter() - began
                waiting_bytes = (self._bytes() - empty) / self._depth
                self._until(self._is_quiet, "the broker has rewritten its log")
                done = threading.Event()
                feeder = threading.Thread(target=self._feed, args=(done,))
                feeder.start()
                try:
                    processes.start(self._router)
                    found = self._slice(client, processes)
                finally:
                    done.set()
                    feeder.join()
                if difference := client.accounts().difference:
                    raise ValueError(f"{difference} jobs are unaccounted for")
                return {"fill_s": fill_s, "broker_bytes_per_job": waiting_bytes, **found}

    @contextmanager
    def _processes(self, url: str) -> Iterator[Processes]:
        processes = Processes(lambda name: (self._folder / name).open("wb"), lambda *_, **__: None, restart=False)
        own = programs(environment({"LEPTON_REDIS_URL": url}), planned({"cpu": 1}))
        self._router = next(each for each in own if each.name == "router")
        try:
            processes.start(next(each for each in own if each.name.startswith("worker")))
            yield processes
        finally:
            processes.kill(list(processes.running))

    def _slice(self, client: Client, processes: Processes) -> dict[str, Any]:
        router = processes.running["router"].pid
        roles = {"broker": [int(self._redis.info("server")["process_id"])]}
        roles |= {name.partition("-")[0]: [process.pid] for name, process in processes.running.items()}

        def succeeded() -> int:
            return client.accounts().terms.get("succeeded", 0)

        first = int(self._jobs * _WARM_SHARE)
        self._until(lambda: succeeded() >= first, "the first jobs have ended")
        began, start, before, held = time.perf_counter(), succeeded(), cpu.used_s(roles), self._bytes()
        self._until(lambda: succeeded() >= start + self._jobs, "the jobs have ended")
        seconds, after = time.perf_counter() - began, cpu.used_s(roles)
        jobs = succeeded() - start
        parts = {role: (after[role] - before[role]) / jobs * 1e6 for role in _MEASURED}
        return {
            "us_per_job": sum(parts.values()),
            "us_per_job_by_process": parts,
            "wall_us_per_job": seconds / jobs * 1e6,
            "broker_bytes_per_finished_job": (self._bytes() - held) / jobs,
            "router_rss_mb": cpu.rss_mb(router),
        }

    def _feed(self, done: threading.Event) -> None:
        """Keeps the lane as deep as it is to be."""
        while not done.wait(0.002):
            self._push(self._depth - int(self._redis.llen(topology.LANE)))

    def _push(self, count: int) -> None:
        for first in range(0, count, _AT_ONCE):
            jobs = new_ids(min(_AT_ONCE, count - first))
            self._redis.lpush(topology.LANE, *(job.encode().join(self._parts) for job in jobs))

    def _bytes(self) -> int:
        return int(self._redis.info("memory")["used_memory_dataset"])

    def _is_quiet(self) -> bool:
        found = self._redis.info("persistence")
        return not (found["aof_rewrite_in_progress"] or found["aof_rewrite_scheduled"])

    @staticmethod
    def _until(found: Any, what: str) -> None:
        deadline = time.monotonic() + _LIMIT_S
        while not found():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {_LIMIT_S:.0f} s")
            time.sleep(0.02)


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    rows = [
        (row["depth"], row["us_per_job"], row["us_per_job_range"], *(row[key] for key in _ROW[1:]))
        for row in found["rows"]
    ]
    columns = ("depth", "CPU us a job", "range", "wall us a job", "bytes a waiting job", "a finished one", "router MB")
    ratio = f"{found['ratio_deepest']} ({report.shown(found['ratio_deepest_range'])})"
    yield report.table(f"{found['jobs']:,} jobs; the deepest costs {ratio} of the first", columns, rows)
