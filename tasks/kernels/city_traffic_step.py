"""Traffic on the roads of a town."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.errors import JobCancelled
from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

traffic_step = Kernel(
    "city.traffic_step",
    inputs={
        "density": "float32[l,c]",
        "demand": "float32[l]",
        "supply": "float32[l]",
        "steps": "int64",
        "step_s": "float32 = 1",
        "cell_m": "float32 = 50",
        "free_kmh": "float32 = 50",
        "wave_kmh": "float32 = 15",
        "jam_per_km": "float32 = 150",
        "capacity_per_h": "float32 = 1800",
    },
    outputs={"after": "float32[l,c]", "left": "float32[l]"},
    flops="10*l*c*steps",
    bytes="8*l*c + 12*l",
    limits={
        "density": "c >= 1",
        "steps": "0 <= steps <= 1000000",
        "step_s": "0 < step_s * max(free_kmh, wave_kmh) <= 3.6 * cell_m",
        "cell_m": "cell_m > 0",
        "free_kmh": "free_kmh >= 0",
        "wave_kmh": "wave_kmh >= 0",
        "jam_per_km": "jam_per_km >= 0",
        "capacity_per_h": "capacity_per_h >= 0",
    },
    batch="concat",
    tolerance=1e-4,
    summary="Densities of traffic on many roads after some steps, and how many vehicles have left each road.",
)

Table = NDArray[np.float32]
Column = NDArray[np.float32]


@traffic_step.reference
def _reference(density: Table, demand: Column, supply: Column, steps: int, **numbers: float) -> Outputs:
    """Each of l roads is c cells; vehicles per km in each, after so many steps of the cell transmission model.

    Daganzo (1994), "The cell transmission model: A dynamic representation of highway traffic consistent with the
    hydrodynamic theory", Transportation Research B 28(4), eq. 5. From cell i to i + 1 flow per hour
    min(free_kmh * density[i], capacity_per_h, wave_kmh * (jam_per_km - density[i+1])). `demand` (vehicles per hour)
    stands for what the first cell could be sent, `supply` for what is taken from the last; infinity is as much as fits.
    `left` counts the vehicles that left the last cell.

    Densities are clipped to what fits, 0 to jam_per_km; demand and supply below 0 are 0. A road with a density that is
    not finite, or a demand or a supply of NaN, is all NaN, and every road is where a number is not finite.
    """
    spoilt = ~np.isfinite(density).all(axis=1) | np.isnan(demand) | np.isnan(supply)
    if not all(map(math.isfinite, numbers.values())):
        spoilt[:] = True
    jam, capacity, free, wave = (numbers[name] for name in ("jam_per_km", "capacity_per_h", "free_kmh", "wave_kmh"))
    hours, cell_km = numbers["step_s"] / 3600, numbers["cell_m"] / 1000
    left = np.zeros(len(density))
    with np.errstate(all="ignore"):
        after = np.minimum(np.maximum(density.astype(np.float64), 0), jam)
        demand, supply = np.maximum(demand, 0)[:, None], np.maximum(supply, 0)[:, None]
        for _ in range(steps):
            send, take = np.minimum(free * after, capacity), np.minimum(wave * (jam - after), capacity)
            flow = np.minimum(np.hstack([demand, send]), np.hstack([take, supply]))
            after = after - hours / cell_km * np.diff(flow)
            left += hours * flow[:, -1]
    after[spoilt], left[spoilt] = np.nan, np.nan
    return {"after": after.astype(np.float32), "left": left.astype(np.float32)}


def _numbers(inputs: Inputs) -> tuple[np.float32, ...] | None:
    """The numbers of a step with densities as the unit of flows, so that a step is what comes less what goes.

    The share of a cell's vehicles that moves on, the share of its room that is given back, jam density, capacity, a
    vehicle per hour in that unit, and a cell's length in km; None where a number is not finite.
    """
    names = ("step_s", "cell_m", "free_kmh", "wave_kmh", "jam_per_km", "capacity_per_h")
    if not all(math.isfinite(inputs[name]) for name in names):
        return None
    step_s, cell_m, free, wave, jam, capacity = (inputs[name] for name in names)
    unit = (step_s / 3600) / (cell_m / 1000)
    return tuple(np.float32(each) for each in (free * unit, wave * unit, jam, capacity * unit, unit, cell_m / 1000))


def _nothing(density: Any) -> Outputs:
    return {"after": np.full(density.shape, np.nan, np.float32), "left": np.full(density.shape[0], np.nan, np.float32)}


def _advance(
    density: Table,
    demand: Column,
    supply: Column,
    steps: int,
    free: float,
    wave: float,
    jam: float,
    capacity: float,
    unit: float,
    cell_km: float,
    after: Table,
    left: Column,
) -> None:
    """A road at a time goes through all steps while it is in the L1 cache."""
    roads, cells = density.shape
    zero = np.float32(0)
    flow = np.empty(cells + 1, np.float32)
    inner, into, out = flow[1:cells], flow[:cells], flow[1:]
    for road in range(roads):
        now = after[road]
        spoilt = zero
        for i in range(cells):
            each = density[road, i]
            spoilt += each * zero
            each = min(jam, each)
            now[i] = max(zero, each)
        come, go = demand[road], supply[road]
        spoilt = spoilt if (come == come) & (go == go) else np.float32(np.nan)
        come, go = min(max(come, zero) * unit, capacity), min(max(go, zero) * unit, capacity)
        gone = 0.0
        behind = now[1:]
        for _ in range(steps):
            room = wave * (jam - now[0])
            flow[0] = min(room, come)
            sent = free * now[cells - 1]
            flow[cells] = min(go, sent)
            gone += float(flow[cells])
            for i in range(cells - 1):
                sent, room = free * now[i], wave * (jam - behind[i])
                sent = min(capacity, sent)
                inner[i] = min(room, sent)
            for i in range(cells):
                now[i] += into[i] - out[i]
        left[road] = gone * cell_km + spoilt
        if spoilt != zero:
            now[:] = np.nan


_ROADS = 256


@traffic_step.on("cpu")
def _cpu(device: Any) -> Run:
    """A road knows of no other, so the roads of many jobs are more roads."""
    from numba import njit, types

    table, column = types.Array(types.float32, 2, "C", readonly=True), types.Array(types.float32, 1, "C", readonly=True)
    advance = njit(
        (table, column, column, types.int64, *(types.float32,) * 6, types.float32[:, ::1], types.float32[::1]),
        nogil=True,
        cache=True,
        error_model="numpy",
        boundscheck=False,
        fastmath={"contract"},
    )(_advance)

    def run(inputs: Inputs, context: Context) -> Outputs:
        density, demand, supply, steps = (inputs[name] for name in ("density", "demand", "supply", "steps"))
        numbers = _numbers(inputs)
        if numbers is None:
            return _nothing(density)
        after, left = np.empty(density.shape, np.float32), np.empty(len(density), np.float32)
        for start in range(0, len(density), _ROADS):
            _look(context, start / len(density))
            part = slice(start, start + _ROADS)
            advance(density[part], demand[part], supply[part], steps, *numbers, after[part], left[part])
        return {"after": after, "left": left}

    return run


def _look(context: Context, done: float) -> None:
    """Tells how far the work is, and ends it where nobody wants it any more."""
    if context.cancelled:
        raise JobCancelled(f"city.traffic_step was cancelled when {done:.0%} were done")
    context.progress(done)


# A group is one work-item with a road. Two rows take turns, so that a step is one loop over the cells, on a board a
# pipeline, on PoCL vectors.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void advance(__global const float* restrict densities, __global const float* restrict demands,
             __global const float* restrict supplies, long steps, float free, float wave, float jam, float capacity,
             float unit, float cell_km, __global float* restrict rows, __global float* restrict afters,
             __global float* restrict lefts, ulong cells) {
  const ulong road = get_group_id(0);
  __global const float* density = densities + road * cells;
  __global float *after = afters + road * cells, *flow = rows + road * (cells + 1);
  float spoilt = 0;
  for (ulong i = 0; i < cells; i++) {
    const float each = density[i];
    spoilt += each * 0;
    after[i] = each < jam ? (each > 0 ? each : 0) : jam;
  }
  const float demand = demands[road], supply = supplies[road];
  if (demand != demand || supply != supply) spoilt = NAN;
  const float come = fmin(fmax(demand, 0.0f) * unit, capacity), go = fmin(fmax(supply, 0.0f) * unit, capacity);
  double gone = 0;
  for (long step = 0; step < steps; step++) {
    const float room = wave * (jam - after[0]), sent = free * after[cells - 1];
    flow[0] = come < room ? come : room;
    flow[cells] = sent < go ? sent : go;
    gone += flow[cells];
    for (ulong i = 1; i < cells; i++) {
      const float most = free * after[i - 1], fits = wave * (jam - after[i]);
      const float sends = most < capacity ? most : capacity;
      flow[i] = sends < fits ? sends : fits;
    }
    for (ulong i = 0; i < cells; i++) after[i] += flow[i] - flow[i + 1];
  }
  lefts[road] = (float)(gone * cell_km) + spoilt;
  if (spoilt != 0)
    for (ulong i = 0; i < cells; i++) after[i] = NAN;
}
"""


@traffic_step.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "city.traffic_step")

    def run(inputs: Inputs, context: Context) -> Outputs:
        density, numbers = inputs["density"], _numbers(inputs)
        if numbers is None:
            return _nothing(density)
        roads, cells = density.shape
        after, left = device.empty(density.shape, np.float32), device.empty((roads,), np.float32)
        flow = device.empty((roads, cells + 1), np.float32)
        given = density, inputs["demand"], inputs["supply"], np.int64(inputs["steps"]), *numbers
        program.launch("advance", (roads,), *given, flow, after, left, np.uint64(cells))
        return {"after": after, "left": left}

    return run


cuda: Any  # numba.cuda, on a GPU

#: Cells that a block of threads holds; a longer road is many blocks, whose edges are right for so many steps.
_SPAN, _HALO = 512, 32
_FACES = _SPAN + 1


def _prepare_gpu(density: Any, demand: Any, supply: Any, jam: Any, now: Any, spoilt: Any, gone: Any) -> None:
    roads, cells = density.shape
    zero = np.float32(0)
    for i in range(cuda.grid(1), roads * cells, cuda.gridsize(1)):
        road, cell = i // cells, i % cells
        each = density[road, cell]
        if each * zero != zero or demand[road] != demand[road] or supply[road] != supply[road]:
            spoilt[road] = 1
        now[road, cell] = max(min(each, jam), zero)
        if cell == 0:
            gone[road] = 0


def _advance_gpu(
    before: Any,
    demand: Any,
    supply: Any,
    steps: Any,
    free: Any,
    wave: Any,
    jam: Any,
    capacity: Any,
    unit: Any,
    width: Any,
    halo: Any,
    after: Any,
    gone: Any,
) -> None:
    """A block has `width` cells of a road and up to `halo` more to each side, of which a step spoils the outermost."""
    now = cuda.shared.array(_SPAN, np.float32)
    flow = cuda.shared.array(_FACES, np.float32)  # a line of its own: on the simulator one line is one array
    cells, road = before.shape[1], cuda.blockIdx.x
    first = cuda.blockIdx.y * width
    last = min(first + width, cells)
    low, high = max(first - halo, 0), min(last + halo, cells)
    size, zero = high - low, np.float32(0)
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    come = min(max(demand[road], zero) * unit, capacity)
    go = min(max(supply[road], zero) * unit, capacity)
    for i in range(thread, size, threads):
        now[i] = before[road, low + i]
    cuda.syncthreads()
    total = 0.0
    for _ in range(steps):
        for i in range(thread, size + 1, threads):
            sent = come if i == 0 else min(free * now[i - 1], capacity)
            room = go if i == size else wave * (jam - now[i])
            flow[i] = min(sent, room)
        cuda.syncthreads()
        for i in range(thread, size, threads):
            now[i] += flow[i] - flow[i + 1]
        if thread == 0 and last == cells:
            total += flow[size]
        cuda.syncthreads()
    for i in range(first - low + thread, last - low, threads):
        after[road, low + i] = now[i]
    if thread == 0 and last == cells:
        gone[road] += total


def _finish_gpu(now: Any, spoilt: Any, gone: Any, cell_km: Any, after: Any, left: Any) -> None:
    roads, cells = after.shape
    for i in range(cuda.grid(1), roads * cells, cuda.gridsize(1)):
        road, cell = i // cells, i % cells
        after[road, cell] = now[road, cell] if spoilt[road] == 0 else np.float32(np.nan)
        if cell == 0:
            left[road] = gone[road] * cell_km if spoilt[road] == 0 else np.nan


@traffic_step.on("gpu")
def _gpu(device: Any) -> Run:
    """Roads in shared memory: one of up to 512 cells for all steps, of a longer one pieces for 32 steps a launch."""
    prepare, finish = device.compile(_prepare_gpu), device.compile(_finish_gpu)
    advance = device.compile(_advance_gpu, threads=(2 if device.simulated else 128,))
    span, halo = (8, 2) if device.simulated else (_SPAN, _HALO)

    def run(inputs: Inputs, context: Context) -> Outputs:
        density, demand, supply, steps = (inputs[name] for name in ("density", "demand", "supply", "steps"))
        numbers = _numbers(inputs)
        if numbers is None:
            return _nothing(density)
        roads, cells = density.shape
        jam, cell_km = numbers[2], numbers[5]
        now, then = device.empty(density.shape, np.float32), device.empty(density.shape, np.float32)
        spoilt, gone = device.zeros((roads,), np.int32), device.empty((roads,), np.float64)
        left = device.empty((roads,), np.float32)
        prepare(density.size, density, demand, supply, jam, now, spoilt, gone)
        width, reach, most = (span, 0, 1000) if cells <= span else (span - 2 * halo, halo, halo)
        for done in range(0, steps, most):
            _look(context, done / steps)
            count, pieces = np.int64(min(most, steps - done)), -(-cells // width)
            reached = np.int64(width), np.int64(reach)
            advance((roads, pieces), now, demand, supply, count, *numbers[:5], *reached, then, gone)
            now, then = then, now
        finish(density.size, now, spoilt, gone, cell_km, then, left)
        return {"after": then, "left": left}

    return run


@traffic_step.on("tpu")
def _tpu(device: Any) -> Run:
    """All cells a step; a cell's neighbour is the next lane."""
    import jax
    import jax.numpy as jnp

    def advance(
        density: Any,
        demand: Any,
        supply: Any,
        steps: Any,
        free: Any,
        wave: Any,
        jam: Any,
        capacity: Any,
        unit: Any,
        cell_km: Any,
        cells: Any,
    ) -> tuple[Any, Any]:
        spoilt = ~jnp.isfinite(density).all(axis=1) | jnp.isnan(demand) | jnp.isnan(supply)
        come = jnp.minimum(jnp.maximum(demand, 0) * unit, capacity)[:, None]
        go = jnp.minimum(jnp.maximum(supply, 0) * unit, capacity)[:, None]
        index = jnp.arange(density.shape[1])
        last, nothing = index == cells - 1, jnp.zeros_like(come)

        def step(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            now, gone = state
            sent = jnp.minimum(free * now, capacity)
            into = jnp.minimum(jnp.concatenate([come, sent[:, :-1]], axis=1), wave * (jam - now))
            out = jnp.where(last, jnp.minimum(sent, go), jnp.concatenate([into[:, 1:], nothing], axis=1))
            # What lies beyond the last cell is padding, and stays empty.
            now = jnp.where(index < cells, now + (into - out), 0)
            return now, gone + jnp.where(last, out, 0).sum(axis=1, dtype=jnp.float64)

        now = jnp.clip(density, 0, jam)
        now, gone = jax.lax.fori_loop(0, steps, step, (now, jnp.zeros(density.shape[0], jnp.float64)))
        left = (gone * cell_km).astype(jnp.float32)
        return jnp.where(spoilt[:, None], jnp.nan, now), jnp.where(spoilt, jnp.nan, left)

    program = device.program(advance)

    def run(inputs: Inputs, context: Context) -> Outputs:
        density, numbers = inputs["density"], _numbers(inputs)
        if numbers is None:
            return _nothing(density)
        roads, cells = density.shape
        given = inputs["demand"], inputs["supply"], np.int64(inputs["steps"])
        shapes = {"after": (roads, cells), "left": (roads,)}
        return program(shapes, density, *given, *numbers, np.int64(cells))

    return run


@traffic_step.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for roads, cells, steps in ((1, 1, 1), (3, 17, 12), (40, 60, 30)):
        yield {
            "density": random.uniform(0, 150, (roads, cells)).astype(np.float32),
            "demand": random.uniform(0, 2000, roads).astype(np.float32),
            "supply": random.uniform(0, 2000, roads).astype(np.float32),
            "steps": steps,
        }
    # Too full, less than empty, not a number; as much as fits comes and goes, or nothing does.
    density = np.array([[200, 20, 10], [-5, 20, 10], [np.nan, 1, 2], [1, np.inf, 2], [1, 2, 3], [1, 2, 3]], np.float32)
    demand = np.array([0, np.inf, 1, 1, np.nan, -9], np.float32)
    supply = np.array([np.inf, 0, 1, 1, 1, np.inf], np.float32)
    yield {"density": density, "demand": demand, "supply": supply, "steps": 7, "step_s": 2.0}
