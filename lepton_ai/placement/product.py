"""Matrix products on the thread that asks for them."""

from __future__ import annotations

from typing import Final

import numpy as np

from lepton_ai.placement.problem import Floats

__all__ = ["product"]

#: OpenBLAS gives a product of more multiplications than this to its threads (its `interface/gemm.c`).
_ALONE: Final = 65536 * 4


def product(left: Floats, right: Floats) -> Floats:
    """`left @ right`, in blocks of rows that are too small for the library to wake its threads.

    On a machine whose cores are busy it waits for those: 14 ms in place of 0.4 for a window of 500 sizes.
    """
    count = len(left)
    rows = max(1, _ALONE // max(1, right.size))
    if count <= rows:
        return left @ right
    blocks = -(-count // rows)
    padded = np.zeros((blocks * rows, left.shape[1]))
    padded[:count] = left
    found: Floats = (padded.reshape(blocks, rows, -1) @ right).reshape(blocks * rows, -1)[:count]
    return found
