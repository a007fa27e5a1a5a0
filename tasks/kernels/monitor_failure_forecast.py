"""When machines will fail."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

failure_forecast = Kernel(
    "monitor.failure_forecast",
    inputs={
        "series": "float64[m,n]",
        "limit": "float64",
        "horizon": "int64 = 24",
        "alpha": "float64 = 0.5",
        "beta": "float64 = 0.1",
    },
    outputs={"steps": "float64[m]", "risk": "float64[m]"},
    flops="m*(10*n + 3*horizon + 60)",
    bytes="8*m*n + 16*m",
    limits={
        "horizon": "1 <= horizon <= 10000",
        "alpha": "0 < alpha <= 1",
        "beta": "0 <= beta <= 1",
    },
    batch="concat",
    tolerance=1e-6,
    summary="Steps until each machine's trend crosses a limit, and the risk that it does so within the horizon.",
)

Vector = NDArray[np.float64]


@failure_forecast.reference
def _reference(series: Vector, limit: float, horizon: int, alpha: float, beta: float) -> Outputs:
    """Holt's linear trend of each row, and how sure it is.

    Level l and slope b begin with the first two measurements. With each later one, y, whose error is e = y - (l + b),
    they become l + b + alpha e and b + alpha beta e. Holt (1957), "Forecasting seasonals and trends by exponentially
    weighted moving averages", as in Hyndman, Koehler, Ord and Snyder (2008), "Forecasting with Exponential Smoothing",
    model ETS(A,A,N). NaN or infinity is a missing measurement: l + b and b follow.

    `steps` (of the time between measurements): (limit - l) / b from the end of the series, 0 where l is at the limit
    already, infinite where b is not above 0. `risk`: the forecast for h steps ahead is normal about l + h b, with the
    variance s**2 (1 + (h - 1) (alpha**2 + alpha b' h + b'**2 h (2h - 1) / 6)), b' = alpha beta (there, table 6.2), s**2
    the mean of e**2. The chance to be at the limit is computed for each h up to the horizon; the largest is the risk.
    That of crossing at any of the steps is no less. Where s is 0 it is 0 or 1.

    Two measurements make `steps`, three `risk`; with fewer they are NaN, as they are where limit, alpha or beta is.
    Limits are upper ones: for a lower one, negate series and limit.
    """
    steps, risk = np.full(len(series), np.nan), np.full(len(series), np.nan)
    if not (np.isfinite(alpha) and np.isfinite(beta)) or np.isnan(limit):
        return {"steps": steps, "risk": risk}
    ahead = np.arange(1, horizon + 1)
    spread = 1 / _inverse_spread(horizon, alpha, beta)
    with np.errstate(all="ignore"):
        for row, values in enumerate(series):
            measured = np.flatnonzero(np.isfinite(values))
            if measured.size < 2:
                continue
            first, second = measured[:2]
            level, slope = values[second], (values[second] - values[first]) / (second - first)
            squares = 0.0
            for value in values[second + 1 :]:
                error = value - (level + slope) if np.isfinite(value) else 0.0
                level, slope = level + slope + alpha * error, slope + alpha * beta * error
                squares += error * error
            steps[row] = 0 if level >= limit else (limit - level) / slope if slope > 0 else np.inf
            if measured.size < 3:
                continue
            deviation = np.sqrt(squares / (measured.size - 2))
            above = level + ahead * slope - limit
            if deviation == 0:
                risk[row] = np.max(above >= 0)
            else:
                risk[row] = math.erfc(-np.max(above / spread) / deviation / math.sqrt(2)) / 2
    return {"steps": steps, "risk": risk}


def _inverse_spread(horizon: int, alpha: float, beta: float) -> Vector:
    """One by the deviation of the forecasts for 1 to `horizon` steps ahead, where that of one step is 1."""
    h, trend = np.arange(1.0, horizon + 1), alpha * beta
    with np.errstate(all="ignore"):
        variance = 1 + (h - 1) * (alpha * alpha + alpha * trend * h + trend * trend * h * (2 * h - 1) / 6)
        return np.asarray(1 / np.sqrt(variance))


def _slope_gain(inputs: Inputs) -> tuple[float, float]:
    """Alpha, and alpha times beta; NaN both where what is asked for is NaN."""
    alpha, beta, limit = inputs["alpha"], inputs["beta"], inputs["limit"]
    if not (math.isfinite(alpha) and math.isfinite(beta)) or math.isnan(limit):
        return math.nan, math.nan
    return alpha, alpha * beta


# -- cpu -------------------------------------------------------------------------------------------------------------

#: Rows side by side in vectors, and the columns of them that are turned at once: 16 KiB.
_LANES, _COLUMNS = 32, 64


def _follow(value: Any, level: Any, slope: Any, squares: Any, number: Any, alpha: Any, gain: Any) -> Any:
    """The state after one more measurement, or none."""
    ahead = level + slope
    measured = value - value == 0.0
    error = value - ahead if measured else 0.0
    count = 1.0 if measured else 0.0
    return ahead + alpha * error, slope + gain * error, squares + error * error, number + count


def _forecast(
    series: Vector, limit: float, alpha: float, gain: float, inverse: Vector, steps: Vector, risk: Vector
) -> None:
    rows, n = series.shape
    turned = np.empty((_COLUMNS, _LANES))
    level, slope, squares, number = np.empty(_LANES), np.empty(_LANES), np.empty(_LANES), np.empty(_LANES)
    begin = np.empty(_LANES, np.int64)
    for top in range(0, rows, _LANES):
        lanes, last = min(_LANES, rows - top), 0
        for lane in range(_LANES):
            # The first two measurements; a row without them begins after its end.
            values = series[min(top + lane, rows - 1)]
            first = 0
            while first < n and values[first] - values[first] != 0.0:
                first += 1
            second = first + 1
            while second < n and values[second] - values[second] != 0.0:
                second += 1
            begin[lane] = second
            if second < n:
                last = max(last, second)
                level[lane] = values[second]
                slope[lane] = (values[second] - values[first]) / (second - first)
            else:
                level[lane], slope[lane] = 0.0, 0.0
            squares[lane], number[lane] = 0.0, 0.0
        for start in range(0, n, _COLUMNS):
            columns = min(_COLUMNS, n - start)
            for lane in range(_LANES):
                values = series[min(top + lane, rows - 1), start : start + columns]
                for column in range(columns):
                    turned[column, lane] = values[column]
            column = 0
            # Until every row has begun, which is two columns at most but where measurements are missing.
            while column < columns and start + column <= last:
                line, now = turned[column], start + column
                for lane in range(_LANES):
                    if now > begin[lane]:
                        level[lane], slope[lane], squares[lane], number[lane] = _follow(
                            line[lane], level[lane], slope[lane], squares[lane], number[lane], alpha, gain
                        )
                column += 1
            while column + 4 <= columns:
                line0, line1, line2, line3 = turned[column], turned[column + 1], turned[column + 2], turned[column + 3]
                for lane in range(_LANES):
                    l, b, s, c = level[lane], slope[lane], squares[lane], number[lane]  # noqa: E741
                    l, b, s, c = _follow(line0[lane], l, b, s, c, alpha, gain)  # noqa: E741
                    l, b, s, c = _follow(line1[lane], l, b, s, c, alpha, gain)  # noqa: E741
                    l, b, s, c = _follow(line2[lane], l, b, s, c, alpha, gain)  # noqa: E741
                    l, b, s, c = _follow(line3[lane], l, b, s, c, alpha, gain)  # noqa: E741
                    level[lane], slope[lane], squares[lane], number[lane] = l, b, s, c
                column += 4
            while column < columns:
                line = turned[column]
                for lane in range(_LANES):
                    level[lane], slope[lane], squares[lane], number[lane] = _follow(
                        line[lane], level[lane], slope[lane], squares[lane], number[lane], alpha, gain
                    )
                column += 1
        for lane in range(lanes):
            if begin[lane] >= n or alpha != alpha:
                steps[top + lane], risk[top + lane] = np.nan, np.nan
                continue
            l, b = level[lane], slope[lane]  # noqa: E741 - as in the formulas
            steps[top + lane] = 0.0 if l >= limit else (limit - l) / b if b > 0 else np.inf
            if number[lane] == 0.0:
                risk[top + lane] = np.nan
                continue
            deviation = math.sqrt(squares[lane] / number[lane])
            most = -np.inf
            for h in range(inverse.size):
                most = max(most, (l - limit + (h + 1) * b) * inverse[h])
            if deviation == 0.0:
                risk[top + lane] = 1.0 if most >= 0.0 else 0.0
            else:
                risk[top + lane] = math.erfc(-most / deviation * 0.7071067811865476) / 2


@failure_forecast.on("cpu")
def _cpu(device: Any) -> Run:
    """Rows are turned into columns, a tile at a time, for each row's own steps wait for each other."""
    from numba import njit, types
    from numba.extending import register_jitable

    register_jitable(forceinline=True)(_follow)
    matrix, column = types.Array(types.float64, 2, "C", readonly=True), types.float64[::1]
    number = types.float64
    forecast = njit(
        (matrix, number, number, number, column, column, column), nogil=True, cache=True, error_model="numpy"
    )(_forecast)

    def run(inputs: Inputs, context: Context) -> Outputs:
        series = inputs["series"]
        alpha, gain = _slope_gain(inputs)
        inverse = _inverse_spread(inputs["horizon"], inputs["alpha"], inputs["beta"])
        steps, risk = np.empty(len(series)), np.empty(len(series))
        forecast(series, inputs["limit"], alpha, gain, inverse, steps, risk)
        return {"steps": steps, "risk": risk}

    return run


# -- gpu -------------------------------------------------------------------------------------------------------------

cuda: Any  # numba.cuda, on a GPU
#: A block has a row a thread; it reads this many columns of all of them at once, for rows lie far from each other.
_ROWS, _WIDE = 64, 32
#: A tile's rows are one longer, so that threads read from different banks.
_STRIDE = _WIDE + 1


def _forecast_gpu(
    series: Vector, limit: float, alpha: float, gain: float, inverse: Vector, steps: Vector, risk: Vector
) -> None:
    tile = cuda.shared.array((_ROWS, _STRIDE), np.float64)
    thread, top = cuda.threadIdx.x, cuda.blockIdx.x * _ROWS
    rows, n = series.shape
    seen, at = 0, 0
    level, slope, squares, number = 0.0, 0.0, 0.0, 0.0
    for start in range(0, n, _WIDE):
        columns = min(_WIDE, n - start)
        for each in range(thread, _ROWS * _WIDE, _ROWS):
            row, column = each // _WIDE, each % _WIDE
            if top + row < rows and column < columns:
                tile[row, column] = series[top + row, start + column]
        cuda.syncthreads()
        if top + thread < rows:
            for column in range(columns):
                value = tile[thread, column]
                measured = value - value == 0.0
                if seen >= 2:
                    ahead = level + slope
                    error = value - ahead if measured else 0.0
                    level = ahead + alpha * error
                    slope += gain * error
                    squares += error * error
                    number += 1.0 if measured else 0.0
                elif measured:
                    if seen == 0:
                        at = start + column
                    else:
                        slope = (value - level) / (start + column - at)
                    level = value
                    seen += 1
        cuda.syncthreads()
    if top + thread < rows:
        step, chance = np.nan, np.nan
        if seen == 2 and alpha == alpha:
            step = 0.0 if level >= limit else (limit - level) / slope if slope > 0 else np.inf
            if number > 0:
                most = -np.inf
                for h in range(inverse.size):
                    most = max(most, (level - limit + (h + 1) * slope) * inverse[h])
                deviation = math.sqrt(squares / number)
                if deviation == 0.0:
                    chance = 1.0 if most >= 0.0 else 0.0
                else:
                    chance = math.erfc(-most / deviation * 0.7071067811865476) / 2
        steps[top + thread], risk[top + thread] = step, chance


@failure_forecast.on("gpu")
def _gpu(device: Any) -> Run:
    """A thread a row; blocks read tiles of their rows together."""
    forecast = device.compile(_forecast_gpu, (_ROWS,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        series, rows = inputs["series"], len(inputs["series"])
        limit, alpha, gain = map(np.float64, (inputs["limit"], *_slope_gain(inputs)))
        inverse = device.upload(_inverse_spread(inputs["horizon"], inputs["alpha"], inputs["beta"]))
        steps, risk = device.empty((rows,), np.float64), device.empty((rows,), np.float64)
        forecast(-(-rows // _ROWS), series, limit, alpha, gain, inverse, steps, risk)
        return {"steps": steps, "risk": risk}

    return run


# -- tpu -------------------------------------------------------------------------------------------------------------


@failure_forecast.on("tpu")
def _tpu(device: Any) -> Run:
    """A scan over time, all rows in vectors."""
    import jax.numpy as jnp
    from jax import lax
    from jax.scipy.special import erfc

    def forecast(series: Any, n: Any, limit: Any, alpha: Any, gain: Any, inverse: Any, horizon: Any) -> Any:
        def follow(state: Any, now: Any) -> Any:
            seen, at, level, slope, squares, number = state
            t, value = now
            measured = jnp.isfinite(value) & (t < n)
            begun, second = (seen == 2) & (t < n), measured & (seen == 1)
            ahead = level + slope
            error = jnp.where(measured & begun, value - ahead, 0)
            moved = jnp.where(begun, ahead + alpha * error, jnp.where(measured & (seen < 2), value, level))
            turned = jnp.where(second, (value - level) / (t - at), slope + gain * error)
            at = jnp.where(measured & (seen == 0), t, at)
            number += measured & begun
            seen = jnp.minimum(seen + measured, 2)
            return (seen, at, moved, turned, squares + error * error, number), None

        rows, columns = series.shape
        whole, zero = jnp.zeros(rows, jnp.int32), jnp.zeros(rows)
        times = jnp.arange(columns, dtype=jnp.int32)
        (seen, _, level, slope, squares, number), _ = lax.scan(
            follow, (whole, whole, zero, zero, zero, whole), (times, series.T)
        )
        most = lax.fori_loop(
            0,
            horizon,
            lambda h, most: jnp.maximum(most, (level - limit + (h + 1) * slope) * inverse[h]),
            jnp.full(rows, -jnp.inf),
        )
        deviation = jnp.sqrt(squares / number)
        steps = jnp.where(level >= limit, 0, jnp.where(slope > 0, (limit - level) / slope, jnp.inf))
        chance = jnp.where(deviation == 0, (most >= 0).astype(steps.dtype), erfc(-most / deviation / math.sqrt(2)) / 2)
        known = (seen == 2) & (alpha == alpha)
        return jnp.where(known, steps, jnp.nan), jnp.where(known & (number > 0), chance, jnp.nan)

    program = device.program(forecast)

    def run(inputs: Inputs, context: Context) -> Outputs:
        rows, n = inputs["series"].shape
        limit, alpha, gain = map(np.float64, (inputs["limit"], *_slope_gain(inputs)))
        horizon = inputs["horizon"]
        inverse = device.upload(_inverse_spread(horizon, inputs["alpha"], inputs["beta"]))
        shapes = {"steps": (rows,), "risk": (rows,)}
        return program(shapes, inputs["series"], np.int32(n), limit, alpha, gain, inverse, np.int32(horizon))

    return run


# -- fpga ------------------------------------------------------------------------------------------------------------

# A group has a block of rows, four at once.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void forecast(__global const double* restrict series, double limit, double alpha, double gain,
              __global const double* restrict inverse, int horizon, __global double* restrict steps,
              __global double* restrict risk, ulong rows, ulong n) {
  const ulong start = get_group_id(0) * BLOCK, stop = min(start + BLOCK, rows);
  for (ulong top = start; top < stop; top += 4) {
    __global const double* row[4];
    long begins[4];
    double levels[4], slopes[4], errors[4], numbers[4];
    for (int lane = 0; lane < 4; lane++) {  // the first two measurements; without them a row begins after its end
      row[lane] = series + min(top + lane, rows - 1) * n;
      ulong first = 0;
      while (first < n && !isfinite(row[lane][first])) first++;
      ulong second = first + 1;
      while (second < n && !isfinite(row[lane][second])) second++;
      begins[lane] = second;
      levels[lane] = second < n ? row[lane][second] : 0;
      slopes[lane] = second < n ? (row[lane][second] - row[lane][first]) / (second - first) : 0;
    }
    const long4 begin = (long4)(begins[0], begins[1], begins[2], begins[3]);
    const double4 zero = 0, one = 1;
    double4 level = (double4)(levels[0], levels[1], levels[2], levels[3]);
    double4 slope = (double4)(slopes[0], slopes[1], slopes[2], slopes[3]), squares = 0, number = 0;
    for (ulong t = 2; t < n; t++) {
      const double4 value = (double4)(row[0][t], row[1][t], row[2][t], row[3][t]), ahead = level + slope;
      const long4 later = (long4)((long)t) > begin, measured = later & (value - value == 0);
      const double4 error = measured ? value - ahead : zero;
      level = later ? ahead + alpha * error : level;
      slope += gain * error;
      squares += error * error;
      number += measured ? one : zero;
    }
    vstore4(level, 0, levels);
    vstore4(slope, 0, slopes);
    vstore4(squares, 0, errors);
    vstore4(number, 0, numbers);
    for (int lane = 0; lane < 4 && top + lane < stop; lane++) {
      const double l = levels[lane], b = slopes[lane];
      double step = NAN, chance = NAN;
      if (begins[lane] < (long)n && !isnan(alpha)) {
        step = l >= limit ? 0 : b > 0 ? (limit - l) / b : INFINITY;
        if (numbers[lane] > 0) {
          double most = -INFINITY;
          for (int h = 0; h < horizon; h++) {
            const double above = (l - limit + (h + 1) * b) * inverse[h];
            most = above > most ? above : most;
          }
          const double deviation = sqrt(errors[lane] / numbers[lane]);
          chance = deviation == 0 ? most >= 0 : erfc(-most / deviation * M_SQRT1_2) / 2;
        }
      }
      steps[top + lane] = step;
      risk[top + lane] = chance;
    }
  }
}
"""
_BLOCK = 64


@failure_forecast.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "monitor.failure_forecast", BLOCK=_BLOCK)

    def run(inputs: Inputs, context: Context) -> Outputs:
        rows, n = inputs["series"].shape
        limit, alpha, gain = map(np.float64, (inputs["limit"], *_slope_gain(inputs)))
        horizon = inputs["horizon"]
        inverse = device.upload(_inverse_spread(horizon, inputs["alpha"], inputs["beta"]))
        steps, risk = device.empty((rows,), np.float64), device.empty((rows,), np.float64)
        sizes = np.uint64(rows), np.uint64(n)
        program.launch(
            "forecast", (-(-rows // _BLOCK),),
            inputs["series"], limit, alpha, gain, inverse, np.int32(horizon), steps, risk, *sizes,
        )  # fmt: skip
        return {"steps": steps, "risk": risk}

    return run


@failure_forecast.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    yield {"series": np.ones((1, 1)), "limit": 2.0}
    for m, n in ((5, 20), (300, 200)):
        wear = np.cumsum(random.gamma(1, 0.01, (m, n)), axis=1) + random.normal(0, 0.05, (m, n))
        wear[random.random((m, n)) < 0.1] = np.nan
        yield {"series": wear, "limit": 3.0}
    nan = np.nan
    odd = [[1, 1, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1], [nan, 1, nan, 2], [nan, nan, nan, 1], [nan] * 4, [1, np.inf, 2, 3]]
    yield {"series": np.array(odd, np.float64), "limit": 3.5, "horizon": 10}
    yield {"series": np.array(odd, np.float64), "limit": 1.0, "horizon": 1, "alpha": 1.0, "beta": 0.0}
