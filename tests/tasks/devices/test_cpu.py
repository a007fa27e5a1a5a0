from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lepton_ai.device import DeviceState
from lepton_ai.errors import InvalidSettings
from tasks.devices.cpu import CpuDriver
from tasks.driver import open_device

ROOT = Path(__file__).parents[3]


def in_a_fresh_process(script: str, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean | env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


THREADS = (
    "import sys, os; from tasks.driver import open_device; open_device('cpu', {slots}); "
    "assert 'numba' not in sys.modules; import numba; "
    "print(numba.config.THREADING_LAYER, numba.config.NUMBA_NUM_THREADS, len(os.sched_getaffinity(0)))"
)


def test_the_driver_is_opened_by_any_name_of_its_kind() -> None:
    for name in ("cpu", "cpu.epyc"):
        driver = open_device(name, slots=3)
        assert (driver.kind, driver.emulated, driver.slots) == ("cpu", False, 3)


def test_a_kind_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(InvalidSettings, match="abacus"):
        open_device("abacus", slots=1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_numba_gets_the_omp_layer_and_its_share_of_the_cores() -> None:
    layer, threads, cores = in_a_fresh_process(THREADS.format(slots=1)).split()
    assert (layer, threads) == ("omp", cores)
    layer, threads, _ = in_a_fresh_process(THREADS.format(slots=1000)).split()
    assert (layer, threads) == ("omp", "1")


def test_what_the_operator_has_set_stays() -> None:
    answer = in_a_fresh_process(THREADS.format(slots=1), NUMBA_NUM_THREADS="1", NUMBA_THREADING_LAYER="workqueue")
    assert answer.split()[:2] == ["workqueue", "1"]


def test_peaks_are_measured_quickly_and_make_sense() -> None:
    driver = open_device("cpu", slots=1)
    started_s = time.perf_counter()
    peaks = driver.peaks()
    assert time.perf_counter() - started_s < 0.5
    assert 1e8 < peaks.flops_per_s < 1e15
    assert 1e8 < peaks.bytes_per_s < 1e13
    assert 0 < peaks.launch_s < 0.01
    assert (peaks.transfer_bytes_per_s, peaks.transfer_latency_s) == (math.inf, 0.0)


def test_an_array_that_fits_is_not_copied() -> None:
    driver = open_device("cpu", slots=1)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.shares_memory(driver.upload(array), array)
    assert array.flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.arange(8.0),
        np.arange(8.0)[::2],
        np.asfortranarray(np.ones((2, 3))),
        np.frombuffer(b"x" + np.arange(3.0).tobytes(), np.float64, offset=1),
        np.empty((0, 3)),
        np.array(1.0),
    ],
    ids=["plain", "strided", "fortran", "unaligned", "empty", "scalar"],
)
def test_what_kernels_see_is_always_contiguous_aligned_and_read_only(array: np.ndarray) -> None:
    driver = open_device("cpu", slots=1)
    seen = driver.upload(array)
    assert seen.flags.c_contiguous
    assert seen.flags.aligned
    assert not seen.flags.writeable
    assert seen.shape == array.shape
    np.testing.assert_array_equal(driver.download(seen), array)


def test_the_hottest_part_that_says_how_hot_it_may_be_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "coretemp": [thermometer(70.0, 100.0), thermometer(81.0, 90.0), thermometer(99.0, None)],
        "nvme": [thermometer(80.0, 81.0)],
    }
    monkeypatch.setattr("psutil.sensors_temperatures", lambda: parts, raising=False)
    assert CpuDriver(1).state() == DeviceState(temperature_c=81.0, temperature_limit_c=90.0)


@pytest.mark.parametrize("found", [{}, {"coretemp": []}])
def test_a_processor_without_a_thermometer_tells_nothing(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    monkeypatch.setattr("psutil.sensors_temperatures", lambda: found, raising=False)
    assert CpuDriver(1).state() == DeviceState()


def thermometer(current: float, critical: float | None) -> Any:
    return SimpleNamespace(current=current, critical=critical)
