from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lepton_ai.errors import InvalidSettings
from pipeline import machine
from pipeline.machine import Found, checked, cores, default_workers, look_for_devices, parse_workers

CPU = Found("cpu", available=True, what="a processor")
FPGA = Found("fpga", available=True, what="PoCL", emulated=True)
TPU = Found("tpu", available=True, what="JAX", emulated=True)
NO_GPU = Found("gpu", available=False, what="no NVIDIA driver", fix="install one")


@pytest.mark.parametrize(
    ("text", "workers"),
    [
        ("cpu:2,fpga:1", {"cpu": 2, "fpga": 1}),
        (" cpu.big:3 , cpu.little:1", {"cpu.big": 3, "cpu.little": 1}),
        ("fpga", {"fpga": 1}),
        ("gpu.h100", {"gpu.h100": 1}),
        ("cpu", {"cpu": cores()}),
    ],
)
def test_workers_are_devices_with_their_slots(text: str, workers: dict[str, int]) -> None:
    assert parse_workers(text) == workers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("abacus:2", "abacus"),
        ("cpu:2,", "''"),
        ("cpu:0", "1 to 63 slots"),
        ("cpu:64", "cpu:64"),
        ("cpu:", "cpu:"),
        ("cpu:two", "cpu:two"),
        ("cpu:-1", "cpu:-1"),
        ("cpu:1,cpu:1", "cpu is named twice"),
        ("cpu.a b", "cpu.a b"),
        ("cpu.a;b:1", "cpu.a;b"),
    ],
)
def test_workers_that_cannot_be_are_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(InvalidSettings, match=says):
        parse_workers(text)


def test_without_another_device_the_processor_has_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert default_workers([CPU, NO_GPU]) == {"cpu": 8}


@pytest.mark.parametrize(("count", "slots"), [(8, 7), (2, 1), (1, 1)])
def test_beside_another_device_it_leaves_a_core_for_that_ones_worker(
    monkeypatch: pytest.MonkeyPatch, count: int, slots: int
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: count)
    assert default_workers([CPU, NO_GPU, FPGA]) == {"cpu": slots, "fpga": 1}


@pytest.mark.parametrize(("count", "slots"), [(8, 6), (3, 1), (2, 1)])
def test_beside_two_other_devices_it_leaves_a_core_for_each(
    monkeypatch: pytest.MonkeyPatch, count: int, slots: int
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: count)
    assert default_workers([CPU, FPGA, TPU]) == {"cpu": slots, "fpga": 1, "tpu": 1}


def test_a_device_that_is_there_may_be_asked_for_under_any_model() -> None:
    checked({"cpu": 1, "fpga.vendor": 1}, [CPU, FPGA])


def test_a_device_that_is_not_there_is_refused_with_what_is_missing_and_the_fix() -> None:
    with pytest.raises(InvalidSettings, match=r"no gpu\.h100 on this machine: no NVIDIA driver; install one"):
        checked({"cpu": 1, "gpu.h100": 1}, [CPU, NO_GPU])


def test_a_device_that_the_probe_does_not_know_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="no tpu on this machine: no driver for it"):
        checked({"tpu": 1}, [CPU])


@pytest.fixture
def as_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that is run for `python -m tasks`."""
    monkeypatch.setattr(machine, "environment", lambda own: {**os.environ, **own, "PYTHONPATH": str(tmp_path)})
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").touch()
    return tmp_path / "tasks" / "__main__.py"


ANSWER = '[{"kind":"cpu","available":true,"what":"x","fix":null,"emulated":false},{"kind":"gpu","available":false}]'


def test_the_probes_last_line_is_its_answer(as_tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    as_tasks.write_text(f"import sys\nprint('loading')\nprint('warning', file=sys.stderr)\nprint({ANSWER!r})\n")
    assert look_for_devices() == (
        Found("cpu", available=True, what="x"),
        Found("gpu", available=False),
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("program", ["raise SystemExit(1)", "print('{}')", "print('[{\"kind\": 1}]')", ""])
def test_where_the_probe_fails_the_processor_is_all_that_is_known(as_tasks: Path, program: str) -> None:
    as_tasks.write_text(program)
    (found,) = look_for_devices()
    assert (found.kind, found.available) == ("cpu", True)


def test_a_probe_that_hangs_is_given_up(as_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROBE_S", 0.3)
    as_tasks.write_text("import time; time.sleep(60)")
    assert [each.kind for each in look_for_devices()] == ["cpu"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no affinity")
def test_cores_are_those_that_this_process_may_use() -> None:
    assert cores() == len(os.sched_getaffinity(0))
