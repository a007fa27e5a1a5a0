"""What NumPy and SciPy make of city.shortest_paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import shortest_path
from scipy.spatial import cKDTree

BOUND = "compute"

Table = NDArray[np.float32]
Outputs = dict[str, NDArray[Any]]
_SIZES = {"small": 30, "medium": 300, "large": 2_000}


def inputs(size: str) -> dict[str, Any]:
    """Junctions of a town of 10 km by 10 km, a road from each to the four nearest and back, one in ten a one-way."""
    n = _SIZES[size]
    random = np.random.default_rng(0)
    place = random.uniform(0, 10, (n, 2))
    length, near = cKDTree(place).query(place, 5)
    roads = np.full((n, n), np.inf, np.float32)
    start = np.repeat(np.arange(n), 4)
    there = (length[:, 1:] * random.uniform(1, 1.3, (n, 4))).astype(np.float32)
    roads[start, near[:, 1:].ravel()] = there.ravel()
    back = random.random(start.size) < 0.9
    roads[near[:, 1:].ravel()[back], start[back]] = there.ravel()[back]
    return {"roads": roads}


def _numpy(roads: Table) -> Outputs:
    distance = np.where(roads >= 0, roads, np.float32(np.inf))
    np.fill_diagonal(distance, 0)
    way = np.empty_like(distance)
    for via in range(len(roads)):
        np.add(distance[:, via, None], distance[None, via], out=way)
        np.minimum(distance, way, out=distance)
    return {"distance": distance}


def _sparse(roads: Table) -> Any:
    """Roads by their ends, where there is one."""
    there = np.isfinite(roads) & (roads >= 0)
    np.fill_diagonal(there, val=False)
    start, end = np.nonzero(there)
    return csr_array((roads[start, end].astype(np.float64), (start, end)), shape=roads.shape)


def _scipy(roads: Table, method: str) -> Outputs:
    return {"distance": shortest_path(_sparse(roads), method=method).astype(np.float32)}


def expressions() -> dict[str, Callable[..., Outputs]]:
    return {
        "np.minimum": _numpy,
        "scipy, Floyd and Warshall": lambda roads: _scipy(roads, "FW"),
        "scipy, Dijkstra": lambda roads: _scipy(roads, "D"),
    }
