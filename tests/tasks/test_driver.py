from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from lepton_ai.errors import InvalidSettings
from lepton_ai.kernel import DEVICE_KINDS
from tasks import driver
from tasks.devices import cpu
from tasks.driver import Found, open_device, probe

ROOT = Path(__file__).parents[2]


def ask(**env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "tasks"], cwd=ROOT, env=os.environ | env, capture_output=True, check=False
    )


def decoded(answer: bytes) -> list[Found]:
    assert answer.count(b"\n") == 1
    return msgspec.json.decode(answer, type=list[Found])


def test_a_probe_tells_of_every_kind_of_device() -> None:
    found = probe()
    assert [each.kind for each in found] == list(DEVICE_KINDS)
    assert all(each.what for each in found)
    assert not any(each.fix for each in found if each.available)
    assert found[0].available
    assert "cores" in found[0].what


def test_a_kind_opens_just_where_the_probe_says_so() -> None:
    for each in probe():
        if each.available:
            opened = open_device(each.kind, slots=1)
            assert (opened.kind, opened.emulated) == (each.kind, each.emulated)
            opened.close()
        else:
            with pytest.raises(InvalidSettings):
                open_device(each.kind, slots=1)


def test_a_kind_without_a_driver_tells_whether_its_hardware_seems_to_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.importlib, "import_module", missing("tasks.devices.gpu"))
    monkeypatch.setattr(driver.Path, "exists", lambda path: False)
    monkeypatch.setattr(driver.shutil, "which", lambda name: None)
    assert driver._probed("gpu") == Found("gpu", False, "no driver in this release, and no sign of such a device", None)
    monkeypatch.setattr(driver.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "seems to have one (/usr/bin/nvidia-smi)" in driver._probed("gpu").what


def test_a_driver_whose_library_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.importlib, "import_module", missing("threadpoolctl"))
    assert driver._probed("cpu") == Found(
        "cpu", False, "threadpoolctl is not installed", "pip install 'lepton-ai[worker]'"
    )


def missing(name: str) -> object:
    def raises(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return raises


def test_a_driver_that_fails_is_told_of_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Found:
        raise OSError("libvendor.so: file too short")

    monkeypatch.setattr(cpu, "probe", broken)
    found = {each.kind: each for each in probe()}
    assert found["cpu"] == Found("cpu", False, "OSError: libvendor.so: file too short", None)
    assert set(found) == set(DEVICE_KINDS)


def test_the_module_prints_one_line_of_json_in_no_time() -> None:
    ask()  # from cold files
    started_s = time.perf_counter()
    answer = ask()
    assert time.perf_counter() - started_s < 2
    assert answer.returncode == 0
    assert decoded(answer.stdout) == probe()


def test_what_a_library_prints_as_it_loads_is_not_in_the_answer(tmp_path: Path) -> None:
    (tmp_path / "pyopencl.py").write_text("import os; os.write(1, b'hello from C'); raise ImportError('libOpenCL.so')")
    answer = ask(PYTHONPATH=str(tmp_path))
    [found] = [each for each in decoded(answer.stdout) if each.kind == "fpga"]
    assert found.what == "pyopencl does not import: libOpenCL.so"
    assert b"hello from C" in answer.stderr


def test_a_library_that_ends_the_process_leaves_no_half_answer(tmp_path: Path) -> None:
    (tmp_path / "pyopencl.py").write_text("import os; os.abort()")
    answer = ask(PYTHONPATH=str(tmp_path))
    assert answer.returncode != 0
    assert answer.stdout == b""
