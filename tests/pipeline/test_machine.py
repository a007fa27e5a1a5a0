from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from lepton_ai.errors import InvalidSettings
from pipeline import machine
from pipeline.machine import (
    Found,
    Unit,
    WorkerPlan,
    checked,
    cores,
    default_workers,
    look_for_devices,
    on_units,
    parse_workers,
    planned,
)

CPU = Found("cpu", available=True, what="a processor")
FPGA = Found("fpga", available=True, what="PoCL", emulated=True)
GPUS = Found(
    "gpu",
    available=True,
    what="2 x Tesla T4 (gpu.t4), NVIDIA A10G (gpu.a10g)",
    units=tuple(
        Unit(device, {"CUDA_VISIBLE_DEVICES": uuid})
        for device, uuid in (("gpu.t4", "A"), ("gpu.a10g", "B"), ("gpu.t4", "C"))
    ),
)
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


def test_cards_get_a_worker_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert default_workers([CPU, GPUS]) == {"cpu": 5, "gpu.t4": 1, "gpu.a10g": 1}


def test_each_card_of_a_model_has_a_worker_which_sees_it_alone() -> None:
    plans = planned({"cpu": 2, "gpu.t4": 1, "gpu.a10g": 2}, [CPU, GPUS])
    assert [(each.name, each.device, each.slots, each.environ.get("CUDA_VISIBLE_DEVICES")) for each in plans] == [
        ("cpu", "cpu", 2, None),
        ("gpu.t4", "gpu.t4", 1, "A"),
        ("gpu.t4-2", "gpu.t4", 1, "C"),
        ("gpu.a10g", "gpu.a10g", 2, "B"),
    ]


def test_a_device_without_a_model_is_every_card() -> None:
    assert [each.environ["CUDA_VISIBLE_DEVICES"] for each in planned({"gpu": 1}, [GPUS])] == ["A", "B", "C"]


def test_workers_that_are_planned_already_get_cards_in_turn() -> None:
    plans = [WorkerPlan(f"gpu.t4-{number}", "gpu.t4", 1, {"X": "1"}) for number in range(3)]
    assert [each.environ for each in on_units(plans, [GPUS])] == [
        {"CUDA_VISIBLE_DEVICES": uuid, "X": "1"} for uuid in ("A", "C", "A")
    ]


def test_cards_are_asked_for_by_their_model_or_by_none() -> None:
    checked({"gpu": 1, "gpu.t4": 1}, [CPU, GPUS])
    with pytest.raises(InvalidSettings, match=r"no gpu\.h100 on this machine, only 2 x Tesla T4 \(gpu\.t4\), NVIDIA"):
        checked({"gpu.h100": 1}, [CPU, GPUS])


@pytest.mark.parametrize(("count", "slots"), [(8, 6), (3, 1)])
def test_beside_two_other_devices_it_leaves_a_core_for_each(
    monkeypatch: pytest.MonkeyPatch, count: int, slots: int
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: count)
    assert default_workers([CPU, FPGA, TPU]) == {"cpu": slots, "fpga": 1, "tpu": 1}


@pytest.mark.parametrize("count", [1, 2])
def test_of_emulated_devices_there_are_no_more_than_the_cpu_can_spare_cores(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(machine, "cores", lambda: count)
    assert default_workers([CPU, FPGA, TPU]) == {"cpu": 1, "fpga": 1}
    real = Found("tpu", available=True, what="TPU v5e")
    assert default_workers([CPU, FPGA, real]) == {"cpu": 1, "tpu": 1}


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


ANSWER = (
    '[{"kind":"cpu","available":true,"what":"x","fix":null,"emulated":false},{"kind":"gpu","available":true,'
    '"units":[{"device":"gpu.t4","environ":{"CUDA_VISIBLE_DEVICES":"GPU-a"}}]}]'
)


def test_the_probes_last_line_is_its_answer(as_tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    as_tasks.write_text(f"import sys\nprint('loading')\nprint('warning', file=sys.stderr)\nprint({ANSWER!r})\n")
    assert look_for_devices() == (
        Found("cpu", available=True, what="x"),
        Found("gpu", available=True, units=(Unit("gpu.t4", {"CUDA_VISIBLE_DEVICES": "GPU-a"}),)),
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
