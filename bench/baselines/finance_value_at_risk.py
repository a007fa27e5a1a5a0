"""What NumPy makes of finance.value_at_risk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

BOUND = "compute"
# NumPy's generators draw other numbers than Philox4x32, so the results differ as two samples of one population do.
AGREES = False
_SIZES = {"small": (4, 256), "medium": (16, 20_000), "large": (32, 1_000_000)}
#: Paths at once: their normals then stay in the second cache.
_BLOCK = 1024


def inputs(size: str) -> dict[str, Any]:
    """Shares that move together; ten trading days, in which one loses more in a hundred."""
    random = np.random.default_rng(0)
    assets, paths = _SIZES[size]
    deviation = random.uniform(0.01, 0.03, assets)
    alike = np.linalg.cholesky(np.full((assets, assets), 0.3) + 0.7 * np.eye(assets))
    return {
        "positions": random.uniform(1e3, 1e5, assets),
        "mean": random.normal(2e-4, 1e-4, assets),
        "factor": deviation[:, None] * alike,
        "paths": paths,
        "horizon": 10.0,
        "confidence": 0.99,
        "seed": 1,
    }


def _risk(losses: Any, confidence: float) -> dict[str, Any]:
    expected = losses.size * confidence
    rank = math.ceil(expected)
    losses.partition(rank - 1)
    var = losses[rank - 1]
    shortfall = (losses[rank:].sum() + (rank - expected) * var) / (losses.size - expected)
    return {"var": np.array([var]), "shortfall": np.array([shortfall])}


def _at_once(
    positions: Any, mean: Any, factor: Any, paths: int, horizon: float, confidence: float, seed: int
) -> dict[str, Any]:
    random = np.random.Generator(np.random.SFC64(seed))
    x = random.standard_normal((paths, mean.size)) @ (factor * math.sqrt(horizon)).T + mean * horizon
    return _risk(positions.sum() - np.exp(x) @ positions, confidence)


def _in_blocks(
    positions: Any, mean: Any, factor: Any, paths: int, horizon: float, confidence: float, seed: int
) -> dict[str, Any]:
    random = np.random.Generator(np.random.SFC64(seed))
    drift, across, invested = mean * horizon, (factor * math.sqrt(horizon)).T.copy(), positions.sum()
    losses = np.empty(paths)
    z, x = np.empty((_BLOCK, mean.size)), np.empty((_BLOCK, mean.size))
    for start in range(0, paths, _BLOCK):
        count = min(_BLOCK, paths - start)
        random.standard_normal(out=z[:count])
        np.matmul(z[:count], across, out=x[:count])
        x[:count] += drift
        np.exp(x[:count], out=x[:count])
        np.subtract(invested, x[:count] @ positions, out=losses[start : start + count])
    return _risk(losses, confidence)


def expressions() -> dict[str, Callable[..., Any]]:
    return {"all paths at once": _at_once, "in blocks": _in_blocks}
