"""Sound: the level of each frame, and a comb filter that makes a room of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

# -- level ------------------------------------------------------------------------------------------------------------

level = Kernel(
    "audio.level",
    inputs={"samples": "float32[frames,size]"},
    outputs={"level_db": "float32[frames]"},
    flops="2*frames*size",
    bytes="4*frames*size + 4*frames",
    limits={"samples": "size >= 1"},
    batch="concat",  # frames do not know of each other: many jobs are one longer one
    tolerance=1e-5,
    summary="Level of each frame in decibels of full scale, by its mean square.",
)


@level.reference
def _level(samples: NDArray[np.float32]) -> Outputs:
    """10 log10 of the mean square: -infinity for silence, NaN where a sample is NaN, infinity where one is infinite."""
    mean_square = (samples.astype(np.float64) ** 2).mean(axis=1)
    with np.errstate(divide="ignore"):
        return {"level_db": (10 * np.log10(mean_square)).astype(np.float32)}


def _fill_level(samples: NDArray[np.float32], level_db: NDArray[np.float32]) -> None:
    frames, size = samples.shape
    for frame in range(frames):
        total = 0.0
        for i in range(size):
            total += np.float64(samples[frame, i]) ** 2
        level_db[frame] = 10 * math.log10(total / size) if total != 0 else -np.inf


@level.on("cpu")
def _level_on_cpu(device: Any) -> Run:
    from numba import njit, types  # here and not above: a process that only lists kernels loads no compiler

    array = types.Array(types.float32, 2, "C", readonly=True)
    # "reassoc" lets the sum be one vector operation for eight samples; NaN and infinity mean what they did.
    fill = njit((array, types.float32[::1]), nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})(
        _fill_level
    )

    def run(inputs: Inputs, context: Context) -> Outputs:
        samples = inputs["samples"]
        level_db = np.empty(len(samples), np.float32)
        fill(samples, level_db)
        return {"level_db": level_db}

    return run


@level.samples
def _level_samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for frames, size in ((1, 1), (7, 480), (100, 1024)):
        yield {"samples": random.uniform(-1, 1, (frames, size)).astype(np.float32)}
    yield {"samples": np.array([[0, 0], [np.nan, 1], [np.inf, 1]], np.float32)}


# -- comb -------------------------------------------------------------------------------------------------------------

comb = Kernel(
    "audio.comb",
    inputs={"samples": "float32[n]", "delay": "int64", "gain": "float32 = 0.7"},
    outputs={"wet": "float32[n]"},
    flops="2*n",
    bytes="8*n",
    limits={"delay": "delay >= 1"},
    tolerance=1e-4,
    summary="Feedback comb filter: each sample and, `delay` samples later, its echo.",
)


@comb.reference
def _comb(samples: NDArray[np.float32], delay: int, gain: float) -> Outputs:
    """y[i] = x[i] + gain y[i - delay].

    Schroeder (1962), "Natural sounding artificial reverberation", Journal of the Audio Engineering Society 10, 219-223,
    equation 1, without its own delay.
    """
    wet = samples.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(delay, len(wet), delay):
            block = wet[start : start + delay]
            block += np.float64(np.float32(gain)) * wet[start - delay : start - delay + len(block)]
        return {"wet": wet.astype(np.float32)}


def _fill_comb(samples: NDArray[np.float32], delay: int, gain: float, wet: NDArray[np.float32]) -> None:
    n = samples.size
    past = np.empty(min(delay, n), np.float64)  # the last `delay` of what came out, in the reference's precision
    for start in range(0, n, delay):
        block = samples[start : start + delay]
        out = wet[start : start + delay]
        for i in range(block.size):
            past[i] = block[i] + gain * past[i] if start > 0 else np.float64(block[i])
            out[i] = past[i]


@comb.on("cpu")
def _comb_on_cpu(device: Any) -> Run:
    from numba import njit, types

    array = types.Array(types.float32, 1, "C", readonly=True)
    types_of_it = (array, types.int64, types.float64, types.float32[::1])
    fill = njit(types_of_it, nogil=True, cache=True, error_model="numpy")(_fill_comb)

    def run(inputs: Inputs, context: Context) -> Outputs:
        samples = inputs["samples"]
        wet = np.empty_like(samples)
        fill(samples, inputs["delay"], float(np.float32(inputs["gain"])), wet)
        return {"wet": wet}

    return run


@comb.samples
def _comb_samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(1)
    for n, delay in ((1, 1), (10, 3), (5, 9), (4096, 441)):
        yield {"samples": random.uniform(-1, 1, n).astype(np.float32), "delay": delay}
    yield {"samples": np.array([1, np.nan, np.inf, 0, 0, 0], np.float32), "delay": 3, "gain": 0.5}
