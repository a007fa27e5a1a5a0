"""Streams: aggregates over event time, carried from job to job."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

# No batching: a job begins with the state that the one before it left.
window = Kernel(
    "stream.window",
    inputs={
        "times": "float64[n]",
        "keys": "int64[n]",
        "values": "float64[n]",
        "width": "float64",
        "lateness": "float64 = 0",
        "state": "float64[s,6]",
        "watermark": "float64[1]",
    },
    outputs={
        "closed": "float64[c,6]",
        "state": "float64[o,6]",
        "watermark": "float64[1]",
        "late": "int64[1]",
    },
    flops="20*(n + s)",
    bytes="24*n + 96*s",
    limits={"width": "width > 0", "lateness": "lateness >= 0"},
    tolerance=1e-9,
    summary="Count, sum, least and most of each key in windows of event time, with state from job to job.",
)

Column = NDArray[np.float64]
Table = NDArray[np.float64]


@window.reference
def _reference(
    times: Column,
    keys: NDArray[np.int64],
    values: Column,
    width: float,
    lateness: float,
    state: Table,
    watermark: Column,
) -> Outputs:
    """Fixed windows of event time, closed by a watermark.

    Akidau et al. (2015), "The Dataflow Model", Proc. VLDB Endowment 8 (12), sec. 1.2 and 2.2. An event at t seconds is
    in window q = floor(t / width), which starts at q * width. The watermark is the latest time seen less `lateness`,
    and never falls; a window is closed once the watermark is in a later one. `closed` has the windows that this job
    closed and `state` those that are open, as rows (key, start, count, sum, least, most) by start, then key; the mean
    is sum / count. The next job gets `state` and `watermark`; the first one no rows, and -inf (or NaN). A watermark of
    +inf without events closes all that is open.

    An event is late, and only counted, where the watermark that came with the job had closed its window, or its time
    is not finite (or so large that the window's start is not). Order within a job does not matter. A value of NaN is
    skipped, as in SQL, though its time moves the watermark. Keys are carried as float64, which tells whole numbers up
    to 2**53 apart. The state belongs to one width; a row with NaN in it, or without a finite start, is left out.
    """
    windows: dict[tuple[float, float], list[float]] = {}

    def add(q: float, key: float, count: float, total: float, least: float, most: float) -> None:
        old = windows.setdefault((q, key), [0, 0, math.inf, -math.inf])
        windows[q, key] = [old[0] + count, old[1] + total, min(old[2], least), max(old[3], most)]

    late, latest = 0, -math.inf
    old = _index(watermark[0], width)
    for row in state:
        q = float(np.rint(_divide(row[1], width)))
        if math.isfinite(q * width) and not np.isnan(row).any():
            add(q, *row[[0, 2, 3, 4, 5]].tolist())
    for t, key, value in zip(times.tolist(), keys.tolist(), values.tolist(), strict=True):
        q = _index(t, width)
        if not math.isfinite(q * width):
            late += 1
            continue
        latest = max(latest, t)
        if q < old:
            late += 1
        elif not math.isnan(value):
            add(q, float(key), 1, value, value, value)
    rows = np.array([[q, key, *each] for (q, key), each in windows.items()]).reshape(-1, 6)
    return _finished(rows, late, latest, width, lateness, watermark)


def _divide(a: float, b: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float64(a) / np.float64(b))


def _index(t: float, width: float) -> float:
    """The window that t seconds are in; NaN and infinities as IEEE 754 has it."""
    return float(np.floor(_divide(t, width)))


def _finished(rows: Table, late: int, latest: float, width: float, lateness: float, watermark: Column) -> Outputs:
    """The outputs, of rows (index, key, count, sum, least, most) in any order."""
    due, before = latest - lateness, float(watermark[0])
    before = -math.inf if math.isnan(before) else before
    after = due if due > before else before
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    closed = np.count_nonzero(rows[:, 0] < _index(after, width))
    ordered = rows[:, [1, 0, 2, 3, 4, 5]]
    ordered[:, 1] *= width
    return {
        "closed": ordered[:closed],
        "state": ordered[closed:],
        "watermark": np.array([after]),
        "late": np.array([late]),
    }


def _bits(x: float) -> Any:
    value: Any = np.float64(x)
    return value.view(np.uint64)


def _slot(slots: NDArray[np.int32], rows: Table, q: float, key: float) -> int:
    """Where the table of slots has this window's row, or (with -1 in it) has room for it."""
    mask = np.uint64(slots.size - 1)
    mixed = _bits(key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = ((mixed ^ (mixed >> np.uint64(32))) + _bits(q)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    slot = (mixed ^ (mixed >> np.uint64(32))) & mask
    while True:
        row = slots[slot]
        if row < 0 or (rows[row, 0] == q and rows[row, 1] == key):
            return slot
        slot = (slot + np.uint64(1)) & mask


def _gather(
    times: Column,
    keys: NDArray[np.int64],
    values: Column,
    width: float,
    old: float,
    state: Table,
    rows: Table,
) -> tuple[int, int, float]:
    """Fills rows (index, key, count, sum, least, most); returns how many, how many events are late, and the latest.

    Windows are found by hashing, with linear probing (Knuth, vol. 3, sec. 6.4, algorithm L). The table grows with the
    windows, which are few as a rule, so that it stays in the cache.
    """
    slots = np.full(1024, -1, np.int32)
    found, late, latest = 0, 0, -np.inf
    for i in range(-state.shape[0], times.size):
        if i < 0:
            row = state[i + state.shape[0]]
            q, key = np.rint(row[1] / width) + 0.0, row[0] + 0.0
            count, total, least, most = row[2], row[3], row[4], row[5]
            bad = key != key or count != count or total != total or least != least or most != most
            if bad or not abs(q * width) < np.inf:
                continue
        else:
            t = times[i]
            q = np.floor(t / width) + 0.0  # -0 becomes 0, which has other bits
            if not abs(q * width) < np.inf:
                late += 1
                continue
            latest = max(latest, t)
            total = values[i]
            if q < old:
                late += 1
                continue
            if total != total:
                continue
            key, count, least, most = np.float64(keys[i]), 1.0, total, total
        slot = _slot(slots, rows, q, key)
        at = slots[slot]
        if at < 0:
            at = np.int32(found)
            slots[slot] = at
            rows[at, 0] = q
            rows[at, 1] = key
            rows[at, 2] = count
            rows[at, 3] = total
            rows[at, 4] = least
            rows[at, 5] = most
            found += 1
            if 2 * found > slots.size:
                slots = np.full(4 * slots.size, -1, np.int32)
                for each in range(found):
                    slots[_slot(slots, rows, rows[each, 0], rows[each, 1])] = each
        else:
            row = rows[np.uint32(at)]
            row[2] += count
            row[3] += total
            row[4] = min(row[4], least)
            row[5] = max(row[5], most)
    return found, late, latest


@window.on("cpu")
def _cpu(device: Any) -> Run:
    from numba import njit, types
    from numba.extending import register_jitable

    for function in (_bits, _slot):
        register_jitable(function)
    column, table = (types.Array(types.float64, ndim, "C", readonly=True) for ndim in (1, 2))
    keys_type, double = types.Array(types.int64, 1, "C", readonly=True), types.float64
    gather = njit(
        (column, keys_type, column, double, double, table, types.float64[:, ::1]),
        nogil=True,
        cache=True,
        error_model="numpy",
    )(_gather)

    def run(inputs: Inputs, context: Context) -> Outputs:
        times, state, width, watermark = (inputs[name] for name in ("times", "state", "width", "watermark"))
        rows = np.empty((times.size + len(state), 6))  # memory that no window needs is never touched
        old = _index(watermark[0], width)
        found, late, latest = gather(times, inputs["keys"], inputs["values"], width, old, state, rows)
        return _finished(rows[:found], late, latest, width, inputs["lateness"], watermark)

    return run


@window.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    none, never = np.empty((0, 6)), np.array([-np.inf])
    one = np.array([1.0])
    yield {"times": one, "keys": np.array([7]), "values": one, "width": 10.0, "state": none, "watermark": never}
    # Three jobs of a stream, each with what the one before it left; some events come late, at either side of 0.
    state, watermark = none, never
    for job in range(3):
        n = 2_000
        events = {
            "times": 100.0 * job - 50 + random.uniform(0, 100, n) - random.exponential(2, n),
            "keys": random.integers(-5, 20, n),
            "values": random.normal(20, 5, n),
            "width": 10.0,
            "lateness": 5.0,
            "state": state,
            "watermark": watermark,
        }
        yield events
        done = _reference(**events)
        state, watermark = done["state"], done["watermark"]
    # Nothing new, and all that is open closes.
    nothing = np.empty(0)
    whole = {"times": nothing, "keys": np.empty(0, np.int64), "values": nothing, "width": 10.0, "lateness": 5.0}
    yield whole | {"state": state, "watermark": np.array([np.inf])}
    # Times without a window, keys that float64 cannot tell apart, a window each, and rows that are none.
    times = np.array([np.nan, np.inf, -np.inf, 1e308, 0.0, -0.0, -1e-300, 0.3, 3, 3])
    values = np.array([1, 2, 3, 4, 5, 6, np.nan, np.inf, -np.inf, 10])
    keys = np.array([0, 0, 0, 0, 2**53, 2**53 + 1, 0, -(2**63), 2**63 - 1, 0])
    odd = np.array([[0, 0, 3, 9, 1, 5], [0, np.nan, 1, 1, 1, 1], [1, np.inf, 1, 1, 1, 1], [np.nan, 0, 1, 1, 1, 1]])
    yield {"times": times, "keys": keys, "values": values, "width": 0.1, "state": odd, "watermark": never}
