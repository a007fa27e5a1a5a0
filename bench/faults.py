"""What is lost when things break: every scenario of `tests/faults`, and plain Celery in some of them beside it.

`./lepton bench faults [--quick] [--only NAME]... [--seed N] [--keep FOLDER] [--json]`. A row can be played again by its
name and its seed, which decides who is killed when; how the machine interleaves the rest nobody decides. The exit code
is 1 where Lepton lost a job, did one twice, or broke another promise; what plain Celery does is for comparison.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from tests.faults.scenario import Row, Scenario, perform
from tests.faults.stock import STOCK
from tests.faults.table import SCENARIOS

_COLUMNS = ("acked", "of", "lost", "twice", "rerun", "again p50", "max s", "took s")
_STYLES = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what we started is ended
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    _say(f"seed {options.seed}")
    try:
        report = {
            "faults": _played("lepton", _chosen(SCENARIOS, options.only), options),
            "stock": _played("plain celery", _chosen(STOCK, options.only), options),
        }
    except KeyboardInterrupt:
        return 130
    if options.json:
        print(json.dumps(msgspec.to_builtins(report)))
    else:
        _print(report, options.seed)
    return int(any(row.verdict == "failed" for row in report["faults"]))


def _options() -> argparse.Namespace:
    names = sorted({scenario.name for scenario in (*SCENARIOS, *STOCK)})
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=f"scenarios: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="all of them, smaller: some minutes instead of an hour")
    parser.add_argument("--only", action="append", metavar="NAME", help="play this scenario (may be given again)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31), help="what decides the schedule")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to keep the logs of plays that fail")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for name in options.only or ():
        if not _chosen((*SCENARIOS, *STOCK), [name]):
            parser.error(f"no scenario {name!r}; there are {', '.join(names)}")
    return options


def _chosen(scenarios: Iterable[Scenario], only: Sequence[str] | None) -> list[Scenario]:
    """Those named; `poison` names plain Celery's too, and `worker_kill_storm` all its kinds."""
    return [each for each in scenarios if only is None or each.name in only or each.name.partition(" ")[0] in only]


def _played(whose: str, scenarios: Sequence[Scenario], options: argparse.Namespace) -> list[Row]:
    rows = []
    for number, scenario in enumerate(scenarios, 1):
        _say(f"[{whose} {number}/{len(scenarios)}] {scenario.name}")
        row = perform(scenario, scenario.quick if options.quick else scenario.full, options.seed, _say, options.keep)
        _say(f"  {row.verdict} after {row.seconds} s: {row.acknowledged} acknowledged, {row.lost} lost")
        rows.append(row)
    return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(report: dict[str, list[Row]], seed: int) -> None:
    console = Console()
    for title, rows in (("Lepton", report["faults"]), ("plain Celery 5.7", report["stock"])):
        if not rows:
            continue
        table = Table(title=f"{title}, seed {seed}", box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("scenario", no_wrap=True)
        for column in _COLUMNS:
            table.add_column(column, justify="right")
        for row in rows:
            counts = (row.acknowledged, row.submitted, row.lost, row.duplicate_effects, row.re_executions)
            times = (row.recovery_p50_s, row.recovery_max_s, row.seconds)
            table.add_row(f"[{_STYLES[row.verdict]}]{row.name}[/]", *map(_shown, (*counts, *times)))
        console.print(table)
        for row in rows:
            for reason in row.reasons:
                console.print(f"{row.name} {row.verdict}: {reason}", markup=False, soft_wrap=True)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value}"


if __name__ == "__main__":
    raise SystemExit(main())
