"""Retrieval: finding the items that fit a query best."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.errors import JobCancelled
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

# No batching: stacking would copy every job's items, which costs more than the search reads.
top_k = Kernel(
    "retrieval.top_k",
    inputs={"items": "float32[n,d]", "queries": "float32[q,d]", "k": "int64 = 10"},
    outputs={"scores": "float32[q,k]", "indices": "int64[q,k]"},
    flops="2*q*n*d + q*n",
    bytes="4*(n*d + q*d + q*n) + 12*q*k",
    limits={"k": "1 <= k <= n"},
    tolerance=1e-4,
    summary="The k items with the largest dot product with each query, best first.",
)


@top_k.reference
def _reference(items: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> Outputs:
    """scores = queries . items, largest first. Equal scores by the lower index; NaN after all numbers.

    Float32 sums depend on their order, so two variants may swap items whose scores differ by a rounding error.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        scores = queries @ items.T
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return {"scores": np.take_along_axis(scores, indices, axis=1), "indices": indices.astype(np.int64)}


# A candidate is one int64, its score above its inverted index, so that one comparison settles ties and NaN too.
_INDEX_BITS = 32
_LAST_INDEX = 2**_INDEX_BITS - 1
_NAN_RANK = -(2**31)


def _collect(
    tile: NDArray[np.float32],
    first: int,
    k: int,
    candidates: NDArray[np.int64],
    counts: NDArray[np.int64],
    cutoffs: NDArray[np.float32],
) -> None:
    """Adds the tile's scores (items `first` and on) that can still be among the k best to each query's candidates.

    A query that has no room left for candidates keeps its k best, and the worst of those is its new cutoff; until
    then the cutoff is NaN, which every score passes. Few scores pass, so 32 are asked at once whether any does.
    """
    queries, width = tile.shape
    room = candidates.shape[1]
    for query in range(queries):
        scores, kept = tile[query], candidates[query]
        count, cutoff = counts[query], cutoffs[query]
        for start in range(0, width, 32):
            stop = min(start + 32, width)
            passing = 0
            if stop - start == 32:
                chunk = scores[start : start + 32]
                for j in range(32):
                    passing |= not chunk[j] <= cutoff
            else:
                passing = 1
            if not passing:
                continue
            for j in range(start, stop):
                score = scores[j]
                if score <= cutoff:
                    continue
                if count == room:
                    _keep_best(kept, k)
                    count = k
                    rank = kept[:k].min() >> 32
                    if rank != -2147483648:
                        bits = np.int32(rank if rank >= 0 else rank ^ 0x7FFFFFFF)
                        cutoff = bits.view(np.float32)
                # + 0 makes -0 the same as 0. The bits of negative floats are in reverse order.
                bits = np.float32(score + np.float32(0)).view(np.int32)
                rank = np.int64(bits) if bits >= 0 else np.int64(bits) ^ 0x7FFFFFFF
                rank = -2147483648 if score != score else rank
                kept[count] = (rank << 32) + (4294967295 - first - j)
                count += 1
        counts[query], cutoffs[query] = count, cutoff


def _keep_best(keys: NDArray[np.int64], k: int) -> None:
    """Moves the k largest keys to the front, in any order: Hoare's Find (1961, CACM algorithm 65)."""
    left, right = 0, keys.size - 1
    while left < right:
        pivot = keys[(left + right) // 2]
        i, j = left, right
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            right = j
        elif k - 1 >= i:
            left = i
        else:
            return


@top_k.on("cpu")
def _cpu(device: Any) -> Run:
    """BLAS scores a tile of items, compiled code picks the candidates from it while it is in the cache."""
    from numba import njit, types
    from numba.extending import register_jitable

    register_jitable(_keep_best)
    collect = njit(
        (types.float32[:, ::1], types.int64, types.int64, types.int64[:, ::1], types.int64[::1], types.float32[::1]),
        nogil=True,
        cache=True,
    )(_collect)

    def run(inputs: Inputs, context: Context) -> Outputs:
        items, queries, k = inputs["items"], inputs["queries"], inputs["k"]
        n, q = len(items), len(queries)
        width = min(n, max(1024, 2**18 // max(q, 1)))
        tile = np.empty(q * width, np.float32)
        candidates = np.empty((q, min(n, 2 * k + 64)), np.int64)
        counts, cutoffs = np.zeros(q, np.int64), np.full(q, np.nan, np.float32)
        for first in range(0, n, width):
            if context.cancelled:
                raise JobCancelled(f"retrieval.top_k was cancelled after {first} of {n} items")
            block = items[first : first + width]
            scores = tile[: q * len(block)].reshape(q, len(block))
            with np.errstate(invalid="ignore", over="ignore"):
                np.matmul(queries, block.T, out=scores)
            collect(scores, first, k, candidates, counts, cutoffs)
        return _best(candidates, counts, k)

    return run


def _best(candidates: NDArray[np.int64], counts: NDArray[np.int64], k: int) -> Outputs:
    """The k best candidates of each query in order, taken apart into scores and indices."""
    empty = np.arange(candidates.shape[1]) >= counts[:, None]
    candidates[empty] = np.iinfo(np.int64).min
    if k < candidates.shape[1]:
        candidates.partition(candidates.shape[1] - k, axis=1)
    best = candidates[:, candidates.shape[1] - k :]
    best.sort(axis=1)
    best = best[:, ::-1]
    ranks = best >> _INDEX_BITS
    scores = np.where(ranks >= 0, ranks, ranks ^ 0x7FFFFFFF).astype(np.int32).view(np.float32)
    return {
        "scores": np.where(ranks == _NAN_RANK, np.float32(np.nan), scores),
        "indices": _LAST_INDEX - (best & _LAST_INDEX),
    }


#: Scores that stand in a TPU's memory at once.
_SCORES = 2**27


@top_k.on("tpu")
def _tpu(device: Any) -> Run:
    """The matrix unit scores, some queries at a time; top_k takes whole numbers in the order of the scores.

    It puts equal ones in the order of their indices. NaN comes after all numbers, and items of padding after that.
    """
    import jax.numpy as jnp
    from jax import lax

    def search(items: Any, queries: Any, n: Any, k: int) -> Any:
        padding = jnp.arange(len(items)) >= n

        def best(some: Any) -> Any:
            scores = jnp.matmul(some, items.T, precision="highest")
            bits = lax.bitcast_convert_type(scores + jnp.float32(0), jnp.int32)
            ranks = jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
            ranks = jnp.where(jnp.isnan(scores), _NAN_RANK + 1, ranks)
            indices = lax.top_k(jnp.where(padding, _NAN_RANK, ranks), k)[1]
            return jnp.take_along_axis(scores, indices, axis=1), indices.astype(jnp.int64)

        together = min(len(queries), max(1, _SCORES // len(items)))  # both are powers of two
        scores, indices = lax.map(best, queries.reshape(-1, together, queries.shape[1]))
        return scores.reshape(-1, k), indices.reshape(-1, k)

    program = device.program(search, static=("k",))

    def run(inputs: Inputs, context: Context) -> Outputs:
        items, queries, k = inputs["items"], inputs["queries"], inputs["k"]
        n, q = items.shape[0], queries.shape[0]
        shape = (q, k)
        return program({"scores": shape, "indices": shape}, items, queries, np.int32(n), k=device.bucket(k))

    return run


@top_k.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, q, d, k in ((1, 1, 1, 1), (7, 3, 2, 7), (5_000, 4, 16, 10), (50_000, 8, 32, 100)):
        # Small whole numbers: their sums are exact in any order, and ties are many.
        yield {
            "items": random.integers(-9, 10, (n, d)).astype(np.float32),
            "queries": random.integers(-9, 10, (q, d)).astype(np.float32),
            "k": k,
        }
