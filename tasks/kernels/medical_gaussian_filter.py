"""The Gaussian filter: what smooths an image before it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

gaussian_filter = Kernel(
    "medical.gaussian_filter",
    inputs={"image": "float32[h,w]", "sigma": "float64 = 1"},
    outputs={"smoothed": "float32[h,w]"},
    flops="4*h*w*(8*sigma + 1)",
    bytes="8*h*w",
    limits={"sigma": "0 <= sigma <= 32"},
    batch="stack",
    tolerance=1e-5,
    summary="The image smoothed by a Gaussian of `sigma` pixels; what is outside is a reflection of what is inside.",
)

Image = NDArray[np.float32]
Images = NDArray[np.float32]


def _taps(sigma: float) -> NDArray[np.float64]:
    """exp(-x**2 / (2 sigma**2)) for whole x of at most 4 sigma, rounded to the nearest whole; their sum is 1."""
    radius = int(4 * sigma + 0.5)
    x = np.arange(-radius, radius + 1) / (sigma or 1.0)
    taps = np.exp(-0.5 * x * x)
    return np.asarray(taps / taps.sum(), np.float64)


def _reflected(start: int, stop: int, size: int) -> NDArray[np.int64]:
    """Where in 0 to `size` each index from `start` to `stop` falls: d c b a | a b c d | d c b a, and so on."""
    index = np.arange(start, stop) % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


@gaussian_filter.reference
def _reference(image: Image, sigma: float) -> Outputs:
    """Both ways one after the other (a Gaussian is separable), with `scipy.ndimage.gaussian_filter`'s defaults.

    Babaud, Witkin, Baudin, Duda (1986), "Uniqueness of the Gaussian kernel for scale-space filtering", IEEE PAMI 8(1),
    eq. 2, truncated at 4 sigma. Sums in float64. NaN and infinity spread to every pixel whose square holds them.
    """
    smoothed = image.astype(np.float64)
    taps = _taps(sigma)
    radius = taps.size // 2
    for axis, size in enumerate(image.shape):
        if image.size == 0:
            break
        padded = np.take(smoothed, _reflected(-radius, size + radius, size), axis=axis)
        windows = np.lib.stride_tricks.sliding_window_view(padded, taps.size, axis=axis)
        with np.errstate(invalid="ignore", over="ignore"):
            smoothed = windows @ taps
    with np.errstate(invalid="ignore", over="ignore"):
        return {"smoothed": smoothed.astype(np.float32)}


_STRIP = 2048


def _smooth(images: Images, rows: NDArray[np.int64], columns: NDArray[np.int64], taps: Image, smoothed: Images) -> None:
    """Strip by strip of columns, along each row into a ring of lines, and down the ring's columns into the result.

    A strip's ring fits the L2 cache up to a sigma of 6, and each row is smoothed along once. Narrower strips, whose
    ring fits the L1 cache, lose more to the short loops than they gain (1.3 times as long at 256).
    """
    count, height, width = images.shape
    span = taps.size
    line, ring = np.empty(_STRIP + span - 1, np.float32), np.empty((span, _STRIP), np.float32)
    flat, starts, shifts = ring.reshape(-1), np.empty(span, np.uint64), np.arange(span).astype(np.uint64)
    for image in range(count):
        for left in range(0, width, _STRIP):
            size = min(_STRIP, width - left)
            # The columns that the strip needs and has are one run of the image; those beyond its edges are looked up.
            first = max(span // 2 - left, 0)
            last = min(size + span - 1, width - left + span // 2)
            for y in range(height + span - 1):
                source = images[image, rows[y]]
                for x in range(first):
                    line[x] = source[columns[left + x]]
                _copy(source[left + first - span // 2 :], line[first:last])
                for x in range(last, size + span - 1):
                    line[x] = source[columns[left + x]]
                _add(line, shifts, taps, ring[y % span, :size])
                if y >= span - 1:
                    for i in range(span):
                        starts[i] = (y + 1 + i) % span * _STRIP
                    _add(flat, starts, taps, smoothed[image, y - span + 1, left : left + size])


def _copy(source: Image, target: Image) -> None:
    for x in range(target.size):
        target[x] = source[x]


def _add(lines: Image, starts: NDArray[np.uint64], taps: Image, target: Image) -> None:
    """The sum of the lines that begin at `starts`, each times its tap.

    Eight at a time, so that a sum is loaded and stored once for eight products; the odd ones come first. Indices are
    unsigned: a negative one would count from the end, and asking for that spoils the vector code.
    """
    size, odd = np.uint64(target.size), taps.size % 8
    a, p = starts[0], taps[0]
    for x in range(size):
        target[x] = p * lines[a + x]
    for i in range(1, odd):
        a, p = starts[i], taps[i]
        for x in range(size):
            target[x] += p * lines[a + x]
    for i in range(odd, taps.size, 8):
        a, b, c, d = starts[i], starts[i + 1], starts[i + 2], starts[i + 3]
        e, f, g, h = starts[i + 4], starts[i + 5], starts[i + 6], starts[i + 7]
        p, q, r, s = taps[i], taps[i + 1], taps[i + 2], taps[i + 3]
        t, u, v, w = taps[i + 4], taps[i + 5], taps[i + 6], taps[i + 7]
        for x in range(size):
            more = t * lines[e + x] + u * lines[f + x] + v * lines[g + x] + w * lines[h + x]
            some = target[x] + p * lines[a + x] + q * lines[b + x] + r * lines[c + x] + s * lines[d + x]
            target[x] = some + more


@gaussian_filter.on("cpu")
def _cpu(device: Any) -> Run:
    """Takes one image, or a stack of them."""
    from numba import njit, types
    from numba.extending import register_jitable

    for function in (_copy, _add):
        register_jitable(fastmath={"contract"})(function)
    stack = types.Array(types.float32, 3, "C", readonly=True)
    index, table = types.int64[::1], types.Array(types.float32, 1, "C", readonly=True)
    smooth = njit(
        (stack, index, index, table, types.float32[:, :, ::1]),
        nogil=True,
        cache=True,
        error_model="numpy",
        fastmath={"contract"},
    )(_smooth)

    def run(inputs: Inputs, context: Context) -> Outputs:
        image = inputs["image"]
        images = image if image.ndim == 3 else image[None]
        smoothed = np.empty(images.shape, np.float32)
        if image.size:
            taps = _taps(inputs["sigma"]).astype(np.float32)
            taps.flags.writeable = False
            radius = taps.size // 2
            rows, columns = (_reflected(-radius, size + radius, size) for size in images.shape[1:])
            smooth(images, rows, columns, taps, smoothed)
        return {"smoothed": smoothed.reshape(image.shape)}

    return run


cuda: Any  # numba.cuda, in the copies that the gpu's driver compiles


def _mirrored(index: Any, size: Any) -> Any:
    """`_reflected` of one index, for any that is not negative once `size` pairs are added to it."""
    at = (index + 2 * size * (1 + 128 // size)) % (2 * size)
    return min(at, 2 * size - 1 - at)


def _along_gpu(images: Image, taps: Image, width: int, lines: Image) -> None:
    """A pixel a thread: those of a warp lie side by side, and what one tap reads is in the cache for the next."""
    radius = taps.size // 2
    for i in range(cuda.grid(1), images.size, cuda.gridsize(1)):
        x = i % width
        total = np.float32(0)
        for j in range(taps.size):
            at = x + j - radius
            if at < 0 or at >= width:
                at = _mirrored(at, width)
            total += taps[j] * images[i - x + at]
        lines[i] = total


def _down_gpu(lines: Image, taps: Image, height: int, width: int, smoothed: Image) -> None:
    radius = taps.size // 2
    for i in range(cuda.grid(1), lines.size, cuda.gridsize(1)):
        y = i // width % height
        total = np.float32(0)
        for j in range(taps.size):
            at = y + j - radius
            if at < 0 or at >= height:
                at = _mirrored(at, height)
            total += taps[j] * lines[i + (at - y) * width]
        smoothed[i] = total


@gaussian_filter.on("gpu")
def _gpu(device: Any) -> Run:
    """Works on rows, so a stack is only a longer image along them; the height parts it down the columns."""
    along = device.compile(_along_gpu, helpers=(_mirrored,))
    down = device.compile(_down_gpu, helpers=(_mirrored,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        image = inputs["image"]
        height, width = image.shape[-2:]
        taps = device.upload(_taps(inputs["sigma"]).astype(np.float32))
        lines, smoothed = device.empty(image.shape, np.float32), device.empty(image.shape, np.float32)
        along(image.size, image.reshape(-1), taps, np.int64(width), lines.reshape(-1))
        down(image.size, lines.reshape(-1), taps, np.int64(height), np.int64(width), smoothed.reshape(-1))
        return {"smoothed": smoothed}

    return run


# A group is one work-item with a strip of a row. Along the rows it looks up what is outside once, into a line in block
# memory; down the columns each tap takes a strip of another row.
_OPENCL = """
#define SPAN 257  // taps at the largest sigma

int reflected(int i, int size) {
  const int period = 2 * size, j = (i % period + period) % period;
  return min(j, period - 1 - j);
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void along(__global const float* restrict images, __global const float* restrict taps, int span,
           __global float* restrict lines, int height, int width) {
  __local float line[STRIP + SPAN - 1], sums[STRIP];
  const int left = get_group_id(0) * STRIP, size = min(STRIP, width - left), radius = span / 2;
  const ulong row = ((ulong)get_group_id(2) * height + get_group_id(1)) * width;
  for (int x = 0; x < size + span - 1; x++) line[x] = images[row + reflected(left + x - radius, width)];
  for (int x = 0; x < STRIP; x++) sums[x] = 0;
  for (int i = 0; i < span; i++) {
    const float tap = taps[i];
    for (int x = 0; x < size; x++) sums[x] += tap * line[x + i];
  }
  for (int x = 0; x < size; x++) lines[row + left + x] = sums[x];
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void down(__global const float* restrict lines, __global const float* restrict taps, int span,
          __global float* restrict smoothed, int height, int width) {
  __local float sums[STRIP];
  const int left = get_group_id(0) * STRIP, size = min(STRIP, width - left), y = get_group_id(1);
  const ulong image = (ulong)get_group_id(2) * height;
  for (int x = 0; x < STRIP; x++) sums[x] = 0;
  for (int i = 0; i < span; i++) {
    const float tap = taps[i];
    __global const float* row = lines + (image + reflected(y + i - span / 2, height)) * width + left;
    for (int x = 0; x < size; x++) sums[x] += tap * row[x];
  }
  for (int x = 0; x < size; x++) smoothed[(image + y) * width + left + x] = sums[x];
}
"""
_FPGA_STRIP = 1024


@gaussian_filter.on("fpga")
def _fpga(device: Any) -> Run:
    """Takes one image, or a stack of them along the third axis of groups."""
    program = device.program(_OPENCL, "medical.gaussian_filter", STRIP=_FPGA_STRIP)

    def run(inputs: Inputs, context: Context) -> Outputs:
        image = inputs["image"]
        *stack, height, width = image.shape
        taps = device.upload(_taps(inputs["sigma"]).astype(np.float32))
        lines, smoothed = device.empty(image.shape, np.float32), device.empty(image.shape, np.float32)
        groups = (-(-width // _FPGA_STRIP), height, *(stack or [1]))
        sizes = np.int32(height), np.int32(width)
        program.launch("along", groups, image, taps, np.int32(taps.size), lines, *sizes)
        program.launch("down", groups, lines, taps, np.int32(taps.size), smoothed, *sizes)
        return {"smoothed": smoothed}

    return run


@gaussian_filter.on("tpu")
def _tpu(device: Any) -> Run:
    """Takes one image, or a stack of them. Taps are traced, their number padded, so a new sigma compiles nothing."""
    import jax.numpy as jnp
    from jax import lax

    def smooth(image: Any, taps: Any, span: Any, height: Any, width: Any) -> Any:
        most = taps.shape[0]

        def both(lines: Any, size: Any, axis: int) -> Any:
            padded = lines.shape[axis]
            index = jnp.arange(padded + most - 1) - span // 2
            size = jnp.maximum(size, 1)
            index = index % (2 * size)
            index = jnp.minimum(index, 2 * size - 1 - index)
            wide = jnp.take(lines, index, axis=axis)

            def add(i: Any, total: Any) -> Any:
                return total + taps[i] * lax.dynamic_slice_in_dim(wide, i, padded, axis=axis)

            return lax.fori_loop(0, span, add, jnp.zeros_like(lines))

        return both(both(image, width, image.ndim - 1), height, image.ndim - 2)

    program = device.program(smooth)

    def run(inputs: Inputs, context: Context) -> Outputs:
        image = inputs["image"]
        height, width = image.shape[-2:]
        taps = device.upload(_taps(inputs["sigma"]).astype(np.float32))
        sizes = np.int32(taps.size), np.int32(height), np.int32(width)
        return program({"smoothed": image.shape}, image, taps, *sizes)

    return run


@gaussian_filter.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for h, w, sigma in ((1, 1, 1.0), (5, 7, 3.0), (40, 600, 1.0), (90, 70, 4.2), (30, 1030, 0.0), (20, 30, 0.3)):
        yield {"image": random.standard_normal((h, w), np.float32), "sigma": sigma}
    hurt = random.standard_normal((30, 30), np.float32)
    hurt[3, 4], hurt[15, 15], hurt[25, 3], hurt[26, 9] = np.nan, np.inf, -np.inf, np.inf
    yield {"image": hurt, "sigma": 1.0}
