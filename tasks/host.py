"""What the host of a worker does: its processors, memory and network, read with psutil in well under a millisecond."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from tasks.driver import cores

__all__ = ["Contention", "Memory", "Network", "Processors", "Traffic", "Usage", "boot"]

#: Processors that are less idle than this are taken to be fought for.
_IDLE: Final = 0.1
#: Threads that have run for less in an interval say nothing of what they waited for.
_ENOUGH_NS: Final = 20_000_000
_TASKS: Final = Path("/proc/self/task")
#: However much else runs, a device is taken to be no slower than this: nothing would ever show that it is not.
_SLOWEST: Final = 0.05
#: The speeds of interfaces are asked for so often: that is a call of the system for each.
_SPEEDS_S: Final = 60.0


class Usage(msgspec.Struct, frozen=True):
    """Shares of the last interval, 0 to 1."""

    host: float
    """Of all processors, by anybody."""
    here: float
    """Of those that this process may use, by anybody."""
    own: float
    """And by this process and the children that it has waited for."""


class Processors:
    """The processors' use, from one reading to the next."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.count = cores()
        self._allowed = self._process.cpu_affinity() if hasattr(self._process, "cpu_affinity") else []
        self._is_pinned = 0 < len(self._allowed) < (psutil.cpu_count() or 1)
        self._busy()
        self._then = (time.monotonic(), self._own_s())

    def read(self) -> Usage:
        now, own_s = time.monotonic(), self._own_s()
        then, before_s = self._then
        self._then = (now, own_s)
        host, here = self._busy()
        own = (own_s - before_s) / max(1e-6, now - then) / self.count
        return Usage(host, here, min(max(0.0, own), here))

    def _busy(self) -> tuple[float, float]:
        """How busy all processors were, and ours. Each by itself costs more to read, so only where some are not."""
        if not self._is_pinned:
            host = psutil.cpu_percent(None) / 100
            return host, host
        each = psutil.cpu_percent(None, percpu=True)
        ours = [each[number] for number in self._allowed if number < len(each)]
        return sum(each) / len(each) / 100, sum(ours) / max(1, len(ours)) / 100

    def _own_s(self) -> float:
        found = self._process.cpu_times()
        return float(found.user + found.system + found.children_user + found.children_system)


class Contention:
    """How much threads of ours have to wait for a processor that others have, from one reading to the next."""

    def __init__(self, folder: Path = _TASKS) -> None:
        self._folder = folder
        self._seen: dict[int, tuple[int, int]] = {}

    def speed(self, threads: Iterable[int], processors: int, others: float) -> float:
        """How fast these threads (by their native ids) compute, as a share of what they would with nobody beside them.

        The scheduler says how long each has run and how long it could have run and waited. Where they have hardly run,
        or it does not say, one is taken to get what a fair scheduler would give it: all of a processor while some are
        idle, else the same as everybody. `others` is how many processors others used: where that is all of them, more
        threads may want one, and the load average says how many lately did.
        """
        ran = waited = 0
        seen = {}
        for each in threads:
            seen[each] = now = self._read(each)
            before = self._seen.get(each, now)
            ran += now[0] - before[0]
            waited += now[1] - before[1]
        self._seen = seen
        if ran >= _ENOUGH_NS:
            return max(_SLOWEST, ran / (ran + max(0, waited)))
        if others <= (1 - _IDLE) * processors:
            return 1.0
        return min(1.0, max(_SLOWEST, processors / (1 + max(others, _wanting() * processors))))

    def _read(self, thread: int) -> tuple[int, int]:
        """Nanoseconds that a thread has run, and has waited to (Linux, Documentation/scheduler/sched-stats.rst)."""
        try:
            ran, waited, _ = (self._folder / str(thread) / "schedstat").read_bytes().split()
            return int(ran), int(waited)
        except (OSError, ValueError):
            return 0, 0


def _wanting() -> float:
    """How many threads of the host ran or could have run in the last minute, for each of its processors."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


class Memory(msgspec.Struct, frozen=True):
    """The host's memory in bytes; used is what no program could have."""

    used: int
    total: int

    @classmethod
    def read(cls) -> Memory:
        found = psutil.virtual_memory()
        return cls(found.total - found.available, found.total)


class Traffic(msgspec.Struct, frozen=True):
    """What went over the network in the last interval: see ResourceState."""

    bytes_per_s: float = 0.0
    speed_bytes_per_s: float | None = None
    utilization: float | None = None


class Network:
    """The traffic of all interfaces but the loopback, from one reading to the next."""

    def __init__(self) -> None:
        self._speeds: dict[str, float] = {}
        self._speeds_at = -_SPEEDS_S
        self._then: tuple[float, dict[str, Any]] = (time.monotonic(), _counters())

    def read(self) -> Traffic:
        now, counters = time.monotonic(), _counters()
        then, before = self._then
        self._then = (now, counters)
        if now >= self._speeds_at + _SPEEDS_S:
            self._speeds_at = now
            self._speeds = {name: each.speed * 125e3 for name, each in psutil.net_if_stats().items() if each.speed > 0}
        elapsed = max(1e-6, now - then)
        total, speed, utilization = 0.0, None, None
        for name in counters.keys() & before.keys():
            sent = max(0, counters[name].bytes_sent - before[name].bytes_sent) / elapsed
            received = max(0, counters[name].bytes_recv - before[name].bytes_recv) / elapsed
            total += sent + received
            if name in self._speeds and max(sent, received) / self._speeds[name] >= (utilization or 0.0):
                speed = self._speeds[name]
                utilization = min(1.0, max(sent, received) / speed)
        return Traffic(total, speed, utilization)


def _counters() -> dict[str, Any]:
    return {name: each for name, each in psutil.net_io_counters(pernic=True).items() if not _is_loopback(name)}


def _is_loopback(name: str) -> bool:
    return name == "lo" or name.startswith("lo0")


def boot(files: Iterable[Path] = (Path("/proc/sys/kernel/random/boot_id"),)) -> str:
    """A name of this running host, the same in all its containers; of its boot time where it has none."""
    for each in files:
        try:
            return each.read_text("ascii").strip()
        except OSError:
            continue
    return f"{psutil.boot_time():.0f}"
