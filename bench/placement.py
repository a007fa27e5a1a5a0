"""How near the policies come to the optimum, and how long they take.

`./lepton bench placement [--instances DIR] [--policies a,b] [--large] [--quick] [--json]`. Every policy places every
instance once, after a small one of the same form, so that nothing is compiled on the clock. The gap is
`makespan / bound - 1`; the bound is the linear program's, or beyond a hundred thousand costs what its dual proves (the
table says which). What would take minutes or tens of gigabytes is left out and named. The policies that search are
asked to end within a time; what they really took is in the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import instances, report
from bench.instances import Instance
from lepton_ai.errors import LeptonError
from lepton_ai.placement import policies
from lepton_ai.placement.bounds import lower_bound
from lepton_ai.placement.problem import Policy, Problem

#: Rows of a policy other than the one it has by itself: the row's name, the policy's, its options.
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "priced": ("priced", {"budget_s": 1.0}),
    "priced-200ms": ("priced", {"budget_s": 0.2}),
    "priced-10ms": ("priced", {"budget_s": 0.01}),
}
#: Jobs, devices, models, shared: of each form, and one so large that other code runs where classes are used.
_WARM_UP = ((64, 8, 4, False), (64, 8, 4, True), (30_000, 64, 8, True))
#: Jobs x devices up to which a policy is tried: above, it takes minutes. The others here work on a column for each
#: device, which a million jobs on a thousand devices have no room for.
_MOST = {"genetic": 100_000, "min_min": 1_000_000, "sufferage": 1_000_000}
_MOST_EXPANDED = 100_000_000


def main() -> int:
    options = _parser().parse_args()
    try:
        rows = _chosen(options.policies)
        given = instances.read(options.instances) if options.instances else None
    except LeptonError as error:
        print(f"lepton bench placement: {error}", file=sys.stderr)
        return 2
    return report.play(lambda: _measure(rows, _all(options, given)), _tables, plain=options.json)


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Without DIR: Braun's twelve classes by their published law, fleets with classes of devices, and large"
        " ones (10,000 x 64, 100,000 x 256, 1,000,000 x 1,024), all seeded. The summary is over Braun's classes, or"
        " over DIR's files.",
    )
    found.add_argument(
        "--instances",
        type=Path,
        metavar="DIR",
        help="files to place instead: seconds, one a line, job by job, 512 x 16; or behind a line `jobs machines`",
    )
    found.add_argument("--policies", metavar="A,B", help="only these (default: every one that there is)")
    found.add_argument("--large", action="store_true", help="with --instances: the large ones too")
    found.add_argument("--quick", action="store_true", help="in small: to see that it runs, not for figures")
    found.add_argument("--json", action="store_true", help="the report as JSON; else tables")
    return found


def _chosen(names: str | None) -> dict[str, Policy]:
    """[row's name]: the policy. Those whose package is missing are named on stderr, unless they were asked for."""
    known = policies.names()
    rows = {name: (name, {}) for name in known} | {
        row: setting for row, setting in _SETTINGS.items() if setting[0] in known
    }
    asked = None if names is None else [name.strip() for name in names.split(",") if name.strip()]
    found: dict[str, Policy] = {}
    for row in rows if asked is None else asked:
        name, options = rows.get(row, (row, {}))
        try:
            found[row] = policies.load(name, **options)
        except LeptonError as error:
            if asked is not None:
                raise
            _say(f"without {row}: {error}")
    return found


def _all(options: argparse.Namespace, given: list[Instance] | None) -> Iterator[Instance]:
    if given is None:
        for make in instances.generated(quick=options.quick):
            yield make()
    else:
        yield from given
    if options.large or (given is None and not options.quick):
        for make in instances.large():
            yield make()


def _measure(rows: dict[str, Policy], problems: Iterable[Instance]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for policy in rows.values():
        for small in _WARM_UP[: 3 if getattr(policy, "by_class", False) else 2]:
            policy.place(instances.fleet(*small[:3], shared=small[3]).problem)
    for instance in problems:
        _say(instance.name)
        bound = lower_bound(instance.problem)
        for row, policy in rows.items():
            if _is_too_large(policy, instance.problem):
                left_out.append({"instance": instance.name, "policy": row})
                continue
            makespan_s, ms = _placed(policy, instance.problem)
            found.append(
                {
                    "instance": instance.name,
                    "policy": row,
                    "makespan": makespan_s,
                    "bound": bound.seconds,
                    "bound_method": bound.method,
                    "gap": makespan_s / bound.seconds - 1,
                    "ms": ms,
                    "braun": instance.is_braun,
                }
            )
    return {"instances": found, "summary": _summary(found), "left_out": left_out}


def _placed(policy: Policy, problem: Problem) -> tuple[float, float]:
    """Makespan in seconds; milliseconds that it took to find."""
    began = time.perf_counter()
    plan = policy.place(problem)
    ms = 1e3 * (time.perf_counter() - began)
    assert bool((plan.device >= 0).all()), f"{policy.name} left jobs out that a device can run"
    return plan.makespan_s(problem), ms


def _is_too_large(policy: Policy, problem: Problem) -> bool:
    cells = problem.jobs * problem.devices
    return cells > _MOST.get(policy.name, cells) or (cells > _MOST_EXPANDED and not getattr(policy, "by_class", False))


def _summary(found: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """[policy] over Braun's classes: the gap on average and at most, and the mean time."""
    rows = [row for row in found if row["braun"]]
    return {
        policy: {
            "average_gap": statistics.mean(row["gap"] for row in rows if row["policy"] == policy),
            "max_gap": max(row["gap"] for row in rows if row["policy"] == policy),
            "ms": statistics.mean(row["ms"] for row in rows if row["policy"] == policy),
            "max_ms": max(row["ms"] for row in rows if row["policy"] == policy),
        }
        for policy in dict.fromkeys(row["policy"] for row in rows)
    }


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    rows = found["instances"]
    yield report.table(
        "Braun's classes",
        ["policy", "average gap", "largest gap", "mean ms", "largest ms"],
        [
            [policy, f"{each['average_gap']:.2%}", f"{each['max_gap']:.2%}", each["ms"], each["max_ms"]]
            for policy, each in sorted(found["summary"].items(), key=lambda item: item[1]["average_gap"])
        ],
    )
    for name in dict.fromkeys(row["instance"] for row in rows):
        here = sorted((row for row in rows if row["instance"] == name), key=lambda row: row["gap"])
        yield report.table(
            f"{name}: no plan ends before {report.shown(here[0]['bound'])} s ({here[0]['bound_method']})",
            ["policy", "makespan s", "gap", "ms"],
            [
                *([row["policy"], row["makespan"], f"{row['gap']:.2%}", row["ms"]] for row in here),
                *([row["policy"], "left out"] for row in found["left_out"] if row["instance"] == name),
            ],
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
