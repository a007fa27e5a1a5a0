"""Big data: tables grouped by a key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

# No batching: stacking would copy every job's rows, which costs as much as the one pass over them.
group_by = Kernel(
    "data.group_by",
    inputs={"keys": "int32[n]", "values": "float64[n]", "groups": "int64"},
    outputs={
        "count": "int64[groups]",
        "total": "float64[groups]",
        "least": "float64[groups]",
        "most": "float64[groups]",
        "mean": "float64[groups]",
    },
    flops="4*n + groups",
    bytes="12*n + 40*groups",
    limits={"groups": "1 <= groups <= 2147483648"},
    tolerance=1e-9,
    summary="How many values each key has, their sum, least, most and mean.",
)

Column = NDArray[np.float64]


@group_by.reference
def _reference(keys: NDArray[np.int32], values: Column, groups: int) -> Outputs:
    """What SQL's GROUP BY makes of COUNT, SUM, MIN, MAX and AVG, for the keys 0 to groups - 1.

    NaN is SQL's NULL: the row is skipped. So is a row whose key is outside. A group without rows has count and total 0,
    and NaN for the rest. Chamberlin and Boyce (1974), "SEQUEL: A structured English query language", sec. 2.
    """
    kept = (keys >= 0) & (keys < groups) & ~np.isnan(values)
    keys, values = keys[kept], values[kept]
    count, total = np.zeros(groups, np.int64), np.zeros(groups)
    least, most = np.full(groups, np.inf), np.full(groups, -np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        np.add.at(count, keys, 1)
        np.add.at(total, keys, values)
        np.minimum.at(least, keys, values)
        np.maximum.at(most, keys, values)
        return {
            "count": count,
            "total": total,
            "least": np.where(count > 0, least, np.nan),
            "most": np.where(count > 0, most, np.nan),
            "mean": np.where(count > 0, total / np.maximum(count, 1), np.nan),
        }


# A group is a row of four numbers (count, total, least, most), 32 bytes, so that a value touches one line of the cache
# and not four. Where the rows do not fit the cache, the values are first brought together by ranges of keys, some
# millions at a time: ten million values of a million groups took 160 ms without that, and 105 with it.


def _add(keys: NDArray[np.int32], values: Column, table: NDArray[np.float64]) -> None:
    groups = np.uint64(table.shape[0])
    for i in range(keys.size):
        key = np.uint64(keys[i])  # below 0 it becomes huge
        value = values[i]
        if key < groups and value == value:
            row = table[key]
            row[0] += 1.0
            row[1] += value
            row[2] = min(row[2], value)
            row[3] = max(row[3], value)


def _gather(
    keys: NDArray[np.int32], values: Column, groups: int, near_keys: NDArray[np.int32], near_values: Column
) -> int:
    """Copies the values whose keys count, those of each range of 4,096 keys together; returns how many there are."""
    ends = np.zeros((groups >> 12) + 2, np.int64)
    for i in range(keys.size):
        key = np.uint64(keys[i])
        ends[(key >> np.uint64(12)) + np.uint64(1) if key < np.uint64(groups) else np.uint64(0)] += 1
    ends[0] = 0
    for part in range(1, ends.size):
        ends[part] += ends[part - 1]
    for i in range(keys.size):
        key = np.uint64(keys[i])
        if key < np.uint64(groups):
            at = np.uint64(ends[key >> np.uint64(12)])
            ends[key >> np.uint64(12)] += 1
            near_keys[at] = keys[i]
            near_values[at] = values[i]
    return int(ends[-1])


def _fill(
    keys: NDArray[np.int32],
    values: Column,
    table: NDArray[np.float64],
    near_keys: NDArray[np.int32],
    near_values: Column,
    count: NDArray[np.int64],
    total: Column,
    least: Column,
    most: Column,
    mean: Column,
) -> None:
    for group in range(count.size):
        table[group, 0] = 0.0
        table[group, 1] = 0.0
        table[group, 2] = np.inf
        table[group, 3] = -np.inf
    room = near_keys.size
    if room == 0:
        _add(keys, values, table)
    else:
        for start in range(0, keys.size, room):
            some = slice(start, min(start + room, keys.size))
            found = _gather(keys[some], values[some], count.size, near_keys, near_values)
            _add(near_keys[:found], near_values[:found], table)
    for group in range(count.size):
        rows = table[group, 0]
        count[group] = np.int64(rows)
        total[group] = table[group, 1]
        least[group] = table[group, 2] if rows > 0 else np.nan
        most[group] = table[group, 3] if rows > 0 else np.nan
        mean[group] = table[group, 1] / rows  # 0 / 0 is NaN


#: So many rows of groups fit the cache of a core, a megabyte; and so many values are brought together at a time.
_NEAR_GROUPS, _NEAR_VALUES = 2**15, 2**21


@group_by.on("cpu")
def _cpu(device: Any) -> Run:
    from numba import njit, types
    from numba.extending import register_jitable

    for function in (_add, _gather):
        register_jitable(function)
    column, near_keys, table = types.float64[::1], types.int32[::1], types.float64[:, ::1]
    keys_type, values_type = (types.Array(each, 1, "C", readonly=True) for each in (types.int32, types.float64))
    fill = njit(
        (keys_type, values_type, table, near_keys, column, types.int64[::1], column, column, column, column),
        nogil=True,
        cache=True,
        error_model="numpy",
    )(_fill)

    def run(inputs: Inputs, context: Context) -> Outputs:
        keys, groups = inputs["keys"], inputs["groups"]
        outputs: dict[str, NDArray[Any]] = {"count": np.empty(groups, np.int64)}
        outputs |= {name: np.empty(groups) for name in ("total", "least", "most", "mean")}
        room = min(keys.size, _NEAR_VALUES) if groups > _NEAR_GROUPS else 0
        near = np.empty(room, np.int32), np.empty(room)
        fill(keys, inputs["values"], np.empty((groups, 4)), *near, *outputs.values())
        return outputs

    return run


cuda: Any  # numba.cuda, on a GPU
#: Up to so many groups each block has a table of its own in shared memory: 28 of the 48 KiB that it may have.
_SHARED = 1024
_MOST_BLOCKS = 512


def _add_gpu(
    keys: NDArray[np.int32],
    values: Column,
    count: NDArray[np.int64],
    total: Column,
    least: Column,
    most: Column,
) -> None:
    for i in range(cuda.grid(1), keys.size, cuda.gridsize(1)):
        key, value = keys[i], values[i]
        if key >= 0 and key < count.size and value == value:
            cuda.atomic.add(count, key, np.int64(1))
            cuda.atomic.add(total, key, value)
            cuda.atomic.min(least, key, value)
            cuda.atomic.max(most, key, value)


def _share_gpu(
    keys: NDArray[np.int32],
    values: Column,
    count: NDArray[np.int64],
    total: Column,
    least: Column,
    most: Column,
) -> None:
    counts = cuda.shared.array(_SHARED, np.int32)
    totals = cuda.shared.array(_SHARED, np.float64)
    leasts = cuda.shared.array(_SHARED, np.float64)
    mosts = cuda.shared.array(_SHARED, np.float64)
    for group in range(cuda.threadIdx.x, count.size, cuda.blockDim.x):
        counts[group] = 0
        totals[group] = 0.0
        leasts[group] = np.inf
        mosts[group] = -np.inf
    cuda.syncthreads()
    for i in range(cuda.grid(1), keys.size, cuda.gridsize(1)):
        key, value = keys[i], values[i]
        if key >= 0 and key < count.size and value == value:
            cuda.atomic.add(counts, key, np.int32(1))
            cuda.atomic.add(totals, key, value)
            cuda.atomic.min(leasts, key, value)
            cuda.atomic.max(mosts, key, value)
    cuda.syncthreads()
    for group in range(cuda.threadIdx.x, count.size, cuda.blockDim.x):
        if counts[group] > 0:
            cuda.atomic.add(count, group, np.int64(counts[group]))
            cuda.atomic.add(total, group, totals[group])
            cuda.atomic.min(least, group, leasts[group])
            cuda.atomic.max(most, group, mosts[group])


def _finish_gpu(count: NDArray[np.int64], total: Column, least: Column, most: Column, mean: Column) -> None:
    for group in range(cuda.grid(1), count.size, cuda.gridsize(1)):
        if count[group] > 0:
            mean[group] = total[group] / count[group]
        else:
            least[group] = np.nan
            most[group] = np.nan
            mean[group] = np.nan


@group_by.on("gpu")
def _gpu(device: Any) -> Run:
    """Atomic operations, in shared memory first where the groups are few and so the collisions many."""
    threads = 16 if device.simulated else 512
    share = device.compile(_share_gpu, threads=(threads,))
    add, finish = device.compile(_add_gpu), device.compile(_finish_gpu)

    def run(inputs: Inputs, context: Context) -> Outputs:
        keys, values, groups = inputs["keys"], inputs["values"], inputs["groups"]
        table = {
            "count": device.zeros((groups,), np.int64),
            "total": device.zeros((groups,), np.float64),
            "least": device.full((groups,), np.inf, np.float64),
            "most": device.full((groups,), -np.inf, np.float64),
        }
        if groups <= _SHARED:
            # Each block adds its whole table to the result, so it should have many more rows than groups.
            blocks = min(-(-keys.size // (8 * threads)), 4 if device.simulated else _MOST_BLOCKS)
            share(blocks, keys, values, *table.values())
        else:
            add(keys.size, keys, values, *table.values())
        mean = device.empty((groups,), np.float64)
        finish(groups, *table.values(), mean)
        return table | {"mean": mean}

    return run


@group_by.on("tpu")
def _tpu(device: Any) -> Run:
    """XLA's segment sums. Rows that do not count, padding among them, go to a segment that there is not."""
    import jax
    import jax.numpy as jnp

    from tasks.devices.tpu import bucket

    def aggregate(keys: Any, values: Any, rows: Any, groups: Any, room: int) -> Any:
        kept = (jnp.arange(keys.size) < rows) & (keys >= 0) & (keys < groups) & ~jnp.isnan(values)
        segments = jnp.where(kept, keys, room)
        count = jax.ops.segment_sum(kept.astype(jnp.int64), segments, room)
        total = jax.ops.segment_sum(jnp.where(kept, values, 0), segments, room)
        least = jax.ops.segment_min(values, segments, room)
        most = jax.ops.segment_max(values, segments, room)
        none = count == 0
        least, most = jnp.where(none, jnp.nan, least), jnp.where(none, jnp.nan, most)
        return count, total, least, most, total / count

    program = device.program(aggregate, static=("room",))

    def run(inputs: Inputs, context: Context) -> Outputs:
        keys, groups = inputs["keys"], inputs["groups"]
        shapes = dict.fromkeys(group_by.spec.outputs, (groups,))
        size = np.int64(keys.size)
        found: Outputs = program(shapes, keys, inputs["values"], size, np.int64(groups), room=bucket(groups))
        return found

    return run


# A group of work-items is one, with a share of the rows and a table of its own, so that nothing is atomic (there is no
# atomic sum of doubles); the tables are then joined, a block of keys at a time.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void fill(__global const int* restrict keys, __global const double* restrict values, __global double* restrict tables,
          ulong size, ulong share, ulong groups) {
  const ulong start = get_group_id(0) * share, stop = min(start + share, size);
  __global double* table = tables + get_group_id(0) * groups * 4;
  for (ulong group = 0; group < groups; group++) {
    table[group * 4] = table[group * 4 + 1] = 0;
    table[group * 4 + 2] = INFINITY;
    table[group * 4 + 3] = -INFINITY;
  }
  for (ulong i = start; i < stop; i++) {
    const int key = keys[i];
    const double value = values[i];
    if (key < 0 || key >= groups || value != value) continue;
    __global double* row = table + (ulong)key * 4;
    row[0] += 1;
    row[1] += value;
    row[2] = value < row[2] ? value : row[2];
    row[3] = value > row[3] ? value : row[3];
  }
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void join(__global const double* restrict tables, int parts, ulong groups, __global long* restrict count,
          __global double* restrict total, __global double* restrict least, __global double* restrict most,
          __global double* restrict mean) {
  const ulong start = get_group_id(0) * BLOCK, stop = min(start + BLOCK, groups);
  for (ulong group = start; group < stop; group++) {
    double rows = 0, sum = 0, low = INFINITY, high = -INFINITY;
    for (int part = 0; part < parts; part++) {
      __global const double* row = tables + (part * groups + group) * 4;
      rows += row[0];
      sum += row[1];
      low = row[2] < low ? row[2] : low;
      high = row[3] > high ? row[3] : high;
    }
    count[group] = (long)rows;
    total[group] = sum;
    least[group] = rows > 0 ? low : NAN;
    most[group] = rows > 0 ? high : NAN;
    mean[group] = sum / rows;  // 0 / 0 is NaN
  }
}
"""
_BLOCK = 1024
#: Each table has at least so many rows to fill it, and all tables together have at most so many groups.
_SHARE, _MOST_PARTS, _MOST_GROUPS = 2**17, 16, 2**21


@group_by.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "data.group_by", BLOCK=_BLOCK)

    def run(inputs: Inputs, context: Context) -> Outputs:
        keys, groups = inputs["keys"], inputs["groups"]
        parts = max(1, min(keys.size // _SHARE, _MOST_PARTS, _MOST_GROUPS // groups))
        tables = device.empty((parts, groups, 4), np.float64)
        count = device.empty((groups,), np.int64)
        rest = [device.empty((groups,), np.float64) for _ in range(4)]
        sizes = np.uint64(keys.size), np.uint64(-(-keys.size // parts)), np.uint64(groups)
        program.launch("fill", (parts,), keys, inputs["values"], tables, *sizes)
        program.launch("join", (-(-groups // _BLOCK),), tables, np.int32(parts), np.uint64(groups), count, *rest)
        return {"count": count, **dict(zip(("total", "least", "most", "mean"), rest, strict=True))}

    return run


@group_by.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, groups in ((1, 1), (1_000, 7), (2_000, 40_000)):
        yield {
            "keys": random.integers(0, groups, n).astype(np.int32),
            "values": random.normal(100, 15, n),
            "groups": groups,
        }
    # A key outside at either end, NaN, infinities of both signs in one group, and a group without rows.
    yield {
        "keys": np.array([-1, 4, 2**31 - 1, -(2**31), 0, 0, 1, 1, 2], np.int32),
        "values": np.array([1, 2, 3, 4, np.nan, 6, np.inf, -np.inf, np.nan]),
        "groups": 4,
    }
