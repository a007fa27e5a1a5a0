"""Non-maximum suppression of the boxes that a detector found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lepton_ai.kernel import Context, Inputs, Kernel, Outputs, Run

nms = Kernel(
    "driving.nms",
    inputs={"boxes": "float32[n,4]", "scores": "float32[n]", "threshold": "float32 = 0.5"},
    outputs={"kept": "int64[k]"},
    flops="5*n*n",
    bytes="64*n",
    limits={"threshold": "0 <= threshold <= 1"},
    tolerance=0.0,
    summary="The boxes that no better one overlaps too much, best first.",
)

Boxes = NDArray[np.float32]


@nms.reference
def _reference(boxes: Boxes, scores: NDArray[np.float32], threshold: float) -> Outputs:
    """From the best score down, a box (x0, y0, x1, y1) is kept unless one kept before it overlaps it too much.

    Too much: intersection > threshold * union (Everingham et al. 2010, "The PASCAL Visual Object Classes Challenge",
    IJCV 88, sec. 4.2). Equal scores by the lower index. A score of NaN and a box with a coordinate that is not finite
    are left out. A box whose x1 <= x0 or y1 <= y0 has no area: nothing overlaps it, so it is kept. A threshold below 0
    is 0; of NaN, nothing is too much.

    Sides are differences rounded to float32, areas their products in float64, which are exact: so it makes no
    difference whether a device fuses the multiplications with the additions.
    """
    limit = _limit(threshold)
    fair = np.isfinite(boxes).all(axis=1) & ~np.isnan(scores)
    left = np.flatnonzero(fair)
    left = left[np.argsort(-scores[left], kind="stable")]
    kept = []
    with np.errstate(over="ignore", invalid="ignore"):
        while left.size:
            best, left = left[0], left[1:]
            kept.append(best)
            low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
            common, union = _area(low, high), _area(boxes[best, :2], boxes[best, 2:])
            union = (union + _area(boxes[left, :2], boxes[left, 2:])) - common
            left = left[~(common > limit * union)]
    return {"kept": np.array(kept, np.int64)}


def _area(low: Boxes, high: Boxes) -> NDArray[np.float64]:
    sides = np.maximum(high - low, np.float32(0)).astype(np.float64)
    return np.asarray(sides[..., 0] * sides[..., 1])


def _limit(threshold: float) -> np.float64:
    """The threshold as every device takes it: rounded to float32, not below 0."""
    rounded = np.float64(np.float32(threshold))
    return rounded if math.isnan(rounded) else max(rounded, np.float64(0))


_LANES = 64


def _order(boxes: Boxes, scores: NDArray[np.float32], keys: NDArray[np.int64]) -> int:
    """Fills in a key for each box that takes part, smallest for the best: its score, reversed, above its index."""
    count, zero = 0, np.float32(0)
    for i in range(scores.size):
        score = scores[i]
        spread = boxes[i, 0] * zero + boxes[i, 1] * zero + boxes[i, 2] * zero + boxes[i, 3] * zero
        if score == score and spread == zero:
            # + 0 makes -0 the same as 0. The bits of negative floats are in reverse order.
            bits = np.int64(np.float32(score + zero).view(np.int32))
            rank = bits if bits >= 0 else bits ^ 0x7FFFFFFF
            keys[count] = ((-1 - rank) << 32) | i
            count += 1
    return count


def _select(boxes: Boxes, keys: NDArray[np.int64], limit: float, kept: NDArray[np.int64]) -> int:
    """Each box meets those kept before it, 64 at once: first whether any touches it, then by how much.

    Few touch, so nearly all the time goes into four comparisons a pair, 8 pairs an instruction.
    """
    size, zero = keys.size, np.float32(0)
    rows = -(-size // _LANES)
    # Kept boxes by coordinate. What is not filled in yet touches nothing.
    left, top = np.full((rows, _LANES), np.inf, np.float32), np.full((rows, _LANES), np.inf, np.float32)
    right, bottom = np.full((rows, _LANES), -np.inf, np.float32), np.full((rows, _LANES), -np.inf, np.float32)
    count = 0
    for key in keys:
        i = np.int64(key & 0xFFFFFFFF)
        x0, y0, x1, y1 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        area = np.float64(max(x1 - x0, zero)) * np.float64(max(y1 - y0, zero))
        hidden = False
        for row in range(-(-count // _LANES)):
            a, b, c, d = left[row], top[row], right[row], bottom[row]
            touched = np.int32(0)
            for j in range(_LANES):
                touched |= np.int32((a[j] < x1) & (x0 < c[j]) & (b[j] < y1) & (y0 < d[j]))
            if touched:
                over = np.int32(0)
                for j in range(_LANES):
                    width = (min(x1, c[j])) - (max(x0, a[j]))
                    height = (min(y1, d[j])) - (max(y0, b[j]))
                    width, height = (max(zero, width)), (max(zero, height))
                    wide, high = c[j] - a[j], d[j] - b[j]
                    wide, high = (max(zero, wide)), (max(zero, high))
                    common = np.float64(width) * np.float64(height)
                    union = (np.float64(wide) * np.float64(high) + area) - common
                    over |= np.int32(common > limit * union)
                if over:
                    hidden = True
                    break
        if not hidden:
            row, lane = count // _LANES, count % _LANES
            left[row, lane], top[row, lane], right[row, lane], bottom[row, lane] = x0, y0, x1, y1
            kept[count] = i
            count += 1
    return count


@nms.on("cpu")
def _cpu(device: Any) -> Run:
    from numba import njit, types

    table = types.Array(types.float32, 2, "C", readonly=True)
    column = types.Array(types.float32, 1, "C", readonly=True)
    options = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
    order = njit((table, column, types.int64[::1]), **options)(_order)
    select = njit((table, types.int64[::1], types.float64, types.int64[::1]), **options)(_select)

    def run(inputs: Inputs, context: Context) -> Outputs:
        boxes, scores = inputs["boxes"], inputs["scores"]
        keys = np.empty(len(boxes), np.int64)
        keys = keys[: order(boxes, scores, keys)]
        keys.sort()
        kept = np.empty(keys.size, np.int64)
        return {"kept": kept[: select(boxes, keys, _limit(inputs["threshold"]), kept)].copy()}

    return run


# Ranks by counting, which is parallel; then one work-item goes down the ranks as the cpu does, on a board a pipeline
# that compares a box with LANES kept ones a cycle.
_OPENCL = """
#pragma OPENCL EXTENSION cl_khr_fp64 : enable

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void rank(__global const float* restrict boxes, __global const float* restrict scores, __global long* restrict order,
          ulong size) {
  const ulong start = get_group_id(0) * LANES;
  float own[LANES];
  int better[LANES];
  for (int j = 0; j < LANES; j++) {
    own[j] = scores[min(start + j, size - 1)];
    better[j] = 0;
  }
  for (ulong i = 0; i < size; i++) {
    const float score = scores[i];
    const float spread = boxes[4 * i] * 0 + boxes[4 * i + 1] * 0 + boxes[4 * i + 2] * 0 + boxes[4 * i + 3] * 0;
    const int first = clamp((long)(i - start), -1L, (long)LANES);
    if (spread == 0)
      for (int j = 0; j < LANES; j++) better[j] += (score > own[j]) | ((score == own[j]) & (first < j));
  }
  for (int j = 0; j < LANES && start + j < size; j++) {
    __global const float* box = boxes + 4 * (start + j);
    if (own[j] == own[j] && box[0] * 0 + box[1] * 0 + box[2] * 0 + box[3] * 0 == 0) order[better[j]] = start + j;
  }
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void clear(__global long* restrict order, ulong size) {
  for (ulong i = 0; i < size; i++) order[i] = -1;
}

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void choose(__global const float* restrict boxes, __global const long* restrict order, double limit,
            __global float* restrict corners, __global long* restrict kept, ulong size) {
  const ulong room = (size + LANES - 1) / LANES * LANES;
  __global float *left = corners, *top = corners + room, *right = corners + 2 * room, *bottom = corners + 3 * room;
  ulong count = 0;
  for (ulong place = 0; place < size && order[place] >= 0; place++) {
    __global const float* box = boxes + 4 * order[place];
    const float x0 = box[0], y0 = box[1], x1 = box[2], y1 = box[3];
    const float across = x1 - x0, down = y1 - y0;
    const double area = (double)(across > 0 ? across : 0) * (double)(down > 0 ? down : 0);
    int over = 0;
    for (ulong row = 0; row < count && !over; row += LANES) {
      __global const float *a = left + row, *b = top + row, *c = right + row, *d = bottom + row;
      int touched = 0;
      for (int j = 0; j < LANES; j++) touched |= (a[j] < x1) & (x0 < c[j]) & (b[j] < y1) & (y0 < d[j]);
      if (touched)
        for (int j = 0; j < LANES; j++) {
          float width = (c[j] < x1 ? c[j] : x1) - (a[j] > x0 ? a[j] : x0);
          float height = (d[j] < y1 ? d[j] : y1) - (b[j] > y0 ? b[j] : y0);
          float wide = c[j] - a[j], high = d[j] - b[j];
          const double common = (double)(width > 0 ? width : 0) * (double)(height > 0 ? height : 0);
          const double each = (double)(wide > 0 ? wide : 0) * (double)(high > 0 ? high : 0);
          over |= common > limit * ((each + area) - common);
        }
    }
    if (!over) {
      if (count % LANES == 0)  // what is not filled in yet touches nothing
        for (int j = 0; j < LANES; j++) {
          left[count + j] = top[count + j] = INFINITY;
          right[count + j] = bottom[count + j] = -INFINITY;
        }
      left[count] = x0;
      top[count] = y0;
      right[count] = x1;
      bottom[count] = y1;
      kept[count++] = order[place];
    }
  }
  kept[size] = count;
}
"""


@nms.on("fpga")
def _fpga(device: Any) -> Run:
    program = device.program(_OPENCL, "driving.nms", LANES=_LANES)

    def run(inputs: Inputs, context: Context) -> Outputs:
        boxes, scores = inputs["boxes"], inputs["scores"]
        size, rows = scores.size, -(-scores.size // _LANES)
        order, kept = device.empty((size,), np.int64), device.empty((size + 1,), np.int64)
        corners = device.empty((4 * rows * _LANES,), np.float32)
        program.launch("clear", (1,), order, np.uint64(size))
        program.launch("rank", (rows,), boxes, scores, order, np.uint64(size))
        program.launch("choose", (1,), boxes, order, _limit(inputs["threshold"]), corners, kept, np.uint64(size))
        found = device.download(kept)
        return {"kept": found[: found[size]].copy()}

    return run


cuda: Any  # numba.cuda, on a GPU

#: Rows of the table of who overlaps whom that are made at once: 25 MB of it for 50,000 boxes.
_ROWS = 4096


def _prepare_gpu(boxes: Any, scores: Any, values: Any) -> None:
    """Scores, NaN for the boxes that are left out."""
    zero = np.float32(0)
    for i in range(cuda.grid(1), scores.size, cuda.gridsize(1)):
        spread = boxes[i, 0] * zero + boxes[i, 1] * zero + boxes[i, 2] * zero + boxes[i, 3] * zero
        values[i] = scores[i] if spread == zero else np.float32(np.nan)


def _rank_gpu(boxes: Any, values: Any, order: Any, ranked: Any) -> None:
    """Counts the better ones of each box; the threads of a warp read the same score at once."""
    for i in range(cuda.grid(1), values.size, cuda.gridsize(1)):
        own, better = values[i], 0
        for j in range(values.size):
            if values[j] > own or (values[j] == own and j < i):
                better += 1
        if own == own:
            order[better] = i
            for j in range(4):
                ranked[better, j] = boxes[i, j]


def _area_gpu(x0: Any, y0: Any, x1: Any, y1: Any) -> Any:
    zero = np.float32(0)
    return np.float64(max(np.float32(x1 - x0), zero)) * np.float64(max(np.float32(y1 - y0), zero))


def _compare_gpu(order: Any, ranked: Any, limit: Any, first: Any, masks: Any) -> None:
    """A block holds 64 boxes against 64 others that rank behind them; a thread has one, and its answers are 64 bits."""
    others = cuda.shared.array((64, 4), np.float32)
    row = first + cuda.blockIdx.y * 64
    column = cuda.blockIdx.x * 64
    size = order.size
    if column + 64 <= row:
        return
    for j in range(cuda.threadIdx.x, min(64, size - column), cuda.blockDim.x):
        for axis in range(4):
            others[j, axis] = ranked[column + j, axis]
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, min(64, size - row), cuda.blockDim.x):
        bits = np.uint64(0)
        if order[row + i] >= 0:
            x0, y0, x1, y1 = ranked[row + i, 0], ranked[row + i, 1], ranked[row + i, 2], ranked[row + i, 3]
            area = _area_gpu(x0, y0, x1, y1)
            for j in range(max(0, row + i + 1 - column), min(64, size - column)):
                a, b, c, d = others[j, 0], others[j, 1], others[j, 2], others[j, 3]
                common = _area_gpu(max(a, x0), max(b, y0), min(c, x1), min(d, y1))
                if common > limit * ((_area_gpu(a, b, c, d) + area) - common):
                    bits |= np.uint64(1) << np.uint64(j)
        masks[row + i - first, cuda.blockIdx.x] = bits


def _choose_gpu(order: Any, masks: Any, first: Any, rows: Any, gone: Any, kept: Any) -> None:
    """One block goes down the ranks, 64 at a time: one thread settles those among themselves, all mark who is gone."""
    own = cuda.shared.array(64, np.uint64)
    index = cuda.shared.array(64, np.int64)
    chosen = cuda.shared.array(1, np.uint64)
    one, size = np.uint64(1), order.size
    for start in range(0, rows, 64):
        block = (first + start) >> 6
        for i in range(cuda.threadIdx.x, min(64, rows - start), cuda.blockDim.x):
            own[i], index[i] = masks[start + i, block], order[first + start + i]
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            hidden, stays, count = gone[block], np.uint64(0), kept[size]
            for i in range(min(64, rows - start)):
                if index[i] >= 0 and (hidden >> np.uint64(i)) & one == 0:
                    stays |= one << np.uint64(i)
                    hidden |= own[i]
                    kept[count] = index[i]
                    count += 1
            kept[size] = count
            chosen[0] = stays
        cuda.syncthreads()
        stays = chosen[0]
        for column in range(block + 1 + cuda.threadIdx.x, gone.size, cuda.blockDim.x):
            hidden = gone[column]
            for i in range(min(64, rows - start)):
                if (stays >> np.uint64(i)) & one != 0:
                    hidden |= masks[start + i, column]
            gone[column] = hidden
        cuda.syncthreads()


@nms.on("gpu")
def _gpu(device: Any) -> Run:
    """Who overlaps whom as a table of bits, as in torchvision, then one pass down the ranks."""
    prepare, rank = device.compile(_prepare_gpu), device.compile(_rank_gpu)
    compare = device.compile(_compare_gpu, threads=(8 if device.simulated else 64,), helpers=(_area_gpu,))
    choose = device.compile(_choose_gpu, threads=(8 if device.simulated else 256,))

    def run(inputs: Inputs, context: Context) -> Outputs:
        boxes, scores = inputs["boxes"], inputs["scores"]
        size, blocks = scores.size, -(-scores.size // 64)
        values, ranked = device.empty((size,), np.float32), device.empty((size, 4), np.float32)
        order, kept = device.full((size,), -1, np.int64), device.zeros((size + 1,), np.int64)
        gone, masks = device.zeros((blocks,), np.uint64), device.empty((min(size, _ROWS), blocks), np.uint64)
        prepare(size, boxes, scores, values)
        rank(size, boxes, values, order, ranked)
        for first in range(0, size, _ROWS):
            rows = min(_ROWS, size - first)
            compare((blocks, -(-rows // 64)), order, ranked, _limit(inputs["threshold"]), np.int64(first), masks)
            choose(1, order, masks, np.int64(first), np.int64(rows), gone, kept)
        found = device.read(kept)
        return {"kept": found[: found[size]].copy()}

    return run


@nms.on("tpu")
def _tpu(device: Any) -> Run:
    """Blocks of 256 down the ranks: those among themselves until nothing changes, then against all that follow."""
    import jax
    import jax.numpy as jnp

    def area(low: Any, high: Any) -> Any:
        sides = jnp.maximum(high - low, 0).astype(jnp.float64)
        return sides[..., 0] * sides[..., 1]

    def choose(boxes: Any, scores: Any, limit: Any, size: Any) -> tuple[Any, Any]:
        room = scores.shape[0]
        index = jnp.arange(room)
        fair = jnp.isfinite(boxes[:, :4]).all(axis=1) & ~jnp.isnan(scores) & (index < size)
        _, _, order = jax.lax.sort((~fair, -scores, index), num_keys=2, is_stable=True)
        low, high = boxes[order, :2], boxes[order, 2:4]
        areas, width = area(low, high), min(256, room)
        behind = jnp.arange(width)[:, None] < jnp.arange(width)

        def block(number: Any, alive: Any) -> Any:
            start = number * width
            own_low, own_high = (jax.lax.dynamic_slice_in_dim(each, start, width)[:, None] for each in (low, high))
            common = area(jnp.maximum(own_low, low), jnp.minimum(own_high, high))
            own_areas = jax.lax.dynamic_slice_in_dim(areas, start, width)[:, None]
            over = common > limit * ((own_areas + areas) - common)
            inner = jax.lax.dynamic_slice_in_dim(over, start, width, axis=1) & behind
            before = jax.lax.dynamic_slice_in_dim(alive, start, width)

            def settle(state: tuple[Any, Any]) -> tuple[Any, Any]:
                # After so many rounds as many of the best are right, so what no longer changes is.
                stays, _ = state
                return before & ~(inner & stays[:, None]).any(axis=0), stays

            first = settle((before, before))
            stays, _ = jax.lax.while_loop(lambda state: (state[0] != state[1]).any(), settle, first)
            hidden = (over & stays[:, None]).any(axis=0) & (index >= start + width)
            return jax.lax.dynamic_update_slice_in_dim(alive & ~hidden, stays, start, axis=0)

        alive = jax.lax.fori_loop(0, room // width, block, fair[order])
        kept = order[jnp.nonzero(alive, size=room, fill_value=0)[0]]
        return kept, alive.sum()[None]

    program = device.program(choose)

    def run(inputs: Inputs, context: Context) -> Outputs:
        boxes, scores = inputs["boxes"], inputs["scores"]
        shapes = {"kept": scores.shape, "count": (1,)}
        found = program(shapes, boxes, scores, _limit(inputs["threshold"]), np.int64(scores.size))
        return {"kept": device.read(found["kept"])[: int(device.read(found["count"])[0])]}

    return run


@nms.samples
def _samples() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(0)
    for n, threshold in ((1, 0.5), (20, 0.0), (120, 0.5)):
        corner, side = random.uniform(0, 20, (n, 2)), random.uniform(1, 10, (n, 2))
        boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
        # Whole tenths: many scores are equal.
        yield {"boxes": boxes, "scores": np.round(random.random(n), 1).astype(np.float32), "threshold": threshold}
    # One box twice, one without an area, one upside down, one that is nowhere, one that nothing is known of.
    yield {
        "boxes": np.array(
            [
                [0, 0, 2, 2],
                [0, 0, 2, 2],
                [1, 1, 1, 3],
                [2, 2, 0, 0],
                [0, np.nan, 1, 1],
                [0, 0, np.inf, 1],
                [5, 5, 6, 6],
            ],
            np.float32,
        ),
        "scores": np.array([0.5, 0.5, -0.0, 0.0, 0.9, 0.8, np.nan], np.float32),
        "threshold": 1.0,
    }
