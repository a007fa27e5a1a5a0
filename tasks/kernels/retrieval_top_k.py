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
    parity=("scores",),  # of items that score alike, which comes first hangs on how their sums were rounded
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


# Two steps for each stretch of items: a group of the first scores a tile of them for a tile of queries, out of block
# memory as linalg.matmul does, and a group of the second adds what may be among the k best to one query's candidates.
# These are the cpu's int64 keys; whenever their place is full, the k best are moved to the front (Hoare 1961), and the
# worst of them is what the next have to beat. The last step puts them in order by a heap (Williams 1964, CACM algorithm
# 232), which needs no memory beside them.
_OPENCL = """
#define LANES 8
#define NAN_RANK INT_MIN

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void score(__global const float* restrict items, __global const float* restrict queries, __global float* restrict tile,
           ulong first, uint width, uint count, uint depth) {
  __local float left[TILE][TILE], right[TILE][TILE], sums[TILE][TILE];
  const uint start = get_group_id(0) * TILE, top = get_group_id(1) * TILE;
  const uint columns = min((uint)TILE, width - start), rows = min((uint)TILE, count - top);
  items += (first + start) * depth;
  queries += (ulong)top * depth;
  for (uint y = 0; y < TILE; y++)
    for (uint x = 0; x < TILE; x++) sums[y][x] = 0;
  for (uint begin = 0; begin < depth; begin += TILE) {
    const uint deep = min((uint)TILE, depth - begin);
    for (uint y = 0; y < rows; y++)
      for (uint l = 0; l < deep; l++) left[y][l] = queries[(ulong)y * depth + begin + l];
    for (uint x = 0; x < columns; x++)
      for (uint l = 0; l < deep; l++) right[l][x] = items[(ulong)x * depth + begin + l];
    for (uint y = 0; y < rows; y++)
      for (uint x = 0; x < columns; x += 2 * LANES) {
        float8 sum0 = vload8(0, &sums[y][x]), sum1 = vload8(1, &sums[y][x]);
        for (uint l = 0; l < deep; l++) {
          sum0 += left[y][l] * vload8(0, &right[l][x]);
          sum1 += left[y][l] * vload8(1, &right[l][x]);
        }
        vstore8(sum0, 0, &sums[y][x]);
        vstore8(sum1, 1, &sums[y][x]);
      }
  }
  for (uint y = 0; y < rows; y++)
    for (uint x = 0; x < columns; x++) tile[(ulong)(top + y) * width + start + x] = sums[y][x];
}

void keep_best(__global long* keys, long count, long k) {
  long left = 0, right = count - 1;
  while (left < right) {
    const long pivot = keys[(left + right) / 2];
    long i = left, j = right;
    while (i <= j) {
      while (keys[i] > pivot) i++;
      while (keys[j] < pivot) j--;
      if (i <= j) {
        const long key = keys[i];
        keys[i++] = keys[j];
        keys[j--] = key;
      }
    }
    if (k - 1 <= j) right = j;
    else if (k - 1 >= i) left = i;
    else return;
  }
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void collect(__global const float* restrict tile, __global long* restrict candidates, __global long* restrict states,
             ulong first, uint width, ulong room, ulong k) {
  const ulong query = get_group_id(0);
  tile += query * width;
  candidates += query * room;
  states += query * 2;  // how many candidates there are, and the key that the next have to beat
  long count = first == 0 ? 0 : states[0], cutoff = first == 0 ? LONG_MIN : states[1];
  for (uint start = 0; start < width; start += CHUNK) {
    const uint stop = min(start + CHUNK, width);
    // One vector loop says whether any passes at all; ties go by the index, so those of a lower key never do.
    const int least = (int)(cutoff >> 32);
    int passing = 0;
    for (uint i = start; i < stop; i++) {
      const float score = tile[i] + 0.0f;
      const int bits = as_int(score);
      passing |= (score != score ? NAN_RANK : bits ^ ((bits >> 31) & 0x7fffffff)) >= least;
    }
    if (!passing) continue;
    for (uint i = start; i < stop; i++) {
      const float score = tile[i] + 0.0f;  // makes -0 the same as 0
      const int bits = as_int(score);
      const int rank = score != score ? NAN_RANK : bits ^ ((bits >> 31) & 0x7fffffff);
      const long key = ((long)rank << 32) | (long)(0xffffffffUL - first - i);
      if (key <= cutoff) continue;
      if (count == room) {
        keep_best(candidates, count, k);
        count = k;
        cutoff = candidates[0];
        for (ulong j = 1; j < k; j++) cutoff = min(cutoff, candidates[j]);
        if (key <= cutoff) continue;
      }
      candidates[count++] = key;
    }
  }
  states[0] = count;
  states[1] = cutoff;
}

void sink(__global long* heap, ulong at, ulong size) {  // the least of a heap is at its top
  const long key = heap[at];
  for (ulong child = 2 * at + 1; child < size; child = 2 * at + 1) {
    if (child + 1 < size && heap[child + 1] < heap[child]) child++;
    if (key <= heap[child]) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = key;
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void finish(__global long* restrict candidates, __global const long* restrict states, __global float* restrict scores,
            __global long* restrict indices, ulong room, ulong k) {
  const ulong query = get_group_id(0);
  candidates += query * room;
  keep_best(candidates, states[2 * query], k);
  for (ulong i = k / 2; i > 0; i--) sink(candidates, i - 1, k);
  for (ulong size = k; size > 0; size--) {
    const long key = candidates[0];
    const int rank = (int)(key >> 32);
    const int bits = rank ^ ((rank >> 31) & 0x7fffffff);
    scores[query * k + size - 1] = rank == NAN_RANK ? NAN : as_float(bits);
    indices[query * k + size - 1] = (long)(0xffffffffUL - (ulong)(key & 0xffffffffL));
    candidates[0] = candidates[size - 1];
    sink(candidates, 0, size - 1);
  }
}
"""
_TILE, _CHUNK = 64, 64


@top_k.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "retrieval.top_k", TILE=_TILE, CHUNK=_CHUNK)

    def run(inputs: Inputs, context: Context) -> Outputs:
        items, queries, k = inputs["items"], inputs["queries"], inputs["k"]
        (n, depth), q = items.shape, queries.shape[0]
        width, room = min(n, max(1024, 2**18 // max(q, 1))), min(n, 2 * k + 64)
        tile, candidates = device.empty((q, width), np.float32), device.empty((q, room), np.int64)
        states = device.empty((q, 2), np.int64)
        scores, indices = device.empty((q, k), np.float32), device.empty((q, k), np.int64)
        for first in range(0, n, width):
            if context.cancelled:
                raise JobCancelled(f"retrieval.top_k was cancelled after {first} of {n} items")
            size = np.uint32(min(width, n - first))
            groups = (-(-int(size) // _TILE), -(-q // _TILE))
            at = np.uint64(first), size
            program.launch("score", groups, items, queries, tile, *at, np.uint32(q), np.uint32(depth))
            program.launch("collect", (q,), tile, candidates, states, *at, np.uint64(room), np.uint64(k))
        program.launch("finish", (q,), candidates, states, scores, indices, np.uint64(room), np.uint64(k))
        return {"scores": scores, "indices": indices}

    return run


#: Scores that stand in a TPU's memory at once.
_SCORES = 2**27


@top_k.on("tpu")
def _tpu(device: Any) -> Run:
    """The matrix unit scores, some queries at a time, and top_k puts equal scores in the order of their indices.

    NaN comes after all numbers, and items of padding after that. Floats have no room for either below -inf, so where
    the best of a query reach down to that, whole numbers in the order of the scores are searched instead: they take
    a hundred times as long on XLA's processor.
    """
    import jax.numpy as jnp
    from jax import lax

    def search(items: Any, queries: Any, n: Any, wanted: Any, k: int) -> Any:
        padding = jnp.arange(len(items)) >= n

        def by_rank(scores: Any) -> Any:
            bits = lax.bitcast_convert_type(scores, jnp.int32)
            ranks = jnp.where(jnp.isnan(scores), _NAN_RANK + 1, jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF))
            return lax.top_k(jnp.where(padding, _NAN_RANK, ranks), k)[1]

        def best(some: Any) -> Any:
            scores = jnp.matmul(some, items.T, precision="highest") + jnp.float32(0)  # makes -0 the same as 0
            numbers, indices = lax.top_k(jnp.where(padding | jnp.isnan(scores), -jnp.inf, scores), k)
            low = jnp.any(lax.dynamic_index_in_dim(numbers, wanted - 1, axis=1) == -jnp.inf)
            indices = lax.cond(low, by_rank, lambda _: indices, scores)
            return jnp.take_along_axis(scores, indices, axis=1), indices.astype(jnp.int64)

        together = min(len(queries), max(1, _SCORES // len(items)))  # both are powers of two
        scores, indices = lax.map(best, queries.reshape(-1, together, queries.shape[1]))
        return scores.reshape(-1, k), indices.reshape(-1, k)

    program = device.program(search, static=("k",))

    def run(inputs: Inputs, context: Context) -> Outputs:
        items, queries, k = inputs["items"], inputs["queries"], inputs["k"]
        n, q = items.shape[0], queries.shape[0]
        shape = (q, k)
        sizes = np.int32(n), np.int32(k)
        return program({"scores": shape, "indices": shape}, items, queries, *sizes, k=device.bucket(k))

    return run


cuda: Any  # numba.cuda, on a GPU
#: A block is _SIDE by _SIDE threads, each with _EACH by _EACH scores, of _WIDE queries and _WIDE items.
_SIDE, _EACH, _WIDE, _PADDED = 16, 4, 64, 65
_SIMULATED = {"_SIDE": 2, "_EACH": 2, "_WIDE": 4, "_PADDED": 5}
#: Threads of a block that selects, and how many keys it selects from; it gets more where 4 k is more.
_SELECTING, _CHUNK = 256, 8192
#: Keys of a launch at most: what more queries need is done after them.
_MOST_KEYS = 2**27

# On a GPU a score becomes an unsigned key, so that larger is better, and equal scores are ordered by the lower index:
# the k best are found by their bits, eight at a time from the top (radix selection, as in Alabi, Blanchard, Gordon,
# Steinbach 2012, "Fast k-Selection Algorithms for Graphics Processing Units"), for a chunk of the items in each block,
# until one chunk is left. No atomic operation decides anything but the place of a key among those that are kept.


def _scores_gpu(items: NDArray[np.float32], queries: NDArray[np.float32], first: int, keys: NDArray[np.uint64]) -> None:
    """The keys of a tile of scores, of the queries from `first` on: the float's bits in order, then the index."""
    left = cuda.shared.array((_SIDE, _PADDED), np.float32)
    right = cuda.shared.array((_SIDE, _PADDED), np.float32)
    sums = cuda.local.array((_EACH, _EACH), np.float32)
    row = cuda.local.array(_EACH, np.float32)
    bits = cuda.local.array(1, np.float32)
    count, n, d = keys.shape[0], items.shape[0], items.shape[1]
    across = (n + _WIDE - 1) // _WIDE
    top, start = (cuda.blockIdx.x // across) * _WIDE, (cuda.blockIdx.x % across) * _WIDE
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    zero = np.float32(0)
    for i in range(_EACH):
        for j in range(_EACH):
            sums[i, j] = zero
    for depth in range(0, d, _SIDE):
        for i in range(_EACH):
            at = y + i * _SIDE
            left[x, at] = queries[first + top + at, depth + x] if top + at < count and depth + x < d else zero
            right[x, at] = items[start + at, depth + x] if start + at < n and depth + x < d else zero
        cuda.syncthreads()
        for z in range(_SIDE):
            for i in range(_EACH):
                row[i] = left[z, y + i * _SIDE]
            for j in range(_EACH):
                value = right[z, x + j * _SIDE]
                for i in range(_EACH):
                    sums[i, j] += row[i] * value
        cuda.syncthreads()
    for i in range(_EACH):
        for j in range(_EACH):
            query, item = top + y + i * _SIDE, start + x + j * _SIDE
            if query < count and item < n:
                bits[0] = sums[i, j] + zero  # -0 is the same as 0
                rank: Any = np.int64(bits.view(np.int32)[0])
                # The bits of negative floats are in reverse order. NaN is last.
                rank = rank if rank >= 0 else rank ^ 0x7FFFFFFF
                rank = -2147483648 if bits[0] != bits[0] else rank
                keys[query, item] = np.uint64(((rank + 2147483648) << 32) | (4294967295 - item))


def _select_gpu(keys: NDArray[np.uint64], chunk: int, kept: NDArray[np.uint64]) -> None:
    """The k largest keys of each chunk of a row, in any order; where it has fewer, all of them and zeros."""
    histogram = cuda.shared.array(256, np.int32)
    found = cuda.shared.array(3, np.int64)  # the byte, how many keys are still wanted of it, how many it has
    places = cuda.shared.array(1, np.int32)
    n, chunks, k = keys.shape[1], kept.shape[1], kept.shape[2]
    query, part = cuda.blockIdx.x // chunks, cuda.blockIdx.x % chunks
    start, stop = part * chunk, min((part + 1) * chunk, n)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    wanted = min(k, stop - start)
    for i in range(wanted + thread, k, threads):
        kept[query, part, i] = np.uint64(0)
    prefix, mask = np.uint64(0), np.uint64(0)
    byte: Any
    if wanted < stop - start:
        shift = 56
        while shift >= 0:
            for i in range(thread, 256, threads):
                histogram[i] = 0
            cuda.syncthreads()
            for i in range(start + thread, stop, threads):
                key = keys[query, i]
                if key & mask == prefix:
                    byte = np.int64((key >> np.uint64(shift)) & np.uint64(255))
                    cuda.atomic.add(histogram, byte, 1)
            cuda.syncthreads()
            if thread == 0:
                byte, above = 255, 0
                while above + histogram[byte] < wanted:
                    above += histogram[byte]
                    byte -= 1
                found[0], found[1], found[2] = byte, wanted - above, histogram[byte]
            cuda.syncthreads()
            prefix |= np.uint64(found[0]) << np.uint64(shift)
            mask |= np.uint64(255) << np.uint64(shift)
            wanted = found[1]
            whole = found[2] == wanted
            cuda.syncthreads()
            if whole:
                break
            shift -= 8
    if thread == 0:
        places[0] = 0
    cuda.syncthreads()
    for i in range(start + thread, stop, threads):
        key = keys[query, i]
        if key >= prefix:
            kept[query, part, cuda.atomic.add(places, 0, 1)] = key


def _order_gpu(keys: NDArray[np.uint64], first: int, ranks: NDArray[np.int32], indices: NDArray[np.int64]) -> None:
    """Each key to its place (how many of its row are larger), taken apart into the score's bits and the index."""
    k = keys.shape[1]
    for at in range(cuda.grid(1), keys.size, cuda.gridsize(1)):
        query, i = at // k, at % k
        key = keys[query, i]
        place = 0
        for j in range(k):
            place += 1 if keys[query, j] > key else 0
        rank = np.int64(key >> np.uint64(32)) - 2147483648
        bits = rank if rank >= 0 else rank ^ 0x7FFFFFFF
        ranks[first + query, place] = np.int32(2143289344 if rank == -2147483648 else bits)
        indices[first + query, place] = 4294967295 - np.int64(key & np.uint64(4294967295))


@top_k.on("gpu")
def _gpu(device: Any) -> Run:
    """Scores by tiles, then the best of each chunk of them, then the best of those, until one chunk is left."""
    constants, selecting, smallest = ({}, _SELECTING, _CHUNK) if not device.simulated else (_SIMULATED, 2, 4)
    side, wide = constants.get("_SIDE", _SIDE), constants.get("_WIDE", _WIDE)
    score = device.compile(_scores_gpu, threads=(side, side), constants=constants)
    select = device.compile(_select_gpu, threads=(selecting,))
    order = device.compile(_order_gpu)

    def run(inputs: Inputs, context: Context) -> Outputs:
        items, queries, k = inputs["items"], inputs["queries"], int(inputs["k"])
        n, q = items.shape[0], queries.shape[0]
        scores, indices = device.empty((q, k), np.float32), device.empty((q, k), np.int64)
        ranks = scores.view(np.int32)
        chunk = max(smallest, 4 * k)
        together = max(1, _MOST_KEYS // n)
        for first in range(0, q, together):
            if context.cancelled:
                raise JobCancelled(f"retrieval.top_k was cancelled after {first} of {q} queries")
            count = min(together, q - first)
            keys = device.empty((count, n), np.uint64)
            score(-(-count // wide) * -(-n // wide), items, queries, np.int64(first), keys)
            while keys.shape[1] > k:
                chunks = -(-keys.shape[1] // chunk)
                kept = device.empty((count, chunks, k), np.uint64)
                select(count * chunks, keys, np.int64(chunk), kept)
                keys = kept.reshape(count, chunks * k)
            order(keys.size, keys, np.int64(first), ranks, indices)
        return {"scores": scores, "indices": indices}

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
