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
    """Four histograms, as neighbours are often alike and each would wait for the other's count; then one vector pass."""
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
