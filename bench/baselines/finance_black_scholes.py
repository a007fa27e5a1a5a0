"""What NumPy and SciPy make of finance.black_scholes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

BOUND = "compute"
_LENGTHS = {"small": 1_000, "medium": 100_000, "large": 10_000_000}
_CHUNK = 8_192

Column = NDArray[np.float64]


def inputs(size: str) -> dict[str, Any]:
    """Options near the money, up to two years."""
    random = np.random.default_rng(0)
    n = _LENGTHS[size]
    return {
        "spot": random.uniform(50, 150, n),
        "strike": random.uniform(50, 150, n),
        "years": random.uniform(0.1, 2, n),
        "volatility": random.uniform(0.05, 0.6, n),
        "rate": 0.03,
    }


def expressions() -> dict[str, Callable[..., Any]]:
    return {"ndtr, put by parity": _parity, "the same in chunks that fit the cache": _chunked, "erfc": _erfc}


def _parity(spot: Column, strike: Column, years: Column, volatility: Column, rate: float) -> dict[str, Any]:
    deviation = volatility * np.sqrt(years)
    due = strike * np.exp(-rate * years)
    d1 = np.log(spot / due) / deviation + deviation / 2
    call = spot * special.ndtr(d1) - due * special.ndtr(d1 - deviation)
    return {"call": call, "put": call - spot + due}


def _chunked(spot: Column, strike: Column, years: Column, volatility: Column, rate: float) -> dict[str, Any]:
    call, put = np.empty_like(spot), np.empty_like(spot)
    for start in range(0, spot.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        priced = _parity(spot[part], strike[part], years[part], volatility[part], rate)
        call[part], put[part] = priced["call"], priced["put"]
    return {"call": call, "put": put}


def _erfc(spot: Column, strike: Column, years: Column, volatility: Column, rate: float) -> dict[str, Any]:
    deviation = volatility * np.sqrt(years)
    due = strike * np.exp(-rate * years)
    d1 = np.log(spot / due) / deviation + deviation / 2
    half = np.sqrt(0.5)
    call = 0.5 * (spot * special.erfc(-half * d1) - due * special.erfc(-half * (d1 - deviation)))
    return {"call": call, "put": call - spot + due}
