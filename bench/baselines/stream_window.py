"""What NumPy makes of stream.window: a job of a stream whose windows fit a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BOUND = "latency"  # each event reads and writes the row of its window


def inputs(size: str) -> dict[str, Any]:
    """A minute of events, nearly in order, and the windows that the minute before left open.

    `sparse` has keys that lie far apart (hashes, say), for which no table has room.
    """
    sizes = {"small": (2_000, 20), "medium": (100_000, 300), "large": (1_000_000, 1_000)}
    n, keys = (sizes | {"sparse": (1_000_000, 1_000)})[size]
    random = np.random.default_rng(0)
    times = np.sort(random.uniform(60, 120, n)) - random.exponential(0.5, n)
    names = np.arange(keys) if size != "sparse" else np.sort(random.integers(0, 2**53, keys))
    totals = random.normal(2_000, 50, keys)
    state = np.stack([names, np.full(keys, 50.0), np.full(keys, 100.0), totals, totals / 110, totals / 90], axis=1)
    return {
        "times": times,
        "keys": random.choice(names, n),
        "values": random.normal(20, 5, n),
        "width": 10.0,
        "lateness": 5.0,
        "state": state,
        "watermark": np.array([55.0]),
    }


def expressions() -> dict[str, Callable[..., Any]]:
    return {"bincount and ufunc.at": _counted, "argsort and ufunc.reduceat": _sorted}


def _counted(**job: Any) -> dict[str, Any]:
    places, columns, first, names, late = _events(**job)
    if (places.max(initial=0) + 1) * (last := int(names.max(initial=0)) + 1) > 2**26:
        return _sorted(**job)  # no table of so many windows
    count, total, least, most = columns
    code = places * last + names.astype(np.int64)
    size = (int(places.max(initial=0)) + 1) * last
    counts, totals = np.bincount(code, count, size), np.bincount(code, total, size)
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, code, least)
    np.maximum.at(high, code, most)
    there = np.flatnonzero(counts)
    found = [each[there] for each in (counts, totals, low, high)]
    return _outputs(there % last, first + there // last, found, late, **job)


def _sorted(**job: Any) -> dict[str, Any]:
    places, columns, first, names, late = _events(**job)
    order = np.lexsort((names, places))
    names, places = names[order], places[order]
    starts = np.flatnonzero(np.r_[True, (names[1:] != names[:-1]) | (places[1:] != places[:-1])])
    joins = (np.add, np.add, np.minimum, np.maximum)
    found = [join.reduceat(column[order], starts) for join, column in zip(joins, columns, strict=True)]
    return _outputs(names[starts], first + places[starts], found, late, **job)


def _events(times: Any, keys: Any, values: Any, width: float, state: Any, watermark: Any, **_: Any) -> Any:
    """Of each event in time and row of the state: the window's number from the first on, what it adds, and the key."""
    index = np.floor(times / width)
    kept = index >= np.floor(watermark[0] / width)
    late = times.size - np.count_nonzero(kept)
    if late:
        index, keys, values = index[kept], keys[kept], values[kept]
    index = np.concatenate([index, np.rint(state[:, 1] / width)])
    first = index.min()
    added = (np.ones(values.size), values, values, values)
    columns = [np.concatenate([new, old]) for new, old in zip(added, state[:, 2:].T, strict=True)]
    return (index - first).astype(np.int64), columns, first, np.concatenate([keys, state[:, 0]]), late


def _outputs(
    names: Any, index: Any, found: Any, late: int, times: Any, width: float, lateness: float, watermark: Any, **_: Any
) -> dict[str, Any]:
    rows = np.stack([names, index * width, *found], axis=1)
    after = max(watermark[0], times.max() - lateness)
    closed = np.searchsorted(index, np.floor(after / width))
    return {
        "closed": rows[:closed],
        "state": rows[closed:],
        "watermark": np.array([after]),
        "late": np.array([late]),
    }
