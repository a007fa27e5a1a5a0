"""What NumPy makes of data.top_k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BOUND = "memory"


def inputs(size: str) -> dict[str, Any]:
    n, k = {"small": (30_000, 10), "medium": (1_000_000, 100), "large": (10_000_000, 100)}[size]
    return {"values": np.random.default_rng(0).standard_normal(n, np.float32), "k": k}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"argpartition": _argpartition, "partition": _partition, "a cutoff from a sample": _sampled}


def _argpartition(values: Any, k: int) -> dict[str, Any]:
    return _outputs(values, np.sort(np.argpartition(values, values.size - k)[values.size - k :]), k)


def _partition(values: Any, k: int) -> dict[str, Any]:
    cutoff = np.partition(values, values.size - k)[values.size - k]
    return _outputs(values, np.flatnonzero(values >= cutoff), k)


def _sampled(values: Any, k: int) -> dict[str, Any]:
    sample = values[:: max(1, values.size // 50_000)]
    rank = min(sample.size, 8 + 2 * k * sample.size // values.size)
    found = np.flatnonzero(values >= np.partition(sample, sample.size - rank)[sample.size - rank])
    return _outputs(values, found, k) if found.size >= k else _partition(values, k)


def _outputs(values: Any, indices: Any, k: int) -> dict[str, Any]:
    indices = indices[np.argsort(-values[indices], kind="stable")][:k]
    return {"values": values[indices], "indices": indices}
