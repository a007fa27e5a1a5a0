"""Mean and p99 response of every policy that places jobs as they come, over the time on the best device.

`./lepton bench online [--quick] [--data DIR] [--copies N] [--stale S] [--spread S] [--rounds N] [--json]`. Simulated
(lepton_ai/placement/simulate.py): Poisson arrivals at 0.5 to 0.95 of what the fleet can carry, the fleets of
bench/fleets.py, and the policies themselves, called as the router calls them.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench import report, theory
from bench.cpu import CORES
from bench.fleets import Mix, drawn, measured
from lepton_ai.placement import policies
from lepton_ai.placement.simulate import Stream, poisson, simulate

LOADS = (0.5, 0.8, 0.9, 0.95)
#: Those for which a job at a time is the whole problem; the others plan for a window, and come to one of these.
POLICIES = ("affinity", "least_loaded", "earliest_finish", "externality", "auto")
#: The baseline: workers of one make share a queue, so what a router knows is nothing to it.
FIXED = "affinity"
DEFAULT = "externality"
#: How many place side by side, all of them with the newest knowledge; and the last also with old.
ROUTERS = (1, 4)
#: How old the knowledge of routers is that see one another's placements before they decide: some round trips.
_STALE_S = 0.002
#: The mean that the default must keep to.
BARS = {0.9: 2.5, 0.95: 4.0}
_FLEETS, _JOBS, _SEED = 8, 30_000, 6

_HELP = """\
fleets    eight drawn ones, half of them consistent (a device that is faster is so for every job), half not; and
          with --data DIR the measured one (network_timings.csv). bench/fleets.py has the law.
load      arrivals over the largest rate that any fixed split of the jobs over the devices can carry (by LP).
policy    affinity is the baseline, fixed queues: each kernel and size on that of its best kind, chosen with hindsight.
stale_s   how often a router looks at the devices (--stale); 0: before each placement. In between it knows what it
          gave itself, and takes the other routers to give as much.
mean, p99 the mean response (from arrival to end) and the 99th percentile of the responses, both over the mean time of
          a job on the device that is best for it; the first tenth of the jobs is left out. A policy that is not stable
          has no mean: its figure grows with the run.
floor     (of a fleet) what the mean would be with no waiting at all, under the best split that carries the load.
"""


def main() -> int:
    parser = report.parser(__doc__, rounds=1)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _HELP
    parser.add_argument("--data", type=Path, metavar="DIR", help="where network_timings.csv lies")
    parser.add_argument("--copies", type=int, default=4, metavar="N", help="devices of each kind measured (default: 4)")
    parser.add_argument(
        "--stale",
        type=float,
        default=_STALE_S,
        metavar="S",
        help="seconds between a router's looks (default: %(default)s)",
    )
    parser.add_argument(
        "--spread", type=float, default=0.0, metavar="S", help="deviation of log(real / predicted time) (default: 0)"
    )
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    mixes = [drawn(number) for number in range(2 if options.quick else _FLEETS)]
    if options.data is not None:
        mixes.append(measured(options.data, options.copies))
    jobs = 5_000 if options.quick else _JOBS
    knowledge = [*((0.0, routers) for routers in ROUTERS), (options.stale, ROUTERS[-1])]
    checks = list(theory.checks(20_000, 100) if options.quick else theory.checks(200_000, 500))
    rows: list[dict[str, Any]] = []
    fleets: list[dict[str, Any]] = []
    # Started anew, each with one thread: a forked child of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(CORES, mp_context=context) as pool:
        due = {}
        for mix in mixes:
            capacity_hz = mix.capacity_hz()
            fleets.append(_described(mix, capacity_hz))
            for load, turn in itertools.product(LOADS, range(options.rounds)):
                stream = poisson(load * capacity_hz, mix.share, jobs, [_SEED, turn], options.spread)
                due[pool.submit(_rows, mix, load, stream, knowledge)] = (mix.name, load)
        for done, each in enumerate(as_completed(due), 1):
            rows += each.result()
            name, load = due[each]
            print(f"{done} of {len(due)}: {name} at load {load}", file=sys.stderr, flush=True)
    return {"rows": _averaged(rows), "fleets": fleets, "checks": [_shown(check) for check in checks]}


def _rows(mix: Mix, load: float, stream: Stream, knowledge: Sequence[tuple[float, int]]) -> list[dict[str, Any]]:
    """One stream under every policy and knowledge."""
    runs = [(name, known) for name in POLICIES for known in knowledge[: 1 if name == FIXED else None]]
    rows = []
    for name, (stale_s, routers) in runs:
        if name not in policies.names():
            continue
        found = simulate(policies.load(name), mix.fleet, stream, routers=routers, stale_s=stale_s)
        response = found.response_s[int(theory.WARM_UP * len(stream.at_s)) :] / mix.best_s
        rows.append(
            {
                "fleet": mix.name,
                "load": load,
                "policy": name,
                "stale_s": stale_s,
                "routers": routers,
                "mean": float(response.mean()),
                "p99": float(np.quantile(response, 0.99)),
            }
        )
    return rows


def _averaged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each case: the mean of its rounds."""
    keys = ("fleet", "load", "policy", "stale_s", "routers")
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["fleet"], row["load"])):
        cases.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, case, strict=True))
        | {figure: round(float(np.mean([row[figure] for row in own])), 3) for figure in ("mean", "p99")}
        for case, own in cases.items()
    ]


def _described(mix: Mix, capacity_hz: float) -> dict[str, Any]:
    return {
        "fleet": mix.name,
        "kinds": int(mix.kind.max()) + 1,
        "devices": len(mix.kind),
        "slots": int(mix.fleet.slots.sum()),
        "capacity_hz": round(capacity_hz, 1),
        "best_s": round(mix.best_s, 6),
        "floor": {str(load): round(mix.floor(load, capacity_hz), 3) for load in LOADS},
    }


def _shown(check: theory.Check) -> dict[str, Any]:
    figures = {"theory": round(check.theory, 4), "simulated": round(check.simulated, 4), "off": round(check.off, 4)}
    return {"name": check.name, "load": check.load} | figures


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    names = list(dict.fromkeys(row["policy"] for row in found["rows"]))
    by_case = {(row["fleet"], row["load"], row["stale_s"], row["routers"], row["policy"]): row for row in found["rows"]}
    floors = {each["fleet"]: each["floor"] for each in found["fleets"]}
    for stale_s, routers in sorted({(row["stale_s"], row["routers"]) for row in found["rows"]}):
        knows = f"routers look every {stale_s} s" if stale_s else "exact"
        for figure in ("mean", "p99"):
            rows = []
            for fleet, load in itertools.product(floors, LOADS):
                own = (by_case.get((fleet, load, stale_s, routers, name)) for name in names)
                rows.append((fleet, str(load), floors[fleet][str(load)], *(row and row[figure] for row in own)))
            title = f"{figure} response over the best device's time: {knows}, routers: {routers}"
            yield report.table(title, ("", "load", "floor", *names), rows)
    worst = [
        (load, *(_worst(found["rows"], load, stale) for stale in (False, True)), bar) for load, bar in BARS.items()
    ]
    yield report.table(f"{DEFAULT} on the worst fleet: mean", ("load", "exact", "stale", "bar, exact"), worst)
    columns = ("kinds", "devices", "slots", "capacity_hz", "best_s")
    yield report.table("fleets", ("", *columns), [(each["fleet"], *map(each.get, columns)) for each in found["fleets"]])
    columns = ("load", "theory", "simulated", "off")
    checks = [(each["name"], *map(each.get, columns)) for each in found["checks"]]
    yield report.table("the simulator beside theory: mean response over mean service", ("", *columns), checks)


def _worst(rows: list[dict[str, Any]], load: float, stale: bool) -> float:
    return max(
        row["mean"]
        for row in rows
        if row["policy"] == DEFAULT and row["load"] == load and bool(row["stale_s"]) == stale
    )
