"""Bits of words, for compiled code on the CPU: plain Python that builders make jitable."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["ones"]


def ones(x: Any) -> int:
    """How many bits of a uint64 are set. LLVM knows this form and makes one instruction of it."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return int(np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56)))
