from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lepton_ai.errors import DeviceLost, DeviceOutOfMemory, InvalidKernel, InvalidSettings
from tasks.devices import tpu
from tasks.devices.tpu import TpuDriver
from tasks.driver import open_device
from tasks.kernels.vision_ndvi import ndvi
from tasks.warmup import IdleContext

ROOT = Path(__file__).parents[3]
pytest.importorskip("jax")


@pytest.fixture(scope="module")
def driver() -> Iterator[TpuDriver]:
    try:
        driver = tpu.open_device("tpu", slots=2)
    except InvalidSettings as error:
        pytest.skip(f"no tpu device opens here: {error}")
    yield driver
    driver.close()


def in_a_fresh_process(script: str, **env: str) -> str:
    mine = ("JAX_", "XLA_", "PJRT_", "TPU_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def launched(driver: TpuDriver, run: Any, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    uploaded = {name: driver.upload(array) for name, array in arrays.items()}
    outputs = driver.launch(lambda inputs, context: run(**inputs), uploaded, IdleContext())
    return {name: driver.download(value) for name, value in outputs.items()}


# -- buckets ----------------------------------------------------------------------------------------------------------


def test_sizes_are_padded_to_few_buckets() -> None:
    sizes = (0, 1, 8, 9, 64, 65, 128, 129, 1000, 2**20, 2**20 + 1)
    assert [tpu.bucket(size) for size in sizes] == [8, 8, 8, 64, 64, 128, 128, 256, 1024, 2**20, 2**21]


def test_an_array_goes_up_with_zeros_around_it(driver: TpuDriver) -> None:
    seen = driver.upload(np.ones((3, 70), np.int16))
    assert (seen.shape, seen.padded, seen.size, seen.ndim, seen.dtype) == ((3, 70), (8, 128), 210, 2, np.int16)
    assert np.asarray(seen.values).sum() == 210
    assert driver.upload(np.empty((0, 5), np.float32)).padded == (8, 8)


def test_another_length_in_the_same_bucket_compiles_nothing(driver: TpuDriver) -> None:
    program = driver.program(lambda x, n: (x * 2, x.sum() + n))
    for size in (65, 100, 128):
        both: dict[str, tuple[int, ...]] = {"twice": (size,), "sum": ()}
        found = launched(driver, lambda x, n=size, both=both: program(both, x, np.int64(n)), x=np.ones(size))
        np.testing.assert_array_equal(found["twice"], np.full(size, 2.0))
        assert found["sum"] == 2 * size
    assert program.compiled == 1
    launched(driver, lambda x: program({"twice": (129,), "sum": ()}, x, np.int64(0)), x=np.ones(129))
    assert program.compiled == 2


def test_the_kernels_compile_nothing_for_another_length_either(driver: TpuDriver) -> None:
    compiled: list[str] = []
    from jax import monitoring

    def heard(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    run = ndvi.build("tpu", driver)
    monitoring.register_event_duration_secs_listener(heard)
    counts = []
    for shape in ((3, 130), (8, 256), (1, 200)):
        band = np.ones(shape, np.float32)
        launched(driver, lambda red, nir: run({"red": red, "nir": nir}, IdleContext()), red=band, nir=band)
        counts.append(len(compiled))
    assert counts[0] > 0, "nothing was heard of the first compilation"
    assert counts == counts[:1] * 3


def test_a_static_argument_is_compiled_in(driver: TpuDriver) -> None:
    program = driver.program(lambda x, k: x[:k], static=("k",))
    for k, compiled in ((2, 1), (3, 2), (2, 2)):
        found = launched(driver, lambda x, k=k: program({"head": (k,)}, x, k=k), x=np.arange(5))
        assert found["head"].tolist() == list(range(k))
        assert program.compiled == compiled


def test_64_bit_numbers_keep_their_bits(driver: TpuDriver) -> None:
    program = driver.program(lambda x, y: (x + 1, y + 1))
    big, fine = np.array([2**62 + 1]), np.array([1 + 2**-50])
    found = launched(driver, lambda x, y: program({"a": (1,), "b": (1,)}, x, y), x=big, y=fine)
    assert (found["a"].dtype, int(found["a"][0])) == (np.int64, 2**62 + 2)
    if driver.emulated:
        assert (found["b"].dtype, float(found["b"][0])) == (np.float64, 2 + 2**-50)


# -- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        ({"one": (3,)}, r"returned 2 arrays for the outputs one$"),
        ({"one": (3,), "two": (9,)}, r"two of shape \[9\] is not in the \[8\]"),
        ({"one": (3, 1), "two": (3,)}, r"one of shape \[3, 1\] is not in the \[8\]"),
    ],
)
def test_outputs_that_are_not_what_was_said_are_refused_by_name(
    driver: TpuDriver, outputs: dict[str, tuple[int, ...]], told: str
) -> None:
    program = driver.program(lambda x: (x, x))
    with pytest.raises(InvalidKernel, match=told):
        launched(driver, lambda x: program(outputs, x), x=np.ones(3))


def test_a_donated_input_gives_its_memory_where_an_output_fits_and_is_gone(driver: TpuDriver) -> None:
    program = driver.program(lambda x, y: x + y, donate=("x",))
    x, y = driver.upload(np.ones(100, np.float32)), driver.upload(np.ones(100, np.float32))
    found = driver.launch(lambda inputs, context: program({"sum": (100,)}, x, y), {}, IdleContext())
    assert driver.download(found["sum"]).tolist() == [2.0] * 100
    assert x.values.is_deleted()
    assert not y.values.is_deleted()
    with pytest.raises((ValueError, RuntimeError), match=r"deleted|donated"):
        program({"sum": (100,)}, x, y)
    driver.synchronize()


def test_what_no_output_fits_into_is_not_donated_and_nothing_warns_of_it(driver: TpuDriver) -> None:
    program = driver.program(lambda x: x.sum(), donate=("x",))
    x = driver.upload(np.ones(100, np.float32))  # a warning would be an error here
    for _ in range(2):
        assert driver.download(program({"sum": ()}, x)["sum"]) == 100
    assert not x.values.is_deleted()
    assert program.compiled == 1


def test_a_count_is_read_where_it_decides_the_shape_of_what_follows(driver: TpuDriver) -> None:
    import jax.numpy as jnp

    count = driver.program(lambda x: (x > 0).sum())
    pack = driver.program(lambda x: x[jnp.argsort(x <= 0, stable=True)])

    def positive(x: Any) -> Any:
        found = int(driver.read(count({"count": ()}, x)["count"]))
        return pack({"packed": (found,)}, x)

    assert launched(driver, positive, x=np.array([-1, 3, -2, 5]))["packed"].tolist() == [3, 5]


def spin(driver: TpuDriver, rounds: int) -> Any:
    """What launches as much work, and leaves its output to nobody."""
    from jax import lax

    slow = driver.program(lambda x, rounds: lax.fori_loop(0, rounds, lambda _, y: y * 0.999 + 0.5, x))
    x = driver.upload(np.ones(8))
    slow({"x": (8,)}, x, np.int64(1))
    driver.synchronize()
    return lambda: slow({"x": (8,)}, x, np.int64(rounds))


def test_a_thread_runs_only_so_far_ahead(driver: TpuDriver) -> None:
    program = driver.program(lambda x: x @ x)
    x = driver.upload(np.zeros((256, 256)))
    outputs = [program({"x": (256, 256)}, x)["x"].values for _ in range(3 * tpu._AHEAD)]
    assert all(each.is_ready() for each in outputs[: -tpu._AHEAD])
    driver.synchronize()


def test_a_thread_waits_for_the_device_without_holding_up_the_others(driver: TpuDriver) -> None:
    seen = []
    for rounds in (10**6, 10**7, 10**8):  # on a machine with much else to do this thread has pauses of its own
        launch = spin(driver, rounds)

        def work(launch: Any = launch) -> float:
            started_s = time.perf_counter()
            launch()
            driver.synchronize()
            return time.perf_counter() - started_s

        longest_s = 0.0
        with ThreadPoolExecutor(1) as other:
            done, last_s = other.submit(work), time.perf_counter()
            while not done.done():
                now_s = time.perf_counter()
                longest_s, last_s = max(longest_s, now_s - last_s), now_s
        seen.append((longest_s, done.result()))
        if longest_s < done.result() / 2:
            return
    raise AssertionError(f"the longest that this thread stood still, and the other worked: {seen}")


def test_peaks_are_of_what_was_done_not_of_what_was_begun(driver: TpuDriver) -> None:
    peaks = driver.peaks()  # nobody holds what is launched there
    if driver.emulated:  # no core does more
        assert 1e8 < peaks.flops_per_s < driver.slots * 5e11
        assert 1e8 < peaks.bytes_per_s < driver.slots * 2e11
    assert peaks.are_possible()
    assert 0 < peaks.launch_s < 0.1


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_job_that_is_too_large_for_the_device_is_told_so_and_the_next_one_runs(driver: TpuDriver) -> None:
    import jax.numpy as jnp

    huge = driver.program(lambda x: jnp.broadcast_to(x[:, None, None, None], (8, 2**17, 2**17, 2**10)) + 1)
    with pytest.raises(DeviceOutOfMemory, match="RESOURCE_EXHAUSTED"):
        launched(driver, lambda x: huge({"x": (8, 1, 1, 1)}, x), x=np.ones(8))
    plain = driver.program(lambda x: x + 1)
    assert launched(driver, lambda x: plain({"x": (1,)}, x), x=np.ones(1))["x"] == 2


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes", DeviceOutOfMemory),
        ("UNAVAILABLE: the device is gone", DeviceLost),
        ("DATA_LOSS: an uncorrectable error", DeviceLost),
        ("INTERNAL: Core halted unexpectedly", DeviceLost),
        ("INVALID_ARGUMENT: the kernel's own fault", None),
    ],
)
def test_what_xla_raises_becomes_what_can_be_acted_on(driver: TpuDriver, told: str, expected: Any) -> None:
    import jax

    raised = jax.errors.JaxRuntimeError(told)

    def run(inputs: Any, context: Any) -> Any:
        raise raised

    with pytest.raises(expected or jax.errors.JaxRuntimeError, match=told.partition(":")[0]) as found:
        driver.launch(run, {}, IdleContext())
    assert (found.value if expected is None else found.value.__cause__) is raised


def test_the_memory_is_told_where_pjrt_tells_it() -> None:
    chip = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 3, "bytes_limit": 5, "num_allocs": 1})
    state = TpuDriver(chip, 1, emulated=False, model="v5e").state()
    assert (state.memory_used_bytes, state.memory_total_bytes) == (3, 5)


# -- opening ----------------------------------------------------------------------------------------------------------

OPEN = """
import json, os, sys
from tasks.driver import open_device
driver = open_device("tpu", {slots})
import jax, jax.numpy as jnp
jnp.dot(jnp.ones((300, 300)), jnp.ones((300, 300))).block_until_ready()
names = [open(f"/proc/self/task/{{each}}/comm").read().strip() for each in os.listdir("/proc/self/task")]
print(json.dumps([driver.emulated, jax.devices()[0].platform, jax.config.jax_enable_x64, names.count("tf_XLAEigen"),
    jax.config.jax_compilation_cache_dir, os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]]))
"""


def test_the_driver_is_opened_by_any_name_of_its_kind() -> None:
    again = open_device("tpu.v5e", slots=1)
    assert (again.kind, again.slots, again.emulated) == ("tpu", 1, tpu.probe().emulated)
    again.close()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no threads to look at")
@pytest.mark.parametrize("slots", [1, 2])
def test_the_emulator_gets_as_many_threads_as_there_are_slots(tmp_path: Path, slots: int) -> None:
    if slots > len(os.sched_getaffinity(0)) or not tpu.probe().emulated:
        pytest.skip("too few cores here, or a TPU")
    found = json.loads(in_a_fresh_process(OPEN.format(slots=slots), XDG_CACHE_HOME=str(tmp_path)))
    assert found[:4] == [True, "cpu", True, slots]


def test_what_was_compiled_is_kept_in_a_folder_of_the_users_own(tmp_path: Path) -> None:
    found = json.loads(in_a_fresh_process(OPEN.format(slots=1), XDG_CACHE_HOME=str(tmp_path)))
    folder = Path(found[4])
    assert folder.is_relative_to(tmp_path / "lepton" / "jax")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert any(folder.iterdir())
    assert found[5] == "false"


def test_a_cache_that_is_broken_costs_a_compile_and_a_warning(tmp_path: Path) -> None:
    folder = Path(json.loads(in_a_fresh_process(OPEN.format(slots=1), XDG_CACHE_HOME=str(tmp_path)))[4])
    for each in folder.iterdir():
        each.write_bytes(each.read_bytes()[:20])
    assert json.loads(in_a_fresh_process(OPEN.format(slots=1), XDG_CACHE_HOME=str(tmp_path)))[4] == str(folder)


def test_what_the_operator_has_set_stays(tmp_path: Path) -> None:
    found = in_a_fresh_process(OPEN.format(slots=2), PJRT_NPROC="1", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert json.loads(found)[3:5] == [1, str(tmp_path / "mine")]


def test_without_a_folder_to_write_to_the_cache_is_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lepton").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tpu._cache()
    assert folder.is_dir()
    assert not folder.is_relative_to(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()


def test_without_jax_the_probe_says_how_to_get_it() -> None:
    script = (
        "import sys; sys.modules['jax'] = None\n"
        "from tasks.devices import tpu\n"
        "print(tpu.probe())\n"
        "try: tpu.open_device('tpu', 1)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    probed, opened = in_a_fresh_process(script).splitlines()
    assert "available=False" in probed
    assert "pip install 'lepton-ai[tpu]'" in probed
    assert opened.startswith("InvalidSettings jax ")
    assert opened.endswith("pip install 'lepton-ai[tpu]'")


def test_a_platform_that_is_not_there_is_no_device() -> None:
    script = "from tasks.devices import tpu; print(tpu.probe())"
    probed = in_a_fresh_process(script, JAX_PLATFORMS="abacus")
    assert "available=False" in probed
    assert "abacus" in probed


def chips(monkeypatch: pytest.MonkeyPatch, chip: Path | None, *, libtpu: bool) -> None:
    monkeypatch.setattr(tpu, "_chip", lambda: chip)
    monkeypatch.setattr(tpu, "find_spec", lambda name: object() if libtpu else None)


def test_a_chip_without_its_library_is_named_with_what_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    chips(monkeypatch, Path("/dev/accel0"), libtpu=False)
    found = tpu.probe()
    if not found.emulated:
        pytest.skip("a TPU is here")
    assert (found.available, found.fix) == (True, "pip install 'jax[tpu]'")
    assert "although there is /dev/accel0, for lack of libtpu" in found.what


@pytest.mark.parametrize(
    ("chip", "libtpu", "platforms"),
    [(None, True, "cpu"), (Path("/dev/accel0"), False, "cpu"), (Path("/dev/accel0"), True, "tpu,cpu")],
)
def test_only_a_chip_with_its_library_makes_jax_look_beyond_the_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chip: Path | None, libtpu: bool, platforms: str
) -> None:
    for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "PJRT_NPROC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chips(monkeypatch, chip, libtpu=libtpu)
    tpu._prepare(1)
    assert os.environ["JAX_PLATFORMS"] == platforms


@pytest.mark.parametrize(("kind", "cores_each"), [("TPU v5 lite", 1), ("TPU v3", 2)])
def test_each_of_several_chips_is_for_a_worker_of_its_own(
    monkeypatch: pytest.MonkeyPatch, kind: str, cores_each: int
) -> None:
    import jax

    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    devices = [
        SimpleNamespace(platform="tpu", device_kind=kind, coords=[chip, 0, 0])
        for chip in range(2)
        for _ in range(cores_each)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    found = tpu.probe()
    assert (found.available, found.emulated) == (True, False)
    assert found.what.endswith(f"on {kind}, 2 chips")
    assert [unit.environ["TPU_VISIBLE_CHIPS"] for unit in found.units] == ["0", "1"]
    assert {unit.device for unit in found.units} == {f"tpu.{tpu.model_of(kind)}"}
    assert {unit.environ["TPU_PROCESS_BOUNDS"] for unit in found.units} == {"1,1,1"}


def test_a_chip_is_named_by_its_model() -> None:
    names = {"TPU v5 lite": "v5lite", "TPU v4": "v4", "TPU7x": "7x", "TPU": "unknown"}
    assert {kind: tpu.model_of(kind) for kind in names} == names
