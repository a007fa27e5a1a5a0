"""Recommendations from what people did."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.errors import InvalidArguments
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

als_step = Kernel(
    "recommend.als_step",
    inputs={
        "starts": "int64[u1]",
        "items": "int32[z]",
        "confidence": "float32[z]",
        "factors": "float32[i,f]",
        "regularization": "float64 = 0.1",
    },
    outputs={"users": "float32[u,f]"},
    flops="i*f*f + z*f*(f + 3) + (u1 - 1)*(f*f*f/3 + 2*f*f) + 1",
    bytes="8*u1 + 8*z + 4*z*f + 4*i*f + 4*u1*f",
    limits={
        "starts": "u1 >= 1",
        "factors": "1 <= f <= 128",
        "regularization": "regularization > 0",
    },
    tolerance=1e-4,
    summary="The users' half of a step of alternating least squares, for implicit feedback.",
)

Matrix = NDArray[np.float32]
Starts = NDArray[np.int64]
Items = NDArray[np.int32]


def _require_order(starts: Starts, entries: int) -> None:
    """InvalidArguments where users together would take more entries than there are: quadratic work of a few bytes."""
    taken = int(np.maximum(np.diff(np.clip(starts, 0, entries)), 0).sum())
    if taken > entries:
        raise InvalidArguments(f"starts must not decrease: users would take {taken} entries of {entries}", "starts")


@als_step.reference
def _reference(starts: Starts, items: Items, confidence: Matrix, factors: Matrix, regularization: float) -> Outputs:
    """x_u = (Y'Y + Y'(C_u - I)Y + regularization I)**-1 Y'C_u p(u), for each user u.

    Hu, Koren and Volinsky (2008), "Collaborative filtering for implicit feedback datasets", eq. 4. Y are the items'
    `factors`. User u's entries, at starts[u] to starts[u + 1] of `items` and `confidence`, are what the user did: p is
    1 there, and c the confidence; elsewhere p is 0 and c is 1. The other half of the step is this with users and items
    exchanged. Solved in float64 here and in float32 on devices: hence the tolerance, for systems whose condition is
    that of ratings (10**3).

    Starts are clamped to the entries there are, and a user whose entries would end before they start has none. Starts
    must not decrease: InvalidArguments where all users together would so take more entries than there are. An entry
    whose item is not among the factors is passed over. A confidence below 1, infinite or NaN, makes its user NaN; a
    factor or a regularization that is NaN or infinite, all users.
    """
    _require_order(starts, items.size)
    wide = factors.astype(np.float64)
    with np.errstate(all="ignore"):
        gram = wide.T @ wide + regularization * np.eye(wide.shape[1])
    users = np.full((len(starts) - 1, wide.shape[1]), np.nan, np.float32)
    if not (np.isfinite(gram).all() and math.isfinite(regularization)):
        return {"users": users}
    bounds = np.clip(starts, 0, items.size)
    for user, (start, stop) in enumerate(itertools.pairwise(bounds)):
        known = (items[start:stop] >= 0) & (items[start:stop] < len(factors))
        rows, c = wide[items[start:stop][known]], confidence[start:stop][known].astype(np.float64)
        if (np.isfinite(c) & (c >= 1)).all():
            users[user] = np.linalg.solve(gram + rows.T @ ((c - 1)[:, None] * rows), rows.T @ c)
    return {"users": users}


# -- cpu -------------------------------------------------------------------------------------------------------------

#: Entries that are added to a user's matrix at once: each of its vectors is then loaded and stored once for so many.
_ENTRIES = 8


def _solve(
    starts: Starts, items: Items, confidence: Matrix, factors: Matrix, gram: Matrix, first: int, users: Matrix
) -> None:
    """Users from `first` on. Factors and `gram` are filled up to a multiple of eight, with 1 on the diagonal."""
    width, entries = gram.shape[0], items.size
    count, f = users.shape
    zero = np.float32(0)
    a, right, x, inverse = (
        np.empty((width, width), np.float32),
        np.empty(width, np.float32),
        gram[0].copy(),
        gram[0].copy(),
    )
    y, scaled = np.empty((_ENTRIES, width), np.float32), np.empty((width, _ENTRIES), np.float32)
    for user in range(count):
        start = min(max(starts[first + user], 0), entries)
        stop = min(max(starts[first + user + 1], start), entries)
        a[:] = gram
        right[:] = zero
        fair = True
        while start < stop:
            held = 0
            while held < _ENTRIES and start < stop:
                item, c = items[start], confidence[start]
                start += 1
                if item < 0 or item >= factors.shape[0]:
                    continue
                fair = fair and c >= 1 and c < np.inf
                row, line = factors[item], y[held]
                for k in range(width):
                    line[k] = row[k]
                    right[k] += c * row[k]
                    scaled[k, held] = (c - np.float32(1)) * row[k]
                held += 1
            for rest in range(held, _ENTRIES):
                y[rest, :] = zero
                scaled[:, rest] = zero
            y0, y1, y2, y3, y4, y5, y6, y7 = y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]
            for j in range(width):
                s, line = scaled[j], a[j]
                s0, s1, s2, s3, s4, s5, s6, s7 = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]
                for k in range(width):
                    line[k] += (
                        (s0 * y0[k] + s1 * y1[k])
                        + (s2 * y2[k] + s3 * y3[k])
                        + ((s4 * y4[k] + s5 * y5[k]) + (s6 * y6[k] + s7 * y7[k]))
                    )
        # Cholesky, U'U = a, row by row over whole rows: what is left of the diagonal comes out as nought.
        for k in range(width):
            line = a[k]
            d = np.float32(1) / np.sqrt(line[k])
            inverse[k] = d
            for j in range(width):
                line[j] *= d
            z = right[k] * d
            for j in range(width):
                right[j] -= z * line[j]
            x[k] = z
            for i in range(k + 1, width):
                below, s = a[i], line[i]
                for j in range(width):
                    below[j] -= s * line[j]
        right[:] = zero
        for k in range(width - 1, -1, -1):
            line, total = a[k], zero
            for j in range(width):
                total += line[j] * right[j]
            right[k] = (x[k] - total) * inverse[k]
        for k in range(f):
            users[user, k] = right[k] if fair else np.float32(np.nan)


#: Users between looks at whether the job was cancelled: some milliseconds.
_CHUNK = 1024


def _gram(factors: Matrix, regularization: float, width: int) -> Matrix:
    """Y'Y + regularization I, from float64, filled up with 1 on the diagonal; NaN where anything is not finite."""
    wide, f = factors.astype(np.float64), factors.shape[1]
    gram = np.eye(width)
    with np.errstate(all="ignore"):
        gram[:f, :f] = wide.T @ wide + regularization * np.eye(f)
    return gram.astype(np.float32) if np.isfinite(gram).all() else np.full((width, width), np.nan, np.float32)


@als_step.on("cpu")
def _cpu(device: Any) -> Run:
    """A user's matrix and its Cholesky factor stay in the first cache; each is in whole vectors."""
    from numba import njit, types

    column, index = types.Array(types.float32, 1, "C", readonly=True), types.Array(types.int32, 1, "C", readonly=True)
    starts_type, matrix = types.Array(types.int64, 1, "C", readonly=True), types.float32[:, ::1]
    solve = njit(
        (starts_type, index, column, matrix, matrix, types.int64, matrix),
        nogil=True,
        cache=True,
        error_model="numpy",
        fastmath={"contract", "reassoc", "nsz"},
    )(_solve)

    def run(inputs: Inputs, context: Context) -> Outputs:
        starts, factors = inputs["starts"], inputs["factors"]
        _require_order(starts, inputs["items"].size)
        count, f = factors.shape
        width = -(-f // 8) * 8
        filled = np.zeros((count, width), np.float32)
        filled[:, :f] = factors
        gram = _gram(factors, inputs["regularization"], width)
        users = np.full((starts.size - 1, f), np.nan, np.float32)
        if np.isnan(gram[0, 0]):
            return {"users": users}
        for first in range(0, len(users), _CHUNK):
            if context.cancelled:
                break
            part = users[first : first + _CHUNK]
            solve(starts, inputs["items"], inputs["confidence"], filled, gram, first, part)
        return {"users": users}

    return run


# -- gpu -------------------------------------------------------------------------------------------------------------

cuda: Any  # numba.cuda, on a GPU
#: The threads of a block; fewer where each is a thread of Python.
_THREADS, _SIMULATED_THREADS = 64, 8
#: The most factors, and the values of the lower half of a matrix of so many: 33 KiB of a block's 48.
_MOST = 128
_PACKED = _MOST * (_MOST + 1) // 2
#: Rows of the items' factors that a thread sums for one value of Y'Y.
_ROWS = 256


def _gram_gpu(factors: Matrix, gram: NDArray[np.float64]) -> None:
    rows, f = factors.shape
    chunks = (rows + _ROWS - 1) // _ROWS
    for each in range(cuda.grid(1), chunks * f * f, cuda.gridsize(1)):
        chunk, j, k = each // (f * f), each // f % f, each % f
        total = 0.0
        for row in range(chunk * _ROWS, min((chunk + 1) * _ROWS, rows)):
            total += np.float64(factors[row, j]) * np.float64(factors[row, k])
        cuda.atomic.add(gram, (j, k), total)


def _solve_gpu(
    starts: Starts,
    items: Items,
    confidence: Matrix,
    factors: Matrix,
    gram: NDArray[np.float64],
    regularization: float,
    users: Matrix,
) -> None:
    a = cuda.shared.array(_PACKED, np.float32)  # the lower half, row after row
    y = cuda.shared.array((_ENTRIES, _MOST), np.float32)
    c = cuda.shared.array(_ENTRIES, np.float32)
    x = cuda.shared.array(_MOST, np.float32)
    fair = cuda.shared.array(1, np.int32)
    thread, threads, entries = cuda.threadIdx.x, cuda.blockDim.x, items.size
    one, zero = np.float32(1), np.float32(0)
    count, f = users.shape
    # Rows p and f - 1 - p of the lower half are f + 1 values together: what threads share is a rectangle.
    folded = (f + 1) // 2 * (f + 1)
    for user in range(cuda.blockIdx.x, count, cuda.gridDim.x):
        start = min(max(starts[user], 0), entries)
        stop = min(max(starts[user + 1], start), entries)
        if thread == 0:
            fair[0] = 1
        cuda.syncthreads()
        for j in range(thread, f, threads):
            x[j] = zero
            for k in range(j + 1):
                a[j * (j + 1) // 2 + k] = gram[j, k] + (regularization if j == k else 0.0)
            pivot = gram[j, j] + regularization
            if pivot - pivot != 0.0:
                fair[0] = 0
        cuda.syncthreads()
        for first in range(start, stop, _ENTRIES):
            for each in range(thread, _ENTRIES * f, threads):
                entry, k = each // f, each % f
                value = zero
                if first + entry < stop:
                    item = items[first + entry]
                    if item >= 0 and item < factors.shape[0]:
                        value = factors[item, k]
                y[entry, k] = value
            for entry in range(thread, _ENTRIES, threads):
                value = one
                if first + entry < stop:
                    item = items[first + entry]
                    if item >= 0 and item < factors.shape[0]:
                        value = confidence[first + entry]
                        if not (value >= one and value < np.inf):
                            fair[0] = 0
                c[entry] = value
            cuda.syncthreads()
            for each in range(thread, folded, threads):
                j, k = each // (f + 1), each % (f + 1)
                if k > j:
                    j, k = f - 1 - j, k - j - 1
                    if 2 * j + 1 == f:
                        continue
                total = zero
                for entry in range(_ENTRIES):
                    total += (c[entry] - one) * y[entry, j] * y[entry, k]
                a[j * (j + 1) // 2 + k] += total
            for k in range(thread, f, threads):
                total = zero
                for entry in range(_ENTRIES):
                    total += c[entry] * y[entry, k]
                x[k] += total
            cuda.syncthreads()
        # Cholesky, L L' = a, column by column, with the right side as one more row of L.
        for k in range(f):
            d = one / np.float32(math.sqrt(max(a[k * (k + 1) // 2 + k], zero)))
            cuda.syncthreads()
            for i in range(k + thread, f, threads):
                a[i * (i + 1) // 2 + k] *= d
            if thread == 0:
                x[k] *= d
            cuda.syncthreads()
            rest = f - k - 1
            for each in range(thread, rest * rest, threads):
                i, j = k + 1 + each // rest, k + 1 + each % rest
                if j <= i:
                    a[i * (i + 1) // 2 + j] -= a[i * (i + 1) // 2 + k] * a[j * (j + 1) // 2 + k]
            for j in range(k + 1 + thread, f, threads):
                x[j] -= x[k] * a[j * (j + 1) // 2 + k]
            cuda.syncthreads()
        for k in range(f - 1, -1, -1):
            if thread == 0:
                x[k] /= a[k * (k + 1) // 2 + k]
            cuda.syncthreads()
            for j in range(thread, k, threads):
                x[j] -= a[k * (k + 1) // 2 + j] * x[k]
            cuda.syncthreads()
        for k in range(thread, f, threads):
            users[user, k] = x[k] if fair[0] == 1 else np.nan
        cuda.syncthreads()


@als_step.on("gpu")
def _gpu(device: Any) -> Run:
    """A block a user, whose matrix is made and factored in shared memory."""
    gram_of = device.compile(_gram_gpu)
    solve = device.compile(_solve_gpu, (_SIMULATED_THREADS if device.simulated else _THREADS,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        starts, factors = inputs["starts"], inputs["factors"]
        _require_order(device.read(starts), inputs["items"].size)
        rows, f = factors.shape
        count = starts.size - 1
        gram, users = device.zeros((f, f), np.float64), device.empty((count, f), np.float32)
        gram_of(-(-rows // _ROWS) * f * f, factors, gram)
        regularization = np.float64(inputs["regularization"])
        solve(min(count, 65_535), starts, inputs["items"], inputs["confidence"], factors, gram, regularization, users)
        return {"users": users}

    return run


# -- tpu -------------------------------------------------------------------------------------------------------------

#: Users side by side, and entries of each that one product of matrices takes.
_USERS, _TAKEN = 128, 64


@als_step.on("tpu")
def _tpu(device: Any) -> Run:
    """Users side by side; their entries meet in the matrix unit, a piece of each user's at a time."""
    import jax.numpy as jnp
    from jax import lax
    from jax.scipy.linalg import solve_triangular

    def solve(
        starts: Any, items: Any, confidence: Any, factors: Any,
        count: Any, entries: Any, known: Any, f: Any, regularization: Any,
    ) -> Any:  # fmt: skip
        wide = factors.shape[1]
        spare = jnp.arange(wide) >= f
        gram = jnp.matmul(factors.T, factors, precision="highest")
        gram += jnp.diag(jnp.where(spare, 1, regularization).astype(factors.dtype))
        sound = jnp.isfinite(factors).all() & jnp.isfinite(regularization)
        begin = jnp.clip(starts, 0, entries)
        end = jnp.concatenate([begin[1:], begin[:1]])
        end = jnp.where(jnp.arange(starts.size) < count, jnp.maximum(end, begin), begin)

        def group(bounds: Any) -> Any:
            start, stop = bounds

            def add(state: Any) -> Any:
                taken, left, right, fair = state
                at = start[:, None] + taken + jnp.arange(_TAKEN)
                place = jnp.clip(at, 0, items.size - 1)
                item, c = items[place], confidence[place]
                there = (at < stop[:, None]) & (item >= 0) & (item < known)
                y = jnp.where(there[..., None], factors[jnp.clip(item, 0, factors.shape[0] - 1)], 0)
                fair &= (~there | ((c >= 1) & (c < jnp.inf))).all(axis=1)
                c = jnp.where(there, c, 1)
                scaled = (c - 1)[..., None] * y
                left += jnp.einsum("uej,uek->ujk", scaled, y, precision="highest")
                right += jnp.einsum("ue,uek->uk", c, y, precision="highest")
                return taken + _TAKEN, left, right, fair

            users = start.size
            longest = (stop - start).max()
            left = jnp.broadcast_to(gram, (users, wide, wide))
            state = (jnp.zeros((), starts.dtype), left, jnp.zeros((users, wide), gram.dtype), jnp.ones(users, bool))
            _, left, right, fair = lax.while_loop(lambda state: state[0] < longest, add, state)
            lower = jnp.linalg.cholesky(left)
            half = solve_triangular(lower, right[..., None], lower=True)
            found = solve_triangular(lower, half, lower=True, trans=1)[..., 0]
            return jnp.where((fair & sound)[:, None], found, jnp.nan)

        size = min(_USERS, starts.size)
        found = lax.map(group, (begin.reshape(-1, size), end.reshape(-1, size)))
        return found.reshape(-1, wide)

    program = device.program(solve)

    def run(inputs: Inputs, context: Context) -> Outputs:
        starts, items, confidence, factors = (inputs[name] for name in ("starts", "items", "confidence", "factors"))
        _require_order(device.read(starts), items.size)
        known, f = factors.shape
        count = starts.size - 1
        sizes = np.int64(count), np.int64(items.size), np.int64(known), np.int64(f)
        regularization = np.float64(inputs["regularization"])
        return program({"users": (count, f)}, starts, items, confidence, factors, *sizes, regularization)

    return run


# -- fpga ------------------------------------------------------------------------------------------------------------

_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#define ROW(j) ((j) * ((j) + 1) / 2)

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void square(__global const float* restrict factors, __global float* restrict gram, double regularization,
            long rows, int f) {  // a row of Y'Y + regularization I
  __local double sums[MOST];
  const int j = get_group_id(0);
  for (int k = 0; k <= j; k++) sums[k] = k == j ? regularization : 0;
  for (long row = 0; row < rows; row++) {
    const double value = factors[row * f + j];
    for (int k = 0; k <= j; k++) sums[k] += value * factors[row * f + k];
  }
  for (int k = 0; k <= j; k++) gram[ROW(j) + k] = sums[k];
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void solve(__global const long* restrict starts, __global const int* restrict items,
           __global const float* restrict confidence, __global const float* restrict factors,
           __global const float* restrict gram, __global float* restrict users, long entries, long known, int f) {
  __local float a[ROW(MOST)], y[4][MOST], x[MOST];  // a is the lower half of a matrix, row after row
  const ulong user = get_group_id(0);
  long start = clamp(starts[user], 0L, entries);
  const long stop = clamp(starts[user + 1], start, entries);
  int fair = 1;
  for (int i = 0; i < ROW(f); i++) a[i] = gram[i];
  for (int k = 0; k < f; k++) {
    x[k] = 0;
    fair &= isfinite(a[ROW(k) + k]);
  }
  while (start < stop) {
    float c[4] = {1, 1, 1, 1};
    int held = 0;
    for (; held < 4 && start < stop; start++) {
      const int item = items[start];
      if (item < 0 || item >= known) continue;
      c[held] = confidence[start];
      fair &= c[held] >= 1 && c[held] < INFINITY;
      for (int k = 0; k < f; k++) y[held][k] = factors[(ulong)item * f + k];
      held++;
    }
    for (; held < 4; held++)
      for (int k = 0; k < f; k++) y[held][k] = 0;
    for (int j = 0; j < f; j++) {
      const float s0 = (c[0] - 1) * y[0][j], s1 = (c[1] - 1) * y[1][j];
      const float s2 = (c[2] - 1) * y[2][j], s3 = (c[3] - 1) * y[3][j];
      __local float* restrict row = a + ROW(j);
      for (int k = 0; k <= j; k++) row[k] += s0 * y[0][k] + s1 * y[1][k] + (s2 * y[2][k] + s3 * y[3][k]);
      x[j] += c[0] * y[0][j] + c[1] * y[1][j] + (c[2] * y[2][j] + c[3] * y[3][j]);
    }
  }
  // Cholesky, L L' = a, row by row, then the two triangles.
  for (int i = 0; i < f; i++)
    for (int j = 0; j <= i; j++) {
      float sum = a[ROW(i) + j];
      for (int k = 0; k < j; k++) sum -= a[ROW(i) + k] * a[ROW(j) + k];
      a[ROW(i) + j] = i == j ? sqrt(sum) : sum / a[ROW(j) + j];
    }
  for (int i = 0; i < f; i++) {
    float sum = x[i];
    for (int k = 0; k < i; k++) sum -= a[ROW(i) + k] * x[k];
    x[i] = sum / a[ROW(i) + i];
  }
  for (int i = f - 1; i >= 0; i--) {
    x[i] /= a[ROW(i) + i];
    for (int k = 0; k < i; k++) x[k] -= a[ROW(i) + k] * x[i];
  }
  for (int k = 0; k < f; k++) users[user * f + k] = fair ? x[k] : NAN;
}
"""


@als_step.on("fpga")
def _fpga(device: Any) -> Run:
    """A group a user."""
    program = device.program(_OPENCL, "recommend.als_step", MOST=_MOST)

    def run(inputs: Inputs, context: Context) -> Outputs:
        starts, items, factors = inputs["starts"], inputs["items"], inputs["factors"]
        _require_order(device.download(starts), items.size)
        known, f = factors.shape
        count = starts.size - 1
        gram = device.empty((f * (f + 1) // 2,), np.float32)
        users = device.empty((count, f), np.float32)
        regularization = np.float64(inputs["regularization"])
        program.launch("square", (f,), factors, gram, regularization, np.int64(known), np.int32(f))
        program.launch(
            "solve", (count,), starts, items, inputs["confidence"], factors, gram, users,
            np.int64(items.size), np.int64(known), np.int32(f),
        )  # fmt: skip
        return {"users": users}

    return run


@als_step.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for users, count, f, each in ((1, 1, 1, 1), (4, 6, 3, 2), (200, 100, 20, 15)):
        lengths = random.poisson(each, users)
        yield {
            "starts": np.concatenate([[0], np.cumsum(lengths)]),
            "items": random.integers(0, count, lengths.sum(), dtype=np.int32),
            "confidence": (1 + random.exponential(5, lengths.sum())).astype(np.float32),
            "factors": random.normal(0, 0.3, (count, f)).astype(np.float32),
            "regularization": 0.5,
        }
    # Starts that go back and beyond, items that are not there, and no confidence.
    yield {
        "starts": np.array([99, -5, 2, 1, 4, 6, 7]),
        "items": np.array([0, 9, -1, 2, 1, 1, 2, 0], np.int32),
        "confidence": np.array([2, np.nan, 3, 1, np.nan, 2, 0.5, 4], np.float32),
        "factors": random.normal(0, 0.3, (3, 4)).astype(np.float32),
    }
