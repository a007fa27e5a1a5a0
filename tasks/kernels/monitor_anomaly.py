"""Monitoring: what a series of measurements says about the machine that it comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

anomaly = Kernel(
    "monitor.anomaly",
    inputs={"series": "float64[n]", "window": "int64 = 30"},
    outputs={"score": "float64[n]"},
    flops="24*n",
    bytes="48*n",
    limits={"window": "window >= 2"},
    batch="stack",
    tolerance=1e-6,
    summary="Rolling z-score: how far each value is from the window before it, in standard deviations.",
)


@anomaly.reference
def _reference(series: NDArray[np.float64], window: int) -> Outputs:
    """score[i] = (series[i] - mean) / deviation, over series[i-window : i], the window before the value.

    The value itself is left out, so a spike does not hide itself. The deviation is the population's (divided by
    `window`). Warm-up: the first `window` scores are NaN, there is nothing to compare with. NaN: a value that is NaN,
    and every value with a NaN or an infinity in its window, scores NaN; once that has left the window, scores are as
    if it had never been. A constant window has deviation 0: the same value scores 0, any other +inf or -inf.
    """
    score = np.full(series.shape, np.nan)
    if window >= series.size:
        return {"score": score}
    before = np.lib.stride_tricks.sliding_window_view(series, window)[:-1]
    value = series[window:]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        constant = before.min(axis=1) == before.max(axis=1)
        # Of equal values the mean and deviation are known; sums would round them.
        mean = np.where(constant, before[:, 0], before.mean(axis=1))
        deviation = np.where(constant, 0.0, before.std(axis=1))
        z = np.where((deviation == 0) & (value == mean), 0.0, (value - mean) / deviation)
    score[window:] = np.where(np.isfinite(before).all(axis=1), z, np.nan)
    return {"score": score}


def _score(series: NDArray[np.float64], window: int, score: NDArray[np.float64]) -> None:
    """Each window is the end of one block of `window` values and the start of the next.

    Means and squared deviations (M2) of both parts by Welford (1962), joined by Chan, Golub and LeVeque (1979, eq.
    2.1). Nothing is ever subtracted from a running sum, so a huge value does no harm after it has left the window
    (the usual running sums never recover), and the cost does not depend on the window.
    """
    rows, n = series.shape
    head_mean, head_m2 = np.empty(window), np.empty(window)
    tail_mean, tail_m2 = np.empty(window), np.empty(window)
    inverse = 1.0 / np.arange(1, window + 1)
    share = np.arange(window) / window
    for row in range(rows):
        values = series[row]
        for i in range(min(window, n)):
            score[row, i] = np.nan
        for block in range(window, n, window):
            # tail[j] covers the last j + 1 values before the block, head[j] the first j + 1 values of the block.
            size = min(window, n - block)
            t_mean, t_m2, h_mean, h_m2 = 0.0, 0.0, 0.0, 0.0
            for j in range(window):
                t_value, h_value = values[block - 1 - j], values[min(block + j, n - 1)]
                t_delta, h_delta = t_value - t_mean, h_value - h_mean
                t_mean += t_delta * inverse[j]
                h_mean += h_delta * inverse[j]
                t_m2 += t_delta * (t_value - t_mean)
                h_m2 += h_delta * (h_value - h_mean)
                tail_mean[j], tail_m2[j] = t_mean, t_m2
                head_mean[j], head_m2[j] = h_mean, h_m2
            for j in range(size):
                # The window of value block + j: j values of the block, window - j before it.
                part = max(j - 1, 0)
                t_mean, t_m2 = tail_mean[window - 1 - j], tail_m2[window - 1 - j]
                gap = head_mean[part] - t_mean if j > 0 else 0.0
                head = head_m2[part] if j > 0 else 0.0
                mean = t_mean + gap * share[j]
                m2 = t_m2 + head + gap * gap * share[j] * (window - j)
                difference = values[block + j] - mean
                z = difference / np.sqrt(m2 / window)
                z = 0.0 if m2 == 0.0 and difference == 0.0 else z
                score[row, block + j] = z


_MOST_BY_SUMS = 2**15


def _score_by_sums(series: NDArray[np.float64], window: int, score: NDArray[np.float64]) -> None:
    """As `_score`, by plain sums of the differences from the last value before the block, and of their squares.

    That value is in every window of the block. So its own difference from a window's mean is part of the window's
    squares, which are therefore at least a window-th of the sum that they are taken from: no more digits are lost than
    the window has, in a sum of at most 2**15 terms. A step waits for an addition, and the second loop is vector code.
    """
    rows, n = series.shape
    head, head_squares = np.empty(window), np.empty(window)
    tail, tail_squares = np.empty(window), np.empty(window)
    share, infinity = 1.0 / window, np.inf
    for row in range(rows):
        values = series[row]
        for i in range(min(window, n)):
            score[row, i] = np.nan
        for block in range(window, n, window):
            # tail[j] is of the values from block - window + j to the block, head[j] of the first j of the block.
            size = min(window, n - block)
            before, after = values[block - window : block], values[block : block + size]
            first = before[window - 1]
            sum_, squares = 0.0, 0.0
            for j in range(window - 1, -1, -1):
                difference = before[j] - first
                sum_ += difference
                squares += difference * difference
                tail[j], tail_squares[j] = sum_, squares
            sum_, squares = 0.0, 0.0
            for j in range(size):
                head[j], head_squares[j] = sum_, squares
                difference = after[j] - first
                sum_ += difference
                squares += difference * difference
            scores = score[row, block : block + size]
            for j in range(size):
                total = tail[j] + head[j]
                square = tail_squares[j] + head_squares[j]
                mean = total * share
                m2 = square - total * mean
                m2 = square if square == infinity and abs(total) < infinity else max(m2, 0.0)
                difference = (after[j] - first) - mean
                z = difference / np.sqrt(m2 * share)
                scores[j] = 0.0 if m2 == 0.0 and difference == 0.0 else z


@anomaly.on("cpu")
def _cpu(device: Any) -> Run:
    """Takes one series, or a stack of them as rows."""
    from numba import njit, types

    series_type = types.Array(types.float64, 2, "C", readonly=True)
    signature = (series_type, types.int64, types.float64[:, ::1])
    options = {"nogil": True, "cache": True, "error_model": "numpy"}
    by_sums, by_means = njit(signature, **options)(_score_by_sums), njit(signature, **options)(_score)

    def run(inputs: Inputs, context: Context) -> Outputs:
        series, window = inputs["series"], inputs["window"]
        score = np.empty(series.shape)
        if window >= series.shape[-1]:
            score.fill(np.nan)
        else:
            fill = by_sums if window <= _MOST_BY_SUMS else by_means
            fill(np.atleast_2d(series), window, np.atleast_2d(score))
        return {"score": score}

    return run


# Blocks of `window` values do not know of each other, so a group is one work-item with a few of them. What the cpu's
# variant keeps of a block's head is only needed in order, and so two numbers; for the tails there is scratch as long as
# the series.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void score(__global const double* restrict series, __global double* restrict tail_means,
           __global double* restrict tail_m2s, __global double* restrict scores, ulong n, ulong window, ulong blocks) {
  const ulong row = get_group_id(1) * n;
  series += row;
  tail_means += row;
  tail_m2s += row;
  scores += row;
  if (get_group_id(0) == 0)
    for (ulong i = 0; i < min(window, n); i++) scores[i] = NAN;
  const ulong first = (get_group_id(0) * blocks + 1) * window;
  for (ulong block = first, count = 0; block < n && count < blocks; block += window, count++) {
    const ulong size = min(window, n - block);
    double mean = 0, m2 = 0;
    // The tail that belongs to value block + j covers the last window - j values before the block.
    for (ulong length = 1; length <= window; length++) {
      const double value = series[block - length], delta = value - mean;
      mean += delta * (1.0 / length);
      m2 += delta * (value - mean);
      if (window - length < size) {
        tail_means[block + window - length] = mean;
        tail_m2s[block + window - length] = m2;
      }
    }
    double head_mean = 0, head_m2 = 0;
    for (ulong j = 0; j < size; j++) {
      const double share = (double)j / window, value = series[block + j];
      const double tail_mean = tail_means[block + j], gap = j > 0 ? head_mean - tail_mean : 0;
      const double all_m2 = tail_m2s[block + j] + head_m2 + gap * gap * share * (window - j);
      const double difference = value - (tail_mean + gap * share);
      const double z = difference / sqrt(all_m2 / window);
      scores[block + j] = all_m2 == 0 && difference == 0 ? 0 : z;
      const double delta = value - head_mean;
      head_mean += delta * (1.0 / (j + 1));
      head_m2 += delta * (value - head_mean);
    }
  }
}
"""
_BLOCK = 4096


@anomaly.on("fpga")
def _fpga(device: Any) -> Run:
    """Takes one series, or a stack of them along the second axis of groups."""
    program = device.program(_OPENCL, "monitor.anomaly")

    def run(inputs: Inputs, context: Context) -> Outputs:
        series = inputs["series"]
        *stack, n = series.shape
        window = min(inputs["window"], n)
        score, *tails = (device.empty(series.shape, np.float64) for _ in range(3))
        if n > 0:
            blocks = max(1, _BLOCK // window)
            groups = (max(1, -(-(n - window) // (window * blocks))), *(stack or [1]))
            sizes = np.uint64(n), np.uint64(window), np.uint64(blocks)
            program.launch("score", groups, series, *tails, score, *sizes)
        return {"score": score}

    return run


@anomaly.on("tpu")
def _tpu(device: Any) -> Run:
    """Takes one series, or a stack of them as rows, every window at once.

    Means and squared deviations of the last `size` values up to each: from 1 on the size is doubled, and one more is
    taken in, as the window's binary digits say; both are joins by Chan, Golub and LeVeque (1979, eq. 2.1). As on the
    cpu nothing is subtracted, and a window of equal values comes out with the deviation 0.
    """
    import jax.numpy as jnp
    from jax import lax

    def later(values: Any, by: Any) -> Any:
        """The values `by` places on. What comes round from the end is in no window that is asked for."""
        return jnp.roll(values, by, axis=-1)

    def score(series: Any, window: Any) -> Any:
        def step(state: Any) -> Any:
            digit, size, mean, m2 = state
            count = size.astype(series.dtype)
            gap = later(mean, size) - mean
            mean, m2 = mean + gap / 2, m2 + later(m2, size) + gap * gap * (count / 2)
            named, count = (window >> digit) & 1, 2 * count
            before = later(mean, 1)
            gap = series - before
            longer = before + gap / (count + 1), later(m2, 1) + gap * gap * (count / (count + 1))
            mean, m2 = jnp.where(named == 1, longer[0], mean), jnp.where(named == 1, longer[1], m2)
            return digit - 1, 2 * size + named, mean, m2

        start = 62 - lax.clz(window), jnp.ones_like(window), series, jnp.zeros_like(series)
        *_, mean, m2 = lax.while_loop(lambda state: state[0] >= 0, step, start)
        difference, m2 = series - later(mean, 1), later(m2, 1)
        z = jnp.where((m2 == 0) & (difference == 0), 0.0, difference / jnp.sqrt(m2 / window))
        return jnp.where(jnp.arange(series.shape[-1]) < window, jnp.nan, z)

    program = device.program(score)

    def run(inputs: Inputs, context: Context) -> Outputs:
        series = inputs["series"]
        window = min(inputs["window"], max(series.shape[-1], 1))
        return program({"score": series.shape}, series, np.int64(window))

    return run


cuda: Any  # numba.cuda, on a GPU
#: Windows of up to so many values are summed value by value; longer ones are put together of stretches of so many.
_BASE = 64

# Every score is found by itself, whatever the window: that is what keeps a card busy. A stretch's mean and squared
# deviations (M2) come of its values less their first, of which sums may be squared without harm: M2 loses one part in
# (1 + values) 2**-52 at most, and values that are equal give 0. Two stretches are joined by Chan, Golub and LeVeque
# (1979, eq. 2.1), so a window of w values takes log2(w / _BASE) passes over the series.


def _stretch(values: NDArray[np.float64], start: int, size: int) -> tuple[float, float]:
    """The mean and M2 of so many values from `start` on."""
    first = values[start]
    total, squares = 0.0, 0.0
    for i in range(1, size):
        difference = values[start + i] - first
        total += difference
        squares += difference * difference
    m2 = squares - total * (total / size)
    if m2 < 0.0:  # noqa: PLR1730 - max() may lose NaN
        m2 = 0.0
    return first + total / size, m2


def _z(value: float, mean: float, m2: float, window: int) -> float:
    """How far a value is from the mean, in deviations; of a window with a NaN or an infinity, NaN."""
    difference = value - mean
    if m2 == 0.0:
        if difference == 0.0:
            return 0.0
        return math.copysign(np.inf, difference) if difference == difference else np.nan
    return difference / math.sqrt(m2 / window)


def _short_gpu(series: NDArray[np.float64], window: int, score: NDArray[np.float64]) -> None:
    """The scores of windows that are summed value by value."""
    n = series.shape[1]
    for at in range(cuda.grid(1), series.size, cuda.gridsize(1)):
        row, i = at // n, at % n
        if i < window:
            score[row, i] = np.nan
            continue
        mean, m2 = _stretch(series[row], i - window, window)
        score[row, i] = _z(series[row, i], mean, m2, window)


def _start_gpu(
    series: NDArray[np.float64],
    rest: int,
    mean: NDArray[np.float64],
    m2: NDArray[np.float64],
    window_mean: NDArray[np.float64],
    window_m2: NDArray[np.float64],
) -> None:
    """The _BASE values from each value on, and the `rest` from each on, with which its window starts (maybe none)."""
    n = series.shape[1]
    for at in range(cuda.grid(1), series.size, cuda.gridsize(1)):
        row, i = at // n, at % n
        if i + _BASE <= n:
            mean[row, i], m2[row, i] = _stretch(series[row], i, _BASE)
        if 0 < rest <= n - i:
            window_mean[row, i], window_m2[row, i] = _stretch(series[row], i, rest)


def _join(mean: float, m2: float, size: int, other: float, other_m2: float, other_size: int) -> tuple[float, float]:
    gap = other - mean
    share = other_size / (size + other_size)
    return mean + gap * share, m2 + other_m2 + gap * gap * share * size


def _double_gpu(
    size: int,
    covered: int,
    joins: int,
    mean: NDArray[np.float64],
    m2: NDArray[np.float64],
    next_mean: NDArray[np.float64],
    next_m2: NDArray[np.float64],
    window_mean: NDArray[np.float64],
    window_m2: NDArray[np.float64],
) -> None:
    """From stretches of `size` values to twice as many; where `joins`, each window first takes one behind its own."""
    n = mean.shape[1]
    for at in range(cuda.grid(1), mean.size, cuda.gridsize(1)):
        row, i = at // n, at % n
        if joins != 0 and i + covered + size <= n:
            if covered == 0:
                window_mean[row, i], window_m2[row, i] = mean[row, i], m2[row, i]
            else:
                window_mean[row, i], window_m2[row, i] = _join(
                    window_mean[row, i],
                    window_m2[row, i],
                    covered,
                    mean[row, i + covered],
                    m2[row, i + covered],
                    size,
                )
        if i + 2 * size <= n:
            next_mean[row, i], next_m2[row, i] = _join(
                mean[row, i], m2[row, i], size, mean[row, i + size], m2[row, i + size], size
            )


def _long_gpu(
    series: NDArray[np.float64],
    window: int,
    mean: NDArray[np.float64],
    m2: NDArray[np.float64],
    score: NDArray[np.float64],
) -> None:
    """The scores, of the means and M2 of windows by where they start."""
    n = series.shape[1]
    for at in range(cuda.grid(1), series.size, cuda.gridsize(1)):
        row, i = at // n, at % n
        if i < window:
            score[row, i] = np.nan
        else:
            score[row, i] = _z(series[row, i], mean[row, i - window], m2[row, i - window], window)


@anomaly.on("gpu")
def _gpu(device: Any) -> Run:
    """Takes one series, or a stack of them as rows."""
    base = 4 if device.simulated else _BASE
    constants = {"_BASE": base}
    short = device.compile(_short_gpu, helpers=(_stretch, _z))
    start = device.compile(_start_gpu, helpers=(_stretch,), constants=constants)
    double = device.compile(_double_gpu, helpers=(_join,))
    long = device.compile(_long_gpu, helpers=(_z,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        series, window = inputs["series"], int(inputs["window"])
        score = device.empty(series.shape, np.float64)
        if series.size == 0:
            return {"score": score}
        if window >= series.shape[-1]:
            return {"score": device.full(series.shape, np.nan, np.float64)}
        rows = series.reshape(-1, series.shape[-1])
        scores = score.reshape(*rows.shape)
        if window < 2 * base:
            short(rows.size, rows, np.int64(window), scores)
            return {"score": score}
        mean, m2, next_mean, next_m2, whole_mean, whole_m2 = (device.empty(rows.shape, np.float64) for _ in range(6))
        covered, size = window % base, base
        start(rows.size, rows, np.int64(covered), mean, m2, whole_mean, whole_m2)
        while covered < window:
            joins = window // size % 2
            sizes = np.int64(size), np.int64(covered), np.int64(joins)
            double(rows.size, *sizes, mean, m2, next_mean, next_m2, whole_mean, whole_m2)
            covered += joins * size
            size *= 2
            mean, m2, next_mean, next_m2 = next_mean, next_m2, mean, m2
        long(rows.size, rows, np.int64(window), whole_mean, whole_m2, scores)
        return {"score": score}

    return run


@anomaly.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    yield {"series": random.standard_normal(5), "window": 2}
    walk = 1000 + np.cumsum(random.standard_normal(10_000))
    walk[[100, 5_000]] += 1e9, np.nan
    yield {"series": walk}
    yield {"series": np.repeat([0.1, 7.0], 50), "window": 10}
    yield {"series": random.standard_normal(1_000), "window": 999}
    yield {"series": random.standard_normal(33_000), "window": 32_900}  # too long for plain sums
