"""A CSV of prices in, a Parquet of option prices out: one job a row, all through one `submit_many`.

Run: `LEPTON_REDIS_URL=redis://... python examples/backfill/backfill.py --output options.parquet`.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from lepton_ai import Client

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; Parquet needs it: pip install 'lepton-ai[backfill]'") from None

YEARS = np.array([1 / 12, 1 / 4, 1 / 2, 1.0])
PRICES = Path(__file__).resolve().parents[1] / "data" / "stocks.csv"

parser = argparse.ArgumentParser(description="Price options at the money for each month of each company.")
parser.add_argument("--input", type=Path, default=PRICES, help="CSV with symbol, date, price; oldest first")
parser.add_argument("--output", type=Path, default=Path("options.parquet"))
options = parser.parse_args()

months: list[dict[str, str]] = []
rows: list[dict[str, object]] = []
history: defaultdict[str, list[float]] = defaultdict(list)
with options.input.open(newline="", encoding="utf-8") as file:
    for month in csv.DictReader(file):
        past = history[month["symbol"]]
        past.append(float(month["price"]))
        if len(past) <= 12:  # the volatility is that of the twelve months before
            continue
        volatility = np.diff(np.log(past[-13:])).std(ddof=1) * np.sqrt(12)
        spot = np.full(YEARS.size, past[-1])
        months.append(month)
        rows.append(
            {"spot": spot, "strike": spot, "years": YEARS, "volatility": np.full(YEARS.size, volatility), "rate": 0.03}
        )

with Client() as lepton:  # low priority: a backfill must not bury online traffic
    results = [job.result(timeout=600) for job in lepton.submit_many("finance.black_scholes", rows, priority=1)]

table = {name: [month[name] for month in months] for name in ("symbol", "date")}
prices = {name: [result[name].tolist() for result in results] for name in ("call", "put")}
pq.write_table(pa.table({**table, "years": [YEARS.tolist()] * len(rows), **prices}), options.output)
print(f"{len(rows)} rows written to {options.output}")
