"""Otsu's threshold: what parts an image into what is dark and what is bright."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

# The limit keeps the whole numbers of the criterion below 2**63: they are at most 255 times the square of the pixels.
otsu = Kernel(
    "medical.otsu",
    inputs={"image": "uint8[h,w]"},
    outputs={"threshold": "int64[1]", "separability": "float64[1]", "mask": "bool[h,w]"},
    flops="2*h*w + 4096",
    bytes="3*h*w + 16",
    limits={"image": "h*w <= 134217728"},
    batch="stack",
    tolerance=1e-9,
    summary="The threshold that parts the values of an image best, what is above it, and how well it parts them.",
)

Image = NDArray[np.uint8]
Counts = NDArray[np.int64]


@otsu.reference
def _reference(image: Image) -> Outputs:
    """Otsu (1979), "A Threshold Selection Method from Gray-Level Histograms", IEEE Trans. SMC 9(1), eqs. 12, 18 and 19.

    The threshold is the value up to which (it included) pixels are dark so that the variance between dark and bright is
    largest; the lowest of equal ones. The mask is true above it. The separability is that variance's share of the
    whole, 0 to 1. In an image of one value nothing is to be parted: the threshold is that value (0 where there are no
    pixels), nothing is above it, and the separability is 0.
    """
    counts = np.bincount(image.reshape(-1), minlength=256)
    dark, sums = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    pixels, total = dark[-1], sums[-1]
    bright = pixels - dark
    parted = (dark > 0) & (bright > 0)
    if not parted.any():
        threshold, separability = (int(image.flat[0]) if image.size else 0), 0.0
    else:
        # The variance between the two, times the square of the pixels: whole numbers up to the two quotients, which
        # IEEE 754 rounds alike everywhere, so that all devices choose the same threshold.
        gap = (total * dark - pixels * sums).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            between = np.where(parted, (gap / dark) * (gap / bright), -1.0)
        threshold = int(np.argmax(between))
        spread = (counts * (np.arange(256) - total / pixels) ** 2).sum()
        separability = between[threshold] / pixels / spread
    return {
        "threshold": np.array([threshold]),
        "separability": np.array([separability]),
        "mask": image > threshold,
    }


def _part(
    images: Image, thresholds: NDArray[np.int64], separabilities: NDArray[np.float64], masks: NDArray[np.bool_]
) -> None:
    """Four histograms, as neighbours are often alike and would wait for each other's count; then one vector pass."""
    counts = np.empty(256, np.int64)
    for number in range(images.shape[0]):
        image, mask = images[number], masks[number]
        _count(image, counts)
        threshold, separability = _choose(counts)
        thresholds[number], separabilities[number] = threshold, separability
        edge = np.uint8(threshold)
        for i in range(image.size):
            mask[i] = image[i] > edge


def _count(image: Image, counts: Counts) -> None:
    """Indices are unsigned: asking whether one is negative takes longer than counting."""
    one, two = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    three, four = np.zeros(256, np.uint32), np.zeros(256, np.uint32)
    size = np.uint64(image.size)
    for i in range(np.uint64(3), size, np.uint64(4)):
        one[image[i - np.uint64(3)]] += np.uint32(1)
        two[image[i - np.uint64(2)]] += np.uint32(1)
        three[image[i - np.uint64(1)]] += np.uint32(1)
        four[image[i]] += np.uint32(1)
    for i in range(size // np.uint64(4) * np.uint64(4), size):
        one[image[i]] += np.uint32(1)
    for value in range(256):
        counts[value] = np.int64(one[value]) + two[value] + three[value] + four[value]


def _choose(counts: Counts) -> tuple[int, float]:
    """The threshold and the separability of a histogram: the reference's arithmetic, value by value."""
    pixels, total, last = 0, 0, 0
    for value in range(256):
        pixels += counts[value]
        total += value * counts[value]
        last = value if counts[value] > 0 else last
    threshold, best = last, -1.0
    dark, below = 0, 0
    for value in range(256):
        dark += counts[value]
        below += value * counts[value]
        bright = pixels - dark
        if dark > 0 and bright > 0:
            gap = np.float64(total * dark - pixels * below)
            between = (gap / dark) * (gap / bright)
            if between > best:
                threshold, best = value, between
    if best < 0:
        return threshold, 0.0
    mean, spread = total / pixels, 0.0
    for value in range(256):
        spread += counts[value] * (value - mean) * (value - mean)
    return threshold, best / pixels / spread


@otsu.on("cpu")
def _cpu(device: Any) -> Run:
    """Takes one image, or a stack of them."""
    from numba import njit, types
    from numba.extending import register_jitable

    for function in (_count, _choose):
        register_jitable(function)
    stack = types.Array(types.uint8, 2, "C", readonly=True)
    part = njit(
        (stack, types.int64[::1], types.float64[::1], types.boolean[:, ::1]),
        nogil=True,
        cache=True,
        error_model="numpy",
    )(_part)

    def run(inputs: Inputs, context: Context) -> Outputs:
        image = inputs["image"]
        stack, pixels = image.shape[:-2], image.shape[-2] * image.shape[-1]
        images = image.reshape(*(stack or (1,)), pixels)
        thresholds, separabilities = np.empty(len(images), np.int64), np.empty(len(images))
        mask = np.empty(images.shape, np.bool_)
        part(images, thresholds, separabilities, mask)
        return {
            "threshold": thresholds.reshape(*stack, 1),
            "separability": separabilities.reshape(*stack, 1),
            "mask": mask.reshape(image.shape),
        }

    return run


cuda: Any  # numba.cuda, in the copies that the gpu's driver compiles
_THREADS, _COPIES, _RUN = 256, 8, 16


def _count_gpu(images: Image, parts: int, counts: NDArray[np.uint32]) -> None:
    """Eight histograms a block, so that fewer threads wait at one count. A thread takes a run of pixels at a time."""
    found = cuda.shared.array((_COPIES, 256), np.uint32)
    thread = cuda.threadIdx.x
    number, part = cuda.blockIdx.x // parts, cuda.blockIdx.x % parts
    pixels = images.shape[1]
    for value in range(thread, 256, _THREADS):
        for copy in range(_COPIES):
            found[copy, value] = 0
    cuda.syncthreads()
    copy = thread % _COPIES
    for start in range((part * _THREADS + thread) * _RUN, pixels, parts * _THREADS * _RUN):
        for i in range(start, min(start + _RUN, pixels)):
            cuda.atomic.add(found, (copy, np.int64(images[number, i])), np.uint32(1))
    cuda.syncthreads()
    for value in range(thread, 256, _THREADS):
        total = np.uint32(0)
        for each in range(_COPIES):
            total += found[each, value]
        if total > 0:
            cuda.atomic.add(counts, (number, value), total)


def _choose_gpu(counts: NDArray[np.uint32], thresholds: NDArray[np.int64], separabilities: NDArray[np.float64]) -> None:
    """A block an image. The sums and the choice are one thread's; the divisions, which take longest, are everyone's."""
    darks = cuda.shared.array(256, np.int64)  # each on a line of its own: by it the simulator tells them apart
    belows = cuda.shared.array(256, np.int64)
    between = cuda.shared.array(256, np.float64)
    spread = cuda.shared.array(256, np.float64)
    number, thread = cuda.blockIdx.x, cuda.threadIdx.x
    if thread == 0:
        dark, below = np.int64(0), np.int64(0)
        for value in range(256):
            dark += np.int64(counts[number, value])
            below += value * np.int64(counts[number, value])
            darks[value], belows[value] = dark, below
    cuda.syncthreads()
    pixels, total = darks[255], belows[255]
    for value in range(thread, 256, _THREADS):
        dark, bright = darks[value], pixels - darks[value]
        between[value], spread[value] = -1.0, 0.0
        if dark > 0 and bright > 0:
            gap = np.float64(total * dark - pixels * belows[value])
            between[value] = (gap / np.float64(dark)) * (gap / np.float64(bright))
        if pixels > 0:
            difference = value - np.float64(total) / np.float64(pixels)
            spread[value] = np.float64(counts[number, value]) * difference * difference
    cuda.syncthreads()
    if thread == 0:
        threshold, last, best, whole = 0, 0, -1.0, 0.0
        for value in range(256):
            last = value if counts[number, value] > 0 else last
            threshold = value if between[value] > best else threshold
            best = max(best, between[value])
            whole += spread[value]
        thresholds[number] = threshold if best >= 0 else last
        separabilities[number] = best / np.float64(pixels) / whole if best >= 0 else 0.0


def _part_gpu(images: Image, thresholds: NDArray[np.int64], pixels: int, masks: NDArray[np.bool_]) -> None:
    for i in range(cuda.grid(1), images.size, cuda.gridsize(1)):
        masks[i] = images[i] > thresholds[i // pixels]


@otsu.on("gpu")
def _gpu(device: Any) -> Run:
    """Takes one image, or a stack of them."""
    threads = 32 if device.simulated else _THREADS
    constants = {"_THREADS": threads}
    count = device.compile(_count_gpu, threads=(threads,), constants=constants)
    choose = device.compile(_choose_gpu, threads=(threads,), constants=constants)
    part = device.compile(_part_gpu)
    most = 2 if device.simulated else 8 * device.processors

    def run(inputs: Inputs, context: Context) -> Outputs:
        image = inputs["image"]
        *stack, height, width = image.shape
        number, pixels = stack[0] if stack else 1, height * width
        counts = device.zeros((number, 256), np.uint32)
        threshold, separability = device.empty((*stack, 1), np.int64), device.empty((*stack, 1), np.float64)
        mask = device.empty(image.shape, np.bool_)
        parts = min(-(-pixels // (threads * _RUN)), max(1, most // max(number, 1)))
        count(number * parts, image.reshape(number, pixels), np.int64(parts), counts)
        choose(number, counts, threshold.reshape(-1), separability.reshape(-1))
        part(image.size, image.reshape(-1), threshold.reshape(-1), np.int64(pixels), mask.reshape(-1))
        return {"threshold": threshold, "separability": separability, "mask": mask}

    return run


# Each group counts a strip in block memory, eight histograms wide so that the loop does not wait for its own counts,
# and adds what it found to the image's. One group chooses the threshold of an image, and strips are parted by it.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#pragma OPENCL EXTENSION cl_khr_int64_base_atomics : enable
#define WIDE 8

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void count(__global const uchar* restrict images, __global uint* restrict counts, ulong pixels) {
  __local uint found[WIDE][256];
  const ulong start = get_group_id(0) * STRIP, stop = min(start + STRIP, pixels);
  images += get_group_id(1) * pixels;
  counts += get_group_id(1) * 256;
  for (int j = 0; j < WIDE; j++)
    for (int value = 0; value < 256; value++) found[j][value] = 0;
  for (ulong i = start; i < stop; i++) found[i % WIDE][images[i]]++;
  for (int value = 0; value < 256; value++) {
    uint sum = 0;
    for (int j = 0; j < WIDE; j++) sum += found[j][value];
    if (sum > 0) atomic_add(&counts[value], sum);
  }
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void choose(__global const uint* restrict counts, __global long* restrict thresholds,
            __global double* restrict separabilities) {
  counts += get_group_id(0) * 256;
  long pixels = 0, total = 0, last = 0, dark = 0, below = 0;
  for (int value = 0; value < 256; value++) {
    pixels += counts[value];
    total += value * (long)counts[value];
    last = counts[value] > 0 ? value : last;
  }
  long threshold = last;
  double best = -1, spread = 0;
  for (int value = 0; value < 256; value++) {
    dark += counts[value];
    below += value * (long)counts[value];
    const long bright = pixels - dark;
    if (dark > 0 && bright > 0) {
      const double gap = total * dark - pixels * below, between = (gap / dark) * (gap / bright);
      threshold = between > best ? value : threshold;
      best = between > best ? between : best;
    }
  }
  const double mean = total / (double)pixels;
  for (int value = 0; value < 256; value++) spread += counts[value] * (value - mean) * (value - mean);
  thresholds[get_group_id(0)] = threshold;
  separabilities[get_group_id(0)] = best < 0 ? 0 : best / pixels / spread;
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void part(__global const uchar* restrict images, __global const long* restrict thresholds,
          __global uchar* restrict masks, ulong pixels) {
  const ulong start = get_group_id(0) * STRIP, stop = min(start + STRIP, pixels);
  const uchar threshold = thresholds[get_group_id(1)];
  images += get_group_id(1) * pixels;
  masks += get_group_id(1) * pixels;
  for (ulong i = start; i < stop; i++) masks[i] = images[i] > threshold;
}
"""
_STRIP = 65536


@otsu.on("fpga")
def _fpga(device: Any) -> Run:
    """Takes one image, or a stack of them along the second axis of groups."""
    program = device.program(_OPENCL, "medical.otsu", STRIP=_STRIP)

    def run(inputs: Inputs, context: Context) -> Outputs:
        image = inputs["image"]
        *stack, height, width = image.shape
        number = stack[0] if stack else 1
        counts = device.upload(np.zeros((number, 256), np.uint32))
        threshold, separability = device.empty((*stack, 1), np.int64), device.empty((*stack, 1), np.float64)
        mask = device.empty(image.shape, np.bool_)
        pixels = np.uint64(height * width)
        strips = (-(-height * width // _STRIP), number)
        program.launch("count", strips, image, counts, pixels)
        program.launch("choose", (number,), counts, threshold, separability)
        program.launch("part", strips, image, threshold, mask, pixels)
        return {"threshold": threshold, "separability": separability, "mask": mask}

    return run


@otsu.on("tpu")
def _tpu(device: Any) -> Run:
    """Takes one image, or a stack of them.

    A histogram is a product of matrices: of the pixels' upper four bits, one of 16 each, with their lower four. Float32
    counts a chunk of pixels exactly.
    """
    import jax.numpy as jnp
    from jax import lax, vmap

    def counted(pixels: Any, valid: Any) -> Any:
        size = min(pixels.size, _CHUNK)
        digits = jnp.arange(16, dtype=jnp.uint8)

        def add(counts: Any, chunk: Any) -> tuple[Any, None]:
            values, own = chunk
            upper = ((values[:, None] >> 4 == digits) & own[:, None]).astype(jnp.bfloat16)
            lower = (values[:, None] & 15 == digits).astype(jnp.bfloat16)
            found = jnp.dot(upper.T, lower, preferred_element_type=jnp.float32)
            return counts + found.astype(jnp.int64), None

        chunks = pixels.reshape(-1, size), valid.reshape(-1, size)
        return lax.scan(add, jnp.zeros((16, 16), jnp.int64), chunks)[0].reshape(256)

    def choose(image: Any, height: Any, width: Any) -> Any:
        values = jnp.arange(256)
        valid = (jnp.arange(image.shape[0]) < height)[:, None] & (jnp.arange(image.shape[1]) < width)
        counts = counted(image.reshape(-1), valid.reshape(-1))
        dark, sums = jnp.cumsum(counts), jnp.cumsum(counts * values)
        pixels, total = dark[-1], sums[-1]
        bright = pixels - dark
        gap = (total * dark - pixels * sums).astype(jnp.float64)
        between = jnp.where((dark > 0) & (bright > 0), (gap / dark) * (gap / bright), -1.0)
        best = jnp.max(between)
        threshold = jnp.where(best < 0, jnp.max(jnp.where(counts > 0, values, 0)), jnp.argmax(between))
        spread = (counts * (values - total / jnp.maximum(pixels, 1)) ** 2).sum()
        separability = jnp.where(best < 0, 0.0, best / jnp.maximum(pixels, 1) / spread)
        one = jnp.zeros(8)  # an axis of one is padded to eight
        return threshold + one.astype(jnp.int64), separability + one, image > threshold

    def part(image: Any, height: Any, width: Any) -> Any:
        return (vmap(choose, (0, None, None)) if image.ndim == 3 else choose)(image, height, width)

    program = device.program(part)

    def run(inputs: Inputs, context: Context) -> Outputs:
        image = inputs["image"]
        *stack, height, width = image.shape
        shapes = {"threshold": (*stack, 1), "separability": (*stack, 1), "mask": image.shape}
        return program(shapes, image, np.int32(height), np.int32(width))

    return run


_CHUNK = 2**16


@otsu.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for h, w in ((1, 1), (3, 5), (300, 500)):
        bright = random.random((h, w)) < 0.3
        grey = np.where(bright, random.normal(170, 20, (h, w)), random.normal(60, 15, (h, w)))
        yield {"image": np.clip(grey, 0, 255).astype(np.uint8)}
    yield {"image": np.zeros((0, 3), np.uint8)}
    yield {"image": np.full((4, 4), 255, np.uint8)}
    # Every threshold from 10 to 199 parts these alike, and of a ramp two do.
    yield {"image": np.array([[10, 200, 200], [10, 10, 200]], np.uint8)}
    yield {"image": np.arange(255, dtype=np.uint8).reshape(15, 17)}
