"""Jobs a second from submit to result in hand, and the CPU that each takes: Lepton, its peers, and the floor.

`./lepton bench throughput [--quick] [--only NAME]... [--rounds N] [--seconds S] [--noop] [--json]`. The job is a name,
three scalars and 256 bytes; its result is kept, read and checked. First one that only adds, then such as compute for
10 us to 10 ms. Figures are medians over the rounds, ratios are taken within each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import cpu, report
from bench.contest import Arena, Turn, arena, turns
from bench.load import NOOP, spinning

FLOOR = "raw_redis"
PEERS = ("celery_two_hop", "celery", "huey", "dramatiq", "taskiq", "ray_tasks", "ray_actors")
NAMES = ("lepton", "lepton_flower", *PEERS, FLOOR)
#: These go no faster with a worker a core, or slower, where the job only adds.
_SINGLE = ("celery_two_hop", "celery", "taskiq")
#: Left out where jobs compute: of `lepton_flower` no more would be learnt, and `ray_actors` go faster than `ray_tasks`.
_NOT_COMPUTING = ("lepton_flower", "ray_tasks")
KERNELS_S = (10e-6, 100e-6, 1e-3, 10e-3)

Turns = Mapping[str, Sequence[Turn]]


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help="this contender (again: more)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn; a third with jobs that compute")
    parser.add_argument("--noop", action="store_true", help="only the job that adds")
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    names = options.only or NAMES
    rounds, seconds = (1, 0.2) if options.quick else (options.rounds, options.seconds)
    with tempfile.TemporaryDirectory(prefix="lepton-bench-") as folder:
        with arena(names, cpu.CORES, Path(folder), single=_SINGLE) as held:
            found = summary(held, turns(held, NOOP, rounds, seconds))
            for name, facts in held.facts().items():
                found[name] |= facts
        if not options.noop:
            found["kernels"] = {}
            computing = [name for name in names if name not in _NOT_COMPUTING]
            with arena(computing, cpu.CORES, Path(folder)) as held:
                for duration_s in KERNELS_S[1:2] if options.quick else KERNELS_S:
                    load = spinning(duration_s)
                    found["kernels"][load.label] = summary(held, turns(held, load, rounds, seconds / 3))
                held.facts()
    return found


def summary(held: Arena, found: Turns) -> dict[str, Any]:
    """Each contender's figures, and the ratios that can be taken."""
    figures: dict[str, Any] = {name: _figures(held, name, found) for name in found}
    figures |= {name: {"missing": reason} for name, reason in held.missing.items()}
    peers = [name for name in PEERS if name in found]
    best = max(peers, key=lambda name: figures[name]["jobs_per_s"], default=None)
    for label, upper, lower in (
        ("ratio_two_hop", "lepton", "celery_two_hop"),
        ("ratio_best_peer", "lepton", best),
        ("share_of_floor", "lepton", FLOOR),
        ("share_with_flower", "lepton_flower", "lepton"),
    ):
        if upper in found and lower in found:
            ratios = [one / other for one, other in zip(_rates(found[upper]), _rates(found[lower]), strict=True)]
            figures[label] = round(statistics.median(ratios), 3)
            figures[f"{label}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    if best is not None:
        figures["best_peer"] = best
    return figures


def _figures(held: Arena, name: str, found: Turns) -> dict[str, Any]:
    own, rates = found[name], _rates(found[name])
    by_process = {role: statistics.median(each.cpu_s[role] / each.jobs * 1e6 for each in own) for role in own[0].cpu_s}
    totals = [sum(each.cpu_s.values()) / each.jobs * 1e6 for each in own]
    idle = [(each.idle_s[name], each.elapsed_s) for other in found if other != name for each in found[other]]
    return {
        "jobs_per_s": round(statistics.median(rates), 1),
        "jobs_per_s_range": [round(min(rates), 1), round(max(rates), 1)],
        "cpu_us_per_job": round(statistics.median(totals), 1),
        "cpu_us_per_job_range": [round(min(totals), 1), round(max(totals), 1)],
        "cpu_us_per_job_by_process": {role: round(us, 1) for role, us in by_process.items()},
        "jobs": own[0].jobs,
        "idle_cpu_share": round(sum(s for s, _ in idle) / sum(s for _, s in idle), 4) if idle else None,
        "settings": held.contenders[name].settings,
    }


def _rates(own: Sequence[Turn]) -> list[float]:
    return [each.jobs / each.seconds for each in own]


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    for label, figures in (("noop", found), *found.get("kernels", {}).items()):
        named = {name: figures[name] for name in NAMES if name in figures}
        present = {name: each for name, each in named.items() if "missing" not in each}
        keys = ("jobs_per_s", "jobs_per_s_range", "cpu_us_per_job", "idle_cpu_share")
        rows = [(name, *map(each.get, keys), each.get("missing")) for name, each in named.items()]
        yield report.table(label, ("", "jobs/s", "range", "CPU us a job", "idle CPU", ""), rows)
        parts = {name: each["cpu_us_per_job_by_process"] for name, each in present.items()}
        roles = list(dict.fromkeys(role for each in parts.values() for role in each))
        split = [(name, *map(each.get, roles)) for name, each in parts.items()]
        yield report.table(f"{label}: CPU us a job, by process", ("", *roles), split)
        ratios = [(name, figures[name], figures[f"{name}_range"]) for name in figures if f"{name}_range" in figures]
        title = f"{label}: best peer {figures.get('best_peer', 'none')}"
        yield report.table(title, ("ratio", "median", "range"), ratios)
        yield report.how_each_is_run({name: each["settings"] for name, each in present.items()})
