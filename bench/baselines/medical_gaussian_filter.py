"""What NumPy and SciPy make of medical.gaussian_filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

BOUND = "compute"
_SIZES = {"small": (64, 1.0), "medium": (512, 2.0), "large": (4096, 2.0)}

Image = NDArray[np.float32]


def inputs(size: str) -> dict[str, Any]:
    """A smooth image with noise on it."""
    random = np.random.default_rng(0)
    side, sigma = _SIZES[size]
    y, x = np.mgrid[:side, :side].astype(np.float32) * np.float32(0.02)
    return {"image": np.sin(y) * np.cos(x) + random.standard_normal((side, side), np.float32) / 4, "sigma": sigma}


def expressions() -> dict[str, Callable[..., Any]]:
    return {
        "ndimage.gaussian_filter": _scipy,
        "oaconvolve both ways": _convolved,
        "shifted sums of whole images": _shifted,
        "shifted sums of rows": _shifted_rows,
    }


def _taps(sigma: float) -> NDArray[np.float32]:
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (taps / taps.sum()).astype(np.float32)


def _scipy(image: Image, sigma: float) -> dict[str, Any]:
    return {"smoothed": ndimage.gaussian_filter(image, sigma)}


def _convolved(image: Image, sigma: float) -> dict[str, Any]:
    taps = _taps(sigma)
    padded = np.pad(image, taps.size // 2, mode="symmetric")
    down = signal.oaconvolve(padded, taps[:, None], mode="valid", axes=0)
    return {"smoothed": signal.oaconvolve(down, taps[None], mode="valid", axes=1)}


def _shifted(image: Image, sigma: float) -> dict[str, Any]:
    taps = _taps(sigma)
    return {"smoothed": _both(np.pad(image, taps.size // 2, mode="symmetric"), taps)}


def _shifted_rows(image: Image, sigma: float) -> dict[str, Any]:
    taps = _taps(sigma)
    padded = np.pad(image, taps.size // 2, mode="symmetric")
    smoothed = np.empty_like(image)
    rows = max(1, 65_536 // image.shape[1])  # so that a strip fits the cache
    for y in range(0, len(image), rows):
        smoothed[y : y + rows] = _both(padded[y : y + rows + taps.size - 1], taps)
    return {"smoothed": smoothed}


def _both(padded: Image, taps: NDArray[np.float32]) -> Image:
    """A tap at a time, down the columns and then along the rows; the taps are alike on both sides."""
    radius = taps.size // 2
    height, width = padded.shape[0] - 2 * radius, padded.shape[1] - 2 * radius
    down = padded[radius : radius + height] * taps[radius]
    for i in range(radius):
        down += taps[i] * (padded[i : i + height] + padded[2 * radius - i : 2 * radius - i + height])
    along = down[:, radius : radius + width] * taps[radius]
    for i in range(radius):
        along += taps[i] * (down[:, i : i + width] + down[:, 2 * radius - i : 2 * radius - i + width])
    return along
