"""Random numbers that depend on a counter and a key alone, so that every device draws the same ones in any order.

Salmon, Moraes, Dror and Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3", SC '11: Philox4x32 with ten rounds.
(NumPy's own Philox is the 4x64 form, whose numbers are others.) Normals come of them by Box and Muller (1958), "A note
on the generation of random normal deviates", from uniforms of 32 bits: none lies beyond 6.8 deviations, and devices
agree to 1e-12. Draw `j` of row `i` under a seed: the counter is (i mod 2**32, i // 2**32, j // 4, 0), the key the
seed's two halves, and of the four words it makes, words 0 and 1 make the normals 0 and 1, words 2 and 3 the next two.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MOST",
    "OPENCL",
    "key_of",
    "normal_pair",
    "normal_pair_cuda",
    "normal_pair_jax",
    "normals",
    "philox4x32",
    "philox_round",
    "prepare",
    "words",
]

#: No normal is further from 0.
MOST = 6.8
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_STEP = 2.0**-32
_TURN = 2 * math.pi * _STEP
#: The root of 1/2 and 1 as bits, the bits of a float64's fraction, and 2**52 as bits: see `_log` and `_float`.
_ROOT, _UP = np.uint64(0x3FE6A09E667F3BCD), np.uint64(0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
_FRACTION, _EXPONENT, _WHOLE = np.uint64(0x000FFFFFFFFFFFFF), np.uint64(52), np.uint64(0x4330000000000000)
_EIGHTH, _QUARTER, _QUARTERS = np.uint64(1 << 29), np.uint64(30), np.uint64((1 << 30) - 1)
_ONE, _TWO, _SIGN = np.uint64(1), np.uint64(2), np.uint64(63)


def key_of(seed: int) -> tuple[int, int]:
    """The two words of the key: the low and the high half of the seed as 64 bits, whatever its sign."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


# -- the definition --------------------------------------------------------------------------------------------------


def words(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """The four words of 32 bits that a counter of four words makes (or arrays of them), as uint64."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + int(_W0)) & 0xFFFFFFFF, (k1 + int(_W1)) & 0xFFFFFFFF
    return c0, c1, c2, c3


def normals(seed: int, rows: int, columns: int) -> NDArray[np.float64]:
    """Standard normal numbers float64[rows, columns], as every device draws them under this seed."""
    blocks = -(-columns // 4)
    row, block = np.arange(rows, dtype=np.uint64)[:, None], np.arange(blocks, dtype=np.uint64)[None, :]
    drawn = words((row & _LOW, row >> _HALF, block, 0), key_of(seed))
    w0, w1, w2, w3 = ((word + 0.5) * _STEP for word in np.broadcast_arrays(*drawn))
    first, second = np.sqrt(-2 * np.log(w0)), np.sqrt(-2 * np.log(w2))
    turn, other = 2 * np.pi * w1, 2 * np.pi * w3
    made = [first * np.cos(turn), first * np.sin(turn), second * np.cos(other), second * np.sin(other)]
    return np.stack(made, axis=-1).reshape(rows, 4 * blocks)[:, :columns]


# -- numba and JAX: without branches, so that numba's loops over it become vector code -------------------------------


def philox4x32(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Ten rounds over words of 32 bits, each in a uint64: vector units multiply 32 by 32 bits into 64.

    For numba on the CPU (after `prepare`), numba-cuda (with `philox_round`, as helpers), JAX and NumPy.
    """
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return philox_round(c0, c1, c2, c3, k0, k1)


def philox_round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """One round."""
    p0, p1 = _M0 * c0, _M1 * c2
    return (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW


def normal_pair(length: Any, angle: Any) -> Any:
    """Two normals of two words (uint64, below 2**32), for numba on the CPU: 2.6 ns each, where NumPy takes 8.5."""
    radius = math.sqrt(-2.0 * _log((_float(length) + 0.5) * _STEP))
    # The turn from the nearest quarter, at most an eighth; the quarters swap sine and cosine and change their signs.
    near = (angle + _EIGHTH) & _LOW
    quarter = near >> _QUARTER
    x = (_float(near & _QUARTERS) - 536870911.5) * _TURN
    # Series by pairs and fours of terms, not one after another: shorter chains, of which the processor runs several.
    z = x * x
    z2 = z * z
    z4 = z2 * z2
    sine = (-1 / 6 + z * (1 / 120)) + z2 * (-1 / 5040 + z * (1 / 362880))
    sine = x + x * z * (sine + z4 * (-1 / 39916800 + z * (1 / 6227020800)))
    cosine = (-1 / 2 + z * (1 / 24)) + z2 * (-1 / 720 + z * (1 / 40320))
    cosine = 1.0 + z * (cosine + z4 * ((-1 / 3628800 + z * (1 / 479001600)) + z2 * (-1 / 87178291200)))
    odd = (quarter & _ONE) != 0
    first, second = (sine if odd else cosine), (cosine if odd else sine)
    first_sign = ((quarter + _ONE) & _TWO) << (_SIGN - _ONE)
    second_sign = (quarter & _TWO) << (_SIGN - _ONE)
    return radius * _signed(first, first_sign), radius * _signed(second, second_sign)


def _signed(value: Any, sign: Any) -> Any:
    bits: Any = np.uint64(np.float64(value).view(np.uint64) ^ sign)
    return bits.view(np.float64)


def _float(word: Any) -> Any:
    """A whole number below 2**52 as float64 (AVX2 has no instruction for it): put into the fraction of 2**52."""
    bits: Any = np.uint64(word | _WHOLE)
    return bits.view(np.float64) - 4503599627370496.0


def _log(x: Any) -> Any:
    """log x of a normal positive x: x = 2**n m, log m = 2 artanh((m - 1) / (m + 1)) (Cody and Waite 1980, ch. 5)."""
    # Exponents are counted from the root of 1/2, so m is in [0.707, 1.414] and the series short.
    bits: Any = np.uint64(np.float64(x).view(np.uint64) + _UP)
    n = _float(bits >> _EXPONENT) - 1023.0
    mantissa: Any = np.uint64((bits & _FRACTION) + _ROOT)
    m = mantissa.view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    z2 = z * z
    p = (1 / 11 + z * (1 / 13)) + z2 * (1 / 15)
    p = (1 / 3 + z * (1 / 5)) + z2 * (1 / 7 + z * (1 / 9)) + z2 * z2 * p
    return n * 0.6931471805599453 + 2.0 * (s + s * z * p)


def prepare() -> None:
    """Lets compiled functions call `philox4x32` and `normal_pair`."""
    from numba.extending import register_jitable

    for function in (philox_round, philox4x32, _float, _log, _signed, normal_pair):
        register_jitable(forceinline=True)(function)  # LLVM's own choice is a call, and no vector code


def normal_pair_cuda(length: Any, angle: Any) -> Any:
    """As `normal_pair`, by the card's own functions: a helper for numba-cuda."""
    radius = math.sqrt(-2.0 * math.log((np.float64(length) + 0.5) * _STEP))
    turn = (np.float64(angle) + 0.5) * _TURN
    return radius * math.cos(turn), radius * math.sin(turn)


def normal_pair_jax(length: Any, angle: Any) -> Any:
    """As `normal_pair`, on arrays of uint64."""
    import jax.numpy as jnp

    radius = jnp.sqrt(-2.0 * jnp.log((length.astype(jnp.float64) + 0.5) * _STEP))
    turn = (angle.astype(jnp.float64) + 0.5) * _TURN
    return radius * jnp.cos(turn), radius * jnp.sin(turn)


# -- OpenCL C: four rows at once -------------------------------------------------------------------------------------

#: Functions over four counters at once, in vectors of 256 bits. Wants cl_khr_fp64.
OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

void philox4x32(ulong4 c[4], ulong k0, ulong k1) {
  #pragma unroll
  for (int i = 0; i < 10; i++) {
    const ulong4 p0 = c[0] * 0xD2511F53UL, p1 = c[2] * 0xCD9E8D57UL;
    c[0] = (p1 >> 32) ^ c[1] ^ k0;
    c[1] = p1 & 0xFFFFFFFFUL;
    c[2] = (p0 >> 32) ^ c[3] ^ k1;
    c[3] = p0 & 0xFFFFFFFFUL;
    k0 = (k0 + 0x9E3779B9UL) & 0xFFFFFFFFUL;
    k1 = (k1 + 0xBB67AE85UL) & 0xFFFFFFFFUL;
  }
}

double4 exact(ulong4 word) { return as_double4(word | 0x4330000000000000UL) - 4503599627370496.0; }

void normal_pair(ulong4 length, ulong4 angle, double4* first, double4* second) {
  const double4 radius = sqrt(-2.0 * log((exact(length) + 0.5) * 0x1p-32));
  const ulong4 near = (angle + (1UL << 29)) & 0xFFFFFFFFUL, quarter = near >> 30;
  const double4 x = (exact(near & 0x3FFFFFFFUL) - 536870911.5) * (6.283185307179586477 * 0x1p-32), z = x * x;
  double4 s = -1 / 39916800.0 + z * (1 / 6227020800.0);
  s = 1 / 362880.0 + z * s;
  s = -1 / 5040.0 + z * s;
  s = 1 / 120.0 + z * s;
  s = -1 / 6.0 + z * s;
  s = x + x * z * s;
  double4 c = 1 / 479001600.0 + z * (-1 / 87178291200.0);
  c = -1 / 3628800.0 + z * c;
  c = 1 / 40320.0 + z * c;
  c = -1 / 720.0 + z * c;
  c = 1 / 24.0 + z * c;
  c = -0.5 + z * c;
  c = 1 + z * c;
  const long4 odd = (quarter & 1) != 0;
  const double4 a = odd ? s : c, b = odd ? c : s;
  *first = radius * as_double4(as_ulong4(a) ^ (((quarter + 1) & 2) << 62));
  *second = radius * as_double4(as_ulong4(b) ^ ((quarter & 2) << 62));
}
"""
