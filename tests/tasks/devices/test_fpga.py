from __future__ import annotations

import gc
import math
import os
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lepton_ai.errors import InvalidKernel, InvalidSettings
from tasks.devices import fpga
from tasks.devices.fpga import FpgaDriver
from tasks.driver import cores, open_device
from tasks.kernels.linalg_matmul import matmul
from tasks.kernels.vision_ndvi import ndvi
from tasks.warmup import IdleContext, launch, warm

ROOT = Path(__file__).parents[3]

DOUBLE = """
__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void twice(__global const float* restrict x, __global float* restrict y) {
  y[get_global_id(0)] = FACTOR * x[get_global_id(0)];
}
"""
SPIN = """
__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void spin(__global float* x, int rounds) {
  float y = x[0];
  for (int i = 0; i < rounds; i++) y = y * 0.999f + 0.5f;
  x[0] = y;
}
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[FpgaDriver]:
    try:
        driver = fpga.open_device("fpga", slots=2)
    except InvalidSettings as error:
        pytest.skip(f"no fpga device opens here: {error}")
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def emulator(driver: FpgaDriver) -> FpgaDriver:
    if not driver.emulated:
        pytest.skip("a board is here, and compiles nothing")
    return driver


def in_a_fresh_process(script: str, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("POCL_")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def twice(driver: FpgaDriver, array: np.ndarray) -> np.ndarray:
    given, doubled = driver.upload(array), driver.empty(array.shape, np.float32)
    driver.program(DOUBLE, "test.double", FACTOR=2).launch("twice", (array.size,), given, doubled)
    driver.synchronize()
    return driver.download(doubled)


# -- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.arange(8.0),
        np.arange(8.0)[::2],
        np.asfortranarray(np.ones((2, 3))),
        np.frombuffer(b"x" + np.arange(3.0).tobytes(), np.float64, offset=1),
        np.empty((0, 3)),
        np.array(1.0),
        np.array([True, False]),
        np.arange(5, dtype=np.int8),
        np.arange(5, dtype=np.float16),
    ],
    ids=["plain", "strided", "fortran", "unaligned", "empty", "scalar", "bool", "int8", "half"],
)
def test_an_array_comes_back_as_it_went(driver: FpgaDriver, array: np.ndarray) -> None:
    seen = driver.upload(array)
    assert (seen.shape, seen.ndim, seen.size, seen.dtype) == (array.shape, array.ndim, array.size, array.dtype)
    back = driver.download(seen)
    assert (back.shape, back.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(back, array)


def test_an_array_that_fits_is_not_copied_either_way(emulator: FpgaDriver) -> None:
    array = np.arange(6, dtype=np.float32)
    array.flags.writeable = False
    seen = emulator.upload(array)
    assert seen.host is not None
    assert np.shares_memory(seen.host, array)
    made = emulator.empty((6,), np.float32)
    assert emulator.download(made) is made.host


def test_an_output_of_the_host_is_taken_as_it_is(driver: FpgaDriver) -> None:
    np.testing.assert_array_equal(driver.download([1, 2]), np.array([1, 2]))


def test_what_a_job_used_is_given_back_with_its_last_name(emulator: FpgaDriver) -> None:
    array = np.ones(1000, np.float32)
    given, doubled = emulator.upload(array), emulator.empty((1000,), np.float32)
    emulator.program(DOUBLE, "test.double", FACTOR=2).launch("twice", (1000,), given, doubled)
    emulator.synchronize()
    back = emulator.download(doubled)
    memory = [weakref.ref(held) for held in (array, back)]
    gc.disable()
    try:
        del array, given, doubled, back
        assert [held() for held in memory] == [None, None]
    finally:
        gc.enable()


def test_arrays_that_nobody_holds_any_more_live_until_the_launch_has_finished(emulator: FpgaDriver) -> None:
    slow, program = emulator.program(SPIN, "test.spin"), emulator.program(DOUBLE, "test.double", FACTOR=2)
    slow.launch("spin", (1,), emulator.upload(np.ones(1, np.float32)), np.int32(20_000_000))
    doubled = emulator.empty((1 << 20,), np.float32)
    program.launch("twice", doubled.shape, emulator.upload(np.full(1 << 20, 3, np.float32)), doubled)
    others = [np.zeros(1 << 20, np.float32) for _ in range(8)]  # would be given the memory, were it free
    emulator.synchronize()
    assert (emulator.download(doubled) == 6).all()
    assert not any(other.any() for other in others)


# -- programs -------------------------------------------------------------------------------------------------------


def test_a_program_is_compiled_once_for_each_set_of_macros(emulator: FpgaDriver) -> None:
    first = emulator.program(DOUBLE, "test.double", FACTOR=2)
    assert emulator.program(DOUBLE, "test.double", FACTOR=2) is first
    assert emulator.program(DOUBLE, "test.double", FACTOR=3) is not first


def test_source_that_does_not_compile_is_an_error_with_the_compilers_words(emulator: FpgaDriver) -> None:
    with pytest.raises(Exception, match="undeclared_thing"):
        emulator.program("__kernel void f(__global int* x) { x[0] = undeclared_thing; }", "test.broken")


def test_a_function_that_does_not_fix_its_groups_is_refused_by_name(emulator: FpgaDriver) -> None:
    program = emulator.program("__kernel void loose(__global int* x) { x[get_global_id(0)] = 1; }", "test.loose")
    with pytest.raises(InvalidKernel, match=r"^loose needs __attribute__.*reqd_work_group_size"):
        program.launch("loose", (1,), emulator.empty((1,), np.int32))


def test_no_groups_are_no_launch(emulator: FpgaDriver) -> None:
    assert twice(emulator, np.empty(0, np.float32)).shape == (0,)


def test_threads_launch_one_function_at_once_and_each_gets_its_own_answer(emulator: FpgaDriver) -> None:
    def answers(seed: int) -> bool:
        arrays = [np.full(100, 1000 * seed + number, np.float32) for number in range(200)]
        return all((twice(emulator, array) == 2 * array).all() for array in arrays)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(answers, range(4)))


def test_a_thread_waits_for_the_device_without_holding_up_the_others(emulator: FpgaDriver) -> None:
    program, launched = emulator.program(SPIN, "test.spin"), threading.Event()

    def work() -> None:
        program.launch("spin", (1,), emulator.upload(np.ones(1, np.float32)), np.int32(200_000_000))
        launched.set()
        emulator.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    launched.wait()
    for _ in range(5):
        time.sleep(0.005)
    assert thread.is_alive()
    thread.join()


def test_peaks_are_measured_quickly_and_make_sense(driver: FpgaDriver) -> None:
    driver.peaks()  # compiles, which warm-up has done in a worker
    started_s = time.perf_counter()
    peaks = driver.peaks()
    assert time.perf_counter() - started_s < 1
    assert peaks.are_possible()
    assert 1e8 < peaks.flops_per_s < 1e15
    assert 1e8 < peaks.bytes_per_s < 1e13
    assert 0 < peaks.launch_s < 0.1
    assert math.isinf(peaks.transfer_bytes_per_s) == driver.emulated


# -- a board: PoCL with binaries made beforehand, and memory of its own -----------------------------------------------


def board(driver: FpgaDriver, binaries: Path | None) -> FpgaDriver:
    return FpgaDriver(driver._device, 1, emulated=False, shares_memory=False, binaries=binaries)


def save(driver: FpgaDriver, kernel: Any, path: Path) -> None:
    """What PoCL compiled for a kernel, as a vendor's tool would have left it."""
    kernel.build("fpga", driver)
    [program] = [program for key, program in driver._programs.items() if key[0] == kernel.name]
    path.write_bytes(program._program.binaries[0])


@pytest.mark.parametrize("name", ["vision.ndvi.aocx", "vision.ndvi.xclbin", "all.xclbin"])
def test_a_board_runs_the_binary_that_is_named_or_in_the_folder_and_copies_arrays(
    emulator: FpgaDriver, tmp_path: Path, name: str
) -> None:
    save(emulator, ndvi, tmp_path / name)
    real = board(emulator, tmp_path / name if name.startswith("all") else tmp_path)
    run = ndvi.build("fpga", real)
    for sample in (*ndvi.sample_inputs(), {key: np.empty((0, 3), np.float32) for key in ("red", "nir")}):
        found = launch(run, sample, real, IdleContext())["ndvi"]
        np.testing.assert_allclose(found, ndvi.refer(sample)["ndvi"], rtol=1e-6)
    array = np.ones(3)
    back = real.download(real.upload(array))
    np.testing.assert_array_equal(back, array)
    assert not np.shares_memory(back, array)


def test_a_kernel_without_a_binary_is_refused_by_the_files_name_and_the_others_serve(
    emulator: FpgaDriver, tmp_path: Path
) -> None:
    save(emulator, ndvi, tmp_path / "vision.ndvi.aocx")
    real = board(emulator, tmp_path)
    found = warm([ndvi, matmul], real, {})
    assert found.kernels == {"vision.ndvi": ndvi}
    assert f"neither linalg.matmul.aocx nor linalg.matmul.xclbin is in {tmp_path}" in found.refused["linalg.matmul"]
    peaks = real.peaks()
    assert peaks.are_possible()
    assert peaks.transfer_bytes_per_s < math.inf


def test_a_board_without_a_folder_of_binaries_names_the_setting(emulator: FpgaDriver) -> None:
    with pytest.raises(InvalidSettings, match="LEPTON_FPGA_BINARY") as refused:
        board(emulator, None).program(DOUBLE, "test.double", FACTOR=2)
    assert refused.value.field == "fpga_binary"


# -- what opens, and what to do where nothing does --------------------------------------------------------------------


def device(kind: int, name: str, *, compiles: bool, maker: str = "Maker") -> Any:
    made_by = SimpleNamespace(name=maker, version="OpenCL 1.0")
    return SimpleNamespace(type=kind, name=name, compiler_available=compiles, platform=made_by, max_compute_units=1)


def offer(monkeypatch: pytest.MonkeyPatch, *devices: Any) -> None:
    cl = pytest.importorskip("pyopencl")
    monkeypatch.setattr(
        cl, "get_platforms", lambda: [SimpleNamespace(get_devices=lambda each=each: [each]) for each in devices]
    )


def kinds() -> Any:
    return pytest.importorskip("pyopencl").device_type


def test_the_driver_is_opened_by_any_name_of_its_kind(driver: FpgaDriver) -> None:
    assert (driver.kind, driver.emulated, driver.slots) == ("fpga", fpga.probe().emulated, 2)
    again = open_device("fpga.a10", slots=1)
    assert (again.kind, again.slots) == ("fpga", 1)
    again.close()


def test_a_board_goes_before_an_emulator_and_that_before_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = device(kinds().CPU, "Xeon", compiles=True)
    emulator = device(kinds().ACCELERATOR, "Emulator", compiles=True)
    real = device(kinds().ACCELERATOR, "a10", compiles=False)
    offer(monkeypatch, processor)
    assert (fpga.probe().what, fpga.probe().emulated) == ("Maker on Xeon, emulated, 1 unit", True)
    offer(monkeypatch, processor, emulator)
    assert (fpga.probe().what, fpga.probe().emulated) == ("Maker on Emulator, emulated, 1 unit", True)
    offer(monkeypatch, processor, emulator, real)
    assert (fpga.probe().what, fpga.probe().emulated) == ("Maker on a10, 1 unit", False)


def test_a_runtime_that_is_broken_does_not_hide_another(monkeypatch: pytest.MonkeyPatch) -> None:
    cl = pytest.importorskip("pyopencl")

    def broken() -> None:
        raise cl.LogicError("clGetDeviceIDs failed: DEVICE_NOT_AVAILABLE")

    works = SimpleNamespace(get_devices=lambda: [device(kinds().CPU, "Xeon", compiles=True)])
    monkeypatch.setattr(cl, "get_platforms", lambda: [SimpleNamespace(get_devices=broken), works])
    assert fpga.probe().available


def refusal() -> str:
    with pytest.raises(InvalidSettings) as refused:
        open_device("fpga", slots=1)
    found = fpga.probe()
    assert not found.available
    assert found.fix is not None
    assert refused.value.message == f"{found.what}; try: {found.fix}"
    return refused.value.message


def test_without_pyopencl_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyopencl", None)
    assert refusal() == "pyopencl is not installed; try: pip install 'lepton-ai[fpga]'"


def test_without_ld_the_error_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offer(monkeypatch, device(kinds().CPU, "pthread-EPYC", compiles=True, maker="Portable Computing Language"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal() == "PoCL links with the program ld, which is not on the PATH; try: apt-get install binutils"


@pytest.mark.parametrize(
    ("system", "machine", "wheel", "fix"),
    [
        ("linux", "x86_64", None, "pip install 'lepton-ai[fpga]'"),
        ("linux", "x86_64", object(), "apt-get install pocl-opencl-icd"),
        ("linux", "aarch64", None, "apt-get install pocl-opencl-icd"),
        ("darwin", "arm64", None, "brew install pocl"),
    ],
)
def test_without_a_platform_the_error_names_the_package_that_brings_one(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, wheel: object, fix: str
) -> None:
    cl = pytest.importorskip("pyopencl")

    def none() -> None:
        raise cl.LogicError("clGetPlatformIDs failed: PLATFORM_NOT_FOUND_KHR")

    monkeypatch.setattr(cl, "get_platforms", none)
    monkeypatch.setattr(fpga.sys, "platform", system)
    monkeypatch.setattr(fpga.platform, "machine", lambda: machine)
    monkeypatch.setattr(fpga, "find_spec", lambda name: wheel)
    assert refusal().startswith("OpenCL finds neither an accelerator")
    assert refusal().endswith(f"; try: {fix}")


def test_a_gpu_is_no_fpga_and_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, device(kinds().GPU, "H100", compiles=True))
    assert "(but H100)" in refusal()


# -- PoCL's own settings ----------------------------------------------------------------------------------------------

UNITS = "from tasks.driver import open_device; print(open_device('fpga', {slots})._device.max_compute_units)"


def test_the_emulated_device_takes_a_thread_a_slot_and_never_more_than_there_are_cores(emulator: FpgaDriver) -> None:
    assert in_a_fresh_process(UNITS.format(slots=1)) == "1"
    assert in_a_fresh_process(UNITS.format(slots=1000)) == str(cores())
    assert in_a_fresh_process(UNITS.format(slots=1000), POCL_MAX_PTHREAD_COUNT="1") == "1"


def test_a_worker_without_a_home_keeps_what_it_compiled_in_a_folder_of_its_own(
    emulator: FpgaDriver, tmp_path: Path
) -> None:
    script = (
        "import numpy as np, os; from tasks.driver import open_device; d = open_device('fpga', 1); "
        f"d.program({SPIN!r}, 'test.spin').launch('spin', (1,), d.empty((1,), np.float32), np.int32(1)); "
        "d.synchronize(); print(os.environ['POCL_CACHE_DIR'])"
    )
    folder = Path(in_a_fresh_process(script, HOME="/proc/none", XDG_CACHE_HOME="", TMPDIR=str(tmp_path)))
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.rglob("spin.so"))
