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
    limits={"values": "n <= 2147483648", "k": "1 <= k <= n"},
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
_NAN_RANK = -(2**31)  # and the bits of -0


def _key(value: np.float32, index: int) -> Any:
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


# On a GPU the k-th largest key is found digit by digit, the highest first, by counting how many keys have each value of
# the next one (radix select: Alabi, Blanchard, Gordon and Steinbach 2012, "Fast k-selection algorithms for graphics
# processing units"). All keys differ, so exactly k are not less than it. What is left is little, and the host sorts it.
cuda: Any  # numba.cuda, on a GPU
_DIGIT = 256


def _key_gpu(value: Any, index: int, index_bits: int) -> Any:
    """The number's rank, 0 to 2**32 - 1, above its inverted index: never negative, so shifts are plain."""
    bits = np.int64((value + np.float32(0)).view(np.int32))
    rank = bits + 2147483648 if bits >= 0 else (bits ^ 2147483647) + 2147483648
    rank = rank if value == value else np.int64(0)
    return (rank << index_bits) + ((np.int64(1) << index_bits) - 1 - index)


def _count_gpu(
    values: NDArray[np.float32], index_bits: int, shift: int, prefix: NDArray[np.int64], counts: NDArray[np.int64]
) -> None:
    own = cuda.shared.array(_DIGIT, np.int32)
    for digit in range(cuda.threadIdx.x, _DIGIT, cuda.blockDim.x):
        own[digit] = 0
    cuda.syncthreads()
    chosen = prefix[0]
    for i in range(cuda.grid(1), values.size, cuda.gridsize(1)):
        upper = _key_gpu(values[i], i, index_bits) >> shift
        if upper >> 8 == chosen:
            cuda.atomic.add(own, upper & 255, np.int32(1))
    cuda.syncthreads()
    for digit in range(cuda.threadIdx.x, _DIGIT, cuda.blockDim.x):
        if own[digit] > 0:
            cuda.atomic.add(counts, digit, np.int64(own[digit]))


def _choose_gpu(counts: NDArray[np.int64], prefix: NDArray[np.int64], left: NDArray[np.int64]) -> None:
    """One thread: the digit of the key that has `left` keys of this prefix not below it; counts are 0 again."""
    digit, above = _DIGIT - 1, np.int64(0)
    while above + counts[digit] < left[0]:
        above += counts[digit]
        digit -= 1
    prefix[0] = (prefix[0] << 8) + digit
    left[0] -= above
    for each in range(_DIGIT):
        counts[each] = 0


def _take_gpu(
    values: NDArray[np.float32],
    index_bits: int,
    cutoff: NDArray[np.int64],
    taken: NDArray[np.int64],
    keys: NDArray[np.int64],
) -> None:
    for i in range(cuda.grid(1), values.size, cuda.gridsize(1)):
        key = _key_gpu(values[i], i, index_bits)
        if key >= cutoff[0]:
            keys[cuda.atomic.add(taken, 0, np.int64(1))] = key


@top_k.on("gpu")
def _gpu(device: Any) -> Run:
    threads = 16 if device.simulated else 256
    count = device.compile(_count_gpu, threads=(threads,), helpers=(_key_gpu,))
    choose = device.compile(_choose_gpu, threads=(1,))
    take = device.compile(_take_gpu, helpers=(_key_gpu,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, k = inputs["values"], inputs["k"]
        index_bits = max(1, (values.size - 1).bit_length())
        blocks = min(-(-values.size // (8 * threads)), 4 if device.simulated else 1024)
        prefix, left = device.zeros((1,), np.int64), device.full((1,), k, np.int64)
        counts, taken = device.zeros((_DIGIT,), np.int64), device.zeros((1,), np.int64)
        keys = device.empty((k,), np.int64)
        bits = np.int64(index_bits)
        for digit in reversed(range(-(-(32 + index_bits) // 8))):
            count(blocks, values, bits, np.int64(8 * digit), prefix, counts)
            choose(1, counts, prefix, left)
        take(values.size, values, bits, prefix, taken, keys)
        found, last = device.read(keys), (1 << index_bits) - 1
        return _opened(((found >> index_bits) - 2**31 << 32) + (_LAST - last + (found & last)))

    return run


@top_k.on("tpu")
def _tpu(device: Any) -> Run:
    """XLA's top_k of the ranks: of equal ones it takes the lower index first."""
    import jax
    import jax.numpy as jnp

    from tasks.devices.tpu import bucket

    def largest(values: Any, size: Any, room: int) -> Any:
        # Of bits, for to XLA's arithmetic the least numbers are 0. -0 becomes 0.
        bits = jax.lax.bitcast_convert_type(values, jnp.int32)
        ranks = jnp.where(bits >= 0, bits, jnp.where(bits == _NAN_RANK, 0, bits ^ 0x7FFFFFFF))
        ranks = jnp.where(jnp.isnan(values), _NAN_RANK + 1, ranks)
        ranks = jnp.where(jnp.arange(values.size) < size, ranks, _NAN_RANK)  # the padding, after NaN
        _, indices = jax.lax.top_k(ranks, room)
        return values[indices], indices.astype(jnp.int64)

    program = device.program(largest, static=("room",))

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, k = inputs["values"], inputs["k"]
        room = min(bucket(k), *values.padded)
        found: Outputs = program({"values": (k,), "indices": (k,)}, values, np.int64(values.size), room=room)
        return found

    return run


# A group is one work-item with a share of the numbers, of which it keeps the k best in a heap, the worst of them on top
# (Williams 1964, CACM algorithm 232). Eight numbers at once are compared with that one; few pass. The host takes the k
# best of all heaps.
_OPENCL = """
__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void collect(__global const float* restrict values, __global long* restrict heaps, ulong size, ulong share, ulong k) {
  const ulong start = get_group_id(0) * share, stop = min(start + share, size);
  __global long* heap = heaps + get_group_id(0) * k;
  for (ulong i = 0; i < k; i++) heap[i] = LONG_MIN;
  float cutoff = NAN;  // which every number passes
  for (ulong i = start; i < stop; i += 8) {
    if (i + 8 <= stop && !any(~(vload8(0, values + i) <= cutoff))) continue;
    for (ulong j = i; j < min(i + 8, stop); j++) {
      const float value = values[j];
      if (value <= cutoff) continue;
      const int bits = as_int(value + 0.0f);  // -0 becomes 0
      const int rank = value != value ? INT_MIN : bits >= 0 ? bits : bits ^ INT_MAX;
      const long key = ((long)rank << 32) + (UINT_MAX - j);
      if (key <= heap[0]) continue;
      ulong at = 0;
      for (ulong child = 1; child < k; child = 2 * at + 1) {
        if (child + 1 < k && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= key) break;
        heap[at] = heap[child];
        at = child;
      }
      heap[at] = key;
      const int worst = (int)(heap[0] >> 32);
      cutoff = worst == INT_MIN ? NAN : as_float(worst >= 0 ? worst : worst ^ INT_MAX);
    }
  }
}
"""
_SHARE, _MOST_PARTS = 2**17, 16


@top_k.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "data.top_k")

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, k = inputs["values"], inputs["k"]
        parts = max(1, min(values.size // max(_SHARE, 4 * k), _MOST_PARTS))
        heaps = device.empty((parts * k,), np.int64)
        share = -(-values.size // parts)
        program.launch("collect", (parts,), values, heaps, np.uint64(values.size), np.uint64(share), np.uint64(k))
        keys = device.download(heaps)
        return _opened(np.partition(keys, keys.size - k)[keys.size - k :])

    return run


@top_k.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, k in ((1, 1), (100, 100), (5_000, 10)):
        yield {"values": random.standard_normal(n, np.float32), "k": k}
    # Ever new best ones, many ties, and more asked for than there are numbers.
    yield {"values": np.arange(5_000, dtype=np.float32), "k": 5}
    yield {"values": random.integers(-2, 3, 1_000).astype(np.float32), "k": 300}
    yield {"values": np.array([np.nan, -0.0, 0.0, -np.inf, np.nan, np.inf, 1e-45, -1e-45], np.float32), "k": 8}
