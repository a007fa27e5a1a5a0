"""What NumPy makes of city.traffic_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND = "compute"

Table = NDArray[np.float32]
Outputs = dict[str, NDArray[Any]]
#: Roads, cells of each, steps.
_SIZES = {"small": (20, 50, 10), "medium": (500, 200, 50), "large": (10_000, 200, 100)}
_NUMBERS = {
    "step_s": 1.0,
    "cell_m": 50.0,
    "free_kmh": 50.0,
    "wave_kmh": 15.0,
    "jam_per_km": 150.0,
    "capacity_per_h": 1800.0,
}


def inputs(size: str) -> dict[str, Any]:
    """Roads in a town on which some way along a queue has formed."""
    roads, cells, steps = _SIZES[size]
    random = np.random.default_rng(0)
    queue = np.arange(cells) > random.uniform(0.3, 1.2, (roads, 1)) * cells
    density = np.where(queue, random.uniform(80, 150, (roads, cells)), random.uniform(0, 40, (roads, cells)))
    return {
        "density": density.astype(np.float32),
        "demand": random.uniform(0, 2000, roads).astype(np.float32),
        "supply": random.uniform(0, 2000, roads).astype(np.float32),
        "steps": steps,
        **_NUMBERS,
    }


def _whole(
    density: Table, demand: NDArray[np.float32], supply: NDArray[np.float32], steps: int, **numbers: float
) -> Outputs:
    """Every step over all roads, into the same few arrays; flows in densities per step."""
    unit = (numbers["step_s"] / 3600) / (numbers["cell_m"] / 1000)
    free, wave = np.float32(numbers["free_kmh"] * unit), np.float32(numbers["wave_kmh"] * unit)
    jam, capacity = np.float32(numbers["jam_per_km"]), np.float32(numbers["capacity_per_h"] * unit)
    now = np.clip(density, 0, jam)
    roads, cells = now.shape
    flow, room = np.empty((roads, cells + 1), np.float32), np.empty((roads, cells), np.float32)
    change, left = np.empty_like(now), np.zeros(roads)
    come = np.minimum(np.maximum(demand, 0) * np.float32(unit), capacity)
    go = np.minimum(np.maximum(supply, 0) * np.float32(unit), capacity)
    for _ in range(steps):
        np.subtract(jam, now, out=room)
        np.multiply(room, wave, out=room)
        np.multiply(now, free, out=flow[:, 1:])
        flow[:, 0] = come
        np.minimum(flow[:, -1], go, out=flow[:, -1])
        np.minimum(flow[:, 1:-1], capacity, out=flow[:, 1:-1])
        np.minimum(flow[:, :-1], room, out=flow[:, :-1])
        left += flow[:, -1]
        np.subtract(flow[:, :-1], flow[:, 1:], out=change)
        now += change
    spoilt = ~np.isfinite(density).all(axis=1) | np.isnan(demand) | np.isnan(supply)
    now[spoilt], left[spoilt] = np.nan, np.nan
    return {"after": now, "left": (left * (numbers["cell_m"] / 1000)).astype(np.float32)}


def _in_blocks(density: Table, **arguments: Any) -> Outputs:
    """100 roads at a time, whose arrays stay in the cache."""
    return _joined(_whole, density, **arguments)


def _cells_first(
    density: Table, demand: NDArray[np.float32], supply: NDArray[np.float32], steps: int, **numbers: float
) -> Outputs:
    """The table turned round, so that each cell's neighbour is a row below and every operation is over one piece."""
    unit = (numbers["step_s"] / 3600) / (numbers["cell_m"] / 1000)
    free, wave = np.float32(numbers["free_kmh"] * unit), np.float32(numbers["wave_kmh"] * unit)
    jam, capacity = np.float32(numbers["jam_per_km"]), np.float32(numbers["capacity_per_h"] * unit)
    spoilt = ~np.isfinite(density).all(axis=1) | np.isnan(demand) | np.isnan(supply)
    now = np.ascontiguousarray(np.clip(density, 0, jam).T)
    cells, roads = now.shape
    send, take = np.empty((cells + 1, roads), np.float32), np.empty((cells + 1, roads), np.float32)
    send[0], take[-1] = np.maximum(demand, 0) * np.float32(unit), np.maximum(supply, 0) * np.float32(unit)
    send[0], take[-1] = np.minimum(send[0], capacity), np.minimum(take[-1], capacity)
    sent, room, flow, left = send[1:], take[:-1], np.empty_like(send), np.zeros(roads)
    for _ in range(steps):
        np.multiply(now, free, out=sent)
        np.minimum(sent, capacity, out=sent)
        np.subtract(jam, now, out=room)
        np.multiply(room, wave, out=room)
        np.minimum(send, take, out=flow)
        left += flow[-1]
        now += flow[:-1]
        now -= flow[1:]
    after, left = np.ascontiguousarray(now.T), (left * (numbers["cell_m"] / 1000)).astype(np.float32)
    after[spoilt], left[spoilt] = np.nan, np.nan
    return {"after": after, "left": left}


def _cells_first_in_blocks(density: Table, **arguments: Any) -> Outputs:
    return _joined(_cells_first, density, **arguments)


def _joined(function: Callable[..., Outputs], density: Table, **arguments: Any) -> Outputs:
    demand, supply = arguments.pop("demand"), arguments.pop("supply")
    parts = [slice(start, start + 100) for start in range(0, len(density), 100)]
    found = [function(density[part], demand[part], supply[part], **arguments) for part in parts]
    return {name: np.concatenate([each[name] for each in found]) for name in ("after", "left")}


def expressions() -> dict[str, Callable[..., Outputs]]:
    return {
        "all roads a step": _whole,
        "blocks of 100 roads": _in_blocks,
        "cells first": _cells_first,
        "cells first, blocks of 100 roads": _cells_first_in_blocks,
    }
