from __future__ import annotations

import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import host
from tasks.host import Contention, Memory, Network, Processors, boot


class Scheduler:
    """What a system says of its threads, in milliseconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def says(self, thread: int, ran_ms: int, waited_ms: int) -> None:
        (self.folder / str(thread)).mkdir(exist_ok=True)
        (self.folder / str(thread) / "schedstat").write_text(f"{ran_ms}000000 {waited_ms}000000 7\n")


@pytest.fixture
def scheduler(tmp_path: Path) -> Scheduler:
    return Scheduler(tmp_path)


def test_speed_is_the_share_of_their_time_in_which_threads_that_could_run_did(scheduler: Scheduler) -> None:
    contention = Contention(scheduler.folder)
    scheduler.says(1, 1000, 5000)
    scheduler.says(2, 0, 0)
    contention.speed([1, 2], 2, 0.0)
    scheduler.says(1, 1500, 5100)
    scheduler.says(2, 100, 100)
    assert contention.speed([1, 2], 2, 2.0) == pytest.approx(0.75)
    scheduler.says(1, 2000, 5100)
    assert contention.speed([1, 2], 2, 2.0) == 1.0


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The load average of a host of four processors, in the first place."""
    found = [0.0]
    monkeypatch.setattr("os.getloadavg", lambda: (found[0], 99.0, 99.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    return found


def test_threads_that_hardly_ran_are_taken_to_get_what_everybody_gets(scheduler: Scheduler, load: list[float]) -> None:
    contention = Contention(scheduler.folder)
    scheduler.says(1, 1000, 5000)
    contention.speed([1], 2, 0.0)
    assert contention.speed([1], 2, 2.0) == pytest.approx(2 / 3)
    assert contention.speed([1], 2, 1.0) == 1.0


def test_where_the_system_says_nothing_of_threads_the_use_of_processors_decides(
    tmp_path: Path, load: list[float]
) -> None:
    contention = Contention(tmp_path)
    assert contention.speed([1], 4, 4.0) == pytest.approx(0.8)
    assert contention.speed([], 4, 3.0) == 1.0


def test_where_more_threads_want_a_processor_than_there_are_each_gets_less(tmp_path: Path, load: list[float]) -> None:
    load[0] = 7.0
    assert Contention(tmp_path).speed([], 4, 4.0) == pytest.approx(0.5)
    assert Contention(tmp_path).speed([], 2, 2.0) == pytest.approx(2 / 4.5)
    assert Contention(tmp_path).speed([], 4, 3.0) == 1.0  # that was a minute ago: now some are idle


def test_of_many_processors_that_are_not_all_taken_a_thread_has_no_more_than_one(
    tmp_path: Path, load: list[float]
) -> None:
    assert Contention(tmp_path).speed([], 64, 60.0) == 1.0
    load[0] = 1e4
    assert Contention(tmp_path).speed([], 2, 2.0) == pytest.approx(0.05)


def test_a_thread_that_is_new_counts_from_when_it_was_first_seen(scheduler: Scheduler) -> None:
    contention = Contention(scheduler.folder)
    scheduler.says(1, 1000, 9000)
    assert contention.speed([1], 2, 0.0) == 1.0


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=2, max_size=5))
def test_a_speed_is_a_share_above_nought(told: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as folder:
        scheduler = Scheduler(Path(folder))
        contention = Contention(scheduler.folder)
        for ran, waited in told:
            scheduler.says(1, ran, waited)
            assert 0 < contention.speed([1], 2, 0.5) <= 1


def test_our_own_threads_are_found_where_the_system_has_them() -> None:
    started = time.monotonic()
    contention, own = Contention(), [threading.get_native_id()]
    contention.speed(own, 2, 0.0)
    while time.monotonic() - started < 0.05:
        pass
    assert 0 < contention.speed(own, 2, 0.0) <= 1


def test_the_use_of_processors_is_told_in_shares() -> None:
    found = Processors().read()
    assert 0 <= found.own <= found.here <= 1
    assert 0 <= found.host <= 1


def test_a_pinned_worker_looks_at_its_own_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [1])
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(psutil, "cpu_percent", lambda _, percpu=False: [90.0, 10.0] if percpu else 50.0)
    found = Processors().read()
    assert (found.host, found.here) == (0.5, 0.1)


def test_memory_is_that_of_the_host() -> None:
    found = Memory.read()
    assert 0 < found.used < found.total


class Traffic:
    """A host's network, played by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.moved: dict[str, tuple[int, int]] = {"lo": (0, 0), "eth0": (0, 0), "eth1": (0, 0)}
        monkeypatch.setattr(host.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(psutil, "net_io_counters", self._counters)
        speeds = {"eth0": SimpleNamespace(speed=1000), "eth1": SimpleNamespace(speed=0)}
        monkeypatch.setattr(psutil, "net_if_stats", lambda: speeds)

    def _counters(self, **_: bool) -> dict[str, Any]:
        return {name: SimpleNamespace(bytes_sent=s, bytes_recv=r) for name, (s, r) in self.moved.items()}


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    return Traffic(monkeypatch)


def test_traffic_is_that_of_all_interfaces_but_the_loopback(traffic: Traffic) -> None:
    network = Network()
    traffic.now, traffic.moved = 2.0, {"lo": (999, 999), "eth0": (10, 20), "eth1": (30, 40)}
    assert network.read().bytes_per_s == 50.0


def test_bandwidth_in_use_is_the_busier_direction_of_an_interface_that_tells_its_speed(traffic: Traffic) -> None:
    network = Network()
    traffic.now, traffic.moved = 1.0, {"lo": (0, 0), "eth0": (125_000, 62_500_000), "eth1": (10**12, 0)}
    found = network.read()
    assert (found.utilization, found.speed_bytes_per_s) == (0.5, 125e6)


def test_an_interface_that_comes_or_begins_to_count_anew_is_no_traffic(traffic: Traffic) -> None:
    traffic.moved = {"eth0": (10**9, 10**9)}
    network = Network()
    traffic.now, traffic.moved = 1.0, {"eth0": (0, 0), "eth1": (10**9, 10**9)}
    assert network.read().bytes_per_s == 0.0


def test_a_host_without_a_network_has_no_traffic(traffic: Traffic) -> None:
    traffic.moved = {}
    found = Network().read()
    assert (found.bytes_per_s, found.speed_bytes_per_s, found.utilization) == (0.0, None, None)


def test_a_host_is_named_by_its_boot(tmp_path: Path) -> None:
    told = tmp_path / "boot_id"
    told.write_text("some-boot\n")
    assert boot([told]) == "some-boot"
    assert float(boot([tmp_path / "none"])) > 0
