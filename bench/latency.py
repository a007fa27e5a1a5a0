"""From submit to result in hand with one job in flight: Lepton, its peers, and the floor.

`./lepton bench latency [--quick] [--only NAME]... [--rounds N] [--jobs N] [--json]`. The job is that of
`bench throughput`. The quantiles are over all jobs of all rounds, the ranges over the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench import report
from bench.contest import arena, rotated, say
from bench.load import NOOP

NAMES = ("lepton", "celery_two_hop", "celery", "huey", "dramatiq", "ray_actors", "raw_redis")


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help="this contender (again: more)")
    parser.add_argument("--jobs", type=int, default=300, metavar="N", help="of a turn (default: %(default)s)")
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    rounds, jobs = (1, 20) if options.quick else (options.rounds, options.jobs)
    with (
        tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder,
        arena(options.only or NAMES, 1, Path(folder), one_by_one=True) as held,
    ):
        found: dict[str, list[list[float]]] = {name: [] for name in held.contenders}
        for contender in held.contenders.values():
            contender.ask("each", load=NOOP, count=20)
        for number, name in rotated(list(found), rounds):
            held.settle()
            found[name].append(held.contenders[name].ask("each", load=NOOP, count=jobs))
            say(f"round {number + 1}/{rounds}: {name} {np.median(found[name][-1]):.3f} ms")
        figures: dict[str, Any] = {
            name: {**_figures(each), "settings": held.settings()[name]} for name, each in found.items()
        }
        held.facts()
        figures |= {name: {"missing": reason} for name, reason in held.missing.items()}
    for label, other in (("share_of_two_hop", "celery_two_hop"), ("ratio_floor", "raw_redis")):
        if "lepton" in found and other in found:
            ratios = [np.median(one) / np.median(two) for one, two in zip(found["lepton"], found[other], strict=True)]
            figures[label] = round(float(np.median(ratios)), 3)
            figures[f"{label}_range"] = [round(float(each), 3) for each in (min(ratios), max(ratios))]
    return figures


def _figures(milliseconds: list[list[float]]) -> dict[str, Any]:
    p50, p99 = np.percentile(np.concatenate(milliseconds), (50, 99))
    each = [np.median(one) for one in milliseconds]
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "p50_ms_range": [round(float(min(each)), 3), round(float(max(each)), 3)],
    }


def _tables(figures: dict[str, Any]) -> Iterator[Table]:
    keys = ("p50_ms", "p99_ms", "p50_ms_range")
    rows = [(name, *(figures[name].get(key) for key in keys)) for name in NAMES if name in figures]
    yield report.table("one job in flight, ms", ("", "p50", "p99", "p50 of the rounds"), rows)
    ratios = [label for label in ("share_of_two_hop", "ratio_floor") if label in figures]
    yield report.table(
        "Lepton's p50", ("", "median", "range"), ((each, figures[each], figures[f"{each}_range"]) for each in ratios)
    )
    yield report.how_each_is_run(
        {name: figures[name].get("settings") or figures[name]["missing"] for name in NAMES if name in figures}
    )
