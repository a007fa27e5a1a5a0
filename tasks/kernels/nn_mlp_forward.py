"""Neural networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

mlp_forward = Kernel(
    "nn.mlp_forward",
    inputs={
        "x": "float32[b,i]",
        "w1": "float32[i,h]",
        "b1": "float32[h]",
        "w2": "float32[h,o]",
        "b2": "float32[o]",
    },
    outputs={"y": "float32[b,o]"},
    flops="2*b*h*(i + o) + 2*b*h + b*o",
    bytes="4*(b*i + i*h + h + h*o + o + b*o)",
    # No batch: each job brings weights of its own, and to lay those side by side costs more than a launch.
    tolerance=1e-4,
    summary="A perceptron with one hidden layer of rectified linear units.",
)

Matrix = NDArray[np.float32]


@mlp_forward.reference
def _reference(x: Matrix, w1: Matrix, b1: Matrix, w2: Matrix, b2: Matrix) -> Outputs:
    """y = max(0, x w1 + b1) w2 + b2, in float64. NaN stays NaN under max, and infinity is what IEEE makes of it.

    Rumelhart, Hinton and Williams (1986), "Learning representations by back-propagating errors", Nature 323; with the
    units of Nair and Hinton (2010), "Rectified linear units improve restricted Boltzmann machines".
    """
    with np.errstate(invalid="ignore", over="ignore"):
        hidden = np.maximum(x.astype(np.float64) @ w1.astype(np.float64) + b1, 0)
        return {"y": (hidden @ w2.astype(np.float64) + b2).astype(np.float32)}


def _rectify(hidden: Matrix, bias: Matrix) -> None:
    rows, columns = hidden.shape
    zero = np.float32(0)
    for row in range(rows):
        line = hidden[row]
        for column in range(columns):
            value = line[column] + bias[column]
            line[column] = zero if value < zero else value  # noqa: FURB136 - max() loses NaN where it is compiled


#: What the hidden values of a block of rows may take, so that they stay in the caches, and the fewest rows for which
#: BLAS packs the weights anew (16,384 rows of 784 to 512 in blocks of 128: 159 ms, of 512 or more: 152, NumPy's: 160).
_BLOCK_BYTES, _LEAST_ROWS = 2**21, 128


@mlp_forward.on("cpu")
def _cpu(device: Any) -> Run:
    """BLAS, a block of rows at a time: bias and max go over hidden values once, while the cache still holds them."""
    from numba import njit, types

    bias = types.Array(types.float32, 1, "C", readonly=True)
    rectify = njit((types.float32[:, ::1], bias), nogil=True, cache=True, error_model="numpy")(_rectify)

    def run(inputs: Inputs, context: Context) -> Outputs:
        x, w1, b1, w2, b2 = (inputs[name] for name in ("x", "w1", "b1", "w2", "b2"))
        batch, units = len(x), b1.size
        y = np.empty((batch, b2.size), np.float32)
        rows = max(_LEAST_ROWS, _BLOCK_BYTES // (4 * max(units, 1)))
        hidden = np.empty((min(rows, batch), units), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, batch, rows):
                if context.cancelled:
                    break
                part, target = x[start : start + rows], y[start : start + rows]
                block = hidden[: len(part)]
                np.matmul(part, w1, out=block)
                rectify(block, b1)
                np.matmul(block, w2, out=target)
                target += b2
        return {"y": y}

    return run


cuda: Any  # numba.cuda, on a GPU
#: A block makes a tile of 64 x 64 of the product, in steps of 8 along the inner axis; each of its 8 x 8 threads makes
#: 8 x 8 values, so that what it reads from shared memory serves eight times.
_TILE, _DEPTH, _SIDE, _EACH = 64, 8, 8, 8
_NO_LEAST = np.float32(-np.inf)


def _linear_gpu(x: Matrix, w: Matrix, bias: Matrix, least: np.float32, y: Matrix) -> None:
    """y = max(x w + bias, least)."""
    left = cuda.shared.array((_DEPTH, _TILE), np.float32)
    right = cuda.shared.array((_DEPTH, _TILE), np.float32)
    sums = cuda.local.array((_EACH, _EACH), np.float32)
    column, row = cuda.threadIdx.x, cuda.threadIdx.y
    thread = row * _SIDE + column
    top, start = cuda.blockIdx.y * _TILE, cuda.blockIdx.x * _TILE
    rows, inner = x.shape
    columns = y.shape[1]
    zero = np.float32(0)
    for i in range(_EACH):
        for j in range(_EACH):
            sums[i, j] = zero
    for first in range(0, inner, _DEPTH):
        for each in range(thread, _DEPTH * _TILE, _SIDE * _SIDE):
            r, k = each // _DEPTH, each % _DEPTH
            left[k, r] = x[top + r, first + k] if top + r < rows and first + k < inner else zero
            k, c = each // _TILE, each % _TILE
            right[k, c] = w[first + k, start + c] if first + k < inner and start + c < columns else zero
        cuda.syncthreads()
        # Not beyond the matrices: zero times infinity is NaN.
        for k in range(min(_DEPTH, inner - first)):
            for i in range(_EACH):
                value = left[k, row + i * _SIDE]
                for j in range(_EACH):
                    sums[i, j] += value * right[k, column + j * _SIDE]
        cuda.syncthreads()
    for i in range(_EACH):
        for j in range(_EACH):
            r, c = top + row + i * _SIDE, start + column + j * _SIDE
            if r < rows and c < columns:
                total = sums[i, j] + bias[c]
                y[r, c] = least if total < least else total  # noqa: FURB136 - as above


@mlp_forward.on("gpu")
def _gpu(device: Any) -> Run:
    """Two products in tiles, each with its bias and its max in the end of it."""
    linear = device.compile(_linear_gpu, (_SIDE, _SIDE))

    def run(inputs: Inputs, context: Context) -> Outputs:
        x, w1, b1, w2, b2 = (inputs[name] for name in ("x", "w1", "b1", "w2", "b2"))
        hidden, y = device.empty((len(x), b1.size), np.float32), device.empty((len(x), b2.size), np.float32)
        for left, w, bias, least, made in ((x, w1, b1, np.float32(0), hidden), (hidden, w2, b2, _NO_LEAST, y)):
            linear((-(-bias.size // _TILE), -(-len(x) // _TILE)), left, w, bias, least, made)
        return {"y": y}

    return run


@mlp_forward.on("tpu")
def _tpu(device: Any) -> Run:
    """Two products in the matrix unit, at full precision; XLA puts bias and max into the end of the first."""
    import jax.numpy as jnp

    def forward(x: Any, w1: Any, b1: Any, w2: Any, b2: Any, units: Any) -> Any:
        hidden = jnp.maximum(jnp.matmul(x, w1, precision="highest") + b1, 0)
        # Beyond the units there may be NaN, of infinite x and zeros of padding.
        hidden = jnp.where(jnp.arange(b1.size) < units, hidden, 0)
        return jnp.matmul(hidden, w2, precision="highest") + b2

    program = device.program(forward)

    def run(inputs: Inputs, context: Context) -> Outputs:
        x, w1, b1, w2, b2 = (inputs[name] for name in ("x", "w1", "b1", "w2", "b2"))
        return program({"y": (x.shape[0], b2.size)}, x, w1, b1, w2, b2, np.int32(b1.size))

    return run


# As linalg.matmul: a group is one work-item that makes one tile, with loops over block memory.
_OPENCL = """
#define ROWS 4
#define LANES 16  // two vectors of 8

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void linear(__global const float* restrict x, __global const float* restrict w, __global const float* restrict bias,
            float least, __global float* restrict y, int rows_of_x, int inner, int columns_of_w) {
  __local float left[TILE][TILE], right[TILE][TILE], sums[TILE][TILE];
  const int top = get_group_id(1) * TILE, start = get_group_id(0) * TILE;
  const int rows = min(TILE, rows_of_x - top), columns = min(TILE, columns_of_w - start);
  x += (ulong)top * inner;
  w += start;
  y += (ulong)top * columns_of_w + start;
  for (int r = 0; r < TILE; r++)
    for (int c = 0; c < TILE; c++) sums[r][c] = 0;
  for (int first = 0; first < inner; first += TILE) {
    const int depth = min(TILE, inner - first);
    for (int r = 0; r < rows; r++)
      for (int k = 0; k < depth; k++) left[r][k] = x[(ulong)r * inner + first + k];
    for (int k = 0; k < depth; k++)
      for (int c = 0; c < columns; c++) right[k][c] = w[(ulong)(first + k) * columns_of_w + c];
    for (int r = 0; r < rows; r += ROWS)
      for (int c = 0; c < columns; c += LANES) {
        float8 sum[ROWS][2];
        #pragma unroll
        for (int i = 0; i < ROWS; i++)
          #pragma unroll
          for (int j = 0; j < 2; j++) sum[i][j] = vload8(j, &sums[r + i][c]);
        for (int k = 0; k < depth; k++)
          #pragma unroll
          for (int i = 0; i < ROWS; i++)
            #pragma unroll
            for (int j = 0; j < 2; j++) sum[i][j] += left[r + i][k] * vload8(j, &right[k][c]);
        #pragma unroll
        for (int i = 0; i < ROWS; i++)
          #pragma unroll
          for (int j = 0; j < 2; j++) vstore8(sum[i][j], j, &sums[r + i][c]);
      }
  }
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) {
      const float total = sums[r][c] + bias[start + c];
      y[(ulong)r * columns_of_w + c] = total < least ? least : total;  // NaN stays
    }
}
"""


@mlp_forward.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "nn.mlp_forward", TILE=_TILE)

    def run(inputs: Inputs, context: Context) -> Outputs:
        x, w1, b1, w2, b2 = (inputs[name] for name in ("x", "w1", "b1", "w2", "b2"))
        batch = x.shape[0]
        hidden, y = device.empty((batch, b1.size), np.float32), device.empty((batch, b2.size), np.float32)
        for left, w, bias, least, made in ((x, w1, b1, np.float32(0), hidden), (hidden, w2, b2, _NO_LEAST, y)):
            groups = (-(-bias.size // _TILE), -(-batch // _TILE))
            sizes = np.int32(batch), np.int32(left.shape[1]), np.int32(bias.size)
            program.launch("linear", groups, left, w, bias, least, made, *sizes)
        return {"y": y}

    return run


@mlp_forward.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for b, i, h, o in ((1, 1, 1, 1), (3, 5, 4, 2), (200, 64, 100, 10), (500, 256, 256, 10)):
        yield {
            "x": random.standard_normal((b, i), np.float32),
            "w1": random.standard_normal((i, h), np.float32) / np.float32(np.sqrt(i)),
            "b1": random.standard_normal(h, np.float32),
            "w2": random.standard_normal((h, o), np.float32) / np.float32(np.sqrt(h)),
            "b2": random.standard_normal(o, np.float32),
        }
