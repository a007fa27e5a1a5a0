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


# A group is a row of four numbers, 32 bytes, so that a value touches one line of the cache and not four.
_COUNT, _TOTAL, _LEAST, _MOST = range(4)


def _fill(
    keys: NDArray[np.int32],
    values: Column,
    table: NDArray[np.float64],
    count: NDArray[np.int64],
    total: Column,
    least: Column,
    most: Column,
    mean: Column,
) -> None:
    groups = np.uint64(count.size)
    for group in range(count.size):
        table[group, 0] = 0.0
        table[group, 1] = 0.0
        table[group, 2] = np.inf
        table[group, 3] = -np.inf
    for i in range(keys.size):
        group = np.uint64(keys[i])  # below 0 it becomes huge
        value = values[i]
        if group < groups and value == value:
            row = table[group]
            row[0] += 1.0
            row[1] += value
            row[2] = min(row[2], value)
            row[3] = max(row[3], value)
    for group in range(count.size):
        rows = table[group, 0]
        count[group] = np.int64(rows)
        total[group] = table[group, 1]
        least[group] = table[group, 2] if rows > 0 else np.nan
        most[group] = table[group, 3] if rows > 0 else np.nan
        mean[group] = table[group, 1] / rows  # 0 / 0 is NaN


@group_by.on("cpu")
def _cpu(device: Any) -> Run:
    from numba import njit, types

    column = types.float64[::1]
    fill = njit(
        (
            types.Array(types.int32, 1, "C", readonly=True),
            types.Array(types.float64, 1, "C", readonly=True),
            types.float64[:, ::1],
            types.int64[::1],
            column,
            column,
            column,
            column,
        ),
        nogil=True,
        cache=True,
        error_model="numpy",
    )(_fill)

    def run(inputs: Inputs, context: Context) -> Outputs:
        groups = inputs["groups"]
        outputs = {"count": np.empty(groups, np.int64)}
        outputs |= {name: np.empty(groups) for name in ("total", "least", "most", "mean")}
        fill(inputs["keys"], inputs["values"], np.empty((groups, 4)), *outputs.values())
        return outputs

    return run


@group_by.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, groups in ((1, 1), (1_000, 7), (5_000, 6_000)):
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
