"""Every driver that opens here keeps the contract of `tasks/driver.py`. What is special to one is in its own tests.

The GPU's runs on Numba's simulator where there is no card, in a process of its own: the simulator replaces CUDA for
good.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lepton_ai.device import DeviceState
from lepton_ai.errors import InvalidSettings
from lepton_ai.kernel import DEVICE_KINDS, Context, Inputs, Outputs, Run
from lepton_ai.tensor import DTYPES
from tasks.driver import Driver, Found, open_device, probe
from tasks.kernels.vision_ndvi import ndvi
from tasks.warmup import IdleContext

ROOT = Path(__file__).parents[2]
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
#: Peaks are measured in well under a second by a processor that nobody else wants.
PATIENCE_S = 20.0


def opened(kind: str, slots: int = 2) -> Driver:
    try:
        return open_device(kind, slots)
    except (ImportError, InvalidSettings, OSError, RuntimeError) as error:
        pytest.skip(f"no {kind} device opens here: {error}")


@pytest.fixture(scope="module", params=DEVICE_KINDS)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    driver = opened(request.param)
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def run(driver: Driver) -> Run:
    return ndvi.build(driver.kind, driver)


def bands(seed: int, shape: tuple[int, ...] = (9, 13)) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    return {"red": random.random(shape, np.float32), "nir": random.random(shape, np.float32)}


def launch(driver: Driver, run: Run, arrays: dict[str, NDArray[Any]]) -> Outputs:
    return driver.launch(run, {name: driver.upload(array) for name, array in arrays.items()}, IdleContext())


def index_of(driver: Driver, run: Run, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    return driver.download(launch(driver, run, arrays)["ndvi"])


def assert_index(found: NDArray[Any], arrays: dict[str, NDArray[Any]]) -> None:
    np.testing.assert_allclose(found, ndvi.refer(arrays)["ndvi"], rtol=1e-6)


# -- arrays ---------------------------------------------------------------------------------------------------------


def round_trip(driver: Driver, array: NDArray[Any]) -> None:
    """Bit by bit: NaN, -0 and the smallest numbers come back as they went."""
    before = array.tobytes()
    seen = driver.upload(array)
    assert (tuple(seen.shape), seen.ndim, seen.size, seen.dtype) == (array.shape, array.ndim, array.size, array.dtype)
    back = driver.download(seen)
    assert (back.shape, back.dtype, back.dtype.isnative) == (array.shape, array.dtype, True)
    assert back.tobytes() == array.tobytes() == before


def extremes(dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind == "b":
        return np.array([True, False, True])
    if dtype.kind in "iu":
        return np.array([np.iinfo(dtype).min, 0, 1, np.iinfo(dtype).max], dtype)
    limits = np.finfo(dtype)
    return np.array([np.nan, np.inf, -np.inf, -0.0, limits.max, limits.tiny, limits.smallest_subnormal], dtype)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_comes_back_as_it_went(driver: Driver, name: str) -> None:
    round_trip(driver, extremes(np.dtype(name)))


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (7,), (8,), (9,), (64,), (65,), (0, 3), (3, 0), (65, 3), (1, 1, 1), (2, 3, 4, 5)]
)
def test_every_shape_comes_back_as_it_went(driver: Driver, shape: tuple[int, ...]) -> None:
    round_trip(driver, np.random.default_rng(0).random(shape))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(20.0)[::2],
        np.arange(20.0)[::-1],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.broadcast_to(np.arange(3.0), (4, 3)),
        np.frombuffer(b"x" + np.arange(70.0).tobytes(), np.float64, offset=1),
        np.frombuffer(np.arange(64.0).tobytes()),
    ],
    ids=["strided", "backwards", "fortran", "broadcast", "unaligned", "read-only"],
)
def test_arrays_of_any_layout_come_back_as_they_went(driver: Driver, array: NDArray[Any]) -> None:
    round_trip(driver, array)


def test_an_output_of_the_host_is_taken_as_it_is(driver: Driver) -> None:
    np.testing.assert_array_equal(driver.download(np.arange(3)), np.arange(3))


# -- launches -------------------------------------------------------------------------------------------------------


def test_what_a_launch_returns_is_finished_and_any_thread_may_read_it(driver: Driver, run: Run) -> None:
    arrays = bands(0, (8, 16) if SIMULATED else (700, 900))
    outputs = launch(driver, run, arrays)
    with ThreadPoolExecutor(1) as other:
        assert_index(other.submit(driver.download, outputs["ndvi"]).result(), arrays)


def test_an_upload_serves_several_launches(driver: Driver, run: Run) -> None:
    arrays = bands(1)
    uploaded = {name: driver.upload(array) for name, array in arrays.items()}
    for _ in range(3):
        assert_index(driver.download(driver.launch(run, uploaded, IdleContext())["ndvi"]), arrays)


def test_a_result_stays_as_it_is_whatever_follows(driver: Driver, run: Run) -> None:
    arrays = bands(2)
    found = index_of(driver, run, arrays)
    before = found.copy()
    for array in arrays.values():
        array[...] = 7
    for seed in range(3, 8):
        index_of(driver, run, bands(seed))
    np.testing.assert_array_equal(found, before)


def test_several_threads_at_once_each_get_their_own_answers(driver: Driver, run: Run) -> None:
    rounds = 3 if SIMULATED else 20
    together = threading.Barrier(4)

    def work(thread: int) -> None:
        together.wait()
        for number in range(rounds):
            arrays = bands(100 * thread + number, (1 + thread, 1 + number))
            assert_index(index_of(driver, run, arrays), arrays)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, thread) for thread in range(4)]:
            done.result()


def test_what_a_kernel_raises_comes_through_and_leaves_the_driver_usable(driver: Driver, run: Run) -> None:
    class Raised(Exception):
        pass

    def early(inputs: Inputs, context: Context) -> Outputs:
        raise Raised

    def late(inputs: Inputs, context: Context) -> Outputs:
        run(inputs, context)
        raise Raised

    for broken in (early, late):
        with pytest.raises(Raised):
            launch(driver, broken, bands(3))
        assert_index(index_of(driver, run, bands(4)), bands(4))


def test_a_variant_is_given_its_context(driver: Driver, run: Run) -> None:
    seen = []

    def told(inputs: Inputs, context: Context) -> Outputs:
        seen.append(context)
        return run(inputs, context)

    context = IdleContext()
    driver.launch(told, {name: driver.upload(array) for name, array in bands(5).items()}, context)
    assert seen == [context]


def test_waiting_for_nothing_returns(driver: Driver) -> None:
    driver.synchronize()
    driver.synchronize()


def test_a_stream_is_its_threads_own(driver: Driver) -> None:
    here = driver.stream
    if here is None:
        return
    assert driver.stream is here
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: driver.stream).result() is not here


# -- what it says of itself -------------------------------------------------------------------------------------------


def test_a_driver_is_opened_by_any_name_of_its_kind_and_says_what_it_has(driver: Driver) -> None:
    assert driver.kind in DEVICE_KINDS
    assert driver.slots == 2
    assert driver.model.strip()
    assert driver.model.isprintable()


def test_what_opens_is_what_the_probe_finds(driver: Driver) -> None:
    found = {each.kind: each for each in probe()}[driver.kind]
    assert isinstance(found, Found)
    assert (found.available, found.emulated) == (True, driver.emulated)
    assert found.what


def test_peaks_are_possible_and_measured_in_bounded_time(driver: Driver) -> None:
    driver.peaks()  # compiles, which warm-up has done in a worker
    started_s = time.perf_counter()
    peaks = driver.peaks()
    assert time.perf_counter() - started_s < PATIENCE_S
    assert peaks.are_possible()


def test_the_state_is_told_at_any_time(driver: Driver, run: Run) -> None:
    def asked() -> None:
        state = driver.state()
        assert isinstance(state, DeviceState)
        used, total = state.memory_used_bytes, state.memory_total_bytes
        assert used is None or total is None or 0 <= used <= total

    asked()
    with ThreadPoolExecutor(1) as other:
        for _ in range(5):
            told = other.submit(asked)
            index_of(driver, run, bands(6))
            told.result()


@pytest.mark.parametrize("kind", DEVICE_KINDS)
def test_what_was_closed_opens_again(kind: str) -> None:
    for slots in (1, 3):
        driver = opened(kind, slots)
        assert driver.slots == slots
        assert_index(index_of(driver, ndvi.build(kind, driver), bands(7)), bands(7))
        driver.close()


# -- the GPU's, where there is no card --------------------------------------------------------------------------------


@pytest.mark.skipif(
    SIMULATED or find_spec("numba_cuda") is None or Path("/dev/nvidia0").exists(),
    reason="numba-cuda is not installed, or has something to run on",
)
@pytest.mark.timeout(600)
def test_the_gpu_driver_keeps_the_contract_on_the_simulator() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "gpu and not simulator"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
