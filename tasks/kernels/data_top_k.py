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


def _collect(values: NDArray[np.float32], k: int, start: int, keys: NDArray[np.int64], count: int) -> tuple[int, int]:
    """Keeps the last k of `count` keys, and appends those of the numbers from `start` on that are above the worst.

    It stops where there is no room; returns where that is, and how many keys there are. Few numbers pass, so 64 are
    asked at once whether any does.
    """
    n, cutoff = values.size, np.float32(np.nan)  # which every number passes
    if count > 0:
        worst = keys[count - 1] >> 32
        for i in range(k):
            keys[i] = keys[count - k + i]
            worst = min(worst, keys[i] >> 32)
        count = k
        if worst != -2147483648:
            cutoff = np.int32(worst if worst >= 0 else worst ^ 0x7FFFFFFF).view(np.float32)
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


def _open(keys: NDArray[np.int64], values: NDArray[np.float32], indices: NDArray[np.int64]) -> None:
    last = keys.size - 1
    for i in range(keys.size):
        key = keys[last - i]
        rank = key >> 32
        value = np.int32(rank if rank >= 0 else rank ^ 0x7FFFFFFF).view(np.float32)
        values[i] = np.float32(np.nan) if rank == -2147483648 else value
        indices[i] = 4294967295 - (key & 4294967295)


_LEAST_ROOM, _MOST_ROOM = 128, 8192


@top_k.on("cpu")
def _cpu(device: Any) -> Run:
    """One pass in compiled code; where the candidates fill their room NumPy finds the k best, which set the cutoff.

    The room beside the k best is small at first, so that there soon is a cutoff, and grows.
    """
    from numba import njit, types
    from numba.extending import register_jitable

    register_jitable(_key)
    whole, keys_type = types.int64, types.int64[::1]
    values_type = types.Array(types.float32, 1, "C", readonly=True)
    options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
    collect = njit((values_type, whole, whole, keys_type, whole), **options)(_collect)
    open_keys = njit((keys_type, types.float32[::1], keys_type), **options)(_open)

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, k = inputs["values"], inputs["k"]
        room = k + _LEAST_ROOM
        keys = np.empty(k + max(room, _MOST_ROOM), np.int64)
        start, count = collect(values, k, 0, keys[: k + room], 0)
        while start < values.size:
            keys[:count].partition(count - k)
            room = min(4 * room, keys.size - k)
            start, count = collect(values, k, start, keys[: k + room], count)
        keys[:count].partition(count - k)
        best = keys[count - k : count]
        best.sort()
        outputs = {"values": np.empty(k, np.float32), "indices": np.empty(k, np.int64)}
        open_keys(best, outputs["values"], outputs["indices"])
        return outputs

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
    """XLA's top_k of the ranks: of equal ones it takes the lower index first.

    It sorts, so first it gets the maxima of blocks: the k best numbers are in the k blocks with the best of those.
    Then it gets these blocks, in their order, which keeps ties in theirs.
    """
    import jax
    import jax.numpy as jnp

    from tasks.devices.tpu import bucket

    def largest(values: Any, size: Any, room: int) -> Any:
        # Of bits, for to XLA's arithmetic the least numbers are 0. -0 becomes 0.
        bits = jax.lax.bitcast_convert_type(values, jnp.int32)
        ranks = jnp.where(bits >= 0, bits, jnp.where(bits == _NAN_RANK, 0, bits ^ 0x7FFFFFFF))
        ranks = jnp.where(jnp.isnan(values), _NAN_RANK + 1, ranks)
        ranks = jnp.where(jnp.arange(values.size) < size, ranks, _NAN_RANK)  # the padding, after NaN
        width = 1 << (values.size // room).bit_length() // 2  # so that about as much is sorted each time
        blocks = values.size // width
        _, chosen = jax.lax.top_k(ranks.reshape(blocks, width).max(axis=1), min(room, blocks))
        places = (jnp.sort(chosen)[:, None] * width + jnp.arange(width)).reshape(-1)
        _, best = jax.lax.top_k(ranks[places], room)
        indices = places[best]
        return values[indices], indices.astype(jnp.int64)

    program = device.program(largest, static=("room",))

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, k = inputs["values"], inputs["k"]
        room = min(bucket(k), *values.padded)
        found: Outputs = program({"values": (k,), "indices": (k,)}, values, np.int64(values.size), room=room)
        return found

    return run


# A group is one work-item with a share of the numbers, of which it keeps the k best in a heap, the worst of them on top
# (Williams 1964, CACM algorithm 232). 64 numbers at once are compared with that one; few pass. The host takes the k
# best of all heaps.
_OPENCL = """
__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void collect(__global const float* restrict values, __global long* restrict heaps, ulong size, ulong share, ulong k) {
  const ulong start = get_group_id(0) * share, stop = min(start + share, size);
  __global long* heap = heaps + get_group_id(0) * k;
  for (ulong i = 0; i < k; i++) heap[i] = LONG_MIN;
  float cutoff = NAN;  // which every number passes
  for (ulong i = start; i < stop; i += 64) {
    if (i + 64 <= stop) {
      int passing = 0;
      for (int j = 0; j < 64; j++) passing |= !(values[i + j] <= cutoff);
      if (!passing) continue;
    }
    for (ulong j = i; j < min(i + 64, stop); j++) {
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
    for n, k in ((1, 1), (100, 100), (1_000, 10)):
        yield {"values": random.standard_normal(n, np.float32), "k": k}
    # Ever new best ones, many ties, and all there are.
    yield {"values": np.arange(700, dtype=np.float32), "k": 5}
    yield {"values": random.integers(-2, 3, 500).astype(np.float32), "k": 200}
    yield {"values": np.array([np.nan, -0.0, 0.0, -np.inf, np.nan, np.inf, 1e-45, -1e-45], np.float32), "k": 8}
