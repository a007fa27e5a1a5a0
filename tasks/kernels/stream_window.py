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
    carries=("state", "watermark"),
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
    is sum / count. The next job gets `state` and `watermark`; the first one no rows, and NaN or -inf. A watermark of
    +inf without events closes all that is open.

    An event is late, and only counted, where the watermark that came with the job had closed its window, or its time
    is not finite (or so large that the window's start is not). Order within a job does not matter. A value of NaN is
    skipped, as in SQL, though its time moves the watermark. Keys are carried as float64, which tells whole numbers up
    to 2**53 apart. The state belongs to one width; a row of it that is no window (NaN in it, a start that is not
    finite, a count below 1) is left out.
    """
    windows: dict[tuple[float, float], list[float]] = {}

    def add(q: float, key: float, count: float, total: float, least: float, most: float) -> None:
        old = windows.setdefault((q, key), [0, 0, math.inf, -math.inf])
        windows[q, key] = [old[0] + count, old[1] + total, min(old[2], least), max(old[3], most)]

    late, latest = 0, -math.inf
    old = _index(watermark[0], width)
    for row in state:
        q = float(_nearest(_divide(row[1], width)))
        if math.isfinite(q * width) and not np.isnan(row).any() and row[2] >= 1:
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
    rows = np.array([[key, q, *each] for (q, key), each in windows.items()]).reshape(-1, 6)
    return _finished(_ordered(rows), late, latest, width, lateness, watermark)


def _divide(a: float, b: float) -> float:
    with np.errstate(all="ignore"):
        return float(np.float64(a) / np.float64(b))


def _nearest(x: float) -> Any:
    """The whole number next to x; the index of a window by its start, which has been rounded."""
    return np.floor(x + 0.5) + 0.0 if abs(x) < 4503599627370496.0 else x  # -0 becomes 0, which has other bits


def _index(t: float, width: float) -> float:
    """The window that t seconds are in; NaN and infinities as IEEE 754 has it."""
    return float(np.floor(_divide(t, width)))


def _ordered(rows: Table) -> Table:
    """Rows (key, index, count, sum, least, most) by index, then key."""
    return rows[np.lexsort((rows[:, 0], rows[:, 1]))]


def _finished(rows: Table, late: int, latest: float, width: float, lateness: float, watermark: Column) -> Outputs:
    """The outputs, of ordered rows (key, index, count, sum, least, most), which become theirs."""
    due, before = latest - lateness, float(watermark[0])
    before = -math.inf if math.isnan(before) else before
    after = max(before, due)
    closed = int(np.count_nonzero(rows[:, 1] < _index(after, width)))
    rows[:, 1] *= width
    return {
        "closed": rows[:closed],
        "state": rows[closed:],
        "watermark": np.array([after]),
        "late": np.array([late]),
    }


# On the cpu one pass finds the window of each event and the range of windows and keys. Where they span a table of
# about the size of the job, that is filled and is in order already: a million events of 7,000 windows took 5 ms, by
# hashing 22. Keys that lie far apart are hashed.


def _survey(
    times: Column,
    keys: NDArray[np.int64],
    values: Column,
    width: float,
    old: float,
    state: Table,
    places: Column,
) -> tuple[int, float, float, float, float, float]:
    """Fills `places` with the index of each event's window, then of each row's of the state; NaN leaves it out.

    Returns how many events are late, the latest time, and the least and the greatest index and key; infinite keys
    where they are not all whole numbers that float64 holds exactly.
    """
    n, late, latest, infinity = times.size, 0, -np.inf, np.inf
    first, last, low, high = infinity, -infinity, np.int64(2**63 - 1), np.int64(-(2**63))
    for i in range(n):
        t = times[i]
        q = np.floor(t / width) + 0.0  # -0 becomes 0, which has other bits
        valid = abs(q * width) < infinity
        latest = max(latest, t if valid else -infinity)
        is_late = not valid or q < old
        late += is_late
        if is_late or values[i] != values[i]:
            places[i] = np.nan
        else:
            places[i] = q
            first, last = min(first, q), max(last, q)
            low, high = min(low, keys[i]), max(high, keys[i])
    least, most = (np.float64(low), np.float64(high)) if low <= high else (infinity, -infinity)
    for i in range(state.shape[0]):
        row = state[i]
        key, q = row[0], _nearest(row[1] / width)
        numbers = row[2] >= 1 and key == key and row[3] == row[3] and row[4] == row[4] and row[5] == row[5]
        if numbers and abs(q * width) < infinity:
            places[n + i] = q
            first, last = min(first, q), max(last, q)
            least, most = min(least, key), max(most, key)
            if key != np.floor(key):
                most = infinity
        else:
            places[n + i] = np.nan
    if max(-least, most) > 9007199254740992.0 and least <= most:
        least, most = -infinity, infinity
    return late, latest, first, last, least, most


def _tabulate(
    keys: NDArray[np.int64],
    values: Column,
    state: Table,
    places: Column,
    first: float,
    low: int,
    span: int,
    table: Table,
    rows: Table,
) -> int:
    """Fills rows (key, index, count, sum, least, most) in order by way of a table of all windows; returns how many."""
    for cell in range(table.shape[0]):
        table[cell, 0] = 0.0
        table[cell, 1] = 0.0
        table[cell, 2] = np.inf
        table[cell, 3] = -np.inf
    n = keys.size
    for i in range(n):
        q = places[i]
        if q == q:
            row = table[np.uint64(np.int64(q - first) * span + (keys[i] - low))]
            value = values[i]
            row[0] += 1.0
            row[1] += value
            row[2] = min(row[2], value)
            row[3] = max(row[3], value)
    for i in range(state.shape[0]):
        q = places[n + i]
        if q == q:
            old = state[i]
            row = table[np.uint64(np.int64(q - first) * span + (np.int64(old[0]) - low))]
            row[0] += old[2]
            row[1] += old[3]
            row[2] = min(row[2], old[4])
            row[3] = max(row[3], old[5])
    found = 0
    for cell in range(table.shape[0]):
        if table[cell, 0] != 0.0:
            rows[found, 0] = low + cell % span
            rows[found, 1] = first + cell // span
            for column in range(4):
                rows[found, 2 + column] = table[cell, column]
            found += 1
    return found


def _bits(x: float) -> Any:
    value: Any = np.float64(x)
    return value.view(np.uint64)


def _mixed(q: float, key: float) -> Any:
    """64 bits in which each depends on all of a window's index and key."""
    mixed = _bits(key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = ((mixed ^ (mixed >> np.uint64(32))) + _bits(q)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(32))


def _slot(slots: NDArray[np.int32], rows: Table, q: float, key: float) -> Any:
    """Where the table of slots has this window's row, or (with -1 in it) has room for it."""
    mask = np.uint64(slots.size - 1)
    slot = _mixed(q, key) & mask
    while True:
        row = slots[slot]
        if row < 0 or (rows[row, 0] == key and rows[row, 1] == q):
            return slot
        slot = (slot + np.uint64(1)) & mask


def _hash(keys: NDArray[np.int64], values: Column, state: Table, places: Column, rows: Table) -> int:
    """Fills rows (key, index, count, sum, least, most) in the order of the first event; returns how many.

    Linear probing (Knuth, "The Art of Computer Programming", vol. 3, sec. 6.4, algorithm L). The table grows with the
    windows, so that it stays in the cache while they are few.
    """
    slots = np.full(1024, -1, np.int32)
    found, n = 0, keys.size
    for i in range(places.size):
        q = places[i]
        if q != q:
            continue
        if i < n:
            key, count, total = np.float64(keys[i]), 1.0, values[i]
            least, most = total, total
        else:
            old = state[i - n]
            key, count, total, least, most = old[0] + 0.0, old[2], old[3], old[4], old[5]
        slot = _slot(slots, rows, q, key)
        at = slots[slot]
        if at >= 0:
            row = rows[np.uint32(at)]
            row[2] += count
            row[3] += total
            row[4] = min(row[4], least)
            row[5] = max(row[5], most)
            continue
        slots[slot] = found
        row = rows[found]
        row[0], row[1], row[2], row[3], row[4], row[5] = key, q, count, total, least, most
        found += 1
        if 2 * found > slots.size:
            slots = np.full(4 * slots.size, -1, np.int32)
            for each in range(found):
                slots[_slot(slots, rows, rows[each, 1], rows[each, 0])] = each
    return found


@window.on("cpu")
def _cpu(device: Any) -> Run:
    from numba import njit, types
    from numba.extending import register_jitable

    for function in (_nearest, _bits, _mixed, _slot):
        register_jitable(function)
    column, table = (types.Array(types.float64, ndim, "C", readonly=True) for ndim in (1, 2))
    whole, double = types.int64, types.float64
    events, places_type, rows_type = types.Array(whole, 1, "C", readonly=True), double[::1], double[:, ::1]
    options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
    survey = njit((column, events, column, double, double, table, places_type), **options)(_survey)
    tabulate = njit((events, column, table, places_type, double, whole, whole, rows_type, rows_type), **options)(
        _tabulate
    )
    hashed = njit((events, column, table, places_type, rows_type), **options)(_hash)

    def run(inputs: Inputs, context: Context) -> Outputs:
        times, keys, values, state = (inputs[name] for name in ("times", "keys", "values", "state"))
        width, watermark = inputs["width"], inputs["watermark"]
        most_rows = times.size + len(state)
        places = np.empty(most_rows)
        old = _index(watermark[0], width)
        late, latest, first, last, low, high = survey(times, keys, values, width, old, state, places)
        cells = (last - first + 1) * (high - low + 1) if first <= last else 0.0
        if cells <= 4 * most_rows:
            span = int(high - low + 1) if cells else 1
            rows = np.empty((min(int(cells), most_rows), 6))
            arguments = (first, int(low), span) if cells else (0.0, 0, 1)
            found = tabulate(keys, values, state, places, *arguments, np.empty((int(cells), 4)), rows)
            rows = rows[:found]
        else:
            rows = np.empty((most_rows, 6))  # memory that no window needs is never touched
            rows = _ordered(rows[: hashed(keys, values, state, places, rows)])
        return _finished(rows, late, latest, width, inputs["lateness"], watermark)

    return run


# On a GPU windows are hashed too. In a slot stands the number of the event, or of the row of the state, that took it
# first: which window that is, its own time and key tell, which nobody writes to. The host puts the windows in order.
cuda: Any  # numba.cuda, on a GPU


def _place_gpu(i: int, times: Column, keys: NDArray[np.int64], state: Table, width: float) -> tuple[float, float]:
    """The index and the key of the window of event i, or of row i - n of the state."""
    if i >= times.size:
        return _nearest_gpu(state[i - times.size, 1] / width), state[i - times.size, 0] + 0.0
    q = times[i] / width
    q = np.float64(math.floor(q)) if abs(q) < 4503599627370496.0 else q
    return q, np.float64(keys[i])


def _nearest_gpu(x: float) -> float:
    return np.float64(math.floor(x + 0.5)) if abs(x) < 4503599627370496.0 else x


def _add_gpu(
    times: Column,
    keys: NDArray[np.int64],
    values: Column,
    width: float,
    old: float,
    state: Table,
    slots: NDArray[np.int64],
    table: Table,
    late: NDArray[np.int64],
    latest: Column,
) -> None:
    n, own_late, own_latest = times.size, np.int64(0), -np.inf
    for i in range(cuda.grid(1), n + state.shape[0], cuda.gridsize(1)):
        q, key = _place_gpu(i, times, keys, state, width)
        valid = abs(q * width) < np.inf
        if i < n:
            if not valid or q < old:
                own_late += 1
            if valid and times[i] > own_latest:
                own_latest = times[i]
            count, total, least, most = 1.0, values[i], values[i], values[i]
            kept = valid and not q < old and total == total
        else:
            count, total, least, most = state[i - n, 2], state[i - n, 3], state[i - n, 4], state[i - n, 5]
            kept = valid and key == key and count >= 1 and total == total and least == least and most == most
        if kept:
            mask = np.int64(slots.size - 1)
            slot = np.int64(_mixed(q, key) >> np.uint64(1)) & mask
            while True:
                owner = slots[slot]
                if owner < 0:
                    owner = cuda.atomic.cas(slots, slot, np.int64(-1), np.int64(i))
                    if owner < 0:
                        break
                owner_q, owner_key = _place_gpu(owner, times, keys, state, width)
                if owner_q == q and owner_key == key:
                    break
                slot = (slot + 1) & mask
            cuda.atomic.add(table, (slot, 0), count)
            cuda.atomic.add(table, (slot, 1), total)
            cuda.atomic.min(table, (slot, 2), least)
            cuda.atomic.max(table, (slot, 3), most)
    if own_late > 0:
        cuda.atomic.add(late, 0, own_late)
    if own_latest > -np.inf:
        cuda.atomic.max(latest, 0, own_latest)


def _clear_gpu(table: Table) -> None:
    for slot in range(cuda.grid(1), table.shape[0], cuda.gridsize(1)):
        table[slot, 0] = 0.0
        table[slot, 1] = 0.0
        table[slot, 2] = np.inf
        table[slot, 3] = -np.inf


def _gather_gpu(
    times: Column,
    keys: NDArray[np.int64],
    width: float,
    state: Table,
    slots: NDArray[np.int64],
    table: Table,
    rows: Table,
    found: NDArray[np.int64],
) -> None:
    """The slots that are taken, as rows (key, index, count, sum, least, most) in any order."""
    for slot in range(cuda.grid(1), slots.size, cuda.gridsize(1)):
        owner = slots[slot]
        if owner >= 0:
            q, key = _place_gpu(owner, times, keys, state, width)
            row = cuda.atomic.add(found, 0, np.int64(1))
            rows[row, 0] = key
            rows[row, 1] = q
            for column in range(4):
                rows[row, 2 + column] = table[slot, column]


def _count_gpu(slots: NDArray[np.int64], found: NDArray[np.int64]) -> None:
    own = np.int64(0)
    for slot in range(cuda.grid(1), slots.size, cuda.gridsize(1)):
        if slots[slot] >= 0:
            own += 1
    if own > 0:
        cuda.atomic.add(found, 0, own)


@window.on("gpu")
def _gpu(device: Any) -> Run:
    helpers = (_nearest_gpu, _place_gpu, _bits, _mixed)
    add = device.compile(_add_gpu, helpers=helpers)
    gather = device.compile(_gather_gpu, helpers=helpers)
    clear, count = device.compile(_clear_gpu), device.compile(_count_gpu)

    def run(inputs: Inputs, context: Context) -> Outputs:
        times, keys, values, state = (inputs[name] for name in ("times", "keys", "values", "state"))
        watermark, width = device.read(inputs["watermark"]), np.float64(inputs["width"])
        items = times.size + len(state)
        size = 1 << (2 * items + 1).bit_length()
        slots, table = device.full((size,), -1, np.int64), device.empty((size, 4), np.float64)
        late, latest = device.zeros((1,), np.int64), device.full((1,), -np.inf, np.float64)
        found, row = device.zeros((1,), np.int64), device.zeros((1,), np.int64)
        clear(size, table)
        old = np.float64(_index(watermark[0], width))
        add(items, times, keys, values, width, old, state, slots, table, late, latest)
        count(size, slots, found)
        rows = device.empty((int(device.read(found)[0]), 6), np.float64)
        gather(size, times, keys, width, state, slots, table, rows, row)
        late_events, latest_s = int(device.read(late)[0]), float(device.read(latest)[0])
        rows = _ordered(device.read(rows))
        return _finished(rows, late_events, latest_s, float(width), inputs["lateness"], watermark)

    return run


@window.on("tpu")
def _tpu(device: Any) -> Run:
    """Sorts events and state by window, and sums the segments. What is left out goes to the end, padding with it."""
    import jax
    import jax.numpy as jnp

    from tasks.devices.tpu import bucket

    def aggregate(times: Any, keys: Any, values: Any, state: Any, watermark: Any, width: Any, n: Any, s: Any) -> Any:
        quotient = state[:, 1] / width
        nearest = jnp.where(jnp.abs(quotient) < 2.0**52, jnp.floor(quotient + 0.5), quotient)
        index = jnp.floor(times / width)
        valid = (jnp.arange(times.size) < n) & jnp.isfinite(index * width)
        is_late = index < jnp.floor(watermark[0] / width)
        late = jnp.sum((jnp.arange(times.size) < n) & (~valid | is_late))
        latest = jnp.max(jnp.where(valid, times, -jnp.inf), initial=-jnp.inf)
        kept = valid & ~is_late & ~jnp.isnan(values)
        rows = (jnp.arange(len(state)) < s) & (state[:, 2] >= 1) & ~jnp.isnan(state[:, :6]).any(axis=1)
        rows &= jnp.isfinite(nearest * width)
        ones = jnp.ones_like(values)
        columns = [
            jnp.concatenate(pair)
            for pair in (
                (jnp.where(kept, index, jnp.inf), jnp.where(rows, nearest, jnp.inf)),
                (keys.astype(values.dtype), state[:, 0]),
                (ones, state[:, 2]),
                *((values, state[:, column]) for column in (3, 4, 5)),
            )
        ]
        index, key, *sums = jax.lax.sort(columns, num_keys=2)
        size = index.size
        fresh = (index != jnp.roll(index, 1)) | (key != jnp.roll(key, 1))
        fresh = fresh.at[0].set(True) & (index < jnp.inf)
        segments = jnp.where(index < jnp.inf, jnp.cumsum(fresh) - 1, size)
        total, least, most = jax.ops.segment_sum, jax.ops.segment_min, jax.ops.segment_max
        joins = zip((most, most, total, total, least, most), (key, index, *sums), strict=True)
        found = [join(column, segments, size, indices_are_sorted=True) for join, column in joins]
        return jnp.stack(found, axis=1), jnp.stack([jnp.sum(fresh), late]), latest[None]

    program = device.program(aggregate)
    cut = device.program(lambda rows, room: rows[:room], static=("room",))

    def run(inputs: Inputs, context: Context) -> Outputs:
        times, keys, values, state = (inputs[name] for name in ("times", "keys", "values", "state"))
        watermark, width = inputs["watermark"], inputs["width"]
        n, s = times.size, state.shape[0]
        shapes = {"rows": (n + s, 6), "numbers": (2,), "latest": (1,)}
        sizes = np.float64(width), np.int64(n), np.int64(s)
        made = program(shapes, times, keys, values, state, watermark, *sizes)
        found, late = device.read(made["numbers"]).tolist()
        room = min(bucket(found), made["rows"].padded[0])
        rows = np.array(device.read(cut({"rows": (found, 6)}, made["rows"], room=room)["rows"]))
        latest = float(device.read(made["latest"])[0])
        return _finished(rows, late, latest, width, inputs["lateness"], device.read(watermark))

    return run


# One work-item hashes: each event may hit the window of the one before it, so a second could only wait for the first.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

double nearest(double x) { return fabs(x) < 4503599627370496.0 ? floor(x + 0.5) + 0.0 : x; }

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void gather(__global const double* restrict times, __global const long* restrict keys,
            __global const double* restrict values, __global const double* restrict state, ulong n, ulong s,
            double width, double old, __global int* restrict slots, ulong size, __global double* restrict rows,
            __global long* restrict numbers, __global double* restrict latest) {
  for (ulong slot = 0; slot < size; slot++) slots[slot] = -1;
  long found = 0, late = 0;
  double last = -INFINITY;
  for (ulong i = 0; i < n + s; i++) {
    double q, key, count, total, least, most;
    if (i < n) {
      q = floor(times[i] / width) + 0.0;
      const bool valid = fabs(q * width) < INFINITY;
      if (valid && times[i] > last) last = times[i];
      if (!valid || q < old) late++;
      key = (double)keys[i];
      count = 1;
      total = least = most = values[i];
      if (!valid || q < old || total != total) continue;
    } else {
      __global const double* row = state + (i - n) * 6;
      q = nearest(row[1] / width);
      key = row[0] + 0.0;
      count = row[2], total = row[3], least = row[4], most = row[5];
      if (!(fabs(q * width) < INFINITY && count >= 1)) continue;
      if (key != key || total != total || least != least || most != most) continue;
    }
    ulong mixed = as_ulong(key) * 0x9E3779B97F4A7C15UL;
    mixed = ((mixed ^ (mixed >> 32)) + as_ulong(q)) * 0xBF58476D1CE4E5B9UL;
    mixed = (mixed ^ (mixed >> 32)) * 0x94D049BB133111EBUL;
    ulong slot = (mixed ^ (mixed >> 32)) & (size - 1);
    int at = slots[slot];
    while (at >= 0 && !(rows[at * 6UL] == key && rows[at * 6UL + 1] == q)) {
      slot = (slot + 1) & (size - 1);
      at = slots[slot];
    }
    if (at >= 0) {
      __global double* row = rows + at * 6UL;
      row[2] += count;
      row[3] += total;
      row[4] = least < row[4] ? least : row[4];
      row[5] = most > row[5] ? most : row[5];
    } else {
      slots[slot] = (int)found;
      __global double* row = rows + found++ * 6UL;
      row[0] = key, row[1] = q, row[2] = count, row[3] = total, row[4] = least, row[5] = most;
    }
  }
  numbers[0] = found;
  numbers[1] = late;
  latest[0] = last;
}
"""


@window.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "stream.window")

    def run(inputs: Inputs, context: Context) -> Outputs:
        events = [inputs[name] for name in ("times", "keys", "values", "state")]
        watermark, width = device.download(inputs["watermark"]), inputs["width"]
        n, s = events[0].size, events[3].shape[0]
        size = 1 << (2 * (n + s) + 1).bit_length()
        slots, rows = device.empty((size,), np.int32), device.empty((n + s, 6), np.float64)
        numbers, latest = device.empty((2,), np.int64), device.empty((1,), np.float64)
        scalars = np.uint64(n), np.uint64(s), np.float64(width), np.float64(_index(watermark[0], width))
        program.launch("gather", (1,), *events, *scalars, slots, np.uint64(size), rows, numbers, latest)
        found, late = device.download(numbers).tolist()
        ordered = _ordered(device.download(rows)[:found])
        return _finished(ordered, late, float(device.download(latest)[0]), width, inputs["lateness"], watermark)

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
        events: dict[str, Any] = {
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
