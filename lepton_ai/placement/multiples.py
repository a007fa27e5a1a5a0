"""Columns that are another one times a factor, as of devices of one make at different clocks, made one column.

A device that takes `factor` times as long for every job is one of the other's kind with `slots / factor` slots, exactly
so as problems count slots. What is left has fewer columns, and fewer that cost a job the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import Floats, Indices

__all__ = ["without_multiples"]

#: Jobs that tell which columns could be multiples; all jobs are asked only if some could.
_ASKED = 16
#: What products differ by because of rounding.
_EXACT = 1e-12


def without_multiples(seconds: Floats, column: Indices, slots: Floats) -> tuple[Floats, Indices, Floats]:
    """[job, column] seconds, [device] column and [device] slots of the same problem in fewer columns, if there are."""
    few = np.ascontiguousarray(seconds[:: max(1, len(seconds) // _ASKED)])
    of, factor = _likely(few)
    if (of == np.arange(of.size)).all():
        return seconds, column, slots
    is_multiple = _hold(seconds, of, factor)
    of[~is_multiple], factor[~is_multiple] = np.flatnonzero(~is_multiple), 1.0
    kept, column_of = np.unique(of, return_inverse=True)
    if kept.size == of.size:
        return seconds, column, slots
    return np.ascontiguousarray(seconds[:, kept]), column_of[column].astype(np.intp), slots / factor[column]


@compiled
def _likely(seconds: Floats) -> tuple[Indices, Floats]:
    """[column] which one it may be a multiple of, itself if none; [column] by which factor."""
    jobs, columns = seconds.shape
    of = np.arange(columns)
    factor = np.ones(columns)
    for column in range(columns):
        for other in range(column):
            if of[other] != other:
                continue
            ratio = 0.0
            for job in range(jobs):
                if 0 < seconds[job, other] < np.inf:
                    ratio = seconds[job, column] / seconds[job, other]
                    break
            if not 0 < ratio < np.inf:
                continue
            agrees = True
            for job in range(jobs):
                if not _is_product(seconds[job, column], ratio, seconds[job, other]):
                    agrees = False
                    break
            if agrees:
                of[column], factor[column] = other, ratio
                break
    return of, factor


@compiled
def _hold(seconds: Floats, of: Indices, factor: Floats) -> NDArray[np.bool_]:
    """[column]: whether it is that multiple for every job."""
    jobs, columns = seconds.shape
    holds: NDArray[np.bool_] = of != np.arange(columns)
    for job in range(jobs):
        for column in range(columns):
            if holds[column] and not _is_product(seconds[job, column], factor[column], seconds[job, of[column]]):
                holds[column] = False
    return holds


@compiled
def _is_product(value: float, factor: float, other: float) -> bool:
    return value == factor * other or abs(value - factor * other) <= _EXACT * value < np.inf
