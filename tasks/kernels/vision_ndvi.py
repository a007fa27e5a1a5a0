"""Images from cameras and satellites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

ndvi = Kernel(
    "vision.ndvi",
    inputs={"red": "float32[h,w]", "nir": "float32[h,w]"},
    outputs={"ndvi": "float32[h,w]"},
    flops="4*h*w",
    bytes="12*h*w",
    batch="stack",
    tolerance=1e-6,
    summary="Normalised difference vegetation index of a red and a near-infrared band.",
)


@ndvi.reference
def _reference(red: NDArray[np.float32], nir: NDArray[np.float32]) -> Outputs:
    """(nir - red) / (nir + red), 0 where nir + red is 0; NaN where a band is NaN or infinite.

    Rouse, Haas, Schell, Deering (1974), "Monitoring vegetation systems in the Great Plains with ERTS", ERTS-1
    Symposium, NASA SP-351.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total = nir + red
        finite = np.isfinite(nir) & np.isfinite(red)
        index = np.where(total == 0, np.float32(0), (nir - red) / total)
    return {"ndvi": np.where(finite, index, np.float32(np.nan))}


def _fill(red: NDArray[np.float32], nir: NDArray[np.float32], ndvi: NDArray[np.float32]) -> None:
    zero = np.float32(0)
    for i in range(red.size):
        total = nir[i] + red[i]
        index = (nir[i] - red[i]) / total
        index = zero if total == zero else index
        # x * 0 is 0 for a finite x and NaN otherwise, and unlike isfinite it is one vector operation.
        ndvi[i] = index + (nir[i] * zero + red[i] * zero)


@ndvi.on("cpu")
def _cpu(device: Any) -> Run:
    """One pass over memory, 16 pixels an instruction. Works on any shape, so a stack is only a longer image."""
    from numba import njit, types

    band = types.Array(types.float32, 1, "C", readonly=True)
    fill = njit((band, band, types.float32[::1]), nogil=True, cache=True, error_model="numpy")(_fill)

    def run(inputs: Inputs, context: Context) -> Outputs:
        red, nir = inputs["red"], inputs["nir"]
        index = np.empty(red.shape, np.float32)
        fill(red.reshape(-1), nir.reshape(-1), index.reshape(-1))
        return {"ndvi": index}

    return run


cuda: Any  # numba.cuda, on a GPU


def _fill_gpu(red: NDArray[np.float32], nir: NDArray[np.float32], ndvi: NDArray[np.float32]) -> None:
    zero = np.float32(0)
    for i in range(cuda.grid(1), red.size, cuda.gridsize(1)):
        r, n = red[i], nir[i]
        total = n + r
        index = zero if total == zero else (n - r) / total
        ndvi[i] = index + (n * zero + r * zero)


@ndvi.on("gpu")
def _gpu(device: Any) -> Run:
    """One thread a pixel, neighbours beside each other. Works on any shape, so a stack is only a longer image."""
    fill = device.compile(_fill_gpu)

    def run(inputs: Inputs, context: Context) -> Outputs:
        red, nir = inputs["red"], inputs["nir"]
        index = device.empty(red.shape, np.float32)
        fill(red.size, red.reshape(-1), nir.reshape(-1), index.reshape(-1))
        return {"ndvi": index}

    return run


# A group is one work-item with a block of pixels: on a board its loop is a pipeline that takes a pixel a cycle, and on
# PoCL one vector loop (with a work-item for each pixel PoCL took 2.5 times as long).
_OPENCL = """
__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void fill(__global const float* restrict red, __global const float* restrict nir, __global float* restrict ndvi,
          ulong size) {
  const ulong start = get_group_id(0) * BLOCK, stop = min(start + BLOCK, size);
  for (ulong i = start; i < stop; i++) {
    const float total = nir[i] + red[i], index = (nir[i] - red[i]) / total;
    ndvi[i] = (total == 0 ? 0.0f : index) + (nir[i] * 0.0f + red[i] * 0.0f);  // NaN where either is not finite
  }
}
"""
_BLOCK = 4096


@ndvi.on("fpga")
def _fpga(device: Any) -> Run:
    """Works on any shape, so a stack is only a longer image."""
    program = device.program(_OPENCL, "vision.ndvi", BLOCK=_BLOCK)

    def run(inputs: Inputs, context: Context) -> Outputs:
        red, nir = inputs["red"], inputs["nir"]
        index = device.empty(red.shape, np.float32)
        program.launch("fill", (-(-red.size // _BLOCK),), red, nir, index, np.uint64(red.size))
        return {"ndvi": index}

    return run


@ndvi.on("tpu")
def _tpu(device: Any) -> Run:
    """Works on any shape; of the zeros around a band it makes zeros, which are cut off."""
    import jax.numpy as jnp

    def fill(red: Any, nir: Any) -> Any:
        total = nir + red
        index = jnp.where(total == 0, 0, (nir - red) / total)
        return jnp.where(jnp.isfinite(nir) & jnp.isfinite(red), index, jnp.nan)

    program = device.program(fill)

    def run(inputs: Inputs, context: Context) -> Outputs:
        red = inputs["red"]
        return program({"ndvi": red.shape}, red, inputs["nir"])

    return run


@ndvi.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for h, w in ((1, 1), (3, 5), (512, 512)):
        yield {"red": random.random((h, w), np.float32), "nir": random.random((h, w), np.float32)}
    zero, odd = np.zeros((2, 2), np.float32), np.array([[0, np.nan], [np.inf, -1]], np.float32)
    yield {"red": zero, "nir": odd}
