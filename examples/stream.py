"""Events in small batches, and what closes as time goes on: windows that carry state from job to job.

Four years of daily weather, as four sensors would send it: a batch of days a job, each day a little late at random, all
under one state key. A job gets what the one before it left open, and returns the windows of thirty days that its events
have closed. At the end all that was sent is in a window once, whatever happened to the workers meanwhile.

Run, with LEPTON_REDIS_URL set to the broker of a running Lepton: `python examples/stream.py`.
"""

import argparse
import csv
import uuid
from pathlib import Path

import numpy as np

from lepton_ai import Client

DAY_S = 86_400.0
SENSORS = ("precipitation", "temp_max", "temp_min", "wind")
COLUMNS = ("sensor", "start", "count", "sum", "least", "most")


def events() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times in seconds from the first day, sensors by number, and values, in the order in which they arrive."""
    with (Path(__file__).parent / "data" / "seattle-weather.csv").open(newline="", encoding="utf-8") as file:
        rows = [[float(row[name]) for name in SENSORS] for row in csv.DictReader(file)]
    values = np.array(rows).ravel()
    times = np.repeat(DAY_S * np.arange(len(rows)), len(SENSORS))
    keys = np.tile(np.arange(len(SENSORS)), len(rows))
    # By up to two days too late, so that batches overlap.
    order = np.argsort(times + np.random.default_rng(0).uniform(0, 2 * DAY_S, times.size), kind="stable")
    return times[order], keys[order], values[order]


def main() -> None:
    parser = argparse.ArgumentParser(description="Stream the example weather through windows of thirty days.")
    parser.add_argument("--batch", type=int, default=400, help="events a job (default: %(default)s)")
    parser.add_argument("--state-key", default=f"seattle-{uuid.uuid4().hex[:8]}", help="default: a new one")
    options = parser.parse_args()
    times, keys, values = events()
    closed, late = [], 0
    asked = {"width": 30 * DAY_S, "lateness": 3 * DAY_S}
    with Client() as lepton:
        for start in range(0, times.size, options.batch):
            batch = slice(start, start + options.batch)
            job = lepton.submit(
                "stream.window",
                {"times": times[batch], "keys": keys[batch], "values": values[batch], **asked},
                state_key=options.state_key,
            )
            outputs = job.result(timeout=30)
            closed.append(outputs["closed"])
            late += int(outputs["late"][0])
        # A last event, far in the future, closes what is open; its own window stays so.
        end = {"times": np.array([times.max() + 1e9]), "keys": np.array([0]), "values": np.array([0.0]), **asked}
        closed.append(lepton.submit("stream.window", end, state_key=options.state_key).result(timeout=30)["closed"])
    windows = np.concatenate(closed)
    for row in windows[:8]:
        told = dict(zip(COLUMNS, row.tolist(), strict=True))
        mean = told["sum"] / told["count"]
        print(
            f"day {told['start'] / DAY_S:5.0f}  {SENSORS[int(told['sensor'])]:13} {told['count']:3.0f} days"
            f"  mean {mean:6.2f}  {told['least']:6.2f} to {told['most']:6.2f}"
        )
    print(f"{len(windows)} windows of {windows[:, 2].sum():.0f} events, {late} late, of {times.size} sent")
    assert windows[:, 2].sum() + late == times.size, "an event is missing, or was counted twice"
    assert np.isclose(windows[:, 3].sum(), values.sum()) or late, "the sums differ"


if __name__ == "__main__":
    main()
