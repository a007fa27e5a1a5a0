"""What a portfolio may lose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run
from tasks import philox
from tasks.philox import normal_pair, normal_pair_cuda, philox4x32, philox_round

value_at_risk = Kernel(
    "finance.value_at_risk",
    inputs={
        "positions": "float64[a]",
        "mean": "float64[a]",
        "factor": "float64[a,a]",
        "paths": "int64 = 100000",
        "horizon": "float64 = 1",
        "confidence": "float64 = 0.99",
        "seed": "int64 = 0",
    },
    outputs={"var": "float64[1]", "shortfall": "float64[1]"},
    flops="paths*(a*a + 110*a + 20)",
    bytes="16*paths + 8*a*a",
    limits={
        "positions": "a <= 1024",
        "paths": "1 <= paths <= 2**4 * 10**4 * 10**4",
        "horizon": "horizon >= 0",
        "confidence": "0 < confidence < 1",
    },
    tolerance=1e-9,
    summary="Value at risk and expected shortfall of a portfolio, by Monte Carlo.",
)

Vector = NDArray[np.float64]


@value_at_risk.reference
def _reference(
    positions: Vector, mean: Vector, factor: Vector, paths: int, horizon: float, confidence: float, seed: int
) -> Outputs:
    """Log returns over the horizon are normal: x = mean * horizon + sqrt(horizon) * L z, a path loses sum p (1 - e**x).

    `positions` is the money in each asset, `mean` and L (the lower triangle of `factor`, the Cholesky factor of their
    covariance; what is above it is not looked at) are those of log returns a period. z of a path: `tasks.philox`,
    under the seed. Glasserman (2003), "Monte Carlo Methods in Financial Engineering", sections 3.2 and 9.1.

    var is the k-th smallest loss, k = ceil(paths * confidence); shortfall the mean of the worst paths * (1 -
    confidence), of which the k-th loss may count in part: Acerbi and Tasche (2002), "On the coherence of expected
    shortfall", definition 2.6. A log return is kept within 700, so that its exponential is finite. Where anything that
    is looked at is NaN or infinite, so are all the losses, and both results, NaN.
    """
    with np.errstate(all="ignore"):
        lower = np.tril(factor)
        spoil = 0 * (positions.sum() + mean.sum() + lower.sum() + horizon + confidence)
        x = mean * horizon + philox.normals(seed, paths, mean.size) @ (lower * np.sqrt(horizon)).T
        losses = (positions * (1 - np.exp(np.clip(x, -700, 700)))).sum(axis=1) + spoil
        return dict(zip(("var", "shortfall"), _risk(np.sort(losses), paths, confidence), strict=True))


def _rank(paths: int, confidence: float) -> tuple[int, float, float]:
    """Which of the losses, counted from the smallest (1), is the value at risk; its share, and all shares, in the mean."""
    sure = confidence if 0 < confidence < 1 else 0.5
    rank = min(max(math.ceil(paths * sure), 1), paths)
    return rank, rank - paths * sure, paths * (1 - sure)


def _risk(losses: Vector, paths: int, confidence: float) -> tuple[Vector, Vector]:
    """Of losses in order, or at least with the smaller ones before the k-th and the larger, and NaN, after it."""
    rank, share, total = _rank(paths, confidence)
    var, beyond = losses[rank - 1], losses[rank:]
    if np.isnan(var) or np.isnan(beyond).any():
        var = np.float64(np.nan)
    return np.array([var]), np.array([(beyond.sum() + share * var) / total])


# -- cpu -------------------------------------------------------------------------------------------------------------

#: Paths side by side in vectors; with 32 assets their normals are 16 KiB, which the first cache holds.
_TILE = 64
_LOW, _HALF, _NONE = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(0)
_BIAS, _EXPONENT = np.int64(1023), np.int64(52)


def _exp(x: float) -> float:
    """e**x for x in [-700, 700], by x = n log 2 + r and the Taylor series of r (Cody and Waite 1980, ch. 6)."""
    # Added to 1.5 * 2**52 a number is rounded to a whole one, which stands in its last bits: AVX2 converts none.
    shifted: Any = np.float64(x * 1.4426950408889634 + 6755399441055744.0)
    n = shifted - 6755399441055744.0
    r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6
    r2 = r * r
    r4 = r2 * r2
    low = (1.0 + r) + r2 * (1 / 2 + r * (1 / 6)) + r4 * ((1 / 24 + r * (1 / 120)) + r2 * (1 / 720 + r * (1 / 5040)))
    high = (1 / 40320 + r * (1 / 362880)) + r2 * (1 / 3628800 + r * (1 / 39916800))
    p = low + r4 * r4 * high
    scale: Any = np.int64((shifted.view(np.int64) + _BIAS) << _EXPONENT)
    return float(p * scale.view(np.float64))


def _lose(
    positions: Vector, drift: Vector, lower: Vector, wild: bool, k0: np.uint64, k1: np.uint64, first: int, losses: Vector
) -> None:
    """The losses of the paths from `first` on. Assets are filled up with zeros to a multiple of four."""
    assets = positions.size
    z = np.empty((assets, _TILE))
    x, y, loss = np.empty(_TILE), np.empty(_TILE), np.empty(_TILE)
    for start in range(0, losses.size, _TILE):
        for block in range(assets // 4):
            z0, z1, z2, z3 = z[4 * block], z[4 * block + 1], z[4 * block + 2], z[4 * block + 3]
            for p in range(_TILE):
                path = np.uint64(first + start + p)
                w0, w1, w2, w3 = philox4x32(path & _LOW, path >> _HALF, np.uint64(block), _NONE, k0, k1)
                z0[p], z1[p] = normal_pair(w0, w1)
                z2[p], z3[p] = normal_pair(w2, w3)
        for p in range(_TILE):
            loss[p] = 0.0
        # Two assets at once: each vector of z that is loaded serves both.
        for i in range(0, assets, 2):
            for p in range(_TILE):
                x[p], y[p] = drift[i], drift[i + 1]
            for j in range(0, i + 2, 4):
                l0, l1, l2, l3 = lower[i, j], lower[i, j + 1], lower[i, j + 2], lower[i, j + 3]
                m0, m1, m2, m3 = lower[i + 1, j], lower[i + 1, j + 1], lower[i + 1, j + 2], lower[i + 1, j + 3]
                z0, z1, z2, z3 = z[j], z[j + 1], z[j + 2], z[j + 3]
                for p in range(_TILE):
                    x[p] += (l0 * z0[p] + l1 * z1[p]) + (l2 * z2[p] + l3 * z3[p])
                    y[p] += (m0 * z0[p] + m1 * z1[p]) + (m2 * z2[p] + m3 * z3[p])
            if wild:
                for p in range(_TILE):
                    x[p], y[p] = min(max(x[p], -700.0), 700.0), min(max(y[p], -700.0), 700.0)
            position, other = positions[i], positions[i + 1]
            for p in range(_TILE):
                loss[p] += position * (1.0 - _exp(x[p])) + other * (1.0 - _exp(y[p]))
        for p in range(min(_TILE, losses.size - start)):
            losses[start + p] = loss[p]


#: Paths between looks at whether the job was cancelled: a few milliseconds.
_CHUNK = 32_768


@value_at_risk.on("cpu")
def _cpu(device: Any) -> Run:
    """A tile of paths at once, from its counters to its losses, in vectors; only the losses are kept."""
    from numba import njit, types
    from numba.extending import register_jitable

    philox.prepare()
    register_jitable(forceinline=True)(_exp)
    column, word = types.float64[::1], types.uint64
    lose = njit(
        (column, column, types.float64[:, ::1], types.boolean, word, word, types.int64, column),
        nogil=True,
        cache=True,
        error_model="numpy",
        fastmath={"contract"},
    )(_lose)

    def run(inputs: Inputs, context: Context) -> Outputs:
        paths, horizon, confidence = inputs["paths"], inputs["horizon"], inputs["confidence"]
        assets = inputs["positions"].size
        filled = -(-assets // 4) * 4
        positions, drift, lower = np.zeros(filled), np.zeros(filled), np.zeros((filled, filled))
        with np.errstate(all="ignore"):
            positions[:assets] = inputs["positions"]
            drift[:assets] = inputs["mean"] * horizon
            lower[:assets, :assets] = np.tril(inputs["factor"])
            spoil = 0 * (positions.sum() + inputs["mean"].sum() + lower.sum() + horizon + confidence)
            lower *= np.sqrt(horizon)
            wild = bool((np.abs(drift) + philox.MOST * np.abs(lower).sum(axis=1) > 700).any())
        if not np.isfinite(spoil):
            return {"var": np.array([np.nan]), "shortfall": np.array([np.nan])}
        low, high = map(np.uint64, philox.key_of(inputs["seed"]))
        losses = np.empty(paths)
        for start in range(0, paths, _CHUNK):
            if context.cancelled:
                break
            lose(positions, drift, lower, wild, low, high, start, losses[start : start + _CHUNK])
        losses.partition(_rank(paths, confidence)[0] - 1)
        return dict(zip(("var", "shortfall"), _risk(losses, paths, confidence), strict=True))

    return run


# -- gpu -------------------------------------------------------------------------------------------------------------

cuda: Any  # numba.cuda, on a GPU
_THREADS = 64
#: The paths' normals wait in memory, a column a thread, so that neighbours read neighbours.
_SCRATCH_BYTES = 64 * 2**20
_SIGN, _ALL = np.uint64(1 << 63), np.uint64(0xFFFFFFFFFFFFFFFF)


def _spoil_gpu(positions: Vector, mean: Vector, factor: Vector, spoil: Vector) -> None:
    for i in range(cuda.grid(1), positions.size, cuda.gridsize(1)):
        total = positions[i] + mean[i]
        for j in range(i + 1):
            total += factor[i, j]
        cuda.atomic.add(spoil, 0, total * 0.0)


def _lose_gpu(
    positions: Vector,
    mean: Vector,
    factor: Vector,
    horizon: float,
    spoil: Vector,
    k0: np.uint64,
    k1: np.uint64,
    z: Vector,
    losses: Vector,
) -> None:
    thread, threads, assets = cuda.grid(1), cuda.gridsize(1), positions.size
    root, spoiled = math.sqrt(horizon), spoil[0]
    for path in range(thread, losses.size, threads):
        row = np.uint64(path)
        for block in range(z.shape[0] // 4):
            w0, w1, w2, w3 = philox4x32(row & _LOW, row >> _HALF, np.uint64(block), _NONE, k0, k1)
            first, second = normal_pair_cuda(w0, w1)
            third, fourth = normal_pair_cuda(w2, w3)
            z[4 * block, thread], z[4 * block + 1, thread] = first, second
            z[4 * block + 2, thread], z[4 * block + 3, thread] = third, fourth
        loss = spoiled
        for i in range(assets):
            x = 0.0
            for j in range(i + 1):
                x += factor[i, j] * z[j, thread]
            x = mean[i] * horizon + root * x
            loss += positions[i] * (1.0 - math.exp(min(max(x, -700.0), 700.0)))
        losses[path] = loss


def _order_gpu(value: float, held: Any) -> Any:
    """A number whose order as uint64 is that of the float64 `value`; `held` is one place to look at its bits."""
    held[0] = value
    bits = held.view(np.uint64)[0]
    return bits ^ _ALL if bits & _SIGN else bits | _SIGN


def _count_gpu(losses: Vector, state: NDArray[np.uint64], shift: np.uint64, counts: NDArray[np.uint64]) -> None:
    """How many losses, of those that begin as the k-th does, have which eight bits next."""
    shared = cuda.shared.array(256, np.uint32)
    held = cuda.local.array(1, np.float64)
    for bin_ in range(cuda.threadIdx.x, 256, cuda.blockDim.x):
        shared[bin_] = 0
    cuda.syncthreads()
    prefix, mask = state[0], state[1]
    for i in range(cuda.grid(1), losses.size, cuda.gridsize(1)):
        key = _order_gpu(losses[i], held)
        if key & mask == prefix:
            cuda.atomic.add(shared, np.int64((key >> shift) & _BYTE), np.uint32(1))
    cuda.syncthreads()
    for bin_ in range(cuda.threadIdx.x, 256, cuda.blockDim.x):
        if shared[bin_] > 0:
            cuda.atomic.add(counts, bin_, np.uint64(shared[bin_]))
