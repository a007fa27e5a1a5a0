"""Medical images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

median_filter = Kernel(
    "medical.median_filter",
    inputs={"image": "float32[h,w]", "radius": "int64 = 1"},
    outputs={"filtered": "float32[h,w]"},
    flops="16*h*w*(2*radius + 1)",
    bytes="8*h*w",
    limits={"radius": "0 <= radius <= 16"},
    batch="stack",
    tolerance=0.0,
    summary="The median of the square around each pixel; the image's edge is repeated outwards.",
)


@median_filter.reference
def _reference(image: NDArray[np.float32], radius: int) -> Outputs:
    """The middle of the (2 radius + 1)**2 sorted values around each pixel (Tukey 1977), edges repeated.

    The count is odd, so the median is one of the values and every variant must find exactly it. A square with a NaN
    in it has median NaN.
    """
    if image.size == 0:
        return {"filtered": image.copy()}
    width = 2 * radius + 1
    squares = np.lib.stride_tricks.sliding_window_view(np.pad(image, radius, mode="edge"), (width, width))
    values = np.sort(squares.reshape(*image.shape, width * width), axis=-1)
    middle = values[..., width * width // 2]
    # NaN sorts last.
    return {"filtered": np.where(np.isnan(values[..., -1]), np.float32(np.nan), middle)}


#: Larger squares would need a network of thousands of exchanges.
_MOST_BY_NETWORK = 3
_LANES = 512
_TILE = 96


@lru_cache
def _network(size: int) -> NDArray[np.int64]:
    """The pairs (i, j) to put in order, so that value size // 2 of `size` values becomes their median.

    Batcher's merge exchange sort (Knuth, TAOCP vol. 3, algorithm 5.2.2M), less the pairs that the median does not
    depend on.
    """
    pairs = []
    top = 1 << max((size - 1).bit_length() - 1, 0)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(size - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    needed, kept = {size // 2}, []
    for i, j in reversed(pairs):
        if i in needed or j in needed:
            needed |= {i, j}
            kept.append((i, j))
    return np.array(kept[::-1], np.int64).reshape(-1, 2)


def _median_by_network(
    padded: NDArray[np.int32], radius: int, pairs: NDArray[np.int64], filtered: NDArray[np.int32]
) -> None:
    """A sorting network over whole strips of pixels: each exchange is a vector minimum and maximum in the L1 cache.

    For small squares. Neither branches nor data decide the time. It goes over the bits of the floats, made so that
    whole numbers are in their order: of a minimum of floats LLVM makes a masked store here, four times as slow.
    """
    images, height, width = filtered.shape
    side = 2 * radius + 1
    lanes = np.empty((side * side, _LANES), np.int32)
    for image in range(images):
        for y in range(height):
            for x in range(0, width, _LANES):
                size = min(_LANES, width - x)
                for dy in range(side):
                    for dx in range(side):
                        _copy(padded[image, y + dy, x + dx :], lanes[dy * side + dx], size)
                for pair in range(pairs.shape[0]):
                    _exchange(lanes[pairs[pair, 0]], lanes[pairs[pair, 1]], size)
                _copy(lanes[side * side // 2], filtered[image, y, x:], size)


def _copy(source: NDArray[np.int32], target: NDArray[np.int32], size: int) -> None:
    """From the bits of floats to whole numbers in their order (those of negative ones are turned over), and back."""
    for lane in range(size):
        bits = source[lane]
        target[lane] = bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _exchange(low: NDArray[np.int32], high: NDArray[np.int32], size: int) -> None:
    """Puts each lane's smaller value first."""
    for lane in range(size):
        a, b = low[lane], high[lane]
        low[lane] = min(b, a)
        high[lane] = max(b, a)


def _median_by_rank(padded: NDArray[np.float32], radius: int, filtered: NDArray[np.float32]) -> None:
    """Suomela (2014), "Median Filtering is Equivalent to Sorting", arXiv:1406.1717.

    Each tile's values are sorted once. A set of ranks, one bit each, holds the square; a step of it changes one side's
    values, and the median is found again by walking a few words of bits from where it was. For large squares: a step
    costs 2 (2 radius + 1) bits rather than (2 radius + 1)**2 values.
    """
    images, height, width = filtered.shape
    side = 2 * radius + 1
    half = side * side // 2
    reach = _TILE + 2 * radius
    one, low6 = np.uint64(1), np.int64(63)
    ranks = np.empty((reach, reach), np.int32)
    old: Any
    new: Any
    keys, order = np.empty((2, reach * reach), np.uint32), np.empty((2, reach * reach), np.int32)
    values = np.empty(reach * reach, np.float32)
    bits = np.empty(reach * reach // 64 + 1, np.uint64)
    buckets = np.empty(2049, np.int64)
    for image in range(images):
        for top in range(0, height, _TILE):
            for left in range(0, width, _TILE):
                rows, columns = min(_TILE, height - top), min(_TILE, width - left)
                tall, wide = rows + 2 * radius, columns + 2 * radius
                count = tall * wide
                for y in range(tall):
                    for x in range(wide):
                        value: Any = np.float32(padded[image, top + y, left + x])
                        raw = value.view(np.uint32)
                        keys[0, y * wide + x] = ~raw if raw >> np.uint32(31) else raw | np.uint32(0x80000000)
                        order[0, y * wide + x] = y * wide + x
                # Radix sort, 11 bits at a time; three passes end in the second half of the buffers.
                for digit in range(3):
                    shift = np.uint32(11 * digit)
                    source, target = digit & 1, 1 - (digit & 1)
                    buckets.fill(0)
                    for i in range(count):
                        buckets[np.int64((keys[source, i] >> shift) & np.uint32(2047)) + 1] += 1
                    for i in range(2048):
                        buckets[i + 1] += buckets[i]
                    for i in range(count):
                        key = keys[source, i]
                        bucket = np.int64((key >> shift) & np.uint32(2047))
                        place = buckets[bucket]
                        buckets[bucket] = place + 1
                        keys[target, place] = key
                        order[target, place] = order[source, i]
                for i in range(count):
                    y, x = order[1, i] // wide, order[1, i] % wide
                    ranks[y, x] = i
                    values[i] = padded[image, top + y, left + x]
                bits.fill(0)
                word, below = 0, 0
                for y in range(side):
                    for x in range(side):
                        rank = np.int64(ranks[y, x])
                        bits[rank >> 6] |= one << np.uint64(rank & low6)
                # The square goes right along one row and left along the next.
                x = 0
                for y in range(rows):
                    if y > 0:
                        for i in range(side):
                            old, new = np.int64(ranks[y - 1, x + i]), np.int64(ranks[y + 2 * radius, x + i])
                            bits[old >> 6] ^= one << np.uint64(old & low6)
                            bits[new >> 6] ^= one << np.uint64(new & low6)
                            below += ((new >> 6) < word) - ((old >> 6) < word)
                    forward = y % 2 == 0
                    for step in range(columns):
                        if step > 0:
                            leaving, entering = (x, x + side) if forward else (x + side - 1, x - 1)
                            x += 1 if forward else -1
                            for i in range(side):
                                old, new = np.int64(ranks[y + i, leaving]), np.int64(ranks[y + i, entering])
                                bits[old >> 6] ^= one << np.uint64(old & low6)
                                bits[new >> 6] ^= one << np.uint64(new & low6)
                                below += ((new >> 6) < word) - ((old >> 6) < word)
                        while below > half:
                            word -= 1
                            below -= _ones(bits[word])
                        here = _ones(bits[word])
                        while below + here <= half:
                            below += here
                            word += 1
                            here = _ones(bits[word])
                        rest = bits[word]
                        for _ in range(half - below):
                            rest &= rest - one
                        lowest = (rest & (~rest + one)) - one
                        filtered[image, top + y, left + x] = values[word * 64 + _ones(lowest)]


def _ones(x: Any) -> int:
    """How many bits of a uint64 are set. LLVM knows this form and makes one instruction of it."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int(np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56)))


def _padded(images: NDArray[np.float32], radius: int) -> NDArray[np.float32]:
    """`np.pad(..., mode="edge")` of both image axes, which takes 40 us of Python more: longer than a small image."""
    count, height, width = images.shape
    padded = np.empty((count, height + 2 * radius, width + 2 * radius), np.float32)
    inner = padded[:, radius : radius + height]
    inner[:, :, radius : radius + width] = images
    inner[:, :, :radius] = images[:, :, :1]
    inner[:, :, radius + width :] = images[:, :, -1:]
    padded[:, :radius] = inner[:, :1]
    padded[:, radius + height :] = inner[:, -1:]
    return padded


def _spread_nan(image: NDArray[np.float32], radius: int, filtered: NDArray[np.float32]) -> None:
    """Puts NaN wherever the square holds one: minimum and maximum alone would lose it."""
    for plane, result in zip(image, filtered, strict=True):
        for y, x in np.argwhere(np.isnan(plane)):
            result[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1] = np.nan


@median_filter.on("cpu")
def _cpu(device: Any) -> Run:
    """Takes one image, or a stack of them."""
    from numba import njit, types
    from numba.extending import register_jitable

    for function in (_copy, _exchange, _ones):
        register_jitable(function)
    padded_type, bits_type = types.float32[:, :, ::1], types.int32[:, :, ::1]
    pairs_type = types.Array(types.int64, 2, "C", readonly=True)
    options = {"nogil": True, "cache": True, "error_model": "numpy"}
    by_network = njit((bits_type, types.int64, pairs_type, bits_type), **options)(_median_by_network)
    by_rank = njit((padded_type, types.int64, padded_type), **options)(_median_by_rank)

    def run(inputs: Inputs, context: Context) -> Outputs:
        image, radius = inputs["image"], inputs["radius"]
        if image.size == 0 or radius == 0:
            return {"filtered": image.copy()}
        images = image if image.ndim == 3 else image[None]
        filtered = np.empty(images.shape, np.float32)
        padded = _padded(images, radius)
        if radius <= _MOST_BY_NETWORK:
            pairs = _network((2 * radius + 1) ** 2)
            by_network(padded.view(np.int32), radius, pairs, filtered.view(np.int32))
        else:
            by_rank(padded, radius, filtered)
        if np.isnan(images).any():
            _spread_nan(images, radius, filtered)
        return {"filtered": filtered.reshape(image.shape)}

    return run


cuda: Any  # numba.cuda, on a GPU
#: A block is _SIDE by _SIDE threads, a pixel each, and sees _REACH = _SIDE + 2 * 16 pixels across.
_SIDE, _REACH = 16, 48


def _median_gpu(images: NDArray[np.uint32], radius: int, filtered: NDArray[np.uint32]) -> None:
    """By halving: the median is the least value that more than half of the square's are not above.

    Values are the bits of floats, made so that unsigned numbers are in their order; the square's own least and most
    begin the search, so it takes 32 rounds at most, the same for every thread of a block but for the last few.
    """
    keys = cuda.shared.array((_REACH, _REACH), np.uint32)
    height, width = images.shape[1], images.shape[2]
    down, across = (height + _SIDE - 1) // _SIDE, (width + _SIDE - 1) // _SIDE
    image = cuda.blockIdx.x // (down * across)
    tile = cuda.blockIdx.x - image * (down * across)
    top, left = (tile // across) * _SIDE, (tile % across) * _SIDE
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    reach, side = _SIDE + 2 * radius, 2 * radius + 1
    for row in range(y, reach, _SIDE):
        for column in range(x, reach, _SIDE):  # the image's edge is repeated outwards
            at = min(max(top + row - radius, 0), height - 1)
            bits = np.int64(images[image, at, min(max(left + column - radius, 0), width - 1)])
            keys[row, column] = np.uint32(bits ^ 0xFFFFFFFF if bits >= 0x80000000 else bits ^ 0x80000000)
    cuda.syncthreads()
    if top + y >= height or left + x >= width:
        return
    low, high = np.uint32(0xFFFFFFFF), np.uint32(0)
    for row in range(y, y + side):
        for column in range(x, x + side):
            low, high = min(low, keys[row, column]), max(high, keys[row, column])
    if low < np.uint32(0x007FFFFF) or high > np.uint32(0xFF800000):  # beyond the infinities is NaN
        filtered[image, top + y, left + x] = np.uint32(0x7FC00000)
        return
    half = side * side // 2
    while low < high:
        middle = np.uint32(low + (high - low) // np.uint32(2))
        below = 0
        for row in range(y, y + side):
            for column in range(x, x + side):
                below += 1 if keys[row, column] <= middle else 0
        if below > half:
            high = middle
        else:
            low = np.uint32(middle + np.uint32(1))
    found = np.int64(low)
    filtered[image, top + y, left + x] = np.uint32(found ^ 0x80000000 if found >= 0x80000000 else found ^ 0xFFFFFFFF)


@median_filter.on("gpu")
def _gpu(device: Any) -> Run:
    """Takes one image, or a stack of them."""
    side = 4 if device.simulated else _SIDE
    median = device.compile(_median_gpu, threads=(side, side), constants={"_SIDE": side, "_REACH": side + 32})

    def run(inputs: Inputs, context: Context) -> Outputs:
        image = inputs["image"]
        *stack, height, width = image.shape
        filtered = device.empty(image.shape, np.float32)
        shape = (math.prod(stack), height, width)
        blocks = shape[0] * -(-height // side) * -(-width // side)
        bits, bits_filtered = (each.view(np.uint32).reshape(*shape) for each in (image, filtered))
        median(blocks, bits, np.int64(inputs["radius"]), bits_filtered)
        return {"filtered": filtered}

    return run


# The network of the cpu's variant, for every radius: neither branches nor data decide the time, so a board makes a
# pipeline of it, its lanes in block memory (136 KiB at radius 16). It has no variant by rank, whose time the data
# decides, so the cpu is twice as fast at radius 5 and 20 times at 16. A group is one work-item with a strip of rows.
_OPENCL = """
#define SIDE 33

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void median(__global const float* restrict images, __global const long* restrict pairs, int count,
            __global float* restrict filtered, int height, int width, int radius) {
  __local float lanes[SIDE * SIDE][LANES];
  __local int hurt[LANES];
  const int left = get_group_id(0) * LANES, top = get_group_id(1) * ROWS, side = 2 * radius + 1;
  const int right = min(LANES, width - left), bottom = min(ROWS, height - top);
  images += get_group_id(2) * height * width;
  filtered += get_group_id(2) * height * width;
  for (int y = top; y < top + bottom; y++) {
    for (int x = 0; x < LANES; x++) hurt[x] = 0;
    for (int dy = 0; dy < side; dy++) {
      __global const float* row = images + (ulong)clamp(y + dy - radius, 0, height - 1) * width;
      for (int dx = 0; dx < side; dx++) {
        __local float* lane = lanes[dy * side + dx];
        const int shift = left + dx - radius;
        if (shift >= 0 && shift + LANES <= width)
          for (int x = 0; x < LANES; x++) lane[x] = row[shift + x];
        else  // the image's edge is repeated outwards
          for (int x = 0; x < LANES; x++) lane[x] = row[clamp(shift + x, 0, width - 1)];
        for (int x = 0; x < LANES; x++) hurt[x] |= lane[x] != lane[x];
      }
    }
    for (int pair = 0; pair < count; pair++) {
      __local float *low = lanes[pairs[2 * pair]], *high = lanes[pairs[2 * pair + 1]];
      for (int x = 0; x < LANES; x++) {
        const float a = low[x], b = high[x];
        low[x] = b < a ? b : a;
        high[x] = b < a ? a : b;
      }
    }
    for (int x = 0; x < right; x++)
      filtered[(ulong)y * width + left + x] = hurt[x] ? NAN : lanes[side * side / 2][x];
  }
}
"""
_ROWS, _STRIP = 8, 32


@median_filter.on("fpga")
def _fpga(device: Any) -> Run:
    """Takes one image, or a stack of them along the third axis of groups."""
    program = device.program(_OPENCL, "medical.median_filter", ROWS=_ROWS, LANES=_STRIP)

    def run(inputs: Inputs, context: Context) -> Outputs:
        image, radius = inputs["image"], inputs["radius"]
        *stack, height, width = image.shape
        filtered = device.empty(image.shape, np.float32)
        pairs = _network((2 * radius + 1) ** 2)
        groups = (-(-width // _STRIP), -(-height // _ROWS), *(stack or [1]))
        sizes = np.int32(height), np.int32(width), np.int32(radius)
        program.launch("median", groups, image, device.upload(pairs), np.int32(len(pairs)), filtered, *sizes)
        return {"filtered": filtered}

    return run


@median_filter.on("tpu")
def _tpu(device: Any) -> Run:
    """Takes one image, or a stack of them. The radius is compiled in.

    Small squares go through the network of the cpu's variant, a whole image an exchange: minimum and maximum hand NaN
    on to where the median stands. In large ones the median is found bit by bit from the top, each pixel counting how
    many of its square are below what it tries: (2 radius + 1)**2 comparisons a bit, without an index that data decide.
    """
    import jax.numpy as jnp
    from jax import lax

    def spread(image: Any, height: Any, width: Any, radius: int) -> Any:
        """The image with its true edges repeated outwards."""
        *_, tall, wide = image.shape
        rows = jnp.clip(jnp.arange(-radius, tall + radius), 0, jnp.maximum(height - 1, 0))
        columns = jnp.clip(jnp.arange(-radius, wide + radius), 0, jnp.maximum(width - 1, 0))
        return jnp.take(jnp.take(image, rows, axis=-2), columns, axis=-1)

    def by_network(image: Any, height: Any, width: Any, radius: int) -> Any:
        *_, tall, wide = image.shape
        padded, side = spread(image, height, width, radius), 2 * radius + 1
        lanes = [padded[..., y : y + tall, x : x + wide] for y in range(side) for x in range(side)]
        for i, j in _network(side * side):
            lanes[i], lanes[j] = jnp.minimum(lanes[i], lanes[j]), jnp.maximum(lanes[i], lanes[j])
        return lanes[side * side // 2]

    def by_bits(image: Any, height: Any, width: Any, radius: int) -> Any:
        *_, tall, wide = image.shape
        padded, side = spread(image, height, width, radius), 2 * radius + 1
        bits = lax.bitcast_convert_type(padded, jnp.uint32)
        keys = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))

        def counted(values: Any, test: Any) -> Any:
            """How many values of each pixel's square pass."""

            def row(y: Any, count: Any) -> Any:
                strip = lax.dynamic_slice_in_dim(values, y, tall, axis=-2)
                for x in range(side):
                    count += test(strip[..., x : x + wide]).astype(jnp.int32)
                return count

            return lax.fori_loop(0, side, row, jnp.zeros(image.shape, jnp.int32))

        def decide(step: Any, found: Any) -> Any:
            tried = found | (jnp.uint32(0x80000000) >> step.astype(jnp.uint32))
            return jnp.where(counted(keys, lambda key: key < tried) <= side * side // 2, tried, found)

        found = lax.fori_loop(0, 32, decide, jnp.zeros(image.shape, jnp.uint32))
        back = jnp.where(found >> 31 == 1, found ^ jnp.uint32(0x80000000), ~found)
        hurt = counted(padded, jnp.isnan) > 0
        return jnp.where(hurt, jnp.nan, lax.bitcast_convert_type(back, jnp.float32))

    network = device.program(by_network, static=("radius",))
    search = device.program(by_bits, static=("radius",))

    def run(inputs: Inputs, context: Context) -> Outputs:
        image, radius = inputs["image"], inputs["radius"]
        height, width = image.shape[-2:]
        program = network if radius <= _MOST_BY_NETWORK else search
        return program({"filtered": image.shape}, image, np.int32(height), np.int32(width), radius=radius)

    return run


@median_filter.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for h, w, radius in ((1, 1, 1), (5, 7, 2), (40, 600, 1), (120, 110, 5), (40, 40, 16)):
        yield {"image": random.standard_normal((h, w), np.float32), "radius": radius}
    hurt = random.standard_normal((20, 20), np.float32)
    hurt[3, 4], hurt[10, 10], hurt[15, 3] = np.nan, np.inf, -np.inf
    yield {"image": hurt, "radius": 2}
