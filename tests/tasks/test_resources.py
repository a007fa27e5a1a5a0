from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lepton_ai.device import Announcement, DeviceState, Peaks, ResourceState
from lepton_ai.settings import Settings
from tasks.host import Processors, Usage
from tasks.resources import Resources

CPU = Announcement("worker", "cpu@host", "cpu", "cpu", 2, False, Peaks(1.0, 1.0, 1.0, 0.0, 0.0), (), 0.0)
GPU = msgspec.structs.replace(CPU, device="gpu", kind="gpu")


@pytest.fixture
def slots() -> Any:
    return SimpleNamespace(busy=0, busy_s=0.0, count=2, driver=SimpleNamespace(state=DeviceState), threads=[])


@pytest.fixture(autouse=True)
def _two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.host.cores", lambda: 2)
    monkeypatch.setattr("tasks.resources.cores", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


def read(slots: Any, usage: Usage, announcement: Announcement = CPU, *, siblings: float = 0.0) -> ResourceState:
    """The state on a host whose processors are used so."""
    found = Resources(Settings(), announcement, slots)
    found._processors._reading = lambda: usage
    return found.read(siblings)


def test_what_neither_we_nor_another_worker_uses_is_foreign(slots: Any) -> None:
    found = read(slots, Usage(0.9, 0.9, 0.3), siblings=1.0)
    assert (found.host_cpu, found.own_cpu) == (0.9, 0.3)
    assert found.foreign_cpu == pytest.approx(0.1)


def test_what_others_use_slows_a_device_that_computes_on_the_same_processors(slots: Any) -> None:
    """Another worker's jobs as well: they are no reason to give this one less, and they take their time."""
    assert read(slots, Usage(1.0, 1.0, 0.0)).speed == pytest.approx(2 / 3)
    assert read(slots, Usage(1.0, 1.0, 0.0), siblings=2.0).speed == pytest.approx(2 / 3)


def test_an_emulated_device_is_slowed_too_and_one_with_processors_of_its_own_is_not(slots: Any) -> None:
    loaded = Usage(1.0, 1.0, 0.0)
    assert read(slots, loaded, msgspec.structs.replace(GPU, kind="fpga", emulated=True)).speed < 1
    assert read(slots, loaded, GPU).speed == 1.0


def test_what_a_device_did_while_no_slot_of_ours_had_it_was_for_others(slots: Any) -> None:
    slots.driver = SimpleNamespace(state=lambda: DeviceState(utilization=0.8))
    resources = Resources(Settings(), GPU, slots)
    deadline = time.monotonic() + 5
    while (found := resources.read()).device is None:
        assert time.monotonic() < deadline
    assert found.foreign_utilization == pytest.approx(0.8)
    slots.busy_s += 1000.0
    assert resources.read().foreign_utilization == 0.0


def test_where_the_system_tells_nothing_the_worker_is_there_all_the_same(
    slots: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise PermissionError

    for name in ("cpu_percent", "net_io_counters", "virtual_memory"):
        monkeypatch.setattr(f"psutil.{name}", refused)
    found = Resources(Settings(), CPU, slots).read()
    assert (found.host_cpu, found.memory_total_bytes, found.network_bytes_per_s) == (0.0, 0, 0.0)
    assert (found.share, found.speed) == (1.0, 1.0)


def test_reading_is_cheap(slots: Any) -> None:
    """Well under a millisecond; the bound is loose because a busy machine's clock counts others' time too."""
    resources = Resources(Settings(), CPU, slots)
    took = []
    for _ in range(20):
        started = time.perf_counter()
        resources.read()
        took.append(time.perf_counter() - started)
    assert min(took) < 2e-3


def test_the_processors_are_those_that_this_process_may_use() -> None:
    assert Processors().count == 2
