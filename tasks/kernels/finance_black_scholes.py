"""Finance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

black_scholes = Kernel(
    "finance.black_scholes",
    inputs={
        "spot": "float64[n]",
        "strike": "float64[n]",
        "years": "float64[n]",
        "volatility": "float64[n]",
        "rate": "float64",
    },
    outputs={"call": "float64[n]", "put": "float64[n]"},
    flops="200*n",
    bytes="48*n",
    batch="concat",
    tolerance=1e-9,
    summary="Prices of European call and put options.",
)

Column = NDArray[np.float64]


@black_scholes.reference
def _reference(spot: Column, strike: Column, years: Column, volatility: Column, rate: float) -> Outputs:
    """Black and Scholes (1973), "The Pricing of Options and Corporate Liabilities", eq. 13; the put eq. 26.

    An input that is negative (the rate apart), NaN or infinite prices to NaN. Where nothing is uncertain (years,
    volatility, spot or strike is 0) the price is what the option is worth for sure, discounted, or 0 if that is more.
    """
    with np.errstate(all="ignore"):
        deviation = volatility * np.sqrt(years)
        certain = (deviation == 0) | (spot == 0) | (strike == 0)
        due = strike * np.exp(-rate * years)
        middle = (np.log(spot / strike) + rate * years) / deviation
        d1, d2 = middle + deviation / 2, middle - deviation / 2
        call = np.where(certain, np.maximum(spot - due, 0), spot * _normal(d1) - due * _normal(d2))
        put = np.where(certain, np.maximum(due - spot, 0), due * _normal(-d2) - spot * _normal(-d1))
    fair = np.isfinite(rate) & np.logical_and.reduce(
        [(column >= 0) & np.isfinite(column) for column in (spot, strike, years, volatility)]
    )
    return {"call": np.where(fair, call, np.nan), "put": np.where(fair, put, np.nan)}


def _normal(x: Column) -> Column:
    """The cumulative normal distribution."""
    return np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x], np.float64)


# The variant spells exp, log and the normal distribution out, without branches, so that LLVM turns the loop into
# vector instructions: 54 ns an option with math.exp, log and erfc (one call each, one option at a time), 10 so.


def _exp(x: float) -> float:
    """e**x for x in [-708, 709], by x = n log 2 + r and the Taylor series of r (Cody and Waite 1980, ch. 6)."""
    x = min(max(x, -708.0), 709.0)
    n = math.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6
    p = 1.0 + r * (1 / 13)
    p = 1.0 + r * (1 / 12) * p
    p = 1.0 + r * (1 / 11) * p
    p = 1.0 + r * (1 / 10) * p
    p = 1.0 + r * (1 / 9) * p
    p = 1.0 + r * (1 / 8) * p
    p = 1.0 + r * (1 / 7) * p
    p = 1.0 + r * (1 / 6) * p
    p = 1.0 + r * (1 / 5) * p
    p = 1.0 + r * (1 / 4) * p
    p = 1.0 + r * (1 / 3) * p
    p = 1.0 + r * (1 / 2) * p
    p = 1.0 + r * p
    scale: Any = np.int64((np.int64(n) + 1023) << 52)
    return float(p * scale.view(np.float64))


def _log(x: float) -> float:
    """log x of a normal positive x: x = 2**n m, log m = 2 artanh((m - 1) / (m + 1)) (Cody and Waite 1980, ch. 5)."""
    value: Any = np.float64(x)
    bits = value.view(np.int64)
    # Exponents are counted from the root of 1/2, so m is in [0.707, 1.414] and the series short.
    n = (bits - 0x3FE6A09E667F3BCD) >> 52
    mantissa: Any = np.int64(bits - (n << 52))
    m = mantissa.view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = 1 / 19 + z * (1 / 21)
    p = 1 / 17 + z * p
    p = 1 / 15 + z * p
    p = 1 / 13 + z * p
    p = 1 / 11 + z * p
    p = 1 / 9 + z * p
    p = 1 / 7 + z * p
    p = 1 / 5 + z * p
    p = 1 / 3 + z * p
    return float(n * 0.6931471805599453 + 2.0 * (s + s * z * p))


def _tail(x: float) -> float:
    """The normal distribution's upper tail beyond x >= 0.

    Hart (1968), "Computer Approximations", algorithm 5666, as given by West (2005), "Better approximations to
    cumulative normal functions"; absolute error below 1e-15.
    """
    p = 0.0352624965998911 * x + 0.700383064443688
    p = p * x + 6.37396220353165
    p = p * x + 33.912866078383
    p = p * x + 112.079291497871
    p = p * x + 221.213596169931
    p = p * x + 220.206867912376
    q = 0.0883883476483184 * x + 1.75566716318264
    q = q * x + 16.064177579207
    q = q * x + 86.7807322029461
    q = q * x + 296.564248779674
    q = q * x + 637.333633378831
    q = q * x + 793.826512519948
    q = q * x + 440.413735824752
    return _exp(-0.5 * x * x) * p / q


def _price(
    spot: Column, strike: Column, years: Column, volatility: Column, rate: float, call: Column, put: Column
) -> None:
    infinity = np.inf
    for i in range(spot.size):
        s, k, t, v = spot[i], strike[i], years[i], volatility[i]
        deviation = v * math.sqrt(t)
        due = k * _exp(-rate * t)
        middle = (_log(s / k) + rate * t) / deviation
        d1, d2 = middle + deviation / 2, middle - deviation / 2
        # Beyond 40 deviations a tail is 0; the polynomials must not overflow there.
        tail1, tail2 = _tail(min(abs(d1), 40.0)), _tail(min(abs(d2), 40.0))
        up1, up2 = (1.0 - tail1 if d1 > 0 else tail1), (1.0 - tail2 if d2 > 0 else tail2)
        down1, down2 = (tail1 if d1 > 0 else 1.0 - tail1), (tail2 if d2 > 0 else 1.0 - tail2)
        c, p = s * up1 - due * up2, due * down2 - s * down1
        certain = (deviation == 0) | (s == 0) | (k == 0)
        c = max(s - due, 0.0) if certain else c
        p = max(due - s, 0.0) if certain else p
        fair = (s >= 0) & (s < infinity) & (k >= 0) & (k < infinity) & (t >= 0) & (t < infinity)
        fair = fair & (v >= 0) & (v < infinity) & (abs(rate) < infinity)
        call[i] = c if fair else np.nan
        put[i] = p if fair else np.nan


@black_scholes.on("cpu")
def _cpu(device: Any) -> Run:
    """One option after another, so options of many jobs with one rate are one longer column."""
    from numba import njit, types
    from numba.extending import register_jitable

    for function in (_exp, _log, _tail):
        register_jitable(function)
    column, out = types.Array(types.float64, 1, "C", readonly=True), types.float64[::1]
    price = njit(
        (column, column, column, column, types.float64, out, out),
        nogil=True,
        cache=True,
        error_model="numpy",
        fastmath={"contract"},
    )(_price)

    def run(inputs: Inputs, context: Context) -> Outputs:
        spot = inputs["spot"]
        call, put = np.empty_like(spot), np.empty_like(spot)
        price(spot, inputs["strike"], inputs["years"], inputs["volatility"], inputs["rate"], call, put)
        return {"call": call, "put": put}

    return run


cuda: Any  # numba.cuda, on a GPU


def _price_gpu(
    spot: Column, strike: Column, years: Column, volatility: Column, rate: float, call: Column, put: Column
) -> None:
    infinity = np.inf
    for i in range(cuda.grid(1), spot.size, cuda.gridsize(1)):
        s, k, t, v = spot[i], strike[i], years[i], volatility[i]
        fair = s >= 0 and s < infinity and k >= 0 and k < infinity and t >= 0 and t < infinity
        if not (fair and v >= 0 and v < infinity and abs(rate) < infinity):
            call[i] = np.nan
            put[i] = np.nan
            continue
        deviation = v * math.sqrt(t)
        due = k * math.exp(min(-rate * t, 709.0))
        if deviation == 0 or s == 0 or k == 0:
            call[i] = max(s - due, 0.0)
            put[i] = max(due - s, 0.0)
            continue
        middle = (math.log(s / k) + rate * t) / deviation
        d1, d2 = middle + deviation / 2, middle - deviation / 2
        call[i] = s * _normal_gpu(d1) - due * _normal_gpu(d2)
        put[i] = due * _normal_gpu(-d2) - s * _normal_gpu(-d1)


def _normal_gpu(x: float) -> float:
    return math.erfc(-x * 0.7071067811865476) / 2


@black_scholes.on("gpu")
def _gpu(device: Any) -> Run:
    """A thread an option, with the card's own exp, log and erfc."""
    price = device.compile(_price_gpu, helpers=(_normal_gpu,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        columns = [inputs[name] for name in ("spot", "strike", "years", "volatility")]
        size = columns[0].size
        call, put = device.empty((size,), np.float64), device.empty((size,), np.float64)
        price(size, *columns, np.float64(inputs["rate"]), call, put)
        return {"call": call, "put": put}

    return run


# A group is one work-item with a block of options, four at once through one long pipeline without a branch: every
# select takes both sides. PoCL has vector code for exp, log and sqrt of four doubles (20 ns an option; 80 one double at
# a time), but not for erfc (73). Not double8: PoCL 3.0 crashes on it where the processor has AVX-512.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#define SIGN 0x7fffffffffffffffL

double4 tail(double4 x) {  // as _tail above; beyond 40 deviations it is 0, and the polynomials must not overflow
  x = as_double4(as_long4(x) & SIGN);
  x = x > 40.0 ? (double4)40.0 : x;
  double4 p = 0.0352624965998911 * x + 0.700383064443688;
  p = p * x + 6.37396220353165;
  p = p * x + 33.912866078383;
  p = p * x + 112.079291497871;
  p = p * x + 221.213596169931;
  p = p * x + 220.206867912376;
  double4 q = 0.0883883476483184 * x + 1.75566716318264;
  q = q * x + 16.064177579207;
  q = q * x + 86.7807322029461;
  q = q * x + 296.564248779674;
  q = q * x + 637.333633378831;
  q = q * x + 793.826512519948;
  q = q * x + 440.413735824752;
  return exp(-0.5 * x * x) * p / q;
}

double4 read(__global const double* restrict column, ulong i, ulong last) {  // past the end it repeats the last option
  return (double4)(column[i], column[min(i + 1, last)], column[min(i + 2, last)], column[min(i + 3, last)]);
}

long4 fair(double4 x) { return x >= 0 && x < INFINITY; }

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void price(__global const double* restrict spots, __global const double* restrict strikes,
           __global const double* restrict years, __global const double* restrict volatilities, double rate,
           __global double* restrict calls, __global double* restrict puts, ulong size) {
  const ulong start = get_group_id(0) * BLOCK, stop = min(start + BLOCK, size), last = size - 1;
  for (ulong i = start; i < stop; i += 4) {
    const double4 s = read(spots, i, last), k = read(strikes, i, last);
    const double4 t = read(years, i, last), v = read(volatilities, i, last);
    const double4 deviation = v * sqrt(t), due = k * exp(-rate * t);
    const double4 middle = (log(s / k) + rate * t) / deviation;
    const double4 d1 = middle + deviation / 2, d2 = middle - deviation / 2;
    const double4 tail1 = tail(d1), tail2 = tail(d2);
    const double4 up1 = d1 > 0 ? 1 - tail1 : tail1, up2 = d2 > 0 ? 1 - tail2 : tail2;
    const double4 down1 = d1 > 0 ? tail1 : 1 - tail1, down2 = d2 > 0 ? tail2 : 1 - tail2;
    const double4 zero = 0, surely = s - due;
    const long4 certain = deviation == 0 || s == 0 || k == 0;
    double4 call = certain ? (surely < 0 ? zero : surely) : s * up1 - due * up2;
    double4 put = certain ? (surely > 0 ? zero : zero - surely) : due * down2 - s * down1;
    const long4 valid = fair(s) && fair(k) && fair(t) && fair(v) && (long4)(isfinite(rate) ? -1 : 0);
    call = valid ? call : (double4)NAN;
    put = valid ? put : (double4)NAN;
    if (i + 4 <= size) {
      vstore4(call, 0, calls + i);
      vstore4(put, 0, puts + i);
    } else {
      const double call_of[4] = {call.x, call.y, call.z, call.w}, put_of[4] = {put.x, put.y, put.z, put.w};
      for (int j = 0; i + j < size; j++) {
        calls[i + j] = call_of[j];
        puts[i + j] = put_of[j];
      }
    }
  }
}
"""
_BLOCK = 1024


@black_scholes.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "finance.black_scholes", BLOCK=_BLOCK)

    def run(inputs: Inputs, context: Context) -> Outputs:
        columns = [inputs[name] for name in ("spot", "strike", "years", "volatility")]
        size = columns[0].size
        call, put = device.empty((size,), np.float64), device.empty((size,), np.float64)
        rate = np.float64(inputs["rate"])
        program.launch("price", (-(-size // _BLOCK),), *columns, rate, call, put, np.uint64(size))
        return {"call": call, "put": put}

    return run


@black_scholes.on("tpu")
def _tpu(device: Any) -> Run:
    """The reference's own formulas; the zeros after the options are options that are worth nothing."""
    import jax.numpy as jnp
    from jax.scipy.special import erfc

    def normal(x: Any) -> Any:
        return erfc(-x / math.sqrt(2)) / 2

    def price(spot: Any, strike: Any, years: Any, volatility: Any, rate: Any) -> Any:
        deviation = volatility * jnp.sqrt(years)
        certain = (deviation == 0) | (spot == 0) | (strike == 0)
        due = strike * jnp.exp(-rate * years)
        middle = (jnp.log(spot / strike) + rate * years) / deviation
        d1, d2 = middle + deviation / 2, middle - deviation / 2
        call = jnp.where(certain, jnp.maximum(spot - due, 0), spot * normal(d1) - due * normal(d2))
        put = jnp.where(certain, jnp.maximum(due - spot, 0), due * normal(-d2) - spot * normal(-d1))
        fair = jnp.isfinite(rate)
        for column in (spot, strike, years, volatility):
            fair &= (column >= 0) & jnp.isfinite(column)
        return jnp.where(fair, call, jnp.nan), jnp.where(fair, put, jnp.nan)

    program = device.program(price)

    def run(inputs: Inputs, context: Context) -> Outputs:
        columns = [inputs[name] for name in ("spot", "strike", "years", "volatility")]
        shape = columns[0].shape
        return program({"call": shape, "put": shape}, *columns, np.float64(inputs["rate"]))

    return run


@black_scholes.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n in (1, 100, 100_000):
        yield {
            "spot": random.uniform(50, 150, n),
            "strike": random.uniform(50, 150, n),
            "years": random.uniform(0.1, 2, n),
            "volatility": random.uniform(0.05, 0.6, n),
            "rate": 0.03,
        }
    # Nothing uncertain, nothing fair, and far out of the money.
    yield {
        "spot": np.array([100, 0, 100, 0, 90, -1, np.nan, np.inf, 1e-300, 1e6]),
        "strike": np.array([90, 90, 0, 0, 100, 90, 90, 90, 100, 1e-3]),
        "years": np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 30.0]),
        "volatility": np.array([0.2, 0.2, 0.2, 0.2, 0, 0.2, 0.2, 0.2, 5, 0.01]),
        "rate": 0.05,
    }
