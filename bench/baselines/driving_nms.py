"""What NumPy makes of driving.nms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND = "compute"

Boxes = NDArray[np.float32]
Outputs = dict[str, NDArray[Any]]
_SIZES = {"small": 100, "medium": 2_000, "large": 20_000}


def inputs(size: str) -> dict[str, Any]:
    """What a detector says of a street: half the boxes crowd round one object in 20, the rest are anywhere."""
    n = _SIZES[size]
    random = np.random.default_rng(0)
    objects = max(n // 40, 1)
    centre, side = random.uniform(0, (3840, 2160), (objects, 2)), random.lognormal(3.5, 0.6, (objects, 2))
    which = random.integers(0, objects, n)
    crowd = (random.random(n) < 0.5)[:, None]
    centre = np.where(
        crowd, centre[which] + random.normal(0, 0.1, (n, 2)) * side[which], random.uniform(0, (3840, 2160), (n, 2))
    )
    side = np.where(crowd, side[which] * random.lognormal(0, 0.1, (n, 2)), random.lognormal(3.5, 0.6, (n, 2)))
    boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=1).astype(np.float32)
    return {"boxes": boxes, "scores": random.random(n).astype(np.float32), "threshold": 0.5}


def _area(x0: Boxes, y0: Boxes, x1: Boxes, y1: Boxes) -> NDArray[np.float64]:
    width, height = np.maximum(x1 - x0, np.float32(0)), np.maximum(y1 - y0, np.float32(0))
    return np.multiply(width, height, dtype=np.float64)


def _sorted(boxes: Boxes, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], Boxes, NDArray[np.float64]]:
    """Indices from the best on, their coordinates as four rows, and their areas."""
    order = np.flatnonzero(np.isfinite(boxes).all(axis=1) & ~np.isnan(scores))
    order = order[np.argsort(-scores[order], kind="stable")]
    columns = np.ascontiguousarray(boxes[order].T)
    return order, columns, _area(*columns)


def _overlaps(one: Boxes, area: Any, others: Boxes, areas: NDArray[np.float64], limit: float) -> NDArray[np.bool_]:
    common = _area(
        np.maximum(one[0], others[0]),
        np.maximum(one[1], others[1]),
        np.minimum(one[2], others[2]),
        np.minimum(one[3], others[3]),
    )
    return common > limit * (area + areas - common)


def _greedy(boxes: Boxes, scores: NDArray[np.float32], threshold: float) -> Outputs:
    """The loop that most projects carry: the best against all that are left."""
    order, columns, areas = _sorted(boxes, scores)
    limit, kept = float(np.float32(threshold)), []
    while order.size:
        kept.append(order[0])
        stays = ~_overlaps(columns[:, 0], areas[0], columns[:, 1:], areas[1:], limit)
        order, columns, areas = order[1:][stays], columns[:, 1:][:, stays], areas[1:][stays]
    return {"kept": np.array(kept, np.int64)}


def _greedy_in_place(boxes: Boxes, scores: NDArray[np.float32], threshold: float) -> Outputs:
    """The same with marks, which copies no boxes but looks at those that are gone."""
    order, columns, areas = _sorted(boxes, scores)
    limit, alive = float(np.float32(threshold)), np.ones(order.size, np.bool_)
    for i in range(order.size):
        if alive[i]:
            alive[i + 1 :] &= ~_overlaps(columns[:, i], areas[i], columns[:, i + 1 :], areas[i + 1 :], limit)
    return {"kept": order[alive]}


def _blocks(boxes: Boxes, scores: NDArray[np.float32], threshold: float) -> Outputs:
    """The best 64 among themselves, then those of them that are kept against all that are left, at once."""
    order, columns, areas = _sorted(boxes, scores)
    limit, kept = float(np.float32(threshold)), []
    while order.size:
        first, size = columns[:, :64], areas[:64]
        over = _overlaps(first[:, :, None], size[:, None], first[:, None, :], size, limit)
        alive = np.ones(size.size, np.bool_)
        for i in range(size.size):
            if alive[i]:
                alive[i + 1 :] &= ~over[i, i + 1 :]
        kept.append(order[:64][alive])
        order, columns, areas = order[64:], columns[:, 64:], areas[64:]
        stays = ~_overlaps(first[:, alive, None], size[alive, None], columns[:, None, :], areas, limit).any(axis=0)
        order, columns, areas = order[stays], columns[:, stays], areas[stays]
    return {"kept": np.concatenate(kept) if kept else np.empty(0, np.int64)}


def expressions() -> dict[str, Callable[..., Outputs]]:
    return {"a greedy loop": _greedy, "a greedy loop over marks": _greedy_in_place, "blocks of 64": _blocks}
