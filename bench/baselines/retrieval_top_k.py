"""What NumPy makes of retrieval.top_k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOUND = "compute"  # 16 products for each number of the items: BLAS takes longer over them than memory does
_SIZES = {"small": (1_000, 2), "medium": (50_000, 8), "large": (1_000_000, 16)}
_CHUNK = 16_384

Matrix = NDArray[np.float32]


def inputs(size: str) -> dict[str, Any]:
    """Vectors of 64 standard normal numbers, as learned embeddings nearly are, and the ten best for each query."""
    random = np.random.default_rng(0)
    n, queries = _SIZES[size]
    return {
        "items": random.standard_normal((n, 64), np.float32),
        "queries": random.standard_normal((queries, 64), np.float32),
        "k": 10,
    }


def expressions() -> dict[str, Callable[..., Any]]:
    return {"argpartition": _partitioned, "argpartition in chunks that fit the cache": _chunked}


def _partitioned(items: Matrix, queries: Matrix, k: int) -> dict[str, Any]:
    scores = queries @ items.T
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    return _ordered(np.take_along_axis(scores, best, axis=1), best)


def _chunked(items: Matrix, queries: Matrix, k: int) -> dict[str, Any]:
    scores, indices = [], []
    for start in range(0, len(items), _CHUNK):
        part = _partitioned(items[start : start + _CHUNK], queries, k)
        scores.append(part["scores"])
        indices.append(part["indices"] + start)
    every, where = np.concatenate(scores, axis=1), np.concatenate(indices, axis=1)
    best = np.argpartition(every, -k, axis=1)[:, -k:]
    return _ordered(np.take_along_axis(every, best, axis=1), np.take_along_axis(where, best, axis=1))


def _ordered(scores: Matrix, indices: NDArray[np.int64]) -> dict[str, Any]:
    order = np.argsort(-scores, axis=1, kind="stable")
    return {
        "scores": np.take_along_axis(scores, order, axis=1),
        "indices": np.take_along_axis(indices, order, axis=1),
    }
