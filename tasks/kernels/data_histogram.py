"""Big data: how numbers are distributed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

# No batching: stacking would copy every job's values, which costs as much as the one pass over them.
histogram = Kernel(
    "data.histogram",
    inputs={"values": "float32[n]", "low": "float64", "high": "float64", "bins": "int64 = 100"},
    outputs={"counts": "int64[bins]"},
    flops="4*n",
    bytes="4*n + 12*bins",
    limits={"high": "high > low", "bins": "1 <= bins <= 16777216"},
    tolerance=0.0,
    summary="How many numbers fall into each of equal bins between two bounds.",
)

Values = NDArray[np.float32]


@histogram.reference
def _reference(values: Values, low: float, high: float, bins: int) -> Outputs:
    """numpy.histogram(values, bins, (low, high)): bin i holds edge[i] <= value < edge[i + 1], the last its end too.

    The edges are evenly spaced in float64 and rounded to float32, so what decides is comparisons of float32, which
    every device makes alike. What lies outside, and NaN, is not counted; nor is anything where high - low is not a
    finite number above 0.
    """
    edges = _edges(low, high, bins)
    inside = values[(values >= edges[0]) & (values <= edges[-1])]
    index = np.minimum(np.searchsorted(edges, inside, side="right") - 1, bins - 1)
    return {"counts": np.bincount(index, minlength=bins).astype(np.int64)}


def _edges(low: float, high: float, bins: int) -> Values:
    """The bins + 1 edges, all NaN (which nothing is inside of) where the bounds are none."""
    if not 0 < high - low < math.inf:
        return np.full(bins + 1, np.nan, np.float32)
    with np.errstate(over="ignore"):
        return np.linspace(low, high, bins + 1).astype(np.float32)


def _guess(low: float, high: float, bins: int) -> tuple[float, float, float]:
    """Numbers a, b, margin: a value's bin is floor(a * value + b) unless that is within `margin` of a whole number.

    Edges are off by half a last place of float32 at most; a tenth of one is for rounding the guess. A margin of 1 says
    that all guesses are to be doubted.
    """
    span = high - low
    if not 0 < span < math.inf:
        return 0.0, 0.0, 1.0
    scale = bins / span
    margin = 0.6 * float(np.finfo(np.float32).eps) * max(abs(low), abs(high)) * scale
    if not (margin < 0.25 and math.isfinite(scale) and math.isfinite(low * scale)):
        return 0.0, 0.0, 1.0
    return scale, -low * scale, margin


_BLOCK = 2048
#: A call counts in int32, half the memory to scatter to, so it takes no more values than that can count.
_LEAST, _MOST = np.int32(-(2**31)), np.int32(2**31 - 1)


def _count(
    values: Values,
    edges: Values,
    scale: float,
    shift: float,
    margin: float,
    numbers: NDArray[np.int32],
    counts: NDArray[np.int32],
) -> None:
    """A block at a time: vector code guesses the bins, then a loop counts, and looks up what was close to an edge."""
    bins = np.int32(counts.size - 1)  # the last of counts is for what is outside
    lowest, highest = edges[0], edges[bins]
    size = numbers.size
    for start in range(0, values.size, size):
        block = values[start : start + size]
        found = numbers[: block.size]
        for i in range(block.size):
            value = block[i]
            inside = (value >= lowest) & (value <= highest)
            place: Any = np.float64(value) * scale + shift
            place = place if inside else 0.5
            whole = np.int32(place)
            part = place - whole
            whole = whole if (part >= margin) & (part <= 1 - margin) else np.int32(-1)
            found[i] = whole if inside else bins
        for i in range(block.size):
            number = found[i]
            if number < 0:
                number = min(np.int32(np.searchsorted(edges, block[i], "right") - 1), np.int32(bins - 1))
            counts[np.uint32(number)] += np.int32(1)


@histogram.on("cpu")
def _cpu(device: Any) -> Run:
    from numba import njit, types

    values_type = types.Array(types.float32, 1, "C", readonly=True)
    double, number = types.float64, types.int32[::1]
    count = njit(
        (values_type, types.float32[::1], double, double, double, number, number),
        nogil=True,
        cache=True,
        error_model="numpy",
    )(_count)

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, bins, bounds = inputs["values"], inputs["bins"], (inputs["low"], inputs["high"], inputs["bins"])
        edges, guess, numbers = _edges(*bounds), _guess(*bounds), np.empty(_BLOCK, np.int32)
        total = np.zeros(bins, np.int64)
        for start in range(0, values.size, _MOST):
            counts = np.zeros(bins + 1, np.int32)
            count(values[start : start + _MOST], edges, *guess, numbers, counts)
            total += counts[:-1]
        return {"counts": total}

    return run


cuda: Any  # numba.cuda, on a GPU
#: Up to so many bins each block has counts of its own in shared memory, 32 of the 48 KiB that it may have.
_SHARED = 8192


def _bin_gpu(value: float, edges: Values, bins: int, scale: float, shift: float) -> int:
    """The bin of a number inside: the guess where that is right, else by halving the edges."""
    place = value * scale + shift
    guess = min(max(int(place), 0), bins - 1)
    if edges[guess] <= value and (value < edges[guess + 1] or guess == bins - 1):
        return guess
    low, high = 0, bins
    while high - low > 1:
        middle = (low + high) // 2
        if edges[middle] <= value:
            low = middle
        else:
            high = middle
    return low


def _count_gpu(values: Values, edges: Values, scale: float, shift: float, counts: NDArray[np.int64]) -> None:
    bins = counts.size
    for i in range(cuda.grid(1), values.size, cuda.gridsize(1)):
        value = values[i]
        if value >= edges[0] and value <= edges[bins]:
            cuda.atomic.add(counts, _bin_gpu(value, edges, bins, scale, shift), np.int64(1))


def _share_gpu(values: Values, edges: Values, scale: float, shift: float, counts: NDArray[np.int64]) -> None:
    own = cuda.shared.array(_SHARED, np.int32)
    bins = counts.size
    for i in range(cuda.threadIdx.x, bins, cuda.blockDim.x):
        own[i] = 0
    cuda.syncthreads()
    for i in range(cuda.grid(1), values.size, cuda.gridsize(1)):
        value = values[i]
        if value >= edges[0] and value <= edges[bins]:
            cuda.atomic.add(own, _bin_gpu(value, edges, bins, scale, shift), np.int32(1))
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, bins, cuda.blockDim.x):
        if own[i] > 0:
            cuda.atomic.add(counts, i, np.int64(own[i]))


@histogram.on("gpu")
def _gpu(device: Any) -> Run:
    """Atomic sums, in shared memory first where the bins fit there."""
    threads = 16 if device.simulated else 512
    share = device.compile(_share_gpu, threads=(threads,), helpers=(_bin_gpu,))
    count = device.compile(_count_gpu, helpers=(_bin_gpu,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, bounds = inputs["values"], (inputs["low"], inputs["high"], inputs["bins"])
        scale, shift, _ = _guess(*bounds)
        counts = device.zeros((inputs["bins"],), np.int64)
        arguments = values, device.upload(_edges(*bounds)), np.float64(scale), np.float64(shift), counts
        if counts.size <= _SHARED:
            # Each block adds its counts to the result, so it should have many more values than bins.
            blocks = min(-(-values.size // (16 * threads)), 4 if device.simulated else 512)
            share(blocks, *arguments)
        else:
            count(values.size, *arguments)
        return {"counts": counts}

    return run


@histogram.on("tpu")
def _tpu(device: Any) -> Run:
    """Sorts, and looks up where the edges would stand: counting by scattering is what a TPU is slowest at."""
    import jax
    import jax.numpy as jnp

    def count(values: Any, edges: Any, size: Any, bins: Any) -> Any:
        # Ranks of bits, for to XLA's arithmetic the least numbers are 0.
        bits = jax.lax.bitcast_convert_type(values, jnp.int32)
        ranks = jnp.where(bits >= 0, bits, _LEAST - bits)
        counted = (jnp.arange(values.size) < size) & ~jnp.isnan(values)
        ordered = jnp.sort(jnp.where(counted, ranks, _MOST))
        left, right = (jnp.searchsorted(ordered, edges, side=side) for side in ("left", "right"))
        below = jnp.where(jnp.arange(edges.size) == bins, right, left)
        return (below[1:] - below[:-1]).astype(jnp.int64)

    program = device.program(count)

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, bins = inputs["values"], inputs["bins"]
        edges = _edges(inputs["low"], inputs["high"], bins)
        if np.isnan(edges[0]):
            return {"counts": np.zeros(bins, np.int64)}
        bits = edges.view(np.int32)
        ranks = device.upload(np.where(bits >= 0, bits, _LEAST - bits))
        found: Outputs = program({"counts": (bins,)}, values, ranks, np.int64(values.size), np.int64(bins))
        return found

    return run


# A group is one work-item with a share of the values and counts of its own, so that nothing is atomic; the counts are
# then added up, a block of bins at a time.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void fill(__global const float* restrict values, __global const float* restrict edges, __global uint* restrict tables,
          ulong size, ulong share, int bins, double scale, double shift, double margin) {
  __local int numbers[BLOCK];
  __global uint* counts = tables + get_group_id(0) * (bins + 1UL);  // the last is for what is outside
  for (int bin = 0; bin <= bins; bin++) counts[bin] = 0;
  const float lowest = edges[0], highest = edges[bins];
  const ulong end = min((get_group_id(0) + 1) * share, size);
  for (ulong start = get_group_id(0) * share; start < end; start += BLOCK) {
    const int block = min((ulong)BLOCK, end - start);
    for (int i = 0; i < block; i++) {
      const float value = values[start + i];
      const int inside = value >= lowest && value <= highest;
      const double place = inside ? value * scale + shift : 0.5;
      const int whole = (int)place;
      const double part = place - whole;
      const int guess = part >= margin && part <= 1 - margin ? whole : -1;
      numbers[i] = inside ? guess : bins;
    }
    for (int i = 0; i < block; i++) {
      int low = numbers[i];
      if (low < 0) {  // too close to an edge to tell
        int high = bins;
        low = 0;
        while (high - low > 1) {
          const int middle = (low + high) / 2;
          if (edges[middle] <= values[start + i]) low = middle;
          else high = middle;
        }
      }
      counts[low]++;
    }
  }
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void join(__global const uint* restrict tables, int parts, int bins, __global long* restrict counts) {
  const int start = get_group_id(0) * PART, stop = min(start + PART, bins);
  for (int bin = start; bin < stop; bin++) {
    long sum = 0;
    for (int part = 0; part < parts; part++) sum += tables[part * (bins + 1UL) + bin];
    counts[bin] = sum;
  }
}
"""
_PART = 1024
#: Each share has at least so many values, and all tables together at most so many counts.
_SHARE, _MOST_PARTS, _MOST_COUNTS = 2**17, 16, 2**22


@histogram.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "data.histogram", BLOCK=_BLOCK, PART=_PART)

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, bins, bounds = inputs["values"], inputs["bins"], (inputs["low"], inputs["high"], inputs["bins"])
        parts = max(1, min(values.size // _SHARE, _MOST_PARTS, _MOST_COUNTS // bins))
        tables, counts = device.empty((parts, bins + 1), np.uint32), device.empty((bins,), np.int64)
        sizes = np.uint64(values.size), np.uint64(-(-values.size // parts)), np.int32(bins)
        guess = [np.float64(each) for each in _guess(*bounds)]
        program.launch("fill", (parts,), values, device.upload(_edges(*bounds)), tables, *sizes, *guess)
        program.launch("join", (-(-bins // _PART),), tables, np.int32(parts), np.int32(bins), counts)
        return {"counts": counts}

    return run


@histogram.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, bins in ((1, 1), (1_000, 10), (5_000, 300), (1_000, 10_000)):
        yield {"values": random.standard_normal(n, np.float32), "low": -3.0, "high": 3.0, "bins": bins}
    # On the edges, next to them, and outside.
    edges = np.linspace(0, 1, 11).astype(np.float32)
    near = np.concatenate([edges, np.nextafter(edges, np.float32(2)), np.nextafter(edges, np.float32(-1))])
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 2], np.float32)
    yield {"values": np.concatenate([near, odd]), "low": 0.0, "high": 1.0, "bins": 10}
    # Bins finer than float32 tells apart, far from 0.
    yield {"values": np.linspace(1e6, 1e6 + 1, 1_000, dtype=np.float32), "low": 1e6, "high": 1e6 + 1, "bins": 1_000}
