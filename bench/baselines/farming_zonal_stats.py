"""What NumPy and SciPy make of farming.zonal_stats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

BOUND = "compute"  # half a dozen operations a pixel, and zones that end within a chunk
_SIZES = {"small": (64, 4), "medium": (1024, 64), "large": (4096, 1_000)}

Values = NDArray[np.float32]
Zones = NDArray[np.int32]


def inputs(size: str) -> dict[str, Any]:
    """A vegetation index over fields of unlike sizes, which are the cells nearest to random points."""
    random = np.random.default_rng(0)
    side, zones = _SIZES[size]
    seeds = np.ones((side, side), np.bool_)
    at = random.choice(side * side, zones, replace=False)
    seeds.flat[at] = False
    nearest = ndimage.distance_transform_edt(seeds, return_distances=False, return_indices=True)
    numbers = np.zeros((side, side), np.int32)
    numbers.flat[at] = np.arange(zones)
    zone = numbers[nearest[0], nearest[1]]
    means = random.uniform(0.2, 0.8, zones).astype(np.float32)
    values = means[zone] + random.standard_normal((side, side), np.float32) / 20
    values[random.random((side, side)) < 0.001] = np.nan  # clouds
    return {"values": values, "zone": zone, "zones": zones}


def expressions() -> dict[str, Callable[..., Any]]:
    return {
        "bincount, minimum.at": _bincount,
        "bincount, minimum.at, row by row": _rows,
        "sort, reduceat": _sorted,
        "sparse matrix product": _product,
        "ndimage": _ndimage,
    }


def _counted(values: Values, zone: Zones, zones: int) -> tuple[Values, Zones]:
    counted = ~np.isnan(values) & (zone >= 0) & (zone < zones)
    return values[counted], zone[counted]


def _bincount(values: Values, zone: Zones, zones: int) -> dict[str, Any]:
    values, zone = _counted(values, zone, zones)
    count = np.bincount(zone, minlength=zones)
    mean = np.bincount(zone, values, minlength=zones) / count
    deviation = np.sqrt(np.bincount(zone, (values - mean[zone]) ** 2, minlength=zones) / count)
    least, most = np.full(zones, np.inf, np.float32), np.full(zones, -np.inf, np.float32)
    np.minimum.at(least, zone, values)
    np.maximum.at(most, zone, values)
    return {"count": count, "mean": mean, "deviation": deviation, "least": least, "most": most}


def _rows(values: Values, zone: Zones, zones: int) -> dict[str, Any]:
    """As above, eight rows at a time, so that what is in between stays in the cache."""
    parts = [(values[y : y + 8], zone[y : y + 8]) for y in range(0, len(values), 8)]
    count, total, squares = np.zeros(zones, np.int64), np.zeros(zones), np.zeros(zones)
    least, most = np.full(zones, np.inf, np.float32), np.full(zones, -np.inf, np.float32)
    for part in parts:
        some, own = _counted(*part, zones)
        count += np.bincount(own, minlength=zones)
        total += np.bincount(own, some, minlength=zones)
        np.minimum.at(least, own, some)
        np.maximum.at(most, own, some)
    mean = total / count
    for part in parts:
        some, own = _counted(*part, zones)
        squares += np.bincount(own, (some - mean[own]) ** 2, minlength=zones)
    return {"count": count, "mean": mean, "deviation": np.sqrt(squares / count), "least": least, "most": most}


def _sorted(values: Values, zone: Zones, zones: int) -> dict[str, Any]:
    values, zone = _counted(values, zone, zones)
    order = np.argsort(zone, kind="stable")
    values, zone = values[order], zone[order]
    count = np.bincount(zone, minlength=zones)
    starts = np.cumsum(count) - count  # no zone of the bench is empty, so each has a start of its own
    mean = np.add.reduceat(values, starts, dtype=np.float64) / count
    squares = (values - np.repeat(mean, count)) ** 2
    return {
        "count": count,
        "mean": mean,
        "deviation": np.sqrt(np.add.reduceat(squares, starts) / count),
        "least": np.minimum.reduceat(values, starts),
        "most": np.maximum.reduceat(values, starts),
    }


def _product(values: Values, zone: Zones, zones: int) -> dict[str, Any]:
    """Each sum is a row of a sparse matrix of ones, times the values."""
    values, zone = _counted(values, zone, zones)
    ones = np.ones(values.size)
    belongs = sparse.csc_array((ones, zone, np.arange(values.size + 1)), shape=(zones, values.size))
    count = np.bincount(zone, minlength=zones)
    wide = values.astype(np.float64)
    mean = belongs @ wide / count
    deviation = np.sqrt(belongs @ (wide - mean[zone]) ** 2 / count)
    least, most = np.full(zones, np.inf, np.float32), np.full(zones, -np.inf, np.float32)
    np.minimum.at(least, zone, values)
    np.maximum.at(most, zone, values)
    return {"count": count, "mean": mean, "deviation": deviation, "least": least, "most": most}


def _ndimage(values: Values, zone: Zones, zones: int) -> dict[str, Any]:
    values, zone = _counted(values, zone, zones)
    wide, index = values.astype(np.float64), np.arange(zones)
    least, most, _, _ = ndimage.extrema(values, zone, index)
    return {
        "count": np.bincount(zone, minlength=zones),
        "mean": ndimage.mean(wide, zone, index),
        "deviation": ndimage.standard_deviation(wide, zone, index),
        "least": np.asarray(least),
        "most": np.asarray(most),
    }
