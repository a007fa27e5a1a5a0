"""What NumPy makes of driving.kalman."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# 120 MB are read and written at the large size, in pages that the system hands out as they are first touched, and each
# is visited a track's step at a time.
BOUND = "latency"

Track = NDArray[np.float32]
Outputs = dict[str, NDArray[Any]]
_SIZES = {"small": (50, 20), "medium": (5_000, 50), "large": (100_000, 50)}


def inputs(size: str) -> dict[str, Any]:
    """Tracks of what moves about, each in turn missed once in ten steps, and one in five of them late."""
    tracks, steps = _SIZES[size]
    random = np.random.default_rng(0)
    course = np.cumsum(random.normal(0, 0.3, (tracks, steps, 2)), axis=1) + random.normal(0, 10, (tracks, 1, 2))
    course = 0.1 * np.cumsum(course, axis=1) + random.normal(0, 50, (tracks, 1, 2))
    detected = (course + random.normal(0, 0.5, course.shape)).astype(np.float32)
    detected[random.random((tracks, steps)) < 0.1] = np.nan
    late = np.where(random.random(tracks) < 0.2, random.integers(0, steps, tracks), 0)
    detected[np.arange(steps) < late[:, None]] = np.nan
    return {"detected": detected, "step_s": 0.1, "acceleration": 1.0, "noise": 0.5, "speed": 10.0}


def _matrices(detected: Track, step_s: float, acceleration: float, noise: float, speed: float) -> Outputs:
    """As it stands in a book: a covariance of 4 by 4 for each track, np.matmul over all of them."""
    tracks, steps, _ = detected.shape
    move = np.eye(4, dtype=np.float32) + step_s * np.eye(4, k=2, dtype=np.float32)
    push = acceleration * np.array([step_s**2 / 2, step_s], np.float32)
    shake = np.kron(np.outer(push, push), np.eye(2)).astype(np.float32)
    start = np.diag([noise**2, noise**2, speed**2, speed**2]).astype(np.float32)
    now, spread = np.full((tracks, 4), np.nan, np.float32), np.full((tracks, 4, 4), np.nan, np.float32)
    state = np.empty((tracks, steps, 4), np.float32)
    for step in range(steps):
        place = detected[:, step]
        seen = np.isfinite(place).all(axis=1)
        now, spread = now @ move.T, move @ spread @ move.T + shake
        first = seen & np.isnan(now[:, 0])
        again = seen & ~first
        gain = spread[again, :, :2] @ np.linalg.inv(spread[again, :2, :2] + noise**2 * np.eye(2, dtype=np.float32))
        now[again] += np.einsum("tij,tj->ti", gain, place[again] - now[again, :2])
        spread[again] -= gain @ spread[again, :2]
        now[first, :2], now[first, 2:], spread[first] = place[first], 0, start
        state[:, step] = now
    return {"state": state, "covariance": spread[:, [0, 0, 2], [0, 2, 2]]}


def _by_axis(
    detected: Track, step_s: float, acceleration: float, noise: float, speed: float, block: int = 0
) -> Outputs:
    """Both axes share three covariances; a column for each, np.where for what is missed."""
    tracks, steps, _ = detected.shape
    state, covariance = np.empty((tracks, steps, 4), np.float32), np.empty((tracks, 3), np.float32)
    dt, noise, speed = np.float32(step_s), np.float32(noise**2), np.float32(speed**2)
    place, pace = step_s**2 / 2 * acceleration, step_s * acceleration
    q0, q1, q2 = np.float32(place**2), np.float32(place * pace), np.float32(pace**2)
    zero = np.float32(0)
    for start in range(0, tracks, block or tracks):
        own = detected[start : start + (block or tracks)]
        now, rate = np.full((2, len(own)), np.nan, np.float32), np.full((2, len(own)), np.nan, np.float32)
        p, c, w = np.full((3, len(own)), np.nan, np.float32)
        columns = np.ascontiguousarray(own.transpose(1, 2, 0))
        for step in range(steps):
            where = columns[step]
            seen = np.isfinite(where).all(axis=0)
            first = seen & np.isnan(p)
            now = now + dt * rate
            p = p + dt * (2 * c + dt * w) + q0
            c = c + dt * w + q1
            w = w + q2
            share = np.where(seen, 1 / (p + noise), zero)
            rest = np.where(seen, where - now, zero)
            now, rate = now + p * share * rest, rate + c * share * rest
            w = w - c * c * share
            p, c = p - p * p * share, c - p * c * share
            if first.any():
                now, rate = np.where(first, where, now), np.where(first, zero, rate)
                p, c, w = np.where(first, noise, p), np.where(first, zero, c), np.where(first, speed, w)
            state[start : start + len(own), step, :2] = now.T
            state[start : start + len(own), step, 2:] = rate.T
        covariance[start : start + len(own)] = np.stack([p, c, w], axis=1)
    return {"state": state, "covariance": covariance}


def _by_axis_in_blocks(**arguments: Any) -> Outputs:
    """4096 tracks at a time, whose columns stay in the cache."""
    return _by_axis(**arguments, block=4096)


def _columns_in_place(detected: Track, step_s: float, acceleration: float, noise: float, speed: float) -> Outputs:
    """2048 tracks at a time in columns that stay in the cache, no np.where: what is missed weighs 0.

    A track before its first detection runs on zeros, and is made NaN at the end.
    """
    tracks, steps, _ = detected.shape
    state, covariance = np.empty((tracks, steps, 4), np.float32), np.empty((tracks, 3), np.float32)
    dt, noise, speed = np.float32(step_s), np.float32(noise**2), np.float32(speed**2)
    place, pace = step_s**2 / 2 * acceleration, step_s * acceleration
    q0, q1, q2 = np.float32(place**2), np.float32(place * pace), np.float32(pace**2)
    for start in range(0, tracks, 2048):
        own = detected[start : start + 2048]
        size = len(own)
        columns = np.ascontiguousarray(own.transpose(1, 2, 0))
        seen = np.isfinite(columns).all(axis=1)
        columns[~np.repeat(seen[:, None], 2, axis=1)] = 0
        weights = seen.astype(np.float32)
        first = np.where(seen.any(axis=0), seen.argmax(axis=0), steps)
        order = np.argsort(first, kind="stable")
        ends = np.searchsorted(first[order], np.arange(steps + 1))
        all_of_it = np.empty((steps, 4, size), np.float32)
        now, rate, rest = (
            np.zeros((2, size), np.float32),
            np.zeros((2, size), np.float32),
            np.empty((2, size), np.float32),
        )
        p, c, w, share, pull, other = np.zeros((6, size), np.float32)
        for step in range(steps):
            np.multiply(rate, dt, out=rest)
            now += rest
            np.multiply(w, dt, out=other)
            p += dt * (c + c + other)
            p += q0
            c += other
            c += q1
            w += q2
            np.add(p, noise, out=share)
            np.divide(weights[step], share, out=share)
            np.multiply(c, share, out=pull)
            np.multiply(p, share, out=share)
            np.subtract(columns[step], now, out=rest)
            now += share * rest
            rest *= pull
            rate += rest
            np.multiply(c, pull, out=other)
            w -= other
            np.multiply(c, share, out=other)
            c -= other
            np.multiply(p, share, out=other)
            p -= other
            if ends[step] < ends[step + 1]:
                born = order[ends[step] : ends[step + 1]]
                now[:, born], rate[:, born] = columns[step][:, born], 0
                p[born], c[born], w[born] = noise, 0, speed
            all_of_it[step, :2], all_of_it[step, 2:] = now, rate
        all_of_it[np.repeat(np.arange(steps)[:, None, None] < first, 4, axis=1)] = np.nan
        state[start : start + size] = all_of_it.transpose(2, 0, 1)
        covariance[start : start + size] = np.where(first == steps, np.float32(np.nan), np.stack([p, c, w])).T
    return {"state": state, "covariance": covariance}


def expressions() -> dict[str, Callable[..., Outputs]]:
    return {
        "np.matmul": _matrices,
        "columns": _by_axis,
        "columns in blocks": _by_axis_in_blocks,
        "columns in place": _columns_in_place,
    }
