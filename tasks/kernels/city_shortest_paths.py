"""The shortest ways between all junctions of a road network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.errors import JobCancelled
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run
from tasks import bits

shortest_paths = Kernel(
    "city.shortest_paths",
    inputs={"roads": "float32[n,n]"},
    outputs={"distance": "float32[n,n]"},
    flops="2*n*n*n",
    bytes="8*n*n + n*n*n/8",
    batch="stack",
    tolerance=1e-5,
    summary="The length of the shortest way from each junction to each other one.",
)

Table = NDArray[np.float32]
Column = NDArray[np.float32]
Numbers = NDArray[np.int64]


@shortest_paths.reference
def _reference(roads: Table) -> Outputs:
    """distance[i,j] of the shortest way from i to j over roads of length roads[i,j]; infinity where there is none.

    Floyd (1962), "Algorithm 97: Shortest Path", CACM 5(6), p. 345. A length that is infinite, NaN or below 0 is no
    road, and from a junction to itself it is 0. Sums are rounded to float32 in the order in which ways are joined, so
    two variants may differ by that.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.where(roads >= 0, roads, np.inf).astype(np.float64)
        np.fill_diagonal(distance, 0)
        for via in range(len(roads)):
            np.minimum(distance, distance[:, via, None] + distance[None, via], out=distance)
        return {"distance": distance.astype(np.float32)}


# On the cpu, first what makes road networks easy (Planken, de Weerdt and van der Krogt 2012, "Computing All-Pairs
# Shortest Paths by Leveraging Low Treewidth", JAIR 43, algorithm Snowball): junctions are taken out one by one, that
# with the fewest neighbours first, while ways over it are noted as roads between its neighbours. That goes on until
# each is beside an eighth of all that are left. What is left, all of a dense network, is done by blocks. Then the
# junctions come back, last out first in, and a way from one leads over one of the few neighbours that it had. 2,000
# junctions of a town took 35 ms so, and 400 ms by blocks.


def _clean(roads: Table, ways: Table) -> None:
    n, nowhere = roads.shape[0], np.float32(np.inf)
    for i in range(n):
        for j in range(n):
            ways[i, j] = roads[i, j] if roads[i, j] >= 0 else nowhere
        ways[i, i] = 0


def _take_out(ways: Table, order: Numbers, ends: Numbers, beside: Numbers, there: Column, back: Column) -> int:
    """How many junctions were taken out, and in which order; of each the neighbours and the ways there and back."""
    n = ways.shape[0]
    one, words = np.uint64(1), -(-n // 64)
    near = np.zeros((n, words), np.uint64)
    for i in range(n):
        for j in range(n):
            if i != j and ways[i, j] < np.inf:
                near[i, j >> 6] |= one << np.uint64(j & 63)
                near[j, i >> 6] |= one << np.uint64(i & 63)
    degree = np.zeros(n, np.int32)
    for i in range(n):
        for word in range(words):
            degree[i] += bits.ones(near[i, word])
    out, end = 0, 0
    while out < n:
        least = degree[0]
        for i in range(n):
            least = min(least, degree[i])
        if 8 * least > n - out or end + least > beside.size:
            break
        v = 0
        while degree[v] != least:
            v += 1
        start = end
        for word in range(words):
            rest = near[v, word]
            while rest:
                lower = rest - one
                beside[end] = word * 64 + bits.ones(~rest & lower)
                rest &= lower
                end += 1
        for a in range(start, end):
            x = beside[a]
            there[a], back[a] = ways[v, x], ways[x, v]
        for a in range(start, end):
            x, first = beside[a], back[a]
            for b in range(start, end):
                y, way = beside[b], first + there[b]
                ways[x, y] = min(ways[x, y], way)
            near[x, v >> 6] &= ~(one << np.uint64(v & 63))
            degree[x] = 0
            for word in range(words):
                near[x, word] |= near[v, word]
                degree[x] += bits.ones(near[x, word])
            near[x, x >> 6] &= ~(one << np.uint64(x & 63))
            degree[x] -= 1
        degree[v] = 2147483647
        order[out], ends[out] = v, end
        out += 1
    return out


def _bring_back(
    first: int,
    last: int,
    place: Numbers,
    ends: Numbers,
    beside: Numbers,
    there: Column,
    back: Column,
    forth: Table,
    reverse: Table,
) -> None:
    """The rows of the junctions that were taken out from `last` - 1 down to `first`.

    `reverse` is `forth` with its axes swapped.
    """
    n = place.size
    for number in range(last - 1, first - 1, -1):
        at, start = n - 1 - number, ends[number - 1] if number > 0 else 0
        own, own_reverse = forth[at], reverse[at]
        for u in range(at):
            own[u] = np.inf
            own_reverse[u] = np.inf
        for a in range(start, ends[number]):
            _reach(own, forth[place[beside[a]]], there[a], at)
            _reach(own_reverse, reverse[place[beside[a]]], back[a], at)
        for u in range(at):
            forth[u, at], reverse[u, at] = own_reverse[u], own[u]
        own[at], own_reverse[at] = 0, 0


def _reach(own: Column, other: Column, first: float, size: int) -> None:
    for u in range(size):
        way = first + other[u]
        own[u] = min(own[u], way)


def _put(forth: Table, place: Numbers, distance: Table) -> None:
    for i in range(place.size):
        row, found = forth[place[i]], distance[i]
        for j in range(place.size):
            found[j] = row[place[j]]


# Blocked (Venkataraman, Sahni and Mukhopadhyaya 2003, "A Blocked All-Pairs Shortest-Paths Algorithm", ACM JEA 8): the
# tile on the diagonal by itself, then those in its row and its column, then the rest, which is a matrix product with
# minimum for sum and sum for product, and nearly all of the work.
_TILE = 64


def _pack(ways: Table, tiles: Table) -> None:
    """A row of `tiles` is a tile of 64 by 64; what lies beyond the last junction has no roads."""
    n = ways.shape[0]
    count = -(-n // _TILE)
    tiles[:] = np.inf
    for y in range(n):
        for j in range(count):
            tile, start = tiles[y // _TILE * count + j], y % _TILE * _TILE
            for x in range(min(_TILE, n - j * _TILE)):
                tile[start + x] = ways[y, j * _TILE + x]


def _unpack(tiles: Table, ways: Table) -> None:
    n = ways.shape[0]
    count = -(-n // _TILE)
    for y in range(n):
        for j in range(count):
            tile, start = tiles[y // _TILE * count + j], y % _TILE * _TILE
            for x in range(min(_TILE, n - j * _TILE)):
                ways[y, j * _TILE + x] = tile[start + x]


def _relax(to: Column, left: Column, right: Column, rows: Column) -> None:
    """to[i,j] = min(to[i,j], left[i,k] + right[k,j]), eight k at a time: 16 operations for 9 loads and a store.

    A row goes to and fro between two that are spare: of a minimum that is stored where it was read, LLVM makes a
    masked store, and halves the speed.
    """
    for i in range(0, _TILE * _TILE, _TILE):
        for j in range(_TILE):
            rows[j] = to[i + j]
        for k in range(0, _TILE, 8):
            a, b, source = i + k, k * _TILE, (k & 8) * (_TILE // 8)
            target = _TILE - source
            a0, a1, a2, a3 = left[a], left[a + 1], left[a + 2], left[a + 3]
            a4, a5, a6, a7 = left[a + 4], left[a + 5], left[a + 6], left[a + 7]
            for j in range(_TILE):
                w0, w1 = a0 + right[b + j], a1 + right[b + _TILE + j]
                w2, w3 = a2 + right[b + 2 * _TILE + j], a3 + right[b + 3 * _TILE + j]
                w4, w5 = a4 + right[b + 4 * _TILE + j], a5 + right[b + 5 * _TILE + j]
                w6, w7 = a6 + right[b + 6 * _TILE + j], a7 + right[b + 7 * _TILE + j]
                w0, w1, w2, w3 = min(w0, w1), min(w2, w3), min(w4, w5), min(w6, w7)
                w4, w5 = min(w0, w1), min(w2, w3)
                w6 = min(w4, w5)
                rows[target + j] = min(rows[source + j], w6)
        for j in range(_TILE):
            to[i + j] = rows[j]


def _round(tiles: Table, count: int, k: int, size: int) -> None:
    """All ways over the `size` junctions of block k."""
    middle = tiles[k * count + k]
    spare, through = np.empty(2 * _TILE, np.float32), np.empty(_TILE, np.float32)
    for via in range(size):
        through[:] = middle[via * _TILE : (via + 1) * _TILE]
        for i in range(0, size * _TILE, _TILE):
            reach = middle[i + via]
            for j in range(_TILE):
                spare[j] = min(middle[i + j], reach + through[j])
            middle[i : i + _TILE] = spare[:_TILE]
    first, second = np.empty_like(middle), middle.copy()
    for i in range(count):
        if i != k:
            first[:] = tiles[i * count + k]
            _relax(tiles[i * count + k], first, second, spare)
    first[:] = middle
    for i in range(count):
        if i != k:
            second[:] = tiles[k * count + i]
            _relax(tiles[k * count + i], first, second, spare)
    for i in range(count):
        if i != k:
            first[:] = tiles[i * count + k]
            for j in range(count):
                if j != k:
                    second[:] = tiles[k * count + j]
                    _relax(tiles[i * count + j], first, second, spare)


@shortest_paths.on("cpu")
def _cpu(device: Any) -> Run:
    """Takes one network, or a stack of them."""
    from numba import njit, types
    from numba.extending import register_jitable

    for function in (bits.ones, _reach, _relax):
        register_jitable(function)
    options = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
    roads_type, table = types.Array(types.float32, 2, "C", readonly=True), types.float32[:, ::1]
    numbers, column = types.int64[::1], types.float32[::1]
    lists = numbers, numbers, column, column
    clean = njit((roads_type, table), **options)(_clean)
    take_out = njit((table, numbers, *lists), **options)(_take_out)
    bring_back = njit((types.int64, types.int64, numbers, *lists, table, table), **options)(_bring_back)
    put = njit((table, numbers, table), **options)(_put)
    pack = njit((table, table), **options)(_pack)
    unpack = njit((table, table), **options)(_unpack)
    relax_round = njit((table, types.int64, types.int64, types.int64), **options)(_round)

    def by_blocks(ways: Table, context: Context, share: float) -> None:
        n, count = len(ways), -(-len(ways) // _TILE)
        tiles = np.empty((count * count, _TILE * _TILE), np.float32)
        pack(ways, tiles)
        for k in range(count):
            _look(context, share * k / count)
            relax_round(tiles, count, k, min(_TILE, n - k * _TILE))
        unpack(tiles, ways)

    def find(roads: Table, distance: Table, context: Context) -> None:
        """The distances are noted where they belong; before that, it is what is known of the ways."""
        n = len(roads)
        clean(roads, distance)
        order, ends, beside = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n * n // 16 + n, np.int64)
        there, back = np.empty(beside.size, np.float32), np.empty(beside.size, np.float32)
        few = np.count_nonzero(distance < np.inf) <= n * n // 16 + n
        out = take_out(distance, order, ends, beside, there, back) if few else 0
        if out == 0:
            by_blocks(distance, context, 1.0)
            return
        stays = np.ones(n, np.bool_)
        stays[order[:out]] = False
        order = np.concatenate([np.flatnonzero(stays), order[:out][::-1]])
        place = np.empty(n, np.int64)
        place[order] = np.arange(n)
        inner = order[: n - out]
        core = distance[np.ix_(inner, inner)]
        share = (len(core) / n) ** 3
        by_blocks(core, context, share)
        # An odd number of cache lines a row, so that the places of a column are not all in one set of the cache.
        width = (-(-n // 16) | 1) * 16
        forth, reverse = np.empty((n, width), np.float32), np.empty((n, width), np.float32)
        forth[: len(core), : len(core)], reverse[: len(core), : len(core)] = core, core.T
        for last in range(out, 0, -_PIECE):
            _look(context, share + (1 - share) * (1 - last / out))
            bring_back(max(last - _PIECE, 0), last, place, ends, beside, there, back, forth, reverse)
        put(forth, place, distance)

    def run(inputs: Inputs, context: Context) -> Outputs:
        roads = inputs["roads"]
        distance = np.empty(roads.shape, np.float32)
        if roads.ndim == 2:
            find(roads, distance, context)
        else:
            for each, found in zip(roads, distance, strict=True):
                find(each, found, context)
        return {"distance": distance}

    return run


_PIECE = 256


def _look(context: Context, done: float) -> None:
    """Tells how far the work on a network is, and ends it where nobody wants it any more."""
    if context.cancelled:
        raise JobCancelled(f"city.shortest_paths was cancelled when {done:.0%} were done")
    context.progress(done)


# A group is one work-item with a tile of the result: its operands in block memory on a board, in the L1 cache on PoCL.
_OPENCL = """
float less(float a, float b) { return a < b ? a : b; }

// As the cpu's, and with its rows to and fro.
void relax(__local float (*to)[TILE], __local float (*left)[TILE], __local float (*right)[TILE]) {
  float rows[2][TILE];
  for (int i = 0; i < TILE; i++) {
    for (int j = 0; j < TILE; j++) rows[0][j] = to[i][j];
    for (int k = 0; k < TILE; k += 8) {
      const float *source = rows[k / 8 & 1];
      float *target = rows[1 - (k / 8 & 1)];
      const float a0 = left[i][k], a1 = left[i][k + 1], a2 = left[i][k + 2], a3 = left[i][k + 3];
      const float a4 = left[i][k + 4], a5 = left[i][k + 5], a6 = left[i][k + 6], a7 = left[i][k + 7];
      for (int j = 0; j < TILE; j++) {
        const float w0 = less(a0 + right[k][j], a1 + right[k + 1][j]);
        const float w1 = less(a2 + right[k + 2][j], a3 + right[k + 3][j]);
        const float w2 = less(a4 + right[k + 4][j], a5 + right[k + 5][j]);
        const float w3 = less(a6 + right[k + 6][j], a7 + right[k + 7][j]);
        target[j] = less(less(less(w0, w1), less(w2, w3)), source[j]);
      }
    }
    for (int j = 0; j < TILE; j++) to[i][j] = rows[0][j];
  }
}

void take(__global const float* restrict tiles, ulong number, __local float (*tile)[TILE]) {
  for (int i = 0; i < TILE; i++)
    for (int x = 0; x < TILE; x += 8) vstore8(vload8(0, tiles + (number * TILE + i) * TILE + x), 0, &tile[i][x]);
}

void give(__local float (*tile)[TILE], ulong number, __global float* restrict tiles) {
  for (int i = 0; i < TILE; i++)
    for (int x = 0; x < TILE; x += 8) vstore8(vload8(0, &tile[i][x]), 0, tiles + (number * TILE + i) * TILE + x);
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void pack(__global const float* restrict roads, __global float* restrict tiles, ulong n, ulong count) {
  const ulong left = get_group_id(0) * TILE, top = get_group_id(1) * TILE, network = get_group_id(2);
  roads += network * n * n;
  tiles += ((network * count + get_group_id(1)) * count + get_group_id(0)) * TILE * TILE;
  for (ulong y = 0; y < TILE; y++)
    for (ulong x = 0; x < TILE; x++) {
      const bool road = top + y < n && left + x < n;
      const float length = road ? roads[(top + y) * n + left + x] : INFINITY;
      tiles[y * TILE + x] = road && top + y == left + x ? 0.0f : length >= 0 ? length : INFINITY;
    }
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void unpack(__global const float* restrict tiles, __global float* restrict distances, ulong n, ulong count) {
  const ulong left = get_group_id(0) * TILE, top = get_group_id(1) * TILE, network = get_group_id(2);
  distances += network * n * n;
  tiles += ((network * count + get_group_id(1)) * count + get_group_id(0)) * TILE * TILE;
  for (ulong y = 0; y < TILE && top + y < n; y++)
    for (ulong x = 0; x < TILE && left + x < n; x++) distances[(top + y) * n + left + x] = tiles[y * TILE + x];
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void diagonal(__global float* restrict tiles, ulong k, ulong count) {
  __local float middle[TILE][TILE];
  const ulong number = (get_group_id(0) * count + k) * count + k;
  take(tiles, number, middle);
  for (int via = 0; via < TILE; via++)
    for (int i = 0; i < TILE; i++) {
      const float reach = middle[i][via];
      for (int j = 0; j < TILE; j++) {
        const float way = reach + middle[via][j];
        middle[i][j] = way < middle[i][j] ? way : middle[i][j];
      }
    }
  give(middle, number, tiles);
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void panels(__global float* restrict tiles, ulong k, ulong count) {  // row k, or column k
  __local float middle[TILE][TILE], before[TILE][TILE], to[TILE][TILE];
  const ulong network = get_group_id(2) * count, i = get_group_id(0) + (get_group_id(0) >= k);
  const ulong number = get_group_id(1) ? (network + i) * count + k : (network + k) * count + i;
  take(tiles, (network + k) * count + k, middle);
  take(tiles, number, before);
  take(tiles, number, to);
  if (get_group_id(1)) relax(to, before, middle);
  else relax(to, middle, before);
  give(to, number, tiles);
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void rest(__global float* restrict tiles, ulong k, ulong count) {
  __local float left[TILE][TILE], right[TILE][TILE], to[TILE][TILE];
  const ulong network = get_group_id(2) * count;
  const ulong j = get_group_id(0) + (get_group_id(0) >= k), i = get_group_id(1) + (get_group_id(1) >= k);
  take(tiles, (network + i) * count + k, left);
  take(tiles, (network + k) * count + j, right);
  take(tiles, (network + i) * count + j, to);
  relax(to, left, right);
  give(to, (network + i) * count + j, tiles);
}
"""


@shortest_paths.on("fpga")
def _fpga(device: Any) -> Run:
    """Takes one network, or a stack of them along the third axis of groups."""
    program = device.program(_OPENCL, "city.shortest_paths", TILE=_TILE)

    def run(inputs: Inputs, context: Context) -> Outputs:
        roads = inputs["roads"]
        *stack, n, _ = roads.shape
        networks, count = (stack[0] if stack else 1), -(-n // _TILE)
        distance = device.empty(roads.shape, np.float32)
        tiles = device.empty((networks, count, count, _TILE, _TILE), np.float32)
        sizes = np.uint64(n), np.uint64(count)
        program.launch("pack", (count, count, networks), roads, tiles, *sizes)
        for k in range(count):
            _look(context, k / count)
            block = np.uint64(k), np.uint64(count)
            program.launch("diagonal", (networks,), tiles, *block)
            program.launch("panels", (count - 1, 2, networks), tiles, *block)
            program.launch("rest", (count - 1, count - 1, networks), tiles, *block)
            device.synchronize()  # or the launches would be queued long before they are cancelled
        program.launch("unpack", (count, count, networks), tiles, distance, *sizes)
        return {"distance": distance}

    return run


cuda: Any  # numba.cuda, on a GPU

#: Threads along each side of a block, each of which has 4 by 4 ways of a tile.
_SIDE = 16


def _clean_gpu(roads: Any, ways: Any) -> None:
    n = roads.shape[2]
    for i in range(cuda.grid(1), roads.size, cuda.gridsize(1)):
        y, x = i // n % n, i % n
        number = i // n // n
        length = roads[number, y, x]
        length = length if length >= 0 else np.float32(np.inf)
        ways[number, y, x] = np.float32(0) if x == y else length


def _take_gpu(ways: Any, number: Any, top: Any, left: Any, tile: Any) -> None:
    """A tile into shared memory; beyond the last junction there are no roads."""
    side, n = 4 * cuda.blockDim.x, ways.shape[1]
    for y in range(cuda.threadIdx.y, side, cuda.blockDim.y):
        for x in range(cuda.threadIdx.x, side, cuda.blockDim.x):
            there = top + y < n and left + x < n
            tile[y, x] = ways[number, top + y, left + x] if there else np.float32(np.inf)


def _relax_gpu(ways: Any, number: Any, top: Any, left: Any, first: Any, second: Any) -> None:
    """ways[i,j] = min(ways[i,j], first[i,k] + second[k,j]) over a tile, 16 of them in each thread's registers."""
    best = cuda.local.array((4, 4), np.float32)
    width, n = cuda.blockDim.x, ways.shape[1]
    y, x = cuda.threadIdx.y, cuda.threadIdx.x
    for i in range(4):
        for j in range(4):
            best[i, j] = np.float32(np.inf)
    for k in range(4 * width):
        for i in range(4):
            reach = first[y + i * width, k]
            for j in range(4):
                best[i, j] = min(best[i, j], reach + second[k, x + j * width])
    for i in range(4):
        for j in range(4):
            row, column = top + y + i * width, left + x + j * width
            if row < n and column < n:
                ways[number, row, column] = min(ways[number, row, column], best[i, j])


def _diagonal_gpu(ways: Any, k: Any) -> None:
    middle = cuda.shared.array((64, 65), np.float32)
    side, n = 4 * cuda.blockDim.x, ways.shape[1]
    number, at = cuda.blockIdx.x, k * side
    _take_gpu(ways, number, at, at, middle)
    cuda.syncthreads()
    for via in range(min(side, n - at)):
        # Ways from and to `via` stay as they are, so none is read while it changes.
        for y in range(cuda.threadIdx.y, side, cuda.blockDim.y):
            for x in range(cuda.threadIdx.x, side, cuda.blockDim.x):
                middle[y, x] = min(middle[y, x], middle[y, via] + middle[via, x])
        cuda.syncthreads()
    for y in range(cuda.threadIdx.y, min(side, n - at), cuda.blockDim.y):
        for x in range(cuda.threadIdx.x, min(side, n - at), cuda.blockDim.x):
            ways[number, at + y, at + x] = middle[y, x]


# Shared arrays stand on a line each: on the simulator those of one line would be one.


def _panels_gpu(ways: Any, k: Any) -> None:
    """The tiles in row k (y of the grid 0) and in column k (1)."""
    middle = cuda.shared.array((64, 65), np.float32)
    before = cuda.shared.array((64, 65), np.float32)
    side, number, block = 4 * cuda.blockDim.x, cuda.blockIdx.z, cuda.blockIdx.x
    if block == k:
        return
    in_row = cuda.blockIdx.y == 0
    top, left = (k * side, block * side) if in_row else (block * side, k * side)
    _take_gpu(ways, number, k * side, k * side, middle)
    _take_gpu(ways, number, top, left, before)
    cuda.syncthreads()
    if in_row:
        _relax_gpu(ways, number, top, left, middle, before)
    else:
        _relax_gpu(ways, number, top, left, before, middle)


def _rest_gpu(ways: Any, k: Any) -> None:
    first = cuda.shared.array((64, 65), np.float32)
    second = cuda.shared.array((64, 65), np.float32)
    side, number = 4 * cuda.blockDim.x, cuda.blockIdx.z
    row, column = cuda.blockIdx.y, cuda.blockIdx.x
    if row == k or column == k:  # noqa: PLR1714 - `in` would make a tuple on the card
        return
    top, left = row * side, column * side
    _take_gpu(ways, number, top, k * side, first)
    _take_gpu(ways, number, k * side, left, second)
    cuda.syncthreads()
    _relax_gpu(ways, number, top, left, first, second)


@shortest_paths.on("gpu")
def _gpu(device: Any) -> Run:
    """By blocks, three launches a block. Takes one network, or a stack of them along the third axis of the grid."""
    threads = (2, 2) if device.simulated else (_SIDE, _SIDE)
    side = 4 * threads[0]
    clean = device.compile(_clean_gpu)
    diagonal = device.compile(_diagonal_gpu, threads=threads, helpers=(_take_gpu,))
    panels, rest = (
        device.compile(function, threads=threads, helpers=(_take_gpu, _relax_gpu))
        for function in (_panels_gpu, _rest_gpu)
    )

    def run(inputs: Inputs, context: Context) -> Outputs:
        roads = inputs["roads"]
        *stack, n, _ = roads.shape
        networks, count = (stack[0] if stack else 1), -(-n // side)
        distance = device.empty(roads.shape, np.float32)
        ways = distance.reshape(networks, n, n)
        clean(roads.size, roads.reshape(networks, n, n), ways)
        for k in range(count):
            _look(context, k / count)
            diagonal(networks, ways, np.int64(k))
            panels((count, 2, networks), ways, np.int64(k))
            rest((count, count, networks), ways, np.int64(k))
        return {"distance": distance}

    return run


@shortest_paths.on("tpu")
def _tpu(device: Any) -> Run:
    """By blocks of up to 64 junctions; the rest of a round is 64 steps over all ways, eight in one pass."""
    import jax
    import jax.numpy as jnp

    def relax(to: Any, first: Any, second: Any) -> Any:
        def eight(step: Any, best: Any) -> Any:
            left = jax.lax.dynamic_slice_in_dim(first, 8 * step, 8, axis=1)
            right = jax.lax.dynamic_slice_in_dim(second, 8 * step, 8, axis=0)
            for k in range(8):
                best = jnp.minimum(best, left[:, k, None] + right[k])
            return best

        return jax.lax.fori_loop(0, first.shape[1] // 8, eight, to)

    def solve(roads: Any, size: Any) -> Any:
        room = roads.shape[0]
        width, index = min(64, room), jnp.arange(room)
        there = (roads >= 0) & (index < size) & (index < size)[:, None]
        ways = jnp.where(index == index[:, None], 0, jnp.where(there, roads, jnp.inf))

        def block(number: Any, ways: Any) -> Any:
            start = number * width
            rows = jax.lax.dynamic_slice_in_dim(ways, start, width, axis=0)
            columns = jax.lax.dynamic_slice_in_dim(ways, start, width, axis=1)
            middle = jax.lax.dynamic_slice_in_dim(rows, start, width, axis=1)
            middle = jax.lax.fori_loop(
                0, width, lambda via, each: jnp.minimum(each, each[:, via, None] + each[via]), middle
            )
            return relax(ways, relax(columns, columns, middle), relax(rows, middle, rows))

        return jax.lax.fori_loop(0, -(-size // width), block, ways)

    def solve_each(roads: Any, size: Any) -> Any:
        return jax.vmap(solve, in_axes=(0, None))(roads, size)

    one, many = device.program(solve), device.program(solve_each)

    def run(inputs: Inputs, context: Context) -> Outputs:
        roads = inputs["roads"]
        return (one if roads.ndim == 2 else many)({"distance": roads.shape}, roads, np.int64(roads.shape[-1]))

    return run


@shortest_paths.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, share in ((1, 1.0), (9, 0.3), (90, 0.05)):
        roads = random.uniform(0.1, 5, (n, n)).astype(np.float32)
        roads[random.random((n, n)) > share] = np.inf
        yield {"roads": roads}
    # Streets of 15 by 15 crossings, some of them one-way: few neighbours each.
    n = 15 * 15
    roads = np.full((n, n), np.inf, np.float32)
    for there in (1, 15):
        start = np.flatnonzero((np.arange(n) + there < n) & ((np.arange(n) % 15 < 14) | (there == 15)))
        roads[start, start + there] = random.uniform(0.1, 0.3, start.size)
        back = start[random.random(start.size) < 0.9]
        roads[back + there, back] = random.uniform(0.1, 0.3, back.size)
    yield {"roads": roads}
    yield {"roads": np.array([[3, 1, np.inf], [np.nan, -1, 2], [-np.inf, 0, np.inf]], np.float32)}
