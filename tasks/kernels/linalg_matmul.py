"""Linear algebra."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

matmul = Kernel(
    "linalg.matmul",
    inputs={"a": "float32[m,k]", "b": "float32[k,n]"},
    outputs={"c": "float32[m,n]"},
    flops="2*m*k*n",
    bytes="4*(m*k + k*n + m*n)",
    batch="stack",
    tolerance=1e-4,
    summary="The product of two matrices.",
)


@matmul.reference
def _reference(a: NDArray[np.float32], b: NDArray[np.float32]) -> Outputs:
    """c[i,j] = sum over l of a[i,l] * b[l,j], summed in float64. A sum over nothing (k = 0) is 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        return {"c": (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)}


@matmul.on("cpu")
def _cpu(device: Any) -> Run:
    """BLAS: nothing compiled here beats it. np.matmul takes a leading axis as it is, so a stack is the same call."""

    def run(inputs: Inputs, context: Context) -> Outputs:
        with np.errstate(invalid="ignore", over="ignore"):
            return {"c": np.matmul(inputs["a"], inputs["b"])}

    return run


cuda: Any  # numba.cuda, on a GPU
#: A block is _SIDE by _SIDE threads, each with _EACH by _EACH elements of c, so its tile is _TILE = _SIDE * _EACH wide.
#: The tile of a is kept by columns; one element more for each keeps them in different banks of shared memory.
_SIDE, _EACH, _WIDE, _PADDED = 16, 8, 128, 129
_SMALL = {"_EACH": 4, "_WIDE": 64, "_PADDED": 65}
_SIMULATED = {"_SIDE": 2, "_EACH": 2, "_WIDE": 4, "_PADDED": 5}


def _multiply_gpu(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> None:
    """A block makes a tile of one product: from _SIDE columns of a and rows of b at a time, in shared memory.

    What lies outside of the matrices counts as 0, and never meets what lies inside: NaN and infinity stay where they
    are. Each thread's sums stay in registers (the loops over _EACH are unrolled).
    """
    left = cuda.shared.array((_SIDE, _PADDED), np.float32)
    right = cuda.shared.array((_SIDE, _WIDE), np.float32)
    sums = cuda.local.array((_EACH, _EACH), np.float32)
    rows = cuda.local.array(_EACH, np.float32)
    m, k, n = a.shape[1], a.shape[2], b.shape[2]
    down, across = (m + _WIDE - 1) // _WIDE, (n + _WIDE - 1) // _WIDE
    product = cuda.blockIdx.x // (down * across)
    tile = cuda.blockIdx.x - product * (down * across)
    top, start = (tile // across) * _WIDE, (tile % across) * _WIDE
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    zero = np.float32(0)
    for i in range(_EACH):
        for j in range(_EACH):
            sums[i, j] = zero
    for first in range(0, k, _SIDE):
        for i in range(_EACH):
            row = top + y + i * _SIDE
            left[x, y + i * _SIDE] = a[product, row, first + x] if row < m and first + x < k else zero
            column = start + x + i * _SIDE
            right[y, x + i * _SIDE] = b[product, first + y, column] if first + y < k and column < n else zero
        cuda.syncthreads()
        for depth in range(_SIDE):
            for i in range(_EACH):
                rows[i] = left[depth, y + i * _SIDE]
            for j in range(_EACH):
                value = right[depth, x + j * _SIDE]
                for i in range(_EACH):
                    sums[i, j] += rows[i] * value
        cuda.syncthreads()
    for i in range(_EACH):
        row = top + y + i * _SIDE
        for j in range(_EACH):
            column = start + x + j * _SIDE
            if row < m and column < n:
                c[product, row, column] = sums[i, j]


@matmul.on("gpu")
def _gpu(device: Any) -> Run:
    """Takes one product, or a stack of them. Small ones are cut into smaller tiles, so that the whole card has work."""
    sizes = [_SIMULATED] if device.simulated else [_SMALL, {}]
    kinds = []
    for constants in sizes:
        side = constants.get("_SIDE", _SIDE)
        multiply = device.compile(_multiply_gpu, threads=(side, side), constants=constants)
        kinds.append((constants.get("_WIDE", _WIDE), multiply))

    def run(inputs: Inputs, context: Context) -> Outputs:
        a, b = inputs["a"], inputs["b"]
        *stack, m, k = a.shape
        n = b.shape[-1]
        c = device.empty((*stack, m, n), np.float32)
        products = math.prod(stack)
        for wide, multiply in reversed(kinds):
            blocks = products * -(-m // wide) * -(-n // wide)
            if blocks >= 2 * device.processors or wide == kinds[0][0]:
                multiply(blocks, a.reshape(products, m, k), b.reshape(products, k, n), c.reshape(products, m, n))
                break
        return {"c": c}

    return run


# A group is one work-item that makes one tile of c: on a board its loops are pipelines over block memory, without a
# barrier, and the eight unrolled sums of eight lanes are its multipliers. On PoCL that is 26 Gflop/s a core, where the
# textbook's form, 16 by 16 work-items with barriers, reaches 0.9. What lies outside of the matrices is never multiplied
# with what lies inside, so NaN and infinity stay where they are. Not fma() or mad(), which PoCL calls (8 Gflop/s), and
# not float16: PoCL 3.0 crashes on it where the processor has AVX-512.
_OPENCL = """
#define ROWS 4
#define LANES 16  // two vectors of 8

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void multiply(__global const float* restrict a, __global const float* restrict b, __global float* restrict c,
              int m, int k, int n) {
  __local float left[TILE][TILE], right[TILE][TILE], sums[TILE][TILE];
  const int top = get_group_id(1) * TILE, start = get_group_id(0) * TILE;
  const int rows = min(TILE, m - top), columns = min(TILE, n - start);
  const ulong number = get_group_id(2);
  a += (number * m + top) * k;
  b += number * k * n + start;
  c += (number * m + top) * n + start;
  for (int y = 0; y < TILE; y++)
    for (int x = 0; x < TILE; x++) sums[y][x] = 0;
  for (int first = 0; first < k; first += TILE) {
    const int depth = min(TILE, k - first);
    for (int y = 0; y < rows; y++)
      for (int l = 0; l < depth; l++) left[y][l] = a[(ulong)y * k + first + l];
    for (int l = 0; l < depth; l++)
      for (int x = 0; x < columns; x++) right[l][x] = b[(ulong)(first + l) * n + x];
    for (int y = 0; y < rows; y += ROWS)
      for (int x = 0; x < columns; x += LANES) {
        float8 sum[ROWS][2];
        #pragma unroll
        for (int i = 0; i < ROWS; i++)
          #pragma unroll
          for (int j = 0; j < 2; j++) sum[i][j] = vload8(j, &sums[y + i][x]);
        for (int l = 0; l < depth; l++)
          #pragma unroll
          for (int i = 0; i < ROWS; i++)
            #pragma unroll
            for (int j = 0; j < 2; j++) sum[i][j] += left[y + i][l] * vload8(j, &right[l][x]);
        #pragma unroll
        for (int i = 0; i < ROWS; i++)
          #pragma unroll
          for (int j = 0; j < 2; j++) vstore8(sum[i][j], j, &sums[y + i][x]);
      }
  }
  for (int y = 0; y < rows; y++)
    for (int x = 0; x < columns; x++) c[(ulong)y * n + x] = sums[y][x];
}
"""
_TILE = 64


@matmul.on("fpga")
def _fpga(device: Any) -> Run:
    """Takes one product, or a stack of them along the third axis of groups."""
    program = device.program(_OPENCL, "linalg.matmul", TILE=_TILE)

    def run(inputs: Inputs, context: Context) -> Outputs:
        a, b = inputs["a"], inputs["b"]
        *stack, m, k = a.shape
        n = b.shape[-1]
        c = device.empty((*stack, m, n), np.float32)
        groups = (-(-n // _TILE), -(-m // _TILE), *(stack or [1]))
        program.launch("multiply", groups, a, b, c, np.int32(m), np.int32(k), np.int32(n))
        return {"c": c}

    return run


@matmul.on("tpu")
def _tpu(device: Any) -> Run:
    """The matrix unit, at full precision: by default it would round the factors to bfloat16, three digits.

    Zeros around the matrices add nothing to a sum, and what NaN and infinity make of them is cut off.
    """
    import jax.numpy as jnp

    program = device.program(lambda a, b: jnp.matmul(a, b, precision="highest"))

    def run(inputs: Inputs, context: Context) -> Outputs:
        a, b = inputs["a"], inputs["b"]
        return program({"c": (*a.shape[:-1], b.shape[-1])}, a, b)

    return run


@matmul.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for m, k, n in ((1, 1, 1), (3, 5, 2), (64, 64, 64), (256, 256, 256)):
        yield {
            "a": random.standard_normal((m, k), np.float32),
            "b": random.standard_normal((k, n), np.float32),
        }
