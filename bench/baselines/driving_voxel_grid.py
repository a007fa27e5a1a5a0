"""What NumPy makes of driving.voxel_grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND = "latency"  # every point reads and writes at its voxel's place

Outputs = dict[str, NDArray[Any]]
#: Points, and cells along x, y and z, all of 20 cm.
_SIZES = {"small": (2_000, (128, 128, 16)), "medium": (100_000, (512, 512, 32)), "large": (1_000_000, (512, 512, 64))}


def inputs(size: str) -> dict[str, Any]:
    """A street as a lidar with 64 beams sees it, in the order in which it turns: ground, walls and cars."""
    n, cells = _SIZES[size]
    random = np.random.default_rng(0)
    turn = np.sort(random.uniform(0, 2 * np.pi, n))
    down = np.radians(np.tile(np.linspace(2, -25, 64), -(-n // 64))[:n])
    ground = 1.8 / np.maximum(np.tan(-down), 1e-3)
    wall = (12 + 30 * np.abs(np.sin(3 * turn)) ** 3 + 3 * np.sign(np.sin(40 * turn))) / np.cos(down)
    distance = np.minimum(ground, wall) + random.normal(0, 0.03, n)
    points = np.empty((n, 4), np.float32)
    points[:, 0] = distance * np.cos(down) * np.cos(turn)
    points[:, 1] = distance * np.cos(down) * np.sin(turn)
    points[:, 2] = 1.8 + distance * np.sin(down)
    points[:, 3] = random.random(n)
    low = [-0.2 * count / 2 for count in cells[:2]]
    return {
        "points": points,
        "edge": 0.2,
        "origin_x": low[0],
        "origin_y": low[1],
        "origin_z": -1.0,
        "cells_x": cells[0],
        "cells_y": cells[1],
        "cells_z": cells[2],
    }


def _numbers(points: NDArray[np.float32], **grid: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The points in the grid, and the numbers of their voxels."""
    origin = np.array([grid["origin_x"], grid["origin_y"], grid["origin_z"]], np.float32)
    place = (points[:, :3] - origin) * (np.float32(1) / np.float32(grid["edge"]))
    cells = np.array([grid["cells_x"], grid["cells_y"], grid["cells_z"]], np.float32)
    inside = ((place >= 0) & (place < cells)).all(axis=1)
    whole = place[inside].astype(np.int64)
    return points[inside], (whole[:, 0] * grid["cells_y"] + whole[:, 1]) * grid["cells_z"] + whole[:, 2]


def _unique_and_bincount(**arguments: Any) -> Outputs:
    points, number = _numbers(**arguments)
    cell, voxel, count = np.unique(number, return_inverse=True, return_counts=True)
    sums = [np.bincount(voxel, weights=points[:, j], minlength=len(cell)) for j in range(4)]
    return {"cell": cell, "count": count, "centroid": (np.stack(sums, axis=1) / count[:, None]).astype(np.float32)}


def _sort_and_reduceat(**arguments: Any) -> Outputs:
    points, number = _numbers(**arguments)
    # One sort of whole numbers, which has vector code, rather than an indirect one.
    keys = np.sort((number << 32) | np.arange(len(number)))
    ordered, order = keys >> 32, keys & 0xFFFFFFFF
    start = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    count = np.diff(np.append(start, len(ordered)))
    sums = np.add.reduceat(points[order], start, axis=0, dtype=np.float64)
    return {"cell": ordered[start], "count": count, "centroid": (sums / count[:, None]).astype(np.float32)}


def _dense_bincount(**arguments: Any) -> Outputs:
    """A bin for every voxel of the grid: no sort, but all of it is written."""
    points, number = _numbers(**arguments)
    bins = arguments["cells_x"] * arguments["cells_y"] * arguments["cells_z"]
    counts = np.bincount(number, minlength=bins)
    cell = np.flatnonzero(counts)
    place = np.empty(bins, np.int64)
    place[cell] = np.arange(len(cell))
    voxel, count = place[number], counts[cell]
    sums = [np.bincount(voxel, weights=points[:, j], minlength=len(cell)) for j in range(4)]
    return {"cell": cell, "count": count, "centroid": (np.stack(sums, axis=1) / count[:, None]).astype(np.float32)}


def expressions() -> dict[str, Callable[..., Outputs]]:
    return {
        "np.unique, np.bincount": _unique_and_bincount,
        "np.sort, np.add.reduceat": _sort_and_reduceat,
        "np.bincount over all voxels": _dense_bincount,
    }
