"""What NumPy makes of recommend.als_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BOUND = "compute"
#: Users, items, factors, entries of a user.
_SIZES = {"small": (10, 50, 16, 10), "medium": (1_000, 2_000, 32, 50), "large": (20_000, 10_000, 32, 100)}


def inputs(size: str) -> dict[str, Any]:
    """Some items are known to many, most to few, and some users did much more than others."""
    random = np.random.default_rng(0)
    users, items, f, each = _SIZES[size]
    lengths = np.minimum(random.geometric(1 / each, users), items)
    rank = (items * random.random(lengths.sum()) ** 2).astype(np.int32)
    return {
        "starts": np.concatenate([[0], np.cumsum(lengths)]),
        "items": rank,
        "confidence": (1 + 10 * random.exponential(1, lengths.sum())).astype(np.float32),
        "factors": random.normal(0, 0.1, (items, f)).astype(np.float32),
        "regularization": 1.0,
    }


def _terms(starts: Any, items: Any, confidence: Any, factors: Any, user: int) -> tuple[Any, Any]:
    part = slice(starts[user], starts[user + 1])
    rows, c = factors[items[part]], confidence[part]
    return rows.T @ ((c - 1)[:, None] * rows), c @ rows


def _gram(factors: Any, regularization: float) -> Any:
    return factors.T @ factors + np.float32(regularization) * np.eye(factors.shape[1], dtype=np.float32)


def _each(starts: Any, items: Any, confidence: Any, factors: Any, regularization: float) -> dict[str, Any]:
    gram, users = _gram(factors, regularization), []
    for user in range(len(starts) - 1):
        added, right = _terms(starts, items, confidence, factors, user)
        users.append(np.linalg.solve(gram + added, right))
    return {"users": np.array(users)}


def _batched(starts: Any, items: Any, confidence: Any, factors: Any, regularization: float) -> dict[str, Any]:
    count, f = len(starts) - 1, factors.shape[1]
    left, right = np.empty((count, f, f), np.float32), np.empty((count, f), np.float32)
    for user in range(count):
        left[user], right[user] = _terms(starts, items, confidence, factors, user)
    left += _gram(factors, regularization)
    return {"users": np.linalg.solve(left, right[..., None])[..., 0]}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"a solve for each user": _each, "all solved at once": _batched}
