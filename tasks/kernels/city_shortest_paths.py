"""The shortest ways between all junctions of a road network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.errors import JobCancelled
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

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


# Blocked (Venkataraman, Sahni and Mukhopadhyaya 2003, "A Blocked All-Pairs Shortest-Paths Algorithm", ACM JEA 8): the
# tile on the diagonal by itself, then those in its row and its column, then the rest, which is a matrix product with
# minimum for sum and sum for product, and nearly all of the work.
_TILE = 64


def _pack(roads: Table, tiles: Table) -> None:
    """Tiles of 64 by 64, each in one piece; what lies beyond the last junction has no roads."""
    n, count = roads.shape[0], tiles.shape[0]
    for i in range(count):
        for j in range(count):
            tile = tiles[i, j]
            for y in range(_TILE):
                row = tile[y]
                for x in range(_TILE):
                    row[x] = np.inf
                at = i * _TILE + y
                if at < n:
                    for x in range(min(_TILE, n - j * _TILE)):
                        length = roads[at, j * _TILE + x]
                        row[x] = length if length >= 0 else np.float32(np.inf)
                    if i == j:
                        row[y] = 0


def _unpack(tiles: Table, distance: Table) -> None:
    n = distance.shape[0]
    for y in range(n):
        for j in range(tiles.shape[1]):
            row = tiles[y // _TILE, j, y % _TILE]
            for x in range(min(_TILE, n - j * _TILE)):
                distance[y, j * _TILE + x] = row[x]


def _relax(to: Table, left: Table, right: Table) -> None:
    """to[i,j] = min(to[i,j], left[i,k] + right[k,j]), eight k at a time: 16 operations for 9 loads and a store."""
    for i in range(_TILE):
        row = to[i]
        for k in range(0, _TILE, 8):
            a = left[i, k : k + 8]
            a0, a1, a2, a3, a4, a5, a6, a7 = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
            if min(min(min(a0, a1), min(a2, a3)), min(min(a4, a5), min(a6, a7))) == np.inf:
                continue
            b = right[k : k + 8]
            for j in range(_TILE):
                best = row[j]
                w0, w1, w2, w3 = a0 + b[0, j], a1 + b[1, j], a2 + b[2, j], a3 + b[3, j]
                w4, w5, w6, w7 = a4 + b[4, j], a5 + b[5, j], a6 + b[6, j], a7 + b[7, j]
                w0, w1 = (w0 if w0 < w1 else w1), (w2 if w2 < w3 else w3)
                w4, w5 = (w4 if w4 < w5 else w5), (w6 if w6 < w7 else w7)
                w0, w4 = (w0 if w0 < w1 else w1), (w4 if w4 < w5 else w5)
                w0 = w0 if w0 < w4 else w4
                row[j] = w0 if w0 < best else best


def _round(tiles: Table, k: int) -> None:
    """All ways over the junctions of block k."""
    count = tiles.shape[0]
    middle = tiles[k, k]
    for via in range(_TILE):
        through = middle[via].copy()
        for i in range(_TILE):
            row, reach = middle[i], middle[i, via]
            for j in range(_TILE):
                way = reach + through[j]
                row[j] = way if way < row[j] else row[j]
    for i in range(count):
        if i != k:
            before = tiles[k, i].copy()
            _relax(tiles[k, i], middle, before)
            before = tiles[i, k].copy()
            _relax(tiles[i, k], before, middle)
    for i in range(count):
        if i != k:
            for j in range(count):
                if j != k:
                    _relax(tiles[i, j], tiles[i, k], tiles[k, j])


@shortest_paths.on("cpu")
def _cpu(device: Any) -> Run:
    """Takes one network, or a stack of them."""
    from numba import njit, types
    from numba.extending import register_jitable

    register_jitable(_relax)
    options = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
    roads_type, tiles_type = types.Array(types.float32, 2, "C", readonly=True), types.float32[:, :, :, ::1]
    pack = njit((roads_type, tiles_type), **options)(_pack)
    unpack = njit((tiles_type, types.float32[:, ::1]), **options)(_unpack)
    relax_round = njit((tiles_type, types.int64), **options)(_round)

    def run(inputs: Inputs, context: Context) -> Outputs:
        roads = inputs["roads"]
        distance = np.empty(roads.shape, np.float32)
        *stack, n, _ = roads.shape
        count = -(-n // _TILE)
        networks = stack[0] if stack else 1
        tiles = np.empty((count, count, _TILE, _TILE), np.float32)
        for number in range(networks):
            pack(roads.reshape(networks, n, n)[number], tiles)
            for k in range(count):
                _look(context, number * count + k, networks * count)
                relax_round(tiles, k)
            unpack(tiles, distance.reshape(networks, n, n)[number])
        return {"distance": distance}

    return run


def _look(context: Context, done: int, rounds: int) -> None:
    """Tells how far the work is, and ends it where nobody wants it any more."""
    if context.cancelled:
        raise JobCancelled(f"city.shortest_paths was cancelled after {done} of {rounds} rounds")
    context.progress(done / rounds)


# A group is one work-item with a tile of the result: its operands in block memory on a board, in the L1 cache on PoCL.
_OPENCL = """
void relax(__local float (*to)[TILE], __local float (*left)[TILE], __local float (*right)[TILE]) {
  for (int i = 0; i < TILE; i++)
    for (int x = 0; x < TILE; x += 32) {
      float8 best[4];
      #pragma unroll
      for (int j = 0; j < 4; j++) best[j] = vload8(j, &to[i][x]);
      for (int k = 0; k < TILE; k++) {
        const float8 reach = left[i][k];
        #pragma unroll
        for (int j = 0; j < 4; j++) {
          const float8 way = reach + vload8(j, &right[k][x]);
          best[j] = way < best[j] ? way : best[j];
        }
      }
      #pragma unroll
      for (int j = 0; j < 4; j++) vstore8(best[j], j, &to[i][x]);
    }
}

void take(__global const float* restrict tiles, ulong number, __local float (*tile)[TILE]) {
  for (int i = 0; i < TILE * TILE; i++) tile[i / TILE][i % TILE] = tiles[number * TILE * TILE + i];
}

void give(__local float (*tile)[TILE], ulong number, __global float* restrict tiles) {
  for (int i = 0; i < TILE * TILE; i++) tiles[number * TILE * TILE + i] = tile[i / TILE][i % TILE];
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
void cross(__global float* restrict tiles, ulong k, ulong count) {  // row k, or column k
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
            _look(context, k, count)
            block = np.uint64(k), np.uint64(count)
            program.launch("diagonal", (networks,), tiles, *block)
            program.launch("cross", (count - 1, 2, networks), tiles, *block)
            program.launch("rest", (count - 1, count - 1, networks), tiles, *block)
            device.synchronize()  # or the launches would be queued long before they are cancelled
        program.launch("unpack", (count, count, networks), tiles, distance, *sizes)
        return {"distance": distance}

    return run


@shortest_paths.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, share in ((1, 1.0), (9, 0.3), (90, 0.05)):
        roads = random.uniform(0.1, 5, (n, n)).astype(np.float32)
        roads[random.random((n, n)) > share] = np.inf
        yield {"roads": roads}
    yield {"roads": np.array([[3, 1, np.inf], [np.nan, -1, 2], [-np.inf, 0, np.inf]], np.float32)}
