"""What a portfolio may lose."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run
from tasks import philox
from tasks.philox import normal_pair, normal_pair_cuda, normal_pair_jax, philox4x32, philox_round

value_at_risk = Kernel(
    "finance.value_at_risk",
    inputs={
        "positions": "float64[a]",
        "mean": "float64[a]",
        "factor": "float64[a,a]",
        "paths": "int64 = 100000",
        "horizon": "float64 = 1",
        "confidence": "float64 = 0.99",
        "seed": "int64 = 0",
    },
    outputs={"var": "float64[1]", "shortfall": "float64[1]"},
    flops="paths*(a*a + 110*a + 20)",
    bytes="16*paths + 8*a*a",
    limits={
        "positions": "a <= 1024",
        "paths": "1 <= paths <= 1000000000",
        "horizon": "horizon >= 0",
        "confidence": "0 < confidence < 1",
    },
    tolerance=1e-9,
    summary="Value at risk and expected shortfall of a portfolio, by Monte Carlo.",
)

Vector = NDArray[np.float64]
Word = np.uint64


@value_at_risk.reference
def _reference(
    positions: Vector, mean: Vector, factor: Vector, paths: int, horizon: float, confidence: float, seed: int
) -> Outputs:
    """Log returns over the horizon are normal: x = mean * horizon + sqrt(horizon) * L z, a path loses sum p (1 - e**x).

    `positions` is the money in each asset, `mean` and L (the lower triangle of `factor`, the Cholesky factor of their
    covariance; what is above it is not looked at) are those of log returns a period. z of a path: `tasks.philox`,
    under the seed. Glasserman (2003), "Monte Carlo Methods in Financial Engineering", sections 3.2 and 9.1.

    var is the k-th smallest loss, k = ceil(paths * confidence); shortfall the mean of the worst paths * (1 -
    confidence), of which the k-th loss may count in part: Acerbi and Tasche (2002), "On the coherence of expected
    shortfall", definition 2.6. A log return is kept within 700, so that its exponential is finite. Where anything that
    is looked at is NaN or infinite, so are all the losses, and both results, NaN.
    """
    with np.errstate(all="ignore"):
        lower = np.tril(factor)
        spoil = 0 * (positions.sum() + mean.sum() + lower.sum() + horizon + confidence)
        x = mean * horizon + philox.normals(seed, paths, mean.size) @ (lower * np.sqrt(horizon)).T
        losses = (positions * (1 - np.exp(np.clip(x, -700, 700)))).sum(axis=1) + spoil
        return dict(zip(("var", "shortfall"), _risk(np.sort(losses), paths, confidence), strict=True))


def _rank(paths: int, confidence: float) -> tuple[int, float, float]:
    """Which loss, counted from the smallest (1), is the value at risk; its share in the mean, and all the shares."""
    sure = confidence if 0 < confidence < 1 else 0.5
    rank = min(max(math.ceil(paths * sure), 1), paths)
    return rank, rank - paths * sure, paths * (1 - sure)


def _risk(losses: Vector, paths: int, confidence: float) -> tuple[Vector, Vector]:
    """Of losses in order, or at least with the smaller ones before the k-th and the larger, and NaN, after it."""
    rank, share, total = _rank(paths, confidence)
    var, beyond = losses[rank - 1], losses[rank:]
    if np.isnan(var) or np.isnan(beyond).any():
        var = np.float64(np.nan)
    return np.array([var]), np.array([(beyond.sum() + share * var) / total])


# -- cpu -------------------------------------------------------------------------------------------------------------

#: Paths side by side in vectors; with 32 assets their normals are 16 KiB, which the first cache holds.
_TILE = 64
_LOW, _HALF, _NONE = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(0)
_BIAS, _EXPONENT = np.int64(1023), np.int64(52)


def _exp(x: float) -> float:
    """e**x for x in [-700, 700], by x = n log 2 + r and the Taylor series of r (Cody and Waite 1980, ch. 6)."""
    # Added to 1.5 * 2**52 a number is rounded to a whole one, which stands in its last bits: AVX2 converts none.
    shifted: Any = np.float64(x * 1.4426950408889634 + 6755399441055744.0)
    n = shifted - 6755399441055744.0
    r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6
    r2 = r * r
    r4 = r2 * r2
    low = (1.0 + r) + r2 * (1 / 2 + r * (1 / 6)) + r4 * ((1 / 24 + r * (1 / 120)) + r2 * (1 / 720 + r * (1 / 5040)))
    high = (1 / 40320 + r * (1 / 362880)) + r2 * (1 / 3628800 + r * (1 / 39916800))
    p = low + r4 * r4 * high
    scale: Any = np.int64((shifted.view(np.int64) + _BIAS) << _EXPONENT)
    return float(p * scale.view(np.float64))


def _lose(
    positions: Vector,
    drift: Vector,
    lower: Vector,
    wild: bool,
    k0: Word,
    k1: Word,
    first: int,
    losses: Vector,
) -> None:
    """The losses of the paths from `first` on. Assets are filled up with zeros to a multiple of four."""
    assets = positions.size
    z = np.empty((assets, _TILE))
    x, y, loss = np.empty(_TILE), np.empty(_TILE), np.empty(_TILE)
    for start in range(0, losses.size, _TILE):
        for block in range(assets // 4):
            z0, z1, z2, z3 = z[4 * block], z[4 * block + 1], z[4 * block + 2], z[4 * block + 3]
            for p in range(_TILE):
                path = np.uint64(first + start + p)
                w0, w1, w2, w3 = philox4x32(path & _LOW, path >> _HALF, np.uint64(block), _NONE, k0, k1)
                z0[p], z1[p] = normal_pair(w0, w1)
                z2[p], z3[p] = normal_pair(w2, w3)
        for p in range(_TILE):
            loss[p] = 0.0
        # Two assets at once: each vector of z that is loaded serves both.
        for i in range(0, assets, 2):
            for p in range(_TILE):
                x[p], y[p] = drift[i], drift[i + 1]
            for j in range(0, i + 2, 4):
                l0, l1, l2, l3 = lower[i, j], lower[i, j + 1], lower[i, j + 2], lower[i, j + 3]
                m0, m1, m2, m3 = lower[i + 1, j], lower[i + 1, j + 1], lower[i + 1, j + 2], lower[i + 1, j + 3]
                z0, z1, z2, z3 = z[j], z[j + 1], z[j + 2], z[j + 3]
                for p in range(_TILE):
                    x[p] += (l0 * z0[p] + l1 * z1[p]) + (l2 * z2[p] + l3 * z3[p])
                    y[p] += (m0 * z0[p] + m1 * z1[p]) + (m2 * z2[p] + m3 * z3[p])
            if wild:
                for p in range(_TILE):
                    x[p], y[p] = min(max(x[p], -700.0), 700.0), min(max(y[p], -700.0), 700.0)
            position, other = positions[i], positions[i + 1]
            for p in range(_TILE):
                loss[p] += position * (1.0 - _exp(x[p])) + other * (1.0 - _exp(y[p]))
        for p in range(min(_TILE, losses.size - start)):
            losses[start + p] = loss[p]


#: Paths between looks at whether the job was cancelled: a few milliseconds.
_CHUNK = 32_768


@value_at_risk.on("cpu")
def _cpu(device: Any) -> Run:
    """A tile of paths at once, from its counters to its losses, in vectors; only the losses are kept."""
    from numba import njit, types
    from numba.extending import register_jitable

    philox.prepare()
    register_jitable(forceinline=True)(_exp)
    column, word = types.float64[::1], types.uint64
    lose = njit(
        (column, column, types.float64[:, ::1], types.boolean, word, word, types.int64, column),
        nogil=True,
        cache=True,
        error_model="numpy",
        fastmath={"contract"},
    )(_lose)

    def run(inputs: Inputs, context: Context) -> Outputs:
        paths, horizon, confidence = inputs["paths"], inputs["horizon"], inputs["confidence"]
        assets = inputs["positions"].size
        filled = -(-assets // 4) * 4
        positions, drift, lower = np.zeros(filled), np.zeros(filled), np.zeros((filled, filled))
        with np.errstate(all="ignore"):
            positions[:assets] = inputs["positions"]
            drift[:assets] = inputs["mean"] * horizon
            lower[:assets, :assets] = np.tril(inputs["factor"])
            spoil = 0 * (positions.sum() + inputs["mean"].sum() + lower.sum() + horizon + confidence)
            lower *= np.sqrt(horizon)
            wild = bool((np.abs(drift) + philox.MOST * np.abs(lower).sum(axis=1) > 700).any())
        if not np.isfinite(spoil):
            return {"var": np.array([np.nan]), "shortfall": np.array([np.nan])}
        low, high = map(np.uint64, philox.key_of(inputs["seed"]))
        losses = np.empty(paths)
        for start in range(0, paths, _CHUNK):
            if context.cancelled:
                break
            lose(positions, drift, lower, wild, low, high, start, losses[start : start + _CHUNK])
        losses.partition(_rank(paths, confidence)[0] - 1)
        return dict(zip(("var", "shortfall"), _risk(losses, paths, confidence), strict=True))

    return run


# -- gpu -------------------------------------------------------------------------------------------------------------

cuda: Any  # numba.cuda, on a GPU
#: The threads of a block; fewer where each is a thread of Python.
_THREADS, _SIMULATED_THREADS = 64, 4
#: The paths' normals wait in memory, a column a thread, so that neighbours read neighbours.
_SCRATCH_BYTES = 64 * 2**20
_SIGN, _ALL, _BYTE = np.uint64(1 << 63), np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(255)


def _spoil_gpu(positions: Vector, mean: Vector, factor: Vector, spoil: Vector) -> None:
    for i in range(cuda.grid(1), positions.size, cuda.gridsize(1)):
        total = positions[i] + mean[i]
        for j in range(i + 1):
            total += factor[i, j]
        cuda.atomic.add(spoil, 0, total * 0.0)


def _lose_gpu(
    positions: Vector,
    mean: Vector,
    factor: Vector,
    horizon: float,
    spoil: Vector,
    k0: Word,
    k1: Word,
    z: Vector,
    losses: Vector,
) -> None:
    thread, threads, assets = cuda.grid(1), cuda.gridsize(1), positions.size
    root, spoiled = math.sqrt(horizon), spoil[0]
    for path in range(thread, losses.size, threads):
        row = np.uint64(path)
        for block in range(z.shape[0] // 4):
            w0, w1, w2, w3 = philox4x32(row & _LOW, row >> _HALF, np.uint64(block), _NONE, k0, k1)
            first, second = normal_pair_cuda(w0, w1)
            third, fourth = normal_pair_cuda(w2, w3)
            z[4 * block, thread], z[4 * block + 1, thread] = first, second
            z[4 * block + 2, thread], z[4 * block + 3, thread] = third, fourth
        loss = spoiled
        for i in range(assets):
            x = 0.0
            for j in range(i + 1):
                x += factor[i, j] * z[j, thread]
            x = mean[i] * horizon + root * x
            loss += positions[i] * (1.0 - math.exp(min(max(x, -700.0), 700.0)))
        losses[path] = loss


def _order_gpu(value: Any) -> Any:
    """A number whose order as uint64 is that of the float64 `value`."""
    bits = np.float64(value).view(np.uint64)
    return bits ^ _ALL if bits & _SIGN else bits | _SIGN


def _count_gpu(losses: Vector, state: NDArray[np.uint64], shift: Word, counts: NDArray[np.uint64]) -> None:
    """How many of the losses that begin as the k-th does have which eight bits next."""
    shared = cuda.shared.array(256, np.uint32)
    for digit in range(cuda.threadIdx.x, 256, cuda.blockDim.x):
        shared[digit] = 0
    cuda.syncthreads()
    prefix, mask = state[0], state[1]
    for i in range(cuda.grid(1), losses.size, cuda.gridsize(1)):
        key = _order_gpu(losses[i])
        if key & mask == prefix:
            cuda.atomic.add(shared, np.int64((key >> shift) & _BYTE), np.uint32(1))
    cuda.syncthreads()
    for digit in range(cuda.threadIdx.x, 256, cuda.blockDim.x):
        if shared[digit] > 0:
            cuda.atomic.add(counts, digit, np.uint64(shared[digit]))


def _narrow_gpu(state: NDArray[np.uint64], shift: Word, rank: Word, counts: NDArray[np.uint64]) -> None:
    """Takes the next eight bits of the k-th loss into `state`: its bits, which are known, how many losses are below."""
    digit, below = 0, state[2]
    while digit < 255 and below + counts[digit] < rank:
        below += counts[digit]
        digit += 1
    state[0] |= np.uint64(digit) << shift
    state[1] |= _BYTE << shift
    state[2] = below
    for each in range(256):
        counts[each] = 0


def _beyond_gpu(losses: Vector, state: NDArray[np.uint64], sums: Vector, above: NDArray[np.int64]) -> None:
    """Each block's sum and number of the losses above the k-th; NaN where a loss is."""
    partial = cuda.shared.array(_THREADS, np.float64)
    number = cuda.shared.array(_THREADS, np.int64)  # on a line of its own: the simulator tells arrays apart by it
    thread, found = cuda.threadIdx.x, state[0]
    total, count = 0.0, 0
    for i in range(cuda.grid(1), losses.size, cuda.gridsize(1)):
        loss = losses[i]
        if loss != loss or _order_gpu(loss) > found:
            total += loss
            count += 1
    partial[thread], number[thread] = total, count
    cuda.syncthreads()
    if thread == 0:
        for other in range(1, cuda.blockDim.x):
            total += partial[other]
            count += number[other]
        sums[cuda.blockIdx.x], above[cuda.blockIdx.x] = total, count


def _finish_gpu(
    state: NDArray[np.uint64],
    sums: Vector,
    above: NDArray[np.int64],
    beyond: np.int64,
    share: float,
    total: float,
    var: Vector,
    shortfall: Vector,
) -> None:
    worst, count = 0.0, 0
    for block in range(sums.size):
        worst += sums[block]
        count += above[block]
    bits = state[0]
    bits = bits ^ _SIGN if bits & _SIGN else bits ^ _ALL
    found = np.nan if worst != worst else np.uint64(bits).view(np.float64)
    # Losses that equal the k-th, and come after it.
    same = beyond - count
    if same > 0:
        worst += same * found
    var[0] = found
    shortfall[0] = (worst + share * found) / total


@value_at_risk.on("gpu")
def _gpu(device: Any) -> Run:
    """A thread a path; then the k-th loss, eight bits at a time. Nothing waits for the host."""
    spoil_of = device.compile(_spoil_gpu)
    threads = _SIMULATED_THREADS if device.simulated else _THREADS
    lose = device.compile(_lose_gpu, (threads,), (philox_round, philox4x32, normal_pair_cuda))
    count = device.compile(_count_gpu, (threads,), (_order_gpu,))
    narrow = device.compile(_narrow_gpu, (1,))
    add_up = device.compile(_beyond_gpu, (threads,), (_order_gpu,))
    finish = device.compile(_finish_gpu, (1,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        positions, mean, factor = inputs["positions"], inputs["mean"], inputs["factor"]
        paths, horizon, confidence = inputs["paths"], inputs["horizon"], inputs["confidence"]
        rank, share, total = _rank(paths, confidence)
        k0, k1 = map(np.uint64, philox.key_of(inputs["seed"]))
        rows = -(-positions.size // 4) * 4
        most = max(1, _SCRATCH_BYTES // (8 * max(rows, 1) * threads))
        blocks = min(-(-paths // threads), most, 2048)
        spoil = device.full((1,), 0 * (horizon + confidence), np.float64)
        z, losses = device.empty((rows, blocks * threads), np.float64), device.empty((paths,), np.float64)
        spoil_of(positions.size, positions, mean, factor, spoil)
        lose(blocks, positions, mean, factor, np.float64(max(horizon, 0)), spoil, k0, k1, z, losses)
        state, counts = device.zeros((3,), np.uint64), device.zeros((256,), np.uint64)
        for shift in range(56, -1, -8):
            count(blocks, losses, state, np.uint64(shift), counts)
            narrow(1, state, np.uint64(shift), np.uint64(rank), counts)
        sums, above = device.empty((blocks,), np.float64), device.empty((blocks,), np.int64)
        var, shortfall = device.empty((1,), np.float64), device.empty((1,), np.float64)
        add_up(blocks, losses, state, sums, above)
        finish(1, state, sums, above, np.int64(paths - rank), np.float64(share), np.float64(total), var, shortfall)
        return {"var": var, "shortfall": shortfall}

    return run


# -- tpu -------------------------------------------------------------------------------------------------------------

#: Paths in a step; their normals are a matrix that the factor's multiplies.
_STEP = 4096


@value_at_risk.on("tpu")
def _tpu(device: Any) -> Run:
    """Steps of paths, whose normals meet the factor in the matrix unit; the losses are sorted."""
    import jax.numpy as jnp
    from jax import lax

    def risk(
        positions: Any, mean: Any, factor: Any, paths: Any, horizon: Any, spoil: Any, k0: Any, k1: Any,
        rank: Any, share: Any, total: Any, size: int,
    ) -> Any:  # fmt: skip
        lower = jnp.tril(factor)
        spoil += 0 * (positions.sum() + mean.sum() + lower.sum())
        rows = min(size, _STEP)
        block = jnp.arange(-(-positions.size // 4), dtype=jnp.uint64)[None, :]

        def lose(first: Any) -> Any:
            path = (first + jnp.arange(rows)).astype(jnp.uint64)[:, None]
            w0, w1, w2, w3 = philox4x32(path & _LOW, path >> _HALF, block, _NONE, k0, k1)
            made = [*normal_pair_jax(w0, w1), *normal_pair_jax(w2, w3)]
            z = jnp.stack(made, axis=-1).reshape(rows, -1)[:, : positions.size]
            x = mean * horizon + jnp.sqrt(horizon) * jnp.matmul(z, lower.T, precision="highest")
            return (positions * (1 - jnp.exp(jnp.clip(x, -700, 700)))).sum(axis=1)

        losses = lax.map(lose, jnp.arange(0, size, rows)).reshape(-1) + spoil
        number = jnp.arange(size)
        missing = (jnp.isnan(losses) & (number < paths)).any()
        # What is beyond the paths is sorted behind them.
        ordered = jnp.sort(jnp.where(number < paths, losses, jnp.inf))
        var = jnp.where(missing, jnp.nan, ordered[rank - 1])
        worst = jnp.where((number >= rank) & (number < paths), ordered, 0).sum()
        return var[None], ((worst + share * var) / total)[None]

    program = device.program(risk, static=("size",))

    def run(inputs: Inputs, context: Context) -> Outputs:
        paths, horizon, confidence = inputs["paths"], inputs["horizon"], inputs["confidence"]
        rank, share, total = _rank(paths, confidence)
        low, high = map(np.uint64, philox.key_of(inputs["seed"]))
        spoil = np.float64(0 * (horizon + confidence))
        size = 1 << (paths - 1).bit_length()
        return program(
            {"var": (1,), "shortfall": (1,)},
            inputs["positions"], inputs["mean"], inputs["factor"], np.int64(paths), np.float64(max(horizon, 0)), spoil,
            low, high, np.int64(rank), np.float64(share), np.float64(total), size=size,
        )  # fmt: skip

    return run


# -- fpga ------------------------------------------------------------------------------------------------------------

# A group has a block of paths, four at once; one work-item then finds the k-th loss, eight bits at a time, which on a
# board is a pipeline that reads the losses nine times.
_OPENCL = (
    philox.OPENCL
    + """
__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void lose(__global const double* restrict positions, __global const double* restrict mean,
          __global const double* restrict factor, double horizon, double spoil, ulong k0, ulong k1,
          __global double* restrict losses, int assets, ulong paths) {
  __local double4 z[MOST];
  const ulong start = get_group_id(0) * BLOCK, stop = min(start + BLOCK, paths);
  const double root = sqrt(horizon);
  for (int i = 0; i < assets; i++) {
    spoil += 0 * (positions[i] + mean[i]);
    for (int j = 0; j <= i; j++) spoil += 0 * factor[(ulong)i * assets + j];
  }
  for (ulong path = start; path < stop; path += 4) {
    const ulong4 row = path + (ulong4)(0, 1, 2, 3);
    for (int block = 0; 4 * block < assets; block++) {
      ulong4 words[4] = {row & 0xFFFFFFFFUL, row >> 32, (ulong4)((ulong)block), (ulong4)(0)};
      philox4x32(words, k0, k1);
      double4 first, second, third, fourth;
      normal_pair(words[0], words[1], &first, &second);
      normal_pair(words[2], words[3], &third, &fourth);
      z[4 * block] = first;
      z[4 * block + 1] = second;
      z[4 * block + 2] = third;
      z[4 * block + 3] = fourth;
    }
    double4 loss = spoil;
    for (int i = 0; i < assets; i++) {
      __global const double* restrict lower = factor + (ulong)i * assets;
      double4 x = 0, y = 0;
      int j = 0;
      for (; j < i; j += 2) {
        x += lower[j] * z[j];
        y += lower[j + 1] * z[j + 1];
      }
      if (j == i) x += lower[j] * z[j];
      x = mean[i] * horizon + root * (x + y);
      x = x > 700.0 ? (double4)700.0 : x;
      x = x < -700.0 ? (double4)-700.0 : x;
      loss += positions[i] * (1.0 - exp(x));
    }
    const double lost[4] = {loss.x, loss.y, loss.z, loss.w};
    for (int l = 0; l < 4 && path + l < stop; l++) losses[path + l] = lost[l];
  }
}

ulong order(double value) {  // as a ulong it has the order of the double
  const ulong bits = as_ulong(value);
  return bits >> 63 ? ~bits : bits | 1UL << 63;
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void select_worst(__global const double* restrict losses, ulong paths, ulong rank, double share, double total,
                  __global double* restrict var, __global double* restrict shortfall) {
  __local ulong counts[256];
  ulong prefix = 0, mask = 0, below = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int digit = 0; digit < 256; digit++) counts[digit] = 0;
    for (ulong i = 0; i < paths; i++) {
      const ulong key = order(losses[i]);
      if ((key & mask) == prefix) counts[(key >> shift) & 255]++;
    }
    int digit = 0;
    for (; digit < 255 && below + counts[digit] < rank; digit++) below += counts[digit];
    prefix |= (ulong)digit << shift;
    mask |= 255UL << shift;
  }
  double found = as_double(prefix >> 63 ? prefix ^ 1UL << 63 : ~prefix), worst = 0;
  ulong same = paths - rank;  // losses that equal the k-th, and come after it
  for (ulong i = 0; i < paths; i++)
    if (isnan(losses[i]) || order(losses[i]) > prefix) {
      worst += losses[i];
      same--;
    }
  if (isnan(worst)) found = NAN;
  else if (same > 0) worst += same * found;
  var[0] = found;
  shortfall[0] = (worst + share * found) / total;
}
"""
)
_BLOCK = 1024


@value_at_risk.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "finance.value_at_risk", BLOCK=_BLOCK, MOST=1024)

    def run(inputs: Inputs, context: Context) -> Outputs:
        positions, paths = inputs["positions"], inputs["paths"]
        horizon, confidence = inputs["horizon"], inputs["confidence"]
        rank, share, total = _rank(paths, confidence)
        spoil = np.float64(0 * (horizon + confidence))
        k0, k1 = map(np.uint64, philox.key_of(inputs["seed"]))
        losses = device.empty((paths,), np.float64)
        var, shortfall = device.empty((1,), np.float64), device.empty((1,), np.float64)
        program.launch(
            "lose", (-(-paths // _BLOCK),), positions, inputs["mean"], inputs["factor"], np.float64(max(horizon, 0)),
            spoil, k0, k1, losses, np.int32(positions.size), np.uint64(paths),
        )  # fmt: skip
        program.launch(
            "select_worst", (1,), losses, np.uint64(paths), np.uint64(rank), np.float64(share), np.float64(total),
            var, shortfall,
        )  # fmt: skip
        return {"var": var, "shortfall": shortfall}

    return run


@value_at_risk.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for assets, paths, confidence in ((1, 1, 0.99), (3, 40, 0.95), (8, 10_000, 0.99)):
        deviation = random.uniform(0.01, 0.03, assets)
        alike = np.linalg.cholesky(np.full((assets, assets), 0.3) + 0.7 * np.eye(assets))
        yield {
            "positions": random.uniform(-1e3, 1e4, assets),
            "mean": random.uniform(0, 1e-3, assets),
            "factor": deviation[:, None] * alike,
            "paths": paths,
            "horizon": 10.0,
            "confidence": confidence,
            "seed": -assets,
        }
    # Every path loses the same, and log returns that are held within 700.
    yield {"positions": np.ones(2), "mean": np.ones(2), "factor": np.zeros((2, 2)), "paths": 20}
    yield {"positions": -np.ones(2), "mean": np.array([1e6, -1e6]), "factor": np.eye(2), "paths": 20}
