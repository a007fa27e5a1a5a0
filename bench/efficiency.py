"""How much of the machine the kernels get: their CPU seconds over elapsed seconds times cores, Celery's beside it.

`./lepton bench efficiency [--quick] [--only NAME]... [--rounds N] [--seconds S] [--json]`. The kernels compute for
10 us to 10 ms without the GIL. What one takes is measured in each round with all cores busy, just before the turns.
`share_of_cpu` is of the CPU that the contender took, and so leaves out what other programs took meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import report, synthetic
from bench.contest import arena, median_and_range, turns
from bench.cpu import CORES
from bench.load import Load, spinning

NAMES = ("lepton", "celery", "huey", "dramatiq", "taskiq", "ray_actors", "raw_redis")
DEFAULT = ("lepton", "celery")
KERNELS_S = (10e-6, 100e-6, 1e-3, 10e-3)


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help="this contender (again: more)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn (default: %(default)s)")
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    rounds, seconds = (1, 0.3) if options.quick else (options.rounds, options.seconds)
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder,
        arena(options.only or DEFAULT, CORES, Path(folder)) as held,
    ):
        for kernel_s in KERNELS_S[2:3] if options.quick else KERNELS_S:
            load = spinning(kernel_s)
            costs_s: list[float] = []
            found = turns(held, load, rounds, seconds, lambda load=load, costs_s=costs_s: costs_s.append(cost_s(load)))
            for name, own in found.items():
                of_jobs = [cost * each.jobs for cost, each in zip(costs_s, own, strict=True)]
                shares = [busy / (each.seconds * CORES) for busy, each in zip(of_jobs, own, strict=True)]
                of_cpu = [busy / sum(each.cpu_s.values()) for busy, each in zip(of_jobs, own, strict=True)]
                rows.append(
                    {
                        "peer": name,
                        "kernel_ms": round(kernel_s * 1e3, 3),
                        "kernel_cpu_share": round(statistics.median(shares), 3),
                        "kernel_cpu_share_range": median_and_range(shares, 3)["range"],
                        "share_of_cpu": round(statistics.median(of_cpu), 3),
                        "jobs_per_s": round(statistics.median(each.jobs / each.seconds for each in own), 1),
                    }
                )
        rows += [{"peer": name, "missing": reason} for name, reason in held.missing.items()]
        held.facts()
        return {"cores": CORES, "rows": rows, "settings": held.settings()}


def cost_s(load: Load) -> float:
    """CPU seconds of one job's kernel while every core runs one: the median of a second's worth."""
    count = max(5, round(0.5 / synthetic.cpu_s(load.n)))
    with ThreadPoolExecutor(CORES) as pool:
        found = pool.map(lambda _: [synthetic.cpu_s(load.n) for _ in range(count)], range(CORES))
        return statistics.median(each for one in found for each in one)


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    keys = ("peer", "kernel_ms", "kernel_cpu_share", "kernel_cpu_share_range", "share_of_cpu", "jobs_per_s")
    rows = [tuple(row.get(key) for key in keys) for row in found["rows"]]
    yield report.table(f"share of {found['cores']} cores that kernels compute on", ("", *keys[1:]), rows)
    yield report.how_each_is_run(found["settings"])
