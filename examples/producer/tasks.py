"""A plain Celery producer. It imports nothing of Lepton, and its module is called `tasks`, as in many a project.

Run: `BROKER_URL=redis://... RESULT_BACKEND=redis://... python examples/producer/tasks.py --count 100`.
Each job prices the options on one company in one month. The last line of output is JSON, for scripts.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult

DATA = Path(__file__).resolve().parents[1] / "data"
#: Jobs sent and not yet answered: enough to keep a fleet busy, few enough that a producer who stops leaves little.
IN_FLIGHT = 24

app = Celery("producer", broker=os.environ.get("BROKER_URL"), backend=os.environ.get("RESULT_BACKEND"))


def orders(data_dir: Path) -> Iterator[dict[str, Any]]:
    """The arguments of one job a company and month: five strikes, three months to run, plain lists as JSON has them."""
    prices: defaultdict[str, list[float]] = defaultdict(list)
    with (data_dir / "stocks.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            prices[row["symbol"]].append(float(row["price"]))
    strikes = (0.8, 0.9, 1.0, 1.1, 1.2)
    for series in prices.values():
        for month in range(12, len(series)):
            past = series[month - 12 : month + 1]
            returns = [math.log(after / before) for before, after in pairwise(past)]
            yield {
                "spot": [series[month]] * len(strikes),
                "strike": [series[month] * strike for strike in strikes],
                "years": [0.25] * len(strikes),
                "volatility": [statistics.stdev(returns) * math.sqrt(12)] * len(strikes),
                "rate": 0.03,
            }


def produce(data_dir: Path, count: int, timeout_s: float) -> dict[str, Any]:
    """Sends `count` jobs, a bounded number at once, and reports how they ended; why one failed goes to stderr.

    `latencies_s` has one figure a job that succeeded: from just before it was sent until its result was here.
    """
    waiting: deque[tuple[AsyncResult, float]] = deque()
    latencies_s: list[float] = []

    def finish(result: AsyncResult, sent: float) -> None:
        try:
            outcome = result.get(timeout=timeout_s, propagate=False)
        except CeleryTimeoutError:
            outcome = TimeoutError(f"no result within {timeout_s:g} s")
        if isinstance(outcome, Exception):
            print(f"{result.id}: {type(outcome).__name__}: {outcome}", file=sys.stderr)
        else:
            latencies_s.append(round(time.perf_counter() - sent, 6))

    for order in islice(cycle(orders(data_dir)), count):
        if len(waiting) >= IN_FLIGHT:
            finish(*waiting.popleft())
        sent = time.perf_counter()
        waiting.append((app.send_task("finance.black_scholes", kwargs=order, queue="lepton.ingest"), sent))
    for result, sent in waiting:
        finish(result, sent)
    succeeded = len(latencies_s)
    return {"submitted": count, "succeeded": succeeded, "failed": count - succeeded, "latencies_s": latencies_s}


def main() -> None:
    parser = argparse.ArgumentParser(description="Send option pricing jobs with plain Celery.")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with stocks.csv")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for each result")
    options = parser.parse_args()
    if not os.environ.get("BROKER_URL") or not os.environ.get("RESULT_BACKEND"):
        parser.error("set BROKER_URL and RESULT_BACKEND, both to the Redis that Lepton uses: redis://host:6379/0")
    ended = produce(options.data, options.count, options.timeout)
    print(json.dumps(ended))
    sys.exit(ended["failed"] > 0)


if __name__ == "__main__":
    main()
