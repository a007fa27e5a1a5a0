"""Tracks of what moves, smoothed from noisy detections."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

kalman = Kernel(
    "driving.kalman",
    inputs={
        "detected": "float32[t,s,2]",
        "step_s": "float32 = 0.1",
        "acceleration": "float32 = 1",
        "noise": "float32 = 0.5",
        "speed": "float32 = 10",
    },
    outputs={"state": "float32[t,s,4]", "covariance": "float32[t,3]"},
    flops="40*t*s",
    bytes="24*t*s",
    limits={
        "step_s": "0.000001 <= step_s <= 1000000",
        "acceleration": "0 <= acceleration <= 1000000",
        "noise": "0.000001 <= noise <= 1000000",
        "speed": "0 <= speed <= 1000000",
    },
    batch="concat",
    tolerance=1e-4,
    summary="Constant-velocity Kalman filter over many tracks at once: position and velocity after each step.",
)

Track = NDArray[np.float32]


@kalman.reference
def _reference(detected: Track, step_s: float, acceleration: float, noise: float, speed: float) -> Outputs:
    """State (x, y, x', y') of each of t tracks after each of s steps, from positions (x, y) detected at them.

    Kalman (1960), "A New Approach to Linear Filtering and Prediction Problems", with the piecewise white-noise
    acceleration of Bar-Shalom, Li and Kirubarajan (2001), "Estimation with Applications to Tracking and Navigation",
    sec. 6.3.2, of deviation `acceleration`; `noise` is the deviation of a detected coordinate. Both axes are alike and
    independent, so one covariance serves both: of position, of position and velocity, of velocity, after the last step.

    A detection with a NaN or an infinity is missed: the state is only predicted. Before a track's first detection all
    is NaN; that detection is its position, and its velocity is 0 with the deviation `speed`. A number that is not
    finite makes everything NaN.
    """
    tracks, steps, _ = detected.shape
    state = np.full((tracks, steps, 2, 2), np.nan)  # by position and velocity, then axis
    covariance = np.full((tracks, 2, 2), np.nan)
    if all(math.isfinite(number) for number in (step_s, acceleration, noise, speed)):
        move = np.array([[1, step_s], [0, 1]])
        push = np.array([[step_s**2 / 2], [step_s]]) * acceleration
        now = np.full((tracks, 2, 2), np.nan)
        seen = np.logical_and(*np.isfinite(np.moveaxis(detected, 2, 0)))
        for step in range(steps):
            now, covariance = move @ now, move @ covariance @ move.T + push @ push.T
            first = seen[:, step] & np.isnan(now[:, 0, 0])
            again = seen[:, step] & ~first
            place = detected[:, step].astype(np.float64)
            now[first], now[first, 0], covariance[first] = 0, place[first], np.diag([noise**2, speed**2])
            gain = covariance[again, :, :1] / (covariance[again, :1, :1] + noise**2)
            now[again] += gain * (place[again, None] - now[again, :1])
            covariance[again] -= gain * covariance[again, :1]
            state[:, step] = now
    parts = np.stack([covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]], axis=1)
    return {
        "state": state.reshape(tracks, steps, 4).astype(np.float32),
        "covariance": parts.astype(np.float32),
    }


def _numbers(inputs: Inputs) -> tuple[np.float32, ...] | None:
    """What the steps need of the numbers: time, process noise (3 covariances), variances of noise and speed.

    None where one is not finite.
    """
    step_s, acceleration, noise, speed = (inputs[name] for name in ("step_s", "acceleration", "noise", "speed"))
    if not all(math.isfinite(number) for number in (step_s, acceleration, noise, speed)):
        return None
    place, pace = step_s**2 / 2 * acceleration, step_s * acceleration
    return tuple(np.float32(each) for each in (step_s, place**2, place * pace, pace**2, noise**2, speed**2))


def _nothing(detected: Any) -> Outputs:
    tracks, steps = detected.shape[:2]
    return {
        "state": np.full((tracks, steps, 4), np.nan, np.float32),
        "covariance": np.full((tracks, 3), np.nan, np.float32),
    }


_LANES = 64


def _filter(
    detected: Track,
    dt: float,
    q0: float,
    q1: float,
    q2: float,
    noise: float,
    speed: float,
    state: Track,
    covariance: Track,
) -> None:
    """64 tracks go through the steps together, their states in the L1 cache, without a branch."""
    tracks, steps, _ = detected.shape
    zero, one, two = np.float32(0), np.float32(1), np.float32(2)
    lanes = np.zeros((9, _LANES), np.float32)
    x, y, u, v, p, c, w = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6]
    seen_x, seen_y = lanes[7], lanes[8]
    for start in range(0, tracks, _LANES):
        size = min(_LANES, tracks - start)
        lanes[:7] = np.nan
        for step in range(steps):
            for j in range(size):
                seen_x[j], seen_y[j] = detected[start + j, step, 0], detected[start + j, step, 1]
            for j in range(_LANES):
                sx, sy = seen_x[j], seen_y[j]
                nx, ny = x[j] + dt * u[j], y[j] + dt * v[j]
                np_, nc, nw = p[j] + dt * (two * c[j] + dt * w[j]) + q0, c[j] + dt * w[j] + q1, w[j] + q2
                # Times 0 is 0 for a finite number and NaN otherwise.
                seen = (sx * zero + sy * zero) == zero
                born = nx != nx
                # The gain of a track that is missed is 0, which leaves what was predicted.
                share = one / (np_ + noise)
                share = share if seen else zero
                gain, pull = np_ * share, nc * share
                rx, ry = (sx - nx if seen else zero), (sy - ny if seen else zero)
                keep = noise * share if seen else one
                lx, ly, lu, lv = nx + gain * rx, ny + gain * ry, u[j] + pull * rx, v[j] + pull * ry
                lp, lc, lw = np_ * keep, nc * keep, nw - pull * nc
                first = seen & born
                x[j], y[j] = (sx if first else lx), (sy if first else ly)
                u[j], v[j] = (zero if first else lu), (zero if first else lv)
                p[j], c[j], w[j] = (noise if first else lp), (zero if first else lc), (speed if first else lw)
            for j in range(size):
                state[start + j, step, 0], state[start + j, step, 1] = x[j], y[j]
                state[start + j, step, 2], state[start + j, step, 3] = u[j], v[j]
        for j in range(size):
            covariance[start + j, 0], covariance[start + j, 1], covariance[start + j, 2] = p[j], c[j], w[j]


@kalman.on("cpu")
def _cpu(device: Any) -> Run:
    """A track knows of no other, so the tracks of many jobs are more tracks."""
    from numba import njit, types

    cube = types.Array(types.float32, 3, "C", readonly=True)
    out = types.float32[:, :, ::1], types.float32[:, ::1]
    fill = njit(
        (cube, *(types.float32,) * 6, *out),
        nogil=True,
        cache=True,
        error_model="numpy",
        boundscheck=False,
        fastmath={"contract"},
    )(_filter)

    def run(inputs: Inputs, context: Context) -> Outputs:
        detected, numbers = inputs["detected"], _numbers(inputs)
        if numbers is None:
            return _nothing(detected)
        tracks, steps, _ = detected.shape
        state, covariance = np.empty((tracks, steps, 4), np.float32), np.empty((tracks, 3), np.float32)
        fill(detected, *numbers, state, covariance)
        return {"state": state, "covariance": covariance}

    return run


# A group is one work-item that takes LANES tracks through the steps, as the cpu does.
_OPENCL = """
__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void filter(__global const float* restrict detected, float dt, float q0, float q1, float q2, float noise, float speed,
            __global float* restrict states, __global float* restrict covariances, ulong tracks, ulong steps) {
  const ulong start = get_group_id(0) * LANES;
  const int size = min((ulong)LANES, tracks - start);
  __local float x[LANES], y[LANES], u[LANES], v[LANES], p[LANES], c[LANES], w[LANES], seen_x[LANES], seen_y[LANES];
  detected += 2 * start * steps;
  states += 4 * start * steps;
  for (int j = 0; j < LANES; j++) {
    x[j] = y[j] = u[j] = v[j] = p[j] = c[j] = w[j] = NAN;
    seen_x[j] = seen_y[j] = 0;
  }
  for (ulong step = 0; step < steps; step++) {
    for (int j = 0; j < size; j++) {
      seen_x[j] = detected[2 * (j * steps + step)];
      seen_y[j] = detected[2 * (j * steps + step) + 1];
    }
    for (int j = 0; j < LANES; j++) {
      const float sx = seen_x[j], sy = seen_y[j], nx = x[j] + dt * u[j], ny = y[j] + dt * v[j];
      const float np = p[j] + dt * (2 * c[j] + dt * w[j]) + q0, nc = c[j] + dt * w[j] + q1, nw = w[j] + q2;
      const int seen = sx * 0 + sy * 0 == 0, first = seen & (nx != nx);
      const float share = seen ? 1 / (np + noise) : 0, gain = np * share, pull = nc * share;
      const float rx = seen ? sx - nx : 0, ry = seen ? sy - ny : 0, keep = seen ? noise * share : 1;
      x[j] = first ? sx : nx + gain * rx;
      y[j] = first ? sy : ny + gain * ry;
      u[j] = first ? 0 : u[j] + pull * rx;
      v[j] = first ? 0 : v[j] + pull * ry;
      p[j] = first ? noise : np * keep;
      c[j] = first ? 0 : nc * keep;
      w[j] = first ? speed : nw - pull * nc;
    }
    for (int j = 0; j < size; j++) vstore4((float4)(x[j], y[j], u[j], v[j]), j * steps + step, states);
  }
  for (int j = 0; j < size; j++) vstore3((float3)(p[j], c[j], w[j]), start + j, covariances);
}
"""


@kalman.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "driving.kalman", LANES=_LANES)

    def run(inputs: Inputs, context: Context) -> Outputs:
        detected, numbers = inputs["detected"], _numbers(inputs)
        if numbers is None:
            return _nothing(detected)
        tracks, steps, _ = detected.shape
        state, covariance = device.empty((tracks, steps, 4), np.float32), device.empty((tracks, 3), np.float32)
        sizes = np.uint64(tracks), np.uint64(steps)
        program.launch("filter", (-(-tracks // _LANES),), detected, *numbers, state, covariance, *sizes)
        return {"state": state, "covariance": covariance}

    return run


cuda: Any  # numba.cuda, on a GPU

#: Threads (tracks) of a block at most, and steps that it reads and writes in one go.
_TRACKS, _STEPS = 64, 8
#: Words of a track in shared memory, one more than are used, so that a column is in as many banks as it has words.
_READ, _WRITTEN = 2 * _STEPS + 1, 4 * _STEPS + 1


def _filter_gpu(
    detected: Any,
    dt: Any,
    q0: Any,
    q1: Any,
    q2: Any,
    noise: Any,
    speed: Any,
    state: Any,
    covariance: Any,
) -> None:
    """A thread a track; eight steps of a block's tracks pass through shared memory, for words to stay side by side."""
    read = cuda.shared.array((_TRACKS, _READ), np.float32)
    written = cuda.shared.array((_TRACKS, _WRITTEN), np.float32)
    tracks, steps = detected.shape[0], detected.shape[1]
    own, lanes = cuda.threadIdx.x, cuda.blockDim.x
    start = cuda.blockIdx.x * lanes
    size = min(lanes, tracks - start)
    zero, one, two = np.float32(0), np.float32(1), np.float32(2)
    nan = np.float32(np.nan)
    x, y, u, v, p, c, w = nan, nan, nan, nan, nan, nan, nan
    for first in range(0, steps, _STEPS):
        count = min(_STEPS, steps - first)
        for i in range(own, size * 2 * count, lanes):
            track, word = i // (2 * count), i % (2 * count)
            read[track, word] = detected[start + track, first + word // 2, word % 2]
        cuda.syncthreads()
        if own < size:
            for step in range(count):
                sx, sy = read[own, 2 * step], read[own, 2 * step + 1]
                x, y = x + dt * u, y + dt * v
                p, c, w = p + dt * (two * c + dt * w) + q0, c + dt * w + q1, w + q2
                if sx * zero + sy * zero == zero:
                    if x != x:
                        x, y, u, v, p, c, w = sx, sy, zero, zero, noise, zero, speed
                    else:
                        share = one / (p + noise)
                        gain, pull = p * share, c * share
                        rx, ry = sx - x, sy - y
                        x, y, u, v = x + gain * rx, y + gain * ry, u + pull * rx, v + pull * ry
                        w = w - pull * c
                        p, c = noise * gain, noise * pull
                written[own, 4 * step], written[own, 4 * step + 1] = x, y
                written[own, 4 * step + 2], written[own, 4 * step + 3] = u, v
        cuda.syncthreads()
        for i in range(own, size * 4 * count, lanes):
            track, word = i // (4 * count), i % (4 * count)
            state[start + track, first + word // 4, word % 4] = written[track, word]
    if own < size:
        covariance[start + own, 0], covariance[start + own, 1], covariance[start + own, 2] = p, c, w


@kalman.on("gpu")
def _gpu(device: Any) -> Run:
    threads = 8 if device.simulated else _TRACKS
    fill = device.compile(_filter_gpu, threads=(threads,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        detected, numbers = inputs["detected"], _numbers(inputs)
        if numbers is None:
            return _nothing(detected)
        tracks, steps, _ = detected.shape
        state, covariance = device.empty((tracks, steps, 4), np.float32), device.empty((tracks, 3), np.float32)
        fill(-(-tracks // threads), detected, *numbers, state, covariance)
        return {"state": state, "covariance": covariance}

    return run


@kalman.on("tpu")
def _tpu(device: Any) -> Run:
    """All tracks a step: the steps are a scan."""
    import jax
    import jax.numpy as jnp

    def fill(detected: Any, dt: Any, q0: Any, q1: Any, q2: Any, noise: Any, speed: Any, steps: Any) -> tuple[Any, Any]:
        def advance(carry: Any, given: Any) -> Any:
            step, (sx, sy) = given
            x, y, u, v, p, c, w = carry
            x, y = x + dt * u, y + dt * v
            p, c, w = p + dt * (2 * c + dt * w) + q0, c + dt * w + q1, w + q2
            seen = jnp.isfinite(sx) & jnp.isfinite(sy)
            first = seen & jnp.isnan(x)
            share = jnp.where(seen, 1 / (p + noise), 0)
            gain, pull, keep = p * share, c * share, jnp.where(seen, noise * share, 1)
            rx, ry = jnp.where(seen, sx - x, 0), jnp.where(seen, sy - y, 0)
            then = x + gain * rx, y + gain * ry, u + pull * rx, v + pull * ry, p * keep, c * keep, w - pull * c
            born = sx, sy, 0, 0, noise, 0, speed
            now = tuple(jnp.where(first, new, old) for new, old in zip(born, then, strict=True))
            # Steps beyond the last are padding.
            now = tuple(jnp.where(step < steps, new, old) for new, old in zip(now, carry, strict=True))
            return now, jnp.stack(now[:4], axis=-1)

        unknown = (jnp.full(detected.shape[0], jnp.nan, jnp.float32),) * 7
        columns = detected[:, :, 0].T, detected[:, :, 1].T
        last, state = jax.lax.scan(advance, unknown, (jnp.arange(detected.shape[1]), columns))
        return state.transpose(1, 0, 2), jnp.stack(last[4:], axis=-1)

    program = device.program(fill)

    def run(inputs: Inputs, context: Context) -> Outputs:
        detected, numbers = inputs["detected"], _numbers(inputs)
        if numbers is None:
            return _nothing(detected)
        tracks, steps, _ = detected.shape
        shapes = {"state": (tracks, steps, 4), "covariance": (tracks, 3)}
        return program(shapes, detected, *numbers, np.int64(steps))

    return run


@kalman.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for tracks, steps in ((1, 1), (3, 20), (100, 12)):
        course = random.normal(0, 50, (tracks, 1, 2)) + 0.1 * np.cumsum(random.normal(5, 2, (tracks, steps, 2)), axis=1)
        detected = (course + random.normal(0, 0.5, course.shape)).astype(np.float32)
        detected[random.random((tracks, steps)) < 0.2] = np.nan
        yield {"detected": detected}
    # A track that comes late, one that is never there, one of which half a detection is missing.
    odd = np.ones((3, 6, 2), np.float32)
    odd[0, :3], odd[1], odd[2, 2, 1], odd[2, 4, 0] = np.nan, np.nan, np.nan, np.inf
    yield {"detected": odd, "acceleration": 0.0, "speed": 0.0}
