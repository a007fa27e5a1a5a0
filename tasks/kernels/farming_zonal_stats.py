"""Zonal statistics: what a raster says of each field on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

zonal_stats = Kernel(
    "farming.zonal_stats",
    inputs={"values": "float32[h,w]", "zone": "int32[h,w]", "zones": "int64"},
    outputs={
        "count": "int64[zones]",
        "mean": "float64[zones]",
        "deviation": "float64[zones]",
        "least": "float64[zones]",
        "most": "float64[zones]",
    },
    flops="8*h*w + 8*zones",
    bytes="16*h*w + 40*zones",
    limits={"zones": "0 <= zones <= 16777216"},
    batch="stack",
    tolerance=1e-9,
    summary="How many pixels each zone of a raster has, and their mean, deviation, least and greatest value.",
)

Values = NDArray[np.float32]
Zones = NDArray[np.int32]
Column = NDArray[np.float64]


@zonal_stats.reference
def _reference(values: Values, zone: Zones, zones: int) -> Outputs:
    """Of each zone 0 to zones - 1, over the pixels that are its by `zone`; the deviation is the population's.

    Pixels that are NaN, or whose zone is none of these, count nowhere; a zone without pixels has count 0 and NaN for
    the rest. Infinities count as values do: the mean is then infinite or NaN, and the deviation NaN. In float64, and in
    two passes, the squares of the differences from the mean in the second (Chan, Golub, LeVeque 1983, "Algorithms for
    computing the sample variance", The American Statistician 37(3), eq. 1.3), so that values far from 0 lose nothing.
    """
    counted = (zone >= 0) & (zone < zones) & ~np.isnan(values)
    inside, own = values[counted].astype(np.float64), zone[counted]
    count = np.bincount(own, minlength=zones)
    least, most = np.full(zones, np.inf), np.full(zones, -np.inf)
    np.minimum.at(least, own, inside)
    np.maximum.at(most, own, inside)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.bincount(own, inside, minlength=zones) / count
        deviation = np.sqrt(np.bincount(own, (inside - mean[own]) ** 2, minlength=zones) / count)
    empty = count == 0
    least[empty], most[empty] = np.nan, np.nan
    return {"count": count, "mean": mean, "deviation": deviation, "least": least, "most": most}


# Pixels of a zone lie together, so the variant asks of a chunk whether it is of one zone, and if so reduces it as one
# vector loop. Extremes are found as whole numbers that are in the order of the floats (Lamport's trick: the bits of
# negative ones are turned over), whose vector minimum knows of no NaN.
_CHUNK = 32
_INFINITE = 0x7F800000


def _key(bits: Any) -> Any:
    """A float32's bits as an int32 that is in the order of the floats, and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


def _is_uniform(zone: Zones) -> bool:
    different = np.int32(0)
    for i in range(_CHUNK):
        different = np.int32(different | np.int32(zone[i] ^ zone[0]))
    return different == 0


def _describe(
    values: NDArray[np.int32],
    zone: Zones,
    count: NDArray[np.int64],
    mean: Column,
    least: NDArray[np.int32],
    most: NDArray[np.int32],
) -> None:
    """The first pass, over the bits of the values: counts, sums (into `mean`) and extremes by key."""
    zones = count.size
    whole = values.size // _CHUNK * _CHUNK
    for start in range(0, whole, _CHUNK):
        chunk, own = values[start : start + _CHUNK], zone[start : start + _CHUNK]
        if not _is_uniform(own):
            _describe_each(chunk, own, count, mean, least, most)
        elif 0 <= own[0] < zones:
            found, total, low, high = _described(chunk)
            at = own[0]
            count[at] += found
            mean[at] += total
            least[at], most[at] = min(least[at], low), max(most[at], high)
    _describe_each(values[whole:], zone[whole:], count, mean, least, most)


def _described(chunk: NDArray[np.int32]) -> tuple[Any, float, Any, Any]:
    found, total, low, high = np.int32(0), 0.0, np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(_CHUNK):
        bits: Any = chunk[i]
        valid = np.int32(bits & np.int32(0x7FFFFFFF)) <= np.int32(_INFINITE)
        key = _key(bits)
        found = np.int32(found + np.int32(valid))
        total += np.float64(np.int32(bits if valid else np.int32(0)).view(np.float32))
        low = min(low, np.int32(key if valid else np.int32(0x7FFFFFFF)))
        high = max(high, np.int32(key if valid else np.int32(-0x80000000)))
    return found, total, low, high


def _describe_each(
    values: NDArray[np.int32],
    zone: Zones,
    count: NDArray[np.int64],
    mean: Column,
    least: NDArray[np.int32],
    most: NDArray[np.int32],
) -> None:
    zones = count.size
    for i in range(values.size):
        at, bits = zone[i], np.int32(values[i])
        if 0 <= at < zones and np.int32(bits & np.int32(0x7FFFFFFF)) <= np.int32(_INFINITE):
            key = _key(bits)
            count[at] += 1
            mean[at] += bits.view(np.float32)
            least[at], most[at] = min(least[at], key), max(most[at], key)


def _spread(values: NDArray[np.int32], zone: Zones, mean: Column, squares: Column) -> None:
    """The second pass: the squares of the differences from each zone's mean."""
    zones = mean.size
    whole = values.size // _CHUNK * _CHUNK
    for start in range(0, whole, _CHUNK):
        chunk, own = values[start : start + _CHUNK], zone[start : start + _CHUNK]
        if not _is_uniform(own):
            _spread_each(chunk, own, mean, squares)
        elif 0 <= own[0] < zones:
            squares[own[0]] += _spread_of(chunk, mean[own[0]])
    _spread_each(values[whole:], zone[whole:], mean, squares)


def _spread_of(chunk: NDArray[np.int32], mean: float) -> float:
    total = 0.0
    for i in range(_CHUNK):
        bits: Any = chunk[i]
        valid = np.int32(bits & np.int32(0x7FFFFFFF)) <= np.int32(_INFINITE)
        difference = np.float64(np.int32(bits).view(np.float32)) - mean
        total += difference * difference if valid else 0.0
    return total


def _spread_each(values: NDArray[np.int32], zone: Zones, mean: Column, squares: Column) -> None:
    zones = mean.size
    for i in range(values.size):
        at, bits = zone[i], np.int32(values[i])
        if 0 <= at < zones and np.int32(bits & np.int32(0x7FFFFFFF)) <= np.int32(_INFINITE):
            difference = np.float64(np.int32(bits).view(np.float32)) - mean[at]
            squares[at] += difference * difference


def _summarize(
    values: NDArray[np.int32],
    zone: Zones,
    count: NDArray[np.int64],
    mean: Column,
    deviation: Column,
    least: Column,
    most: Column,
) -> None:
    zones = count.size
    low, high = np.full(zones, 0x7FFFFFFF, np.int32), np.full(zones, -0x80000000, np.int32)
    count[:] = 0
    mean[:] = 0
    deviation[:] = 0
    _describe(values, zone, count, mean, low, high)
    for i in range(zones):
        mean[i] /= count[i]
    _spread(values, zone, mean, deviation)
    for i in range(zones):
        deviation[i] = np.sqrt(deviation[i] / count[i])
        least[i] = np.int32(_key(low[i])).view(np.float32) if count[i] > 0 else np.nan
        most[i] = np.int32(_key(high[i])).view(np.float32) if count[i] > 0 else np.nan


@zonal_stats.on("cpu")
def _cpu(device: Any) -> Run:
    """Takes one raster, or a stack of them."""
    from numba import njit, types
    from numba.extending import register_jitable

    for function in (_key, _is_uniform, _describe, _describe_each, _spread, _spread_each):
        register_jitable(function)
    for reducing in (_described, _spread_of):  # sums in the order that vectors take; NaN is told by its bits
        register_jitable(fastmath={"reassoc", "contract"})(reducing)
    pixels, column = types.Array(types.int32, 1, "C", readonly=True), types.float64[::1]
    summarize = njit(
        (pixels, pixels, types.int64[::1], column, column, column, column),
        nogil=True,
        cache=True,
        error_model="numpy",
    )(_summarize)

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, zone, zones = inputs["values"], inputs["zone"], inputs["zones"]
        stack = values.shape[:-2]
        rasters = values.reshape(*(stack or (1,)), values.shape[-2] * values.shape[-1])
        count = np.empty((len(rasters), zones), np.int64)
        statistics = [np.empty((len(rasters), zones)) for _ in range(4)]
        for number, (raster, own) in enumerate(zip(rasters, zone.reshape(rasters.shape), strict=True)):
            summarize(raster.view(np.int32), own, count[number], *(each[number] for each in statistics))
        mean, deviation, least, most = (each.reshape(*stack, zones) for each in statistics)
        return {
            "count": count.reshape(*stack, zones),
            "mean": mean,
            "deviation": deviation,
            "least": least,
            "most": most,
        }

    return run


# A thread goes down a column of a strip of rows, so that those of a warp read side by side; it keeps to itself what it
# finds of a zone, and adds it to the zone's by atomic operations when it comes to another.
cuda: Any  # numba.cuda, in the copies that the gpu's driver compiles
_ROWS = 64


def _describe_gpu(
    values: Values,
    bits: NDArray[np.int32],
    zone: Zones,
    strips: int,
    count: NDArray[np.int64],
    total: Column,
    least: NDArray[np.int32],
    most: NDArray[np.int32],
) -> None:
    images, height, width = values.shape
    zones = count.shape[1]
    for i in range(cuda.grid(1), images * strips * width, cuda.gridsize(1)):
        x, strip, image = i % width, i // width % strips, i // width // strips
        at, found, sum_ = -1, np.int64(0), 0.0
        low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for y in range(strip * _ROWS, min((strip + 1) * _ROWS, height)):
            own, value = zone[image, y, x], values[image, y, x]
            if own < 0 or own >= zones or value != value:
                continue
            if own != at:
                if found > 0:
                    cuda.atomic.add(count, (image, at), found)
                    cuda.atomic.add(total, (image, at), sum_)
                    cuda.atomic.min(least, (image, at), low)
                    cuda.atomic.max(most, (image, at), high)
                at, found, sum_ = own, np.int64(0), 0.0
                low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
            key = _key(bits[image, y, x])
            found += np.int64(1)
            sum_ += np.float64(value)
            low, high = min(low, key), max(high, key)
        if found > 0:
            cuda.atomic.add(count, (image, at), found)
            cuda.atomic.add(total, (image, at), sum_)
            cuda.atomic.min(least, (image, at), low)
            cuda.atomic.max(most, (image, at), high)


def _mean_gpu(
    count: NDArray[np.int64], total: Column, least: NDArray[np.int32], most: NDArray[np.int32], mean: Column
) -> None:
    for i in range(cuda.grid(1), count.size, cuda.gridsize(1)):
        mean[i] = total[i] / np.float64(count[i]) if count[i] > 0 else np.nan
        least[i], most[i] = _key(least[i]), _key(most[i])


def _spread_gpu(values: Values, zone: Zones, strips: int, mean: Column, squares: Column) -> None:
    images, height, width = values.shape
    zones = mean.shape[1]
    for i in range(cuda.grid(1), images * strips * width, cuda.gridsize(1)):
        x, strip, image = i % width, i // width % strips, i // width // strips
        at, sum_, middle = -1, 0.0, 0.0
        for y in range(strip * _ROWS, min((strip + 1) * _ROWS, height)):
            own, value = zone[image, y, x], values[image, y, x]
            if own < 0 or own >= zones or value != value:
                continue
            if own != at:
                if at >= 0:
                    cuda.atomic.add(squares, (image, at), sum_)
                at, sum_, middle = own, 0.0, mean[image, own]
            sum_ += (np.float64(value) - middle) * (np.float64(value) - middle)
        if at >= 0:
            cuda.atomic.add(squares, (image, at), sum_)


def _finish_gpu(
    count: NDArray[np.int64],
    squares: Column,
    low: Values,
    high: Values,
    deviation: Column,
    least: Column,
    most: Column,
) -> None:
    for i in range(cuda.grid(1), count.size, cuda.gridsize(1)):
        some = count[i] > 0
        deviation[i] = math.sqrt(squares[i] / np.float64(count[i])) if some else np.nan
        least[i] = np.float64(low[i]) if some else np.nan
        most[i] = np.float64(high[i]) if some else np.nan


@zonal_stats.on("gpu")
def _gpu(device: Any) -> Run:
    """Takes one raster, or a stack of them."""
    describe = device.compile(_describe_gpu, helpers=(_key,))
    average = device.compile(_mean_gpu, helpers=(_key,))
    spread, finish = device.compile(_spread_gpu), device.compile(_finish_gpu)

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, zone, zones = inputs["values"], inputs["zone"], inputs["zones"]
        *stack, height, width = values.shape
        number, strips = stack[0] if stack else 1, -(-height // _ROWS)
        raster, own = values.reshape(number, height, width), zone.reshape(number, height, width)
        whole, items, every = (number, zones), number * strips * width, number * zones
        count, total, squares = (device.zeros(whole, dtype) for dtype in (np.int64, np.float64, np.float64))
        low, high = device.full(whole, 0x7FFFFFFF, np.int32), device.full(whole, -0x80000000, np.int32)
        mean, deviation, least, most = (device.empty(whole, np.float64) for _ in range(4))
        describe(items, raster, raster.view(np.int32), own, np.int64(strips), count, total, low, high)
        flat = count.reshape(-1)
        average(every, flat, total.reshape(-1), low.reshape(-1), high.reshape(-1), mean.reshape(-1))
        spread(items, raster, own, np.int64(strips), mean, squares)
        extremes = low.view(np.float32).reshape(-1), high.view(np.float32).reshape(-1)
        found = (each.reshape(-1) for each in (deviation, least, most))
        finish(every, flat, squares.reshape(-1), *extremes, *found)
        outputs = {"count": count, "mean": mean, "deviation": deviation, "least": least, "most": most}
        return {name: each.reshape(*stack, zones) for name, each in outputs.items()}

    return run


# Each group keeps the sums of a part of the raster to itself, as OpenCL has no atomic sum of doubles, and a second
# kernel joins the parts; then the same for the squares. Few groups where there are many zones: the parts take memory.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

int key(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }  // in the order of the floats, and back

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void describe(__global const float* restrict values, __global const int* restrict zone, ulong pixels, ulong strip,
              __global long* restrict counts, __global double* restrict sums, __global int* restrict lows,
              __global int* restrict highs, int zones) {
  const ulong part = get_group_id(1) * get_num_groups(0) + get_group_id(0);
  const ulong first = get_group_id(1) * pixels, start = get_group_id(0) * strip, stop = min(start + strip, pixels);
  counts += part * zones; sums += part * zones; lows += part * zones; highs += part * zones;
  for (int i = 0; i < zones; i++) {
    counts[i] = 0;
    sums[i] = 0;
    lows[i] = 0x7fffffff;
    highs[i] = -0x7fffffff - 1;
  }
  for (ulong i = first + start; i < first + stop; i++) {
    const int at = zone[i];
    const float value = values[i];
    if (at >= 0 && at < zones && !isnan(value)) {
      const int found = key(as_int(value));
      counts[at]++;
      sums[at] += value;
      lows[at] = min(lows[at], found);
      highs[at] = max(highs[at], found);
    }
  }
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void join(__global const long* restrict counts, __global const double* restrict sums,
          __global const int* restrict lows, __global const int* restrict highs, int parts, int zones,
          __global long* restrict count, __global double* restrict mean, __global double* restrict least,
          __global double* restrict most) {
  const ulong image = get_group_id(1);
  const int start = get_group_id(0) * BLOCK, stop = min(start + BLOCK, zones);
  for (int i = start; i < stop; i++) {
    long found = 0;
    double sum = 0;
    int low = 0x7fffffff, high = -0x7fffffff - 1;
    for (int part = 0; part < parts; part++) {
      const ulong at = (image * parts + part) * zones + i;
      found += counts[at];
      sum += sums[at];
      low = min(low, lows[at]);
      high = max(high, highs[at]);
    }
    count[image * zones + i] = found;
    mean[image * zones + i] = sum / found;
    least[image * zones + i] = found > 0 ? (double)as_float(key(low)) : NAN;
    most[image * zones + i] = found > 0 ? (double)as_float(key(high)) : NAN;
  }
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void spread(__global const float* restrict values, __global const int* restrict zone, ulong pixels, ulong strip,
            __global const double* restrict means, __global double* restrict squares, int zones) {
  const ulong part = get_group_id(1) * get_num_groups(0) + get_group_id(0);
  const ulong first = get_group_id(1) * pixels, start = get_group_id(0) * strip, stop = min(start + strip, pixels);
  squares += part * zones;
  means += get_group_id(1) * zones;
  for (int i = 0; i < zones; i++) squares[i] = 0;
  for (ulong i = first + start; i < first + stop; i++) {
    const int at = zone[i];
    const float value = values[i];
    if (at >= 0 && at < zones && !isnan(value)) squares[at] += (value - means[at]) * (value - means[at]);
  }
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void deviate(__global const double* restrict squares, __global const long* restrict count, int parts, int zones,
             __global double* restrict deviation) {
  const ulong image = get_group_id(1);
  const int start = get_group_id(0) * BLOCK, stop = min(start + BLOCK, zones);
  for (int i = start; i < stop; i++) {
    double sum = 0;
    for (int part = 0; part < parts; part++) sum += squares[(image * parts + part) * zones + i];
    deviation[image * zones + i] = sqrt(sum / count[image * zones + i]);
  }
}
"""
_BLOCK = 4096
_PARTS = 16
_MOST_PARTIAL = 2**20


@zonal_stats.on("fpga")
def _fpga(device: Any) -> Run:
    """Takes one raster, or a stack of them along the second axis of groups."""
    program = device.program(_OPENCL, "farming.zonal_stats", BLOCK=_BLOCK)

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, zone, zones = inputs["values"], inputs["zone"], inputs["zones"]
        *stack, height, width = values.shape
        number, pixels = stack[0] if stack else 1, height * width
        parts = max(1, min(_PARTS, _MOST_PARTIAL // max(zones, 1), -(-pixels // _BLOCK)))
        whole, partial = (*stack, zones), (number, parts, zones)
        counts, lows, highs = (device.empty(partial, dtype) for dtype in (np.int64, np.int32, np.int32))
        sums = device.empty(partial, np.float64)
        count = device.empty(whole, np.int64)
        mean, deviation, least, most = (device.empty(whole, np.float64) for _ in range(4))
        raster = values, zone, np.uint64(pixels), np.uint64(-(-pixels // parts))
        sizes = np.int32(parts), np.int32(zones)
        blocks = (-(-zones // _BLOCK), number)
        program.launch("describe", (parts, number), *raster, counts, sums, lows, highs, np.int32(zones))
        program.launch("join", blocks, counts, sums, lows, highs, *sizes, count, mean, least, most)
        program.launch("spread", (parts, number), *raster, mean, sums, np.int32(zones))
        program.launch("deviate", blocks, sums, count, *sizes, deviation)
        return {"count": count, "mean": mean, "deviation": deviation, "least": least, "most": most}

    return run


@zonal_stats.on("tpu")
def _tpu(device: Any) -> Run:
    """Takes one raster, or a stack of them: their zones are one after the other's. How many is compiled in, padded."""
    import jax.numpy as jnp
    from jax import ops

    def describe(values: Any, zone: Any, height: Any, width: Any, zones: Any, room: int) -> Any:
        *stack, tall, wide = values.shape
        number = stack[0] if stack else 1
        segments = number * room + 1  # the last is of the pixels that count nowhere
        inside = (jnp.arange(tall) < height)[:, None] & (jnp.arange(wide) < width)
        counted = inside & (zone >= 0) & (zone < zones) & ~jnp.isnan(values)
        first = (jnp.arange(number) * room).reshape(*stack, 1, 1)
        own = jnp.where(counted, zone + first, segments - 1).reshape(-1)
        exact = jnp.where(counted, values, 0).reshape(-1).astype(jnp.float64)
        count = ops.segment_sum(counted.reshape(-1).astype(jnp.int64), own, segments)
        mean = ops.segment_sum(exact, own, segments) / count
        squares = ops.segment_sum((exact - mean[own]) ** 2, own, segments)
        empty = count == 0
        least = jnp.where(empty, jnp.nan, ops.segment_min(exact, own, segments))
        most = jnp.where(empty, jnp.nan, ops.segment_max(exact, own, segments))
        found = count, mean, jnp.sqrt(squares / count), least, most
        return tuple(each[:-1].reshape(*stack, room) for each in found)

    program = device.program(describe, static=("room",))

    def run(inputs: Inputs, context: Context) -> Outputs:
        values, zone, zones = inputs["values"], inputs["zone"], inputs["zones"]
        *stack, height, width = values.shape
        shapes = dict.fromkeys(("count", "mean", "deviation", "least", "most"), (*stack, zones))
        sizes = np.int32(height), np.int32(width), np.int32(zones)
        return program(shapes, values, zone, *sizes, room=device.bucket(zones))

    return run


@zonal_stats.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for h, w, zones in ((1, 1, 1), (5, 7, 3), (64, 200, 10)):
        values = 1000 + random.standard_normal((h, w), np.float32)
        yield {"values": values, "zone": _fields(h, w, zones), "zones": zones}
    # A zone without a pixel, pixels without a value, and zones that there are not.
    values = np.array([[1, np.nan, 3, -np.inf], [np.nan, 5, -0.0, 7]], np.float32)
    yield {"values": values, "zone": np.array([[0, 0, 4, 1], [3, -1, 4, 2**31 - 1]], np.int32), "zones": 5}
    yield {"values": values, "zone": np.zeros((2, 4), np.int32), "zones": 0}


def _fields(height: int, width: int, zones: int) -> Zones:
    """Stripes of fields, at a slant."""
    y, x = np.mgrid[:height, :width]
    return np.asarray((x + y // 4) // max(width // zones, 1) % (zones + 1), np.int32)
