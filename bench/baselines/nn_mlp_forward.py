"""What NumPy makes of nn.mlp_forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BOUND = "compute"
#: Images of 28 x 28 in batches, 512 hidden units, ten classes.
_BATCHES = {"small": 4, "medium": 256, "large": 16_384}


def inputs(size: str) -> dict[str, Any]:
    random = np.random.default_rng(0)
    pixels, units, classes = (64, 64, 10) if size == "small" else (784, 512, 10)
    return {
        "x": random.standard_normal((_BATCHES[size], pixels), np.float32),
        "w1": random.standard_normal((pixels, units), np.float32) / np.float32(np.sqrt(pixels)),
        "b1": random.standard_normal(units, np.float32),
        "w2": random.standard_normal((units, classes), np.float32) / np.float32(np.sqrt(units)),
        "b2": random.standard_normal(classes, np.float32),
    }


def _plain(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> dict[str, Any]:
    return {"y": np.maximum(x @ w1 + b1, 0) @ w2 + b2}


def _in_place(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> dict[str, Any]:
    hidden = x @ w1
    hidden += b1
    np.maximum(hidden, 0, out=hidden)
    y = hidden @ w2
    y += b2
    return {"y": y}


def expressions() -> dict[str, Callable[..., Any]]:
    return {"matmul, maximum": _plain, "matmul, maximum, in place": _in_place}
