from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import host
from tasks.host import Memory, Network, Processors, boot, fair_speed

SHARES = st.floats(0.0, 1.0)


def test_alone_a_thread_has_all_of_its_speed() -> None:
    assert fair_speed(2, 2.0, 2.0, 0.0) == 1.0


def test_others_that_leave_processors_idle_slow_nobody() -> None:
    assert fair_speed(8, 2.0, 2.0, 5.0) == 1.0


def test_as_many_threads_of_others_as_of_ours_halve_the_speed() -> None:
    """Two of ours and two of theirs on two processors: each gets half of one."""
    assert fair_speed(2, 2.0, 1.0, 1.0) == pytest.approx(0.5)


def test_while_nothing_of_ours_runs_the_speed_is_what_one_thread_would_get() -> None:
    assert fair_speed(2, 0.0, 0.0, 2.0) == pytest.approx(2 / 3)
    assert fair_speed(2, 0.0, 0.0, 1.0) == 1.0


def test_kernels_that_wait_do_not_make_others_look_like_many() -> None:
    """Ours got a tenth of a processor because they wanted no more: there are idle ones."""
    assert fair_speed(4, 2.0, 0.2, 1.0) == 1.0


@given(st.integers(1, 64), st.floats(0.0, 64.0), SHARES, SHARES)
def test_a_speed_is_a_share_above_nought(processors: int, busy: float, own: float, others: float) -> None:
    used = own * processors
    assert 0 < fair_speed(processors, busy, used, others * (processors - used)) <= 1


@given(st.integers(1, 16), st.floats(1.0, 16.0), SHARES, SHARES)
def test_more_of_others_is_never_quicker(processors: int, busy: float, one: float, other: float) -> None:
    low, high = sorted((one * processors, other * processors))
    # Each of ours gets a whole processor, so that only the number of theirs differs.
    assert fair_speed(processors, busy, busy, low) >= fair_speed(processors, busy, busy, high)


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
