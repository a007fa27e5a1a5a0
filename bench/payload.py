"""Large arrays in, a number out, on one host: Lepton beside ray, the raw loop, and a copy in memory.

`./lepton bench payload [--quick] [--only NAME]... [--rounds N] [--json]`. Arrays of float32 of 1 and 16 MiB, another
for each job; the kernel reads one number of each page. `mb_per_s` with four in flight, `p50_ms` with one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench import report
from bench.contest import arena, rotated, say

NAMES = ("lepton", "ray_tasks", "ray_actors", "raw_redis")
MEMCPY = "memcpy"
SIZES = (2**20, 16 * 2**20)
_AT_ONCE = 4
_MB = 1e6
#: What a job may weigh: see LEPTON_BODY_LIMIT_BYTES.
_LIMIT_BYTES = 64 * 2**20


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help="this contender (again: more)")
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["LEPTON_BODY_LIMIT_BYTES"] = str(_LIMIT_BYTES)
    rounds, at_once = (1, 2) if options.quick else (options.rounds, _AT_ONCE)
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder,
        arena(options.only or NAMES, 1, Path(folder)) as held,
    ):
        for size in SIZES:
            batches = 1 if options.quick else max(2, 64 * 2**20 // size // at_once)
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*held.contenders, MEMCPY)}
            for name in held.contenders:  # until a ring or an object store is warm
                held.contenders[name].ask("carry", bytes=size, batches=batches, at_once=at_once)
            for number, name in rotated(list(found), rounds):
                held.settle()
                if name == MEMCPY:
                    many, single = _copies(size, batches * at_once), _copies(size, batches)
                else:
                    contender = held.contenders[name]
                    many = contender.ask("carry", bytes=size, batches=batches, at_once=at_once)
                    single = contender.ask("carry", bytes=size, batches=batches, at_once=1)
                rate = size * batches * at_once / sum(many) / _MB
                say(f"{size >> 20} MiB, round {number + 1}/{rounds}: {name} {rate:,.0f} MB/s")
                found[name].append((rate, statistics.median(single) * 1e3))
            rows += [_row(name, size, own) for name, own in found.items()]
        rows += [{"peer": name, "missing": reason} for name, reason in held.missing.items()]
        held.facts()
        return {"rows": rows, **_ratios(rows), "settings": held.settings()}


def _copies(size: int, count: int) -> list[float]:
    """Seconds of each copy between two arrays of that size."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    found = []
    for _ in range(count):
        start = time.perf_counter()
        np.copyto(target, source)
        found.append(time.perf_counter() - start)
    return found


def _row(name: str, size: int, own: list[tuple[float, float]]) -> dict[str, Any]:
    rates, times = zip(*own, strict=True)
    return {
        "peer": name,
        "bytes": size,
        "mb_per_s": round(statistics.median(rates), 1),
        "mb_per_s_range": [round(min(rates), 1), round(max(rates), 1)],
        "p50_ms": round(statistics.median(times), 3),
    }


def _ratios(rows: list[dict[str, Any]]) -> dict[str, Any]:
    rates = {(row["peer"], row["bytes"]): row["mb_per_s"] for row in rows if "bytes" in row}
    found = {}
    for size in SIZES:
        if (own := rates.get(("lepton", size))) is None:
            continue
        rays = [rates[name, size] for name in ("ray_tasks", "ray_actors") if (name, size) in rates]
        if rays:
            found[f"ratio_ray_{size >> 20}_mib"] = round(own / max(rays), 2)
        found[f"share_of_memcpy_{size >> 20}_mib"] = round(own / rates[MEMCPY, size], 3)
    return found


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    keys = ("peer", "bytes", "mb_per_s", "mb_per_s_range", "p50_ms")
    yield report.table("arrays in", ("", *keys[1:]), ([row.get(key) for key in keys] for row in found["rows"]))
    ratios = ((key, value) for key, value in found.items() if key not in {"rows", "settings"})
    yield report.table("Lepton's", ("", ""), ratios)
    yield report.how_each_is_run(found["settings"])
