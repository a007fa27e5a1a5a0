"""What NumPy makes of data.group_by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BOUND = "latency"  # each row reads and writes the row of its group: loads that wait for stores, not bandwidth


def inputs(size: str) -> dict[str, Any]:
    """`large` is ten million rows of a thousand groups; `wide` as many of a million, more than the caches hold."""
    sizes = {"small": (5_000, 100), "medium": (300_000, 1_000), "large": (10_000_000, 1_000)}
    n, groups = (sizes | {"wide": (10_000_000, 1_000_000)})[size]
    random = np.random.default_rng(0)
    return {
        "keys": random.integers(0, groups, n).astype(np.int32),
        "values": random.normal(100, 15, n),
        "groups": groups,
    }


def expressions() -> dict[str, Callable[..., Any]]:
    return {"bincount and ufunc.at": _counted, "argsort and ufunc.reduceat": _sorted}


def _counted(keys: Any, values: Any, groups: int) -> dict[str, Any]:
    count = np.bincount(keys, minlength=groups)
    total = np.bincount(keys, values, minlength=groups)
    least, most = np.full(groups, np.inf), np.full(groups, -np.inf)
    np.minimum.at(least, keys, values)
    np.maximum.at(most, keys, values)
    return _outputs(count, total, least, most)


def _sorted(keys: Any, values: Any, groups: int) -> dict[str, Any]:
    # Of 16 bits NumPy's stable sort is a radix sort.
    order = np.argsort(keys.astype(np.uint16) if groups <= 65_536 else keys, kind="stable")
    values = values[order]
    count = np.bincount(keys, minlength=groups)
    some = count > 0
    starts = (np.cumsum(count) - count)[some]
    total, least, most = np.zeros(groups), np.full(groups, np.nan), np.full(groups, np.nan)
    total[some] = np.add.reduceat(values, starts)
    least[some] = np.minimum.reduceat(values, starts)
    most[some] = np.maximum.reduceat(values, starts)
    return _outputs(count, total, least, most)


def _outputs(count: Any, total: Any, least: Any, most: Any) -> dict[str, Any]:
    none = count == 0
    least[none] = most[none] = np.nan
    with np.errstate(invalid="ignore"):
        return {"count": count, "total": total, "least": least, "most": most, "mean": total / count}
