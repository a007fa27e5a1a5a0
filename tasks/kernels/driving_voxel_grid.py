"""Down-sampling of a lidar's point cloud."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run
from tasks import bits

voxel_grid = Kernel(
    "driving.voxel_grid",
    inputs={
        "points": "float32[n,4]",
        "edge": "float32",
        "origin_x": "float32",
        "origin_y": "float32",
        "origin_z": "float32",
        "cells_x": "int64",
        "cells_y": "int64",
        "cells_z": "int64",
    },
    outputs={"cell": "int64[v]", "count": "int64[v]", "centroid": "float32[v,4]"},
    flops="20*n + cells_x*cells_y*cells_z/64",
    bytes="80*n + cells_x*cells_y*cells_z/4",
    limits={
        "edge": "edge > 0",
        "cells_x": "1 <= cells_x <= 4096",
        "cells_y": "1 <= cells_y <= 4096",
        "cells_z": "1 <= cells_z <= min(4096, 134217728 / (cells_x*cells_y))",
    },
    tolerance=1e-6,
    summary="The occupied voxels of a point cloud: how many points each holds, and their mean.",
)

Points = NDArray[np.float32]
Numbers = NDArray[np.int64]


@voxel_grid.reference
def _reference(
    points: Points,
    edge: float,
    origin_x: float,
    origin_y: float,
    origin_z: float,
    cells_x: int,
    cells_y: int,
    cells_z: int,
) -> Outputs:
    """Points (x, y, z, intensity) by the cube of a grid that they lie in; v cubes (voxels) hold some.

    The voxel of a point along x is the floor of (x - origin_x) * (1 / edge), each step rounded to float32; its number
    is (x * cells_y + y) * cells_z + z. Voxels come in the order of their numbers. Points outside of the grid, and
    those with a NaN for a place, are left out; an intensity of NaN is one point's, and makes the mean NaN.

    Rusu and Cousins (2011), "3D is here: Point Cloud Library (PCL)", ICRA, the filter VoxelGrid.
    """
    origin = np.array([origin_x, origin_y, origin_z], np.float32)
    with np.errstate(all="ignore"):
        place = (points[:, :3] - origin) * (np.float32(1) / np.float32(edge))
        inside = ((place >= 0) & (place < np.array([cells_x, cells_y, cells_z], np.float32))).all(axis=1)
        x, y, z = place[inside].astype(np.int64).T
        cell, voxel, count = np.unique((x * cells_y + y) * cells_z + z, return_inverse=True, return_counts=True)
        total = np.zeros((len(cell), 4))
        np.add.at(total, voxel, points[inside])
        centroid = (total / count[:, None]).astype(np.float32)
    return {"cell": cell, "count": count, "centroid": centroid}


def _grid(inputs: Inputs) -> tuple[Any, ...]:
    """The grid as compiled code takes it: origin and 1 / edge in float32, cells in int64.

    Every device takes a difference times this number, which leaves nothing to fuse or to divide in another way, so
    all find the same voxels.
    """
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / np.float32(inputs["edge"])
        origin = [np.float32(inputs[f"origin_{axis}"]) for axis in "xyz"]
    return (*origin, inverse, *[np.int64(inputs[f"cells_{axis}"]) for axis in "xyz"])


# No sort: a bit a voxel says which are occupied, and how many bits stand before one is its place in the output. The
# bits of 16 million voxels and the counts of bits before each word are 3 MB, which stay in the cache.


def _mark(
    points: Points,
    x0: float,
    y0: float,
    z0: float,
    inverse: float,
    nx: int,
    ny: int,
    nz: int,
    cells: NDArray[np.int32],
    occupied: NDArray[np.uint64],
    before: NDArray[np.int32],
) -> int:
    """Finds each point's voxel (-1: none), the set of them, how many stand before each word of it, and in all."""
    fx, fy, fz, zero = np.float32(nx), np.float32(ny), np.float32(nz), np.float32(0)
    for i in range(points.shape[0]):
        x, y, z = (points[i, 0] - x0) * inverse, (points[i, 1] - y0) * inverse, (points[i, 2] - z0) * inverse
        if (x >= zero) & (x < fx) & (y >= zero) & (y < fy) & (z >= zero) & (z < fz):
            cell = (np.int64(x) * ny + np.int64(y)) * nz + np.int64(z)
            cells[i] = cell
            occupied[cell >> 6] |= np.uint64(1) << np.uint64(cell & 63)
        else:
            cells[i] = -1
    total = 0
    for word in range(occupied.size):
        before[word] = total
        total += bits.ones(occupied[word])
    return total


def _gather(
    points: Points,
    cells: NDArray[np.int32],
    occupied: NDArray[np.uint64],
    before: NDArray[np.int32],
    cell: Numbers,
    count: Numbers,
    centroid: Points,
) -> None:
    one = np.uint64(1)
    sums = np.zeros((count.size, 4))
    for word in range(occupied.size):
        rest, at = occupied[word], before[word]
        while rest:
            lower = rest - one
            cell[at] = word * 64 + bits.ones(~rest & lower)
            rest &= lower
            at += 1
    for i in range(points.shape[0]):
        number = cells[i]
        if number >= 0:
            word = number >> 6
            below = (one << np.uint64(number & 63)) - one
            place = before[word] + bits.ones(occupied[word] & below)
            count[place] += 1
            for j in range(4):
                sums[place, j] += points[i, j]
    for voxel in range(count.size):
        for j in range(4):
            centroid[voxel, j] = sums[voxel, j] / count[voxel]


@voxel_grid.on("cpu")
def _cpu(device: Any) -> Run:
    from numba import njit, types
    from numba.extending import register_jitable

    register_jitable(bits.ones)
    cloud = types.Array(types.float32, 2, "C", readonly=True)
    floats, ints = (types.float32,) * 4, (types.int64,) * 3
    cells_type, set_type, before_type = types.int32[::1], types.uint64[::1], types.int32[::1]
    options = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
    mark = njit((cloud, *floats, *ints, cells_type, set_type, before_type), **options)(_mark)
    found = types.int64[::1], types.int64[::1], types.float32[:, ::1]
    gather = njit((cloud, cells_type, set_type, before_type, *found), **options)(_gather)

    def run(inputs: Inputs, context: Context) -> Outputs:
        points, grid = inputs["points"], _grid(inputs)
        words = -(-int(grid[4] * grid[5] * grid[6]) // 64)
        cells = np.empty(len(points), np.int32)
        occupied, before = np.zeros(words, np.uint64), np.empty(words, np.int32)
        voxels = mark(points, *grid, cells, occupied, before)
        cell, count = np.empty(voxels, np.int64), np.zeros(voxels, np.int64)
        centroid = np.empty((voxels, 4), np.float32)
        gather(points, cells, occupied, before, cell, count, centroid)
        return {"cell": cell, "count": count, "centroid": centroid}

    return run


# The cpu's algorithm, each function one work-item: on a board a pipeline that takes a point a cycle. Groups cannot
# share the sums, since OpenCL 1.2 has no atomic addition of floats.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void mark(__global const float* restrict points, float x0, float y0, float z0, float inverse, long nx, long ny, long nz,
          __global int* restrict cells, __global ulong* restrict occupied, __global int* restrict before,
          __global long* restrict total, ulong size, ulong words) {
  for (ulong word = 0; word < words; word++) occupied[word] = 0;
  for (ulong i = 0; i < size; i++) {
    const float x = (points[4 * i] - x0) * inverse, y = (points[4 * i + 1] - y0) * inverse;
    const float z = (points[4 * i + 2] - z0) * inverse;
    cells[i] = -1;
    if (x >= 0 && x < nx && y >= 0 && y < ny && z >= 0 && z < nz) {
      const long cell = ((long)x * ny + (long)y) * nz + (long)z;
      cells[i] = cell;
      occupied[cell >> 6] |= 1UL << (cell & 63);
    }
  }
  long sum = 0;
  for (ulong word = 0; word < words; word++) {
    before[word] = sum;
    sum += popcount(occupied[word]);
  }
  total[0] = sum;
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void gather(__global const float* restrict points, __global const int* restrict cells,
            __global const ulong* restrict occupied, __global const int* restrict before,
            __global double* restrict sums, __global long* restrict cell, __global long* restrict count,
            __global float* restrict centroid, ulong size, ulong words, ulong voxels) {
  for (ulong at = 0; at < voxels; at++) count[at] = 0;
  for (ulong at = 0; at < 4 * voxels; at++) sums[at] = 0;
  for (ulong word = 0; word < words; word++) {
    ulong at = before[word];
    for (ulong rest = occupied[word]; rest; rest &= rest - 1) cell[at++] = 64 * word + popcount(~rest & (rest - 1));
  }
  for (ulong i = 0; i < size; i++) {
    const int number = cells[i];
    if (number >= 0) {
      const ulong below = (1UL << (number & 63)) - 1;
      const ulong at = before[number >> 6] + popcount(occupied[number >> 6] & below);
      count[at] += 1;
      for (int j = 0; j < 4; j++) sums[4 * at + j] += points[4 * i + j];
    }
  }
  for (ulong at = 0; at < voxels; at++)
    for (int j = 0; j < 4; j++) centroid[4 * at + j] = sums[4 * at + j] / count[at];
}
"""


@voxel_grid.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "driving.voxel_grid")

    def run(inputs: Inputs, context: Context) -> Outputs:
        points, grid = inputs["points"], _grid(inputs)
        size, words = points.shape[0], -(-int(grid[4] * grid[5] * grid[6]) // 64)
        cells, total = device.empty((size,), np.int32), device.empty((1,), np.int64)
        occupied, before = device.empty((words,), np.uint64), device.empty((words,), np.int32)
        sizes = np.uint64(size), np.uint64(words)
        program.launch("mark", (1,), points, *grid, cells, occupied, before, total, *sizes)
        voxels = int(device.download(total)[0])
        cell, count = device.empty((voxels,), np.int64), device.empty((voxels,), np.int64)
        sums, centroid = device.empty((voxels, 4), np.float64), device.empty((voxels, 4), np.float32)
        found = sums, cell, count, centroid
        program.launch("gather", (1,), points, cells, occupied, before, *found, *sizes, np.uint64(voxels))
        return {"cell": cell, "count": count, "centroid": centroid}

    return run


cuda: Any  # numba.cuda, on a GPU

_CHUNK = 32


def _mark_gpu(
    points: Any, x0: Any, y0: Any, z0: Any, inverse: Any, nx: Any, ny: Any, nz: Any, cells: Any, occupied: Any
) -> None:
    fx, fy, fz, zero = np.float32(nx), np.float32(ny), np.float32(nz), np.float32(0)
    for i in range(cuda.grid(1), points.shape[0], cuda.gridsize(1)):
        x, y, z = (points[i, 0] - x0) * inverse, (points[i, 1] - y0) * inverse, (points[i, 2] - z0) * inverse
        cells[i] = -1
        if x >= zero and x < fx and y >= zero and y < fy and z >= zero and z < fz:
            cell = (np.int64(x) * ny + np.int64(y)) * nz + np.int64(z)
            cells[i] = cell
            cuda.atomic.or_(occupied, cell >> 5, np.uint32(1) << np.uint32(cell & 31))


def _count_gpu(occupied: Any, before: Any, chunks: Any) -> None:
    """How many bits stand before each word of its chunk, and in all of each chunk."""
    for chunk in range(cuda.grid(1), chunks.size, cuda.gridsize(1)):
        total = np.int32(0)
        for word in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, occupied.size)):
            before[word] = total
            total += np.int32(cuda.popc(occupied[word]))
        chunks[chunk] = total


def _list_gpu(occupied: Any, before: Any, starts: Any, cell: Any) -> None:
    """Adds what stands before each chunk, and writes down which voxels are occupied."""
    one = np.uint32(1)
    for word in range(cuda.grid(1), occupied.size, cuda.gridsize(1)):
        at = before[word] + starts[word // _CHUNK]
        before[word] = at
        rest = occupied[word]
        while rest != 0:
            lower = np.uint32(rest - one)
            cell[at] = np.int64(word) * 32 + np.int64(cuda.popc(np.uint32(~rest & lower)))
            rest = np.uint32(rest & lower)
            at += 1


def _add_gpu(points: Any, cells: Any, occupied: Any, before: Any, count: Any, sums: Any) -> None:
    one = np.uint32(1)
    for i in range(cuda.grid(1), cells.size, cuda.gridsize(1)):
        number = cells[i]
        if number >= 0:
            word = number >> 5
            below = np.uint32((one << np.uint32(number & 31)) - one)
            at = before[word] + np.int32(cuda.popc(np.uint32(occupied[word] & below)))
            cuda.atomic.add(count, at, 1)
            for j in range(4):
                cuda.atomic.add(sums, (at, j), np.float64(points[i, j]))


def _divide_gpu(sums: Any, count: Any, centroid: Any) -> None:
    for i in range(cuda.grid(1), 4 * count.size, cuda.gridsize(1)):
        centroid[i >> 2, i & 3] = sums[i >> 2, i & 3] / count[i >> 2]


@voxel_grid.on("gpu")
def _gpu(device: Any) -> Run:
    """The cpu's algorithm by atomic operations; the host adds up what the chunks hold, since it must know how many."""
    mark, count_bits, list_cells, add, divide = (
        device.compile(function) for function in (_mark_gpu, _count_gpu, _list_gpu, _add_gpu, _divide_gpu)
    )

    def run(inputs: Inputs, context: Context) -> Outputs:
        points, grid = inputs["points"], _grid(inputs)
        size, words = points.shape[0], -(-int(grid[4] * grid[5] * grid[6]) // 32)
        cells, occupied = device.empty((size,), np.int32), device.zeros((words,), np.uint32)
        before, chunks = device.empty((words,), np.int32), device.empty((-(-words // _CHUNK),), np.int32)
        mark(size, points, *grid, cells, occupied)
        count_bits(chunks.size, occupied, before, chunks)
        ends = np.cumsum(device.read(chunks), dtype=np.int32)
        voxels = int(ends[-1])
        cell, count = device.empty((voxels,), np.int64), device.zeros((voxels,), np.int64)
        sums, centroid = device.zeros((voxels, 4), np.float64), device.empty((voxels, 4), np.float32)
        list_cells(words, occupied, before, device.upload(np.concatenate([ends[:1] * 0, ends[:-1]])), cell)
        add(size, points, cells, occupied, before, count, sums)
        divide(4 * voxels, sums, count, centroid)
        return {"cell": cell, "count": count, "centroid": centroid}

    return run


@voxel_grid.on("tpu")
def _tpu(device: Any) -> Run:
    """The points sorted by voxel, which XLA does better than scattering into a grid."""
    import jax
    import jax.numpy as jnp

    nowhere = np.iinfo(np.int32).max

    def find(
        points: Any, x0: Any, y0: Any, z0: Any, inverse: Any, nx: Any, ny: Any, nz: Any, size: Any
    ) -> tuple[Any, ...]:
        index = jnp.arange(points.shape[0], dtype=jnp.int32)
        place = [(points[:, axis] - start) * inverse for axis, start in enumerate((x0, y0, z0))]
        inside = index < size
        for each, most in zip(place, (nx, ny, nz), strict=True):
            inside &= (each >= 0) & (each < most.astype(jnp.float32))
        x, y, z = (jnp.where(inside, each, 0).astype(jnp.int64) for each in place)
        number = jnp.where(inside, (x * ny + y) * nz + z, nowhere).astype(jnp.int32)
        number, order = jax.lax.sort((number, index), num_keys=1)
        first = (number != nowhere) & jnp.concatenate([jnp.ones(1, bool), number[1:] != number[:-1]])
        total = inside.sum()
        start = jnp.nonzero(first, size=index.size, fill_value=total)[0]
        # Rows past the last voxel take those points that have none; they are cut off.
        voxel = jnp.where(number == nowhere, index.size, jnp.cumsum(first) - 1)
        sums = jax.ops.segment_sum(points[order, :4].astype(jnp.float64), voxel, index.size, indices_are_sorted=True)
        count = jnp.append(start[1:], total) - start
        centroid = (sums / count[:, None]).astype(jnp.float32)
        return number[jnp.minimum(start, index.size - 1)].astype(jnp.int64), count, centroid, first.sum()[None]

    program = device.program(find)

    def run(inputs: Inputs, context: Context) -> Outputs:
        points = inputs["points"]
        size = points.shape[0]
        shapes = {"cell": (size,), "count": (size,), "centroid": (size, 4), "voxels": (1,)}
        found = program(shapes, points, *_grid(inputs), np.int32(size))
        voxels = int(device.read(found.pop("voxels"))[0])
        return {name: device.read(each)[:voxels] for name, each in found.items()}

    return run


@voxel_grid.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, edge, cells in ((1, 1.0, (2, 3, 4)), (200, 0.5, (8, 8, 4)), (500, 0.1, (40, 50, 33))):
        low = -np.array(cells, np.float32) * edge / 2
        points = random.uniform(1.2 * low.min(), -1.2 * low.min(), (n, 4)).astype(np.float32)
        points[3::50, 1], points[7::60, 0], points[9::70, 3] = np.nan, np.inf, np.nan
        yield {
            "points": points,
            "edge": edge,
            **dict(zip(("origin_x", "origin_y", "origin_z"), low.tolist(), strict=True)),
            **dict(zip(("cells_x", "cells_y", "cells_z"), cells, strict=True)),
        }
