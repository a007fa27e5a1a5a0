"""Linear algebra."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

matmul = Kernel(
    "linalg.matmul",
    inputs={"a": "float32[m,k]", "b": "float32[k,n]"},
    outputs={"c": "float32[m,n]"},
    flops="2*m*k*n",
    bytes="4*(m*k + k*n + m*n)",
    batch="stack",
    tolerance=1e-4,
    summary="The product of two matrices.",
)


@matmul.reference
def _reference(a: NDArray[np.float32], b: NDArray[np.float32]) -> Outputs:
    """c[i,j] = sum over l of a[i,l] * b[l,j], summed in float64. A sum over nothing (k = 0) is 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        return {"c": (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)}


@matmul.on("cpu")
def _cpu(device: Any) -> Run:
    """BLAS: nothing compiled here beats it. np.matmul takes a leading axis as it is, so a stack is the same call."""

    def run(inputs: Inputs, context: Context) -> Outputs:
        with np.errstate(invalid="ignore", over="ignore"):
            return {"c": np.matmul(inputs["a"], inputs["b"])}

    return run


@matmul.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for m, k, n in ((1, 1, 1), (3, 5, 2), (64, 64, 64), (256, 256, 256)):
        yield {
            "a": random.standard_normal((m, k), np.float32),
            "b": random.standard_normal((k, n), np.float32),
        }
