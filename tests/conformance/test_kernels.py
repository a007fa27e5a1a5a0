"""Every kernel, on every kind of device that opens here, equals its reference.

A new kernel or driver is under test by being there, and a module of kernels by being named in LEPTON_KERNELS. Inputs
come from the signature; VALUES holds what random numbers alone would make meaningless.

Variants for the gpu run here where there is one. On Numba's simulator, which starts a thread of Python for each of a
GPU's, they run with small inputs, and in a process of their own: see `test_gpu_simulator.py`.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lepton_ai.errors import InvalidArguments, InvalidSettings
from lepton_ai.kernel import DEVICE_KINDS, Kernel, Run
from lepton_ai.settings import Settings
from lepton_ai.signature import Argument
from tasks.catalogue import load
from tasks.driver import Driver, open_device

Inputs = dict[str, Any]
CATALOGUE = load(Settings.read().kernel_modules)
KERNELS = CATALOGUE.kernels
#: Whether this is the process in which the simulator runs the gpu's variants, and nothing else's.
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
#: How often inputs are drawn, their largest dim, and the most flops of a kernel's own sample that is run.
ROUNDS, LARGEST, MOST_FLOPS = (3, 9, 50_000.0) if SIMULATED else (6, 69, math.inf)


class Quiet:
    """A context that nobody listens to."""

    cancelled = False
    deadline = None
    stream = None

    def progress(self, fraction: float) -> None:
        pass


def _whole(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    return random.integers(-9, 10, shape)


def _windows(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    """Rows (key, start, count, sum, least, most) of windows five seconds wide, some in the same window."""
    rows = random.standard_normal(shape)
    rows[:, :3] = random.integers([-5, -4, 1], [5, 4, 9], (shape[0], 3)) * [1, 5, 1]
    return rows


def _boxes(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    low = random.integers(0, 12, (shape[0], 2))
    return np.concatenate([low, low + random.integers(-1, 10, low.shape)], axis=1)


def _roads(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    """Few junctions have a road between them; of some, more than one way is as short."""
    lengths = random.integers(-1, 20, shape) / 8
    return np.where(random.random(shape) < 0.1, lengths, np.inf)


#: Values of an input where standard normal ones would not do, by kernel and input.
VALUES: dict[str, dict[str, Callable[[np.random.Generator, tuple[int, ...]], Any]]] = {
    "city.shortest_paths": {"roads": _roads},
    "city.traffic_step": {
        "density": lambda random, shape: random.uniform(-10, 170, shape),
        "demand": lambda random, shape: random.uniform(-100, 2500, shape),
        "supply": lambda random, shape: random.uniform(-100, 2500, shape),
        "steps": lambda random, shape: random.integers(0, 6 if SIMULATED else 50),
        "step_s": lambda random, shape: random.uniform(0.1, 2),
        "cell_m": lambda random, shape: random.uniform(40, 100),
        "free_kmh": lambda random, shape: random.uniform(20, 70),
        "wave_kmh": lambda random, shape: random.uniform(5, 20),
        "jam_per_km": lambda random, shape: random.uniform(100, 160),
        "capacity_per_h": lambda random, shape: random.uniform(1000, 2500),
    },
    # Keys outside at either end, too.
    "data.group_by": {"keys": lambda random, shape: random.integers(-2, 16, shape)},
    "data.histogram": {
        "low": lambda random, shape: random.uniform(-2, -1),
        "high": lambda random, shape: random.uniform(0, 2),
    },
    # Whole numbers: ties.
    "data.top_k": {"values": _whole},
    "driving.kalman": {
        "step_s": lambda random, shape: random.uniform(0.05, 1),
        "acceleration": lambda random, shape: random.uniform(0, 5),
        "noise": lambda random, shape: random.uniform(0.1, 2),
        "speed": lambda random, shape: random.uniform(0, 20),
    },
    # Whole numbers: many boxes share a side, many scores are equal.
    "driving.nms": {"boxes": _boxes, "scores": _whole, "threshold": lambda random, shape: random.uniform(0, 1)},
    "driving.voxel_grid": {
        "points": lambda random, shape: random.uniform(-5, 5, shape),
        "edge": lambda random, shape: random.uniform(0.1, 3),
        **{f"origin_{axis}": lambda random, shape: random.uniform(-6, 0) for axis in "xyz"},
    },
    "finance.black_scholes": {
        "spot": lambda random, shape: random.uniform(1, 200, shape),
        "strike": lambda random, shape: random.uniform(1, 200, shape),
        "years": lambda random, shape: random.uniform(0, 5, shape),
        "volatility": lambda random, shape: random.uniform(0, 1, shape),
        "rate": lambda random, shape: random.uniform(-0.05, 0.2),
    },
    # Else log returns of ten deviations cancel each other, and the losses are rounding.
    "finance.value_at_risk": {
        "factor": lambda random, shape: random.normal(0, 0.02, shape),
        "mean": lambda random, shape: random.normal(0, 0.01, shape),
        "horizon": lambda random, shape: random.uniform(0, 10),
        "confidence": lambda random, shape: random.uniform(0.01, 0.99),
    },
    "medical.gaussian_filter": {"sigma": lambda random, shape: random.uniform(0, 1 if SIMULATED else 6)},
    # A pixel of radius 16 costs the simulator 30 ms.
    "medical.median_filter": {"radius": lambda random, shape: random.integers(0, 4 if SIMULATED else 17)},
    "monitor.failure_forecast": {
        "alpha": lambda random, shape: random.uniform(0.01, 1),
        "beta": lambda random, shape: random.uniform(0, 1),
    },
    "recommend.als_step": {
        "starts": lambda random, shape: np.sort(random.integers(-2, 72, shape)),
        "items": lambda random, shape: random.integers(-1, 12, shape),
        "confidence": lambda random, shape: 1 + random.exponential(2, shape),
        "factors": lambda random, shape: random.normal(0, 0.3, shape),
        "regularization": lambda random, shape: random.uniform(0.5, 2),
    },
    # Whole numbers: exact in any order of summing, so that ties are ties on every device.
    "retrieval.top_k": {"items": _whole, "queries": _whole},
    "stream.window": {
        "times": lambda random, shape: random.uniform(-20, 20, shape),
        "keys": lambda random, shape: random.integers(-5, 5, shape),
        "width": lambda random, shape: 5,
        "lateness": lambda random, shape: random.uniform(0, 10),
        "state": _windows,
        "watermark": lambda random, shape: random.uniform(-20, 0, shape),
    },
}

#: Inputs that keep the signature and its limits, and that a kernel refuses all the same: the argument at fault, changes
#: to the first of its samples.
REFUSED: dict[str, list[tuple[str, Inputs]]] = {
    # Of one entry, 50 users would take it, or two.
    "recommend.als_step": [
        ("starts", {"starts": np.array([0, 9] * 50)}),
        ("starts", {"starts": np.array([-9, 9, 0, 9])}),
    ],
}


@cache
def driver_of(kind: str) -> Driver | str:
    try:
        return open_device(kind, slots=1)
    except (ImportError, InvalidSettings, OSError, RuntimeError) as error:
        return f"no {kind} device opens here: {error}"


@cache
def run_of(name: str, kind: str) -> Run:
    return KERNELS[name].build(kind, driver_of(kind))


def kinds() -> list[str]:
    """Those whose variants are under test in this process."""
    if SIMULATED:
        return ["gpu"]
    has_gpu = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    return [kind for kind in DEVICE_KINDS if kind != "gpu" or has_gpu]


VARIANTS = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name in sorted(KERNELS)
    for kind in kinds()
    if kind in KERNELS[name].kinds
]
variants = pytest.mark.parametrize(("name", "kind"), VARIANTS)
batched = pytest.mark.parametrize(
    ("name", "kind"), [variant for variant in VARIANTS if KERNELS[str(variant.values[0])].spec.batch is not None]
)


def launch(name: str, kind: str, inputs: Inputs) -> dict[str, NDArray[Any]]:
    driver = driver_of(kind)
    if isinstance(driver, str):
        pytest.skip(driver)
    uploaded = {key: driver.upload(value) if isinstance(value, np.ndarray) else value for key, value in inputs.items()}
    outputs = driver.launch(run_of(name, kind), uploaded, Quiet())
    return {key: np.array(driver.download(value)) for key, value in outputs.items()}


def generator(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), seed])


def draw(kernel: Kernel, random: np.random.Generator, dims: dict[str, int]) -> Inputs:
    """Inputs of the kernel's signature with these dims; the rest of the dims drawn, the limits honoured."""
    for _ in range(1000):
        sizes = dims | {dim: int(random.integers(1, LARGEST + 1)) for dim in kernel.signature.names if dim not in dims}
        inputs = {name: value_of(kernel, argument, random, sizes) for name, argument in kernel.signature.inputs.items()}
        try:
            return kernel.signature.bind(inputs)[0]
        except InvalidArguments:
            continue
    raise AssertionError(f"no inputs of {kernel.name} with {dims} keep its limits")


def value_of(kernel: Kernel, argument: Argument, random: np.random.Generator, sizes: dict[str, int]) -> Any:
    own = VALUES.get(kernel.name, {}).get(argument.name)
    dtype = np.dtype(argument.dtype)
    shape = tuple(dim if isinstance(dim, int) else sizes[dim] for dim in argument.dims or ())
    if own is not None:
        values = np.asarray(own(random, shape))
    elif dtype.kind == "b":
        values = random.integers(0, 2, shape)
    elif argument.dims is None and dtype.kind in "iu":
        values = np.asarray(sizes[argument.name])
    elif dtype.kind in "iu":
        values = random.integers(0, 100, shape)
    else:
        values = random.standard_normal(shape)
    values = np.asarray(values).astype(dtype)
    return values.item() if argument.dims is None else values


def array_dims(kernel: Kernel) -> set[str]:
    arrays = [argument for argument in kernel.signature.inputs.values() if argument.dims is not None]
    return {dim for argument in arrays for dim in argument.dims or () if isinstance(dim, str)}


def assert_refers(kernel: Kernel, outputs: dict[str, NDArray[Any]], inputs: Inputs, told: str) -> None:
    assert_close(kernel, outputs, {key: np.asarray(value) for key, value in kernel.refer(inputs).items()}, told)


def assert_close(
    kernel: Kernel, outputs: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], told: str
) -> None:
    assert set(outputs) == set(expected) == set(kernel.signature.outputs), told
    for key, wanted in expected.items():
        found = outputs[key]
        assert found.dtype == wanted.dtype == np.dtype(kernel.signature.outputs[key].dtype), f"{told}: {key}"
        assert found.shape == wanted.shape, f"{told}: {key}"
        with np.errstate(invalid="ignore", over="ignore"):
            found64, wanted64 = found.astype(np.float64), wanted.astype(np.float64)
            allowed = kernel.spec.tolerance * np.maximum(1, np.abs(wanted64))
            close = (found64 == wanted64) | (np.isnan(found64) & np.isnan(wanted64))
            close |= np.isfinite(wanted64) & (np.abs(found64 - wanted64) <= allowed)
        if not close.all():
            at = tuple(np.argwhere(~close)[0])
            raise AssertionError(
                f"{told}: {key}{[int(i) for i in at]} is {found[at]!r}, the reference {wanted[at]!r}; "
                f"{np.count_nonzero(~close)} of {close.size} differ by more than {kernel.spec.tolerance:g}"
            )


def flops(kernel: Kernel, inputs: Inputs) -> float:
    return kernel.spec.work(kernel.signature.bind(inputs)[1]).flops


@variants
def test_it_equals_the_reference_on_its_own_samples(name: str, kind: str) -> None:
    kernel = KERNELS[name]
    samples = [each for each in kernel.sample_inputs() if flops(kernel, each) <= MOST_FLOPS]
    assert samples, f"every sample of {name} asks for more than {MOST_FLOPS} flops, too many for the simulator"
    for number, inputs in enumerate(samples):
        assert_refers(kernel, launch(name, kind, inputs), inputs, f"{name} on {kind}, sample {number}")


@variants
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_it_equals_the_reference_on_random_inputs(name: str, kind: str, seed: int) -> None:
    kernel = KERNELS[name]
    inputs = draw(kernel, generator(name, seed), {})
    assert_refers(kernel, launch(name, kind, inputs), inputs, f"{name} on {kind}, seed {seed}")


@variants
def test_it_takes_arrays_of_one_element(name: str, kind: str) -> None:
    kernel = KERNELS[name]
    inputs = draw(kernel, generator(name, 0), dict.fromkeys(array_dims(kernel), 1))
    assert_refers(kernel, launch(name, kind, inputs), inputs, f"{name} on {kind}, one element")


@variants
def test_it_takes_empty_arrays_along_each_dim_that_may_be_empty(name: str, kind: str) -> None:
    kernel = KERNELS[name]
    for dim in sorted(array_dims(kernel)):
        if any(dim in limit.names for limit in kernel.signature.limits.values()):
            continue
        inputs = draw(kernel, generator(name, 0), {dim: 0})
        assert_refers(kernel, launch(name, kind, inputs), inputs, f"{name} on {kind}, {dim} = 0")


@variants
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_it_treats_values_that_are_not_finite_as_the_reference_does(name: str, kind: str, odd: float) -> None:
    kernel = KERNELS[name]
    random = generator(name, 0)
    for key, argument in kernel.signature.inputs.items():
        if np.dtype(argument.dtype).kind != "f":
            continue
        inputs = draw(kernel, random, {})
        if argument.dims is None:
            inputs[key] = odd
            if refuses(kernel, inputs):  # so no variant ever sees it
                continue
        else:
            array = inputs[key].copy()
            array.flat[random.integers(0, array.size, 3)] = odd
            inputs[key] = array
        assert_refers(kernel, launch(name, kind, inputs), inputs, f"{name} on {kind}, {odd} in {key}")


@pytest.mark.parametrize(("name", "kind"), [each for each in VARIANTS if each.values[0] in REFUSED])
def test_it_refuses_what_the_reference_refuses(name: str, kind: str) -> None:
    kernel = KERNELS[name]
    for field, changes in REFUSED[name]:
        inputs = kernel.signature.bind(kernel.sample_inputs()[0] | changes)[0]
        for run in (partial(kernel.refer, inputs), partial(launch, name, kind, inputs)):
            with pytest.raises(InvalidArguments) as refused:
                run()
            assert refused.value.field == field
            assert field in refused.value.message


def refuses(kernel: Kernel, inputs: Inputs) -> bool:
    try:
        kernel.signature.bind(inputs)
    except InvalidArguments:
        return True
    return False


@variants
def test_arrays_that_are_not_contiguous_or_aligned_make_no_difference(name: str, kind: str) -> None:
    kernel = KERNELS[name]
    inputs = draw(kernel, generator(name, 1), {})

    def spread(array: NDArray[Any]) -> NDArray[Any]:
        raw = np.zeros(2 * array.nbytes + 1, np.uint8)
        wide = raw[1:].view(array.dtype).reshape(*array.shape[:-1], 2 * array.shape[-1])
        view = wide[..., ::2]
        view[...] = array
        return view

    hard = {key: spread(value) if isinstance(value, np.ndarray) else value for key, value in inputs.items()}
    bound = kernel.signature.bind(hard)[0]
    assert_refers(kernel, launch(name, kind, bound), inputs, f"{name} on {kind}, strided")
    unaligned = {key: misalign(value) if isinstance(value, np.ndarray) else value for key, value in inputs.items()}
    assert_refers(kernel, launch(name, kind, unaligned), inputs, f"{name} on {kind}, unaligned")


def misalign(array: NDArray[Any]) -> NDArray[Any]:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@variants
def test_it_leaves_its_inputs_as_they_were(name: str, kind: str) -> None:
    kernel = KERNELS[name]
    inputs = draw(kernel, generator(name, 2), {})
    before = {key: np.array(value) for key, value in inputs.items()}
    launch(name, kind, inputs)
    for key, value in before.items():
        np.testing.assert_array_equal(inputs[key], value)


@batched
@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_a_batch_gives_what_its_jobs_give_one_by_one(name: str, kind: str, jobs: int) -> None:
    kernel = KERNELS[name]
    batch = list(draw_batch(kernel, generator(name, jobs), jobs))
    alone = [launch(name, kind, inputs) for inputs in batch]
    together = launch(name, kind, join(kernel, batch))
    for number, outputs in enumerate(split(kernel, together, batch)):
        assert_close(kernel, outputs, alone[number], f"{name} on {kind}, job {number} of {jobs}")


def draw_batch(kernel: Kernel, random: np.random.Generator, jobs: int) -> Iterator[Inputs]:
    """Jobs that may share a launch: equal scalars, and equal shapes but for a first dim that joins them."""
    first = draw(kernel, random, {})
    scalars = {key: value for key, value in first.items() if not isinstance(value, np.ndarray)}
    dims = {dim: int(size) for dim, size in kernel.signature.bind(first)[1].items()}
    if kernel.spec.batch == "concat":
        lead = {argument.dims[0] for argument in kernel.signature.inputs.values() if argument.dims}
        dims = {dim: size for dim, size in dims.items() if dim not in lead}
    for _ in range(jobs):
        yield draw(kernel, random, dims) | scalars


def join(kernel: Kernel, batch: list[Inputs]) -> Inputs:
    combine = np.stack if kernel.spec.batch == "stack" else np.concatenate
    return {
        key: combine([inputs[key] for inputs in batch]) if isinstance(value, np.ndarray) else value
        for key, value in batch[0].items()
    }


def split(kernel: Kernel, outputs: dict[str, NDArray[Any]], batch: list[Inputs]) -> Iterator[dict[str, NDArray[Any]]]:
    if kernel.spec.batch == "stack":
        for number in range(len(batch)):
            yield {key: value[number] for key, value in outputs.items()}
        return
    start = 0
    for inputs in batch:
        size = next(len(value) for value in inputs.values() if isinstance(value, np.ndarray))
        yield {key: value[start : start + size] for key, value in outputs.items()}
        start += size


def test_no_module_with_kernels_is_refused() -> None:
    assert CATALOGUE.refused == {}


def test_every_kernel_has_a_reference_samples_and_a_variant() -> None:
    for kernel in KERNELS.values():
        assert kernel.sample_inputs(), kernel.name
        assert kernel.kinds, kernel.name
        assert kernel.spec.summary, kernel.name


def test_the_work_of_every_sample_is_above_nought() -> None:
    for kernel in KERNELS.values():
        for inputs in kernel.sample_inputs():
            work = kernel.spec.work(kernel.signature.bind(inputs)[1])
            assert work.flops > 0, kernel.name
            assert work.bytes > 0, kernel.name
