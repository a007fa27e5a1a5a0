"""The GPU driver on Numba's CUDA simulator. Its process is started by `test_gpu.py`."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numba.cuda.cudadrv.driver import CudaAPIError
from numpy.typing import NDArray

from lepton_ai.device import DeviceState
from lepton_ai.errors import DeviceLost, DeviceOutOfMemory, InvalidKernel, InvalidSettings
from tasks import cuda_memory
from tasks.devices import gpu
from tasks.devices.gpu import GpuDriver
from tasks.kernels.linalg_matmul import matmul
from tasks.kernels.vision_ndvi import ndvi
from tasks.warmup import IdleContext, launch, warm

cuda: Any
FACTOR = 2


@pytest.fixture
def driver() -> Iterator[GpuDriver]:
    driver = gpu.open_device("gpu", slots=2)
    yield driver
    driver.close()


def failure(code: str) -> CudaAPIError:
    return CudaAPIError(f"[CUresult.{code}] Call to cuMemAlloc results in {code}")


# -- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.arange(8.0),
        np.arange(8.0)[::2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.frombuffer(b"x" + np.arange(3.0).tobytes(), np.float64, offset=1),
        np.zeros((3, 0), np.int16),
        np.array([True, False]),
        np.array([1.5, np.nan], np.float16),
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    ],
    ids=["plain", "strided", "fortran", "unaligned", "empty", "bool", "half", "deep"],
)
def test_an_array_comes_back_as_it_went(driver: GpuDriver, array: NDArray[Any]) -> None:
    there = driver.upload(array)
    assert (there.shape, there.ndim, there.size, there.dtype) == (array.shape, array.ndim, array.size, array.dtype)
    found = driver.download(there)
    np.testing.assert_array_equal(found, array)
    assert found.flags.writeable


@pytest.mark.parametrize("size", [1, 511, 512, 513, 2048, 5000])
def test_large_arrays_go_in_pieces(driver: GpuDriver, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(cuda_memory, "_SEGMENT_BYTES", 512)
    random = np.random.default_rng(size)
    sent = [random.integers(0, 256, size, np.uint8) for _ in range(3)]
    there = [driver.upload(each) for each in sent]
    for each, array in zip(there, sent, strict=True):
        np.testing.assert_array_equal(driver.download(each), array)


def test_the_host_may_change_what_it_has_uploaded(driver: GpuDriver) -> None:
    array = np.arange(100.0)
    there = driver.upload(array)
    array[:] = 0
    np.testing.assert_array_equal(driver.read(there), np.arange(100.0))


def test_arrays_are_made_of_zeros_or_of_a_value(driver: GpuDriver) -> None:
    np.testing.assert_array_equal(driver.read(driver.zeros((2, 3), np.int16)), np.zeros((2, 3), np.int16))
    np.testing.assert_array_equal(driver.read(driver.full((7,), -1, np.int64)), np.full(7, -1))
    assert driver.read(driver.full((0, 2), 1, np.float32)).shape == (0, 2)


def test_an_array_has_other_shapes_and_types_over_the_same_memory(driver: GpuDriver) -> None:
    there = driver.upload(np.arange(6, dtype=np.float32))
    np.testing.assert_array_equal(driver.read(there.reshape(2, -1)), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(driver.read(there.reshape((3, 2)))[1], [2, 3])
    np.testing.assert_array_equal(driver.read(there.view(np.int32)), np.arange(6, dtype=np.float32).view(np.int32))
    assert driver.zeros((0, 4), np.int8).reshape(-1).shape == (0,)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        there.reshape(4, -1)
    with pytest.raises(ValueError, match="float64"):
        there.view(np.float64)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_block_is_used_again_by_its_thread_and_by_no_other(driver: GpuDriver) -> None:
    first = driver.empty((1000,), np.float32)
    block = first.lease.block
    shaped = first.reshape(10, 100)
    del first
    assert driver.empty((1000,), np.float32).lease.block is not block, "it is still in use, under another shape"
    del shaped
    gc.collect()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: driver.empty((1000,), np.float32).lease.block).result() is not block
    assert any(driver.empty((1000,), np.float32).lease.block is block for _ in range(3))


def test_a_block_that_another_thread_lets_go_of_returns_to_where_it_came_from(driver: GpuDriver) -> None:
    held = [driver.empty((5000,), np.float64)]
    block = held[0].lease.block
    letting_go = threading.Thread(target=held.clear)
    letting_go.start()
    letting_go.join()
    assert driver.empty((5000,), np.float64).lease.block is block


def test_what_is_kept_is_given_up_before_memory_is_said_to_be_short(
    driver: GpuDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = driver._thread.memory
    driver.empty((1000,), np.uint8)
    assert memory.kept_bytes > 0
    allocate, refusals = memory._allocate, [failure("CUDA_ERROR_OUT_OF_MEMORY")]

    def short(size: int) -> Any:
        if refusals:
            raise refusals.pop()
        return allocate(size)

    monkeypatch.setattr(memory, "_allocate", short)
    held = driver.empty((2**20,), np.uint8)
    assert not refusals
    assert (held.size, memory.kept_bytes) == (2**20, 0)


def test_memory_that_is_short_all_the_same_is_told_as_such(driver: GpuDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(size: int) -> Any:
        raise failure("CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(driver._thread.memory, "_allocate", short)
    with pytest.raises(DeviceOutOfMemory, match="too little memory"):
        driver.upload(np.zeros(2**20))


# -- launches ---------------------------------------------------------------------------------------------------------


def count_gpu(hits: NDArray[np.int32]) -> None:
    for i in range(cuda.grid(1), hits.size, cuda.gridsize(1)):
        cuda.atomic.add(hits, i, twice(FACTOR))


def twice(x: int) -> int:
    return 2 * x


def reverse_gpu(values: NDArray[np.float32]) -> None:
    """Each block turns its own eight values round."""
    shared = cuda.shared.array(8, np.float32)
    at, thread = cuda.grid(1), cuda.threadIdx.x
    shared[thread] = values[at]
    cuda.syncthreads()
    values[at] = shared[7 - thread]


def fail_gpu(values: NDArray[np.float32]) -> None:
    raise ValueError("no such value")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_a_loop_over_items_sees_each_of_them_once(driver: GpuDriver, size: int) -> None:
    hits = driver.zeros((size,), np.int32)
    driver.compile(count_gpu, helpers=(twice,))(size, hits)
    np.testing.assert_array_equal(driver.read(hits), np.full(size, 4))


def test_helpers_and_constants_are_the_compiled_functions_alone(driver: GpuDriver) -> None:
    hits = driver.zeros((3,), np.int32)
    driver.compile(count_gpu, helpers=(twice,), constants={"FACTOR": 5})(3, hits)
    np.testing.assert_array_equal(driver.read(hits), [10, 10, 10])
    assert (twice(1), FACTOR) == (2, 2)
    assert "cuda" not in globals()


@pytest.mark.parametrize("blocks", [3, (3,), (3, 1)])
def test_threads_of_a_block_share_memory_and_wait_for_each_other(driver: GpuDriver, blocks: Any) -> None:
    values = driver.upload(np.arange(24, dtype=np.float32))
    driver.compile(reverse_gpu, threads=(8,))(blocks, values)
    np.testing.assert_array_equal(driver.read(values), np.arange(24).reshape(3, 8)[:, ::-1].reshape(-1))


def test_no_blocks_are_no_launch(driver: GpuDriver) -> None:
    driver.compile(fail_gpu, threads=(8,))((3, 0), driver.zeros((1,), np.float32))


def test_a_number_without_a_type_is_refused(driver: GpuDriver) -> None:
    with pytest.raises(InvalidKernel, match="not int"):
        driver.compile(count_gpu)(3, 3)  # type: ignore[arg-type]


def test_the_simulator_refuses_more_threads_than_it_can_start(driver: GpuDriver) -> None:
    with pytest.raises(AssertionError, match="2400 threads"):
        driver.compile(fail_gpu, threads=(8,))(300, driver.zeros((1,), np.float32))


def test_what_a_kernel_raises_comes_through(driver: GpuDriver) -> None:
    fail = driver.compile(fail_gpu)
    with pytest.raises(ValueError, match="no such value"):
        driver.launch(
            lambda inputs, _: fail(1, inputs["x"]) or {}, {"x": driver.zeros((1,), np.float32)}, IdleContext()
        )


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY", DeviceOutOfMemory),
        ("CUDA_ERROR_ILLEGAL_ADDRESS", DeviceLost),
        ("CUDA_ERROR_LAUNCH_FAILED", DeviceLost),
        ("CUDA_ERROR_ECC_UNCORRECTABLE", DeviceLost),
        ("CUDA_ERROR_INVALID_VALUE", CudaAPIError),
    ],
)
def test_what_cuda_raises_is_told_in_our_words(driver: GpuDriver, code: str, error: type[Exception]) -> None:
    def run(inputs: Any, context: Any) -> Any:
        raise failure(code)

    with pytest.raises(error, match=code):
        driver.launch(run, {}, IdleContext())


def test_several_threads_launch_at_once(driver: GpuDriver) -> None:
    run = matmul.build("gpu", driver)
    random = np.random.default_rng(0)

    def multiply(number: int) -> None:
        a, b = random.standard_normal((2, 5, 5)).astype(np.float32)
        np.testing.assert_allclose(launch(run, {"a": a, "b": b}, driver, IdleContext())["c"], a @ b, atol=1e-4)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(multiply, range(6)))


# -- the driver -------------------------------------------------------------------------------------------------------


def test_each_thread_has_its_own_stream(driver: GpuDriver) -> None:
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: driver.stream).result() is not driver.stream
    assert driver.stream is driver.stream


def test_a_worker_warms_up_on_it(driver: GpuDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    few: Callable[[], Any] = lambda: [{"red": np.ones((2, 2), np.float32), "nir": np.zeros((2, 2), np.float32)}]  # noqa: E731
    monkeypatch.setattr(ndvi, "_samples", few)
    assert list(warm([ndvi], driver, {}).runs) == ["vision.ndvi"]


def test_it_can_be_measured(driver: GpuDriver) -> None:
    assert driver.peaks().are_possible()


def test_it_says_that_it_is_no_card(driver: GpuDriver) -> None:
    assert (driver.kind, driver.emulated, driver.simulated, driver.processors) == ("gpu", True, True, 1)
    assert driver.state() == DeviceState()
    assert gpu.probe().emulated


def test_another_model_is_refused_by_the_name_of_the_one_that_is_here() -> None:
    with pytest.raises(InvalidSettings, match=r"gpu\.h100 is not here: the GPU is simulator, .* gpu\.simulator"):
        gpu.open_device("gpu.h100", slots=1)
