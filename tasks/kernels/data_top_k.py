"""Big data: the largest of many numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

# No batching: stacking would copy every job's values, which costs as much as the one pass over them.
top_k = Kernel(
    "data.top_k",
    inputs={"values": "float32[n]", "k": "int64 = 10"},
    outputs={"values": "float32[k]", "indices": "int64[k]"},
    flops="n",
    bytes="4*n + 12*k",
    limits={"values": "n <= 4294967296", "k": "1 <= k <= n"},
    tolerance=0.0,
    summary="The k largest numbers, largest first, and where they are.",
)


@top_k.reference
def _reference(values: NDArray[np.float32], k: int) -> Outputs:
    """Equal numbers by the lower index (-0 equals 0); NaN after all numbers."""
    indices = np.argsort(-values, kind="stable")[:k]
    return {"values": values[indices], "indices": indices.astype(np.int64)}


# A candidate is one int64, the number's rank above its inverted index: one comparison settles ties and NaN too.
_LAST = 2**32 - 1
_NAN_RANK = -(2**31)


def _key(value: np.float32, index: int) -> int:
    # + 0 makes -0 the same as 0. The bits of negative floats are in reverse order.
    bits = np.int64(np.float32(value + np.float32(0)).view(np.int32))
    rank = bits if bits >= 0 else bits ^ 0x7FFFFFFF
    rank = rank if value == value else np.int64(-2147483648)
    return (rank << 32) + (4294967295 - index)


def _opened(keys: NDArray[np.int64]) -> Outputs:
    """The numbers and indices of keys, the largest key first."""
    keys = np.sort(keys)[::-1]
    ranks = keys >> 32
    values = np.where(ranks >= 0, ranks, ranks ^ 0x7FFFFFFF).astype(np.int32).view(np.float32)
    values[ranks == _NAN_RANK] = np.nan
    return {"values": values, "indices": _LAST - (keys & _LAST)}


def _collect(
    values: NDArray[np.float32], start: int, cutoff: np.float32, keys: NDArray[np.int64], count: int
) -> tuple[int, int]:
    """Appends the keys of the numbers from `start` on that are above the cutoff, until there is no room.

    Returns where it stopped and how many keys there are. Few numbers pass, so 64 are asked at once whether any does.
    """
    n = values.size
    while start < n:
        stop = min(start + 64, n)
        if stop - start == 64:
            chunk = values[start : start + 64]
            passing = 0
            for j in range(64):
                passing |= not chunk[j] <= cutoff
            if not passing:
                start = stop
                continue
        if count + 64 > keys.size:
            return start, count
        for i in range(start, stop):
            if not values[i] <= cutoff:
                keys[count] = _key(values[i], i)
                count += 1
        start = stop
    return n, count


_ROOM = 4096


@top_k.on("cpu")
def _cpu(device: Any) -> Run:
    """One pass in compiled code; where the candidates fill their room NumPy keeps the k best, which sets the cutoff."""
    from numba import njit, types
    from numba.extending import register_jitable

    register_jitable(_key)
    values_type = types.Array(types.float32, 1, "C", readonly=True)
    collect = njit(
        (values_type, types.int64, types.float32, types.int64[::1], types.int64),
        nogil=True,
        cache=True,
        error_model="numpy",
    )(_collect)

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, k = inputs["values"], inputs["k"]
        keys = np.empty(2 * k + _ROOM, np.int64)
        cutoff = np.float32(np.nan)  # which every number passes
        start, count = collect(values, 0, cutoff, keys, 0)
        while start < values.size:
            keys[:k] = np.partition(keys[:count], count - k)[count - k :]
            cutoff = _opened(keys[:k].min(keepdims=True))["values"][0]
            start, count = collect(values, start, cutoff, keys, k)
        return _opened(np.partition(keys[:count], count - k)[count - k :])

    return run


@top_k.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, k in ((1, 1), (100, 100), (5_000, 10)):
        yield {"values": random.standard_normal(n, np.float32), "k": k}
    # Ever new best ones, many ties, and more asked for than there are numbers.
    yield {"values": np.arange(20_000, dtype=np.float32), "k": 5}
    yield {"values": random.integers(-2, 3, 1_000).astype(np.float32), "k": 300}
    yield {"values": np.array([np.nan, -0.0, 0.0, -np.inf, np.nan, np.inf, 1e-45, -1e-45], np.float32), "k": 8}
