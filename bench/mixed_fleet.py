"""A fleet of four kinds of device on one machine: a broker, a router, telemetry, and a real worker a device.

The two emulators compute on the machine's cores, so each has one of its own; the stand-ins (bench/declared.py)
wait, and take what little they need where they find it. So do the broker, the router and the client.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import redis

from bench.contest import say
from bench.cpu import CORES
from lepton_ai import Client
from lepton_ai.settings import Settings
from pipeline.machine import planned
from pipeline.processes import Processes, Program, ending, environment
from pipeline.supervisor import programs
from queues.embedded import EmbeddedBroker

__all__ = ["DEVICES", "MixedFleet", "mixed_fleet"]

#: By device: the Celery application of its worker, and which core it computes on.
DEVICES = {
    "cpu": ("tasks.worker", 0),
    "fpga": ("tasks.worker", 1),
    "gpu.declared": ("bench.declared_worker", None),
    "tpu.declared": ("bench.declared_worker", None),
}
_SERVICES = ("router", "telemetry")
_STOP_S = 20.0


class MixedFleet(msgspec.Struct, frozen=True):
    """A running fleet and its client."""

    url: str
    client: Client
    processes: Processes
    logs: Path

    def settle(self) -> None:
        """Rewrites the broker's log and waits for it, so that it is not rewritten while somebody has a turn."""
        with redis.Redis.from_url(self.url) as broker:
            with contextlib.suppress(redis.ResponseError):  # it has begun by itself
                broker.bgrewriteaof()
            while any(map(broker.info("persistence").get, ("aof_rewrite_in_progress", "aof_rewrite_scheduled"))):
                time.sleep(0.02)

    def check(self) -> None:
        """Raises RuntimeError, with the end of its log, where a process has ended by itself."""
        for name, process in self.processes.running.items():
            if (code := process.poll()) is not None:
                told = (self.logs / name).read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"{name} ended with {ending(code)}:\n{told}")


@contextmanager
def mixed_fleet(name: str, devices: Sequence[str] = tuple(DEVICES)) -> Iterator[MixedFleet]:
    """Yields once every worker has announced itself; ends everything however it ends."""
    say(f"{name}: starting a broker, {', '.join(_SERVICES)} and a worker for each of {', '.join(devices)}")
    with EmbeddedBroker(Settings.read()) as broker, contextlib.ExitStack() as stack:
        logs = broker.directory / "logs"
        logs.mkdir()
        processes = Processes(lambda each: (logs / each).open("wb"), lambda *_, **__: None, restart=False)
        stack.callback(_stop, processes)
        for program in _programs(environment({"LEPTON_REDIS_URL": broker.url}), devices):
            processes.start(program)
        for device in devices:
            if (core := DEVICES[device][1]) is not None:
                _pin(processes.running[f"worker-{device}"].pid, core)
        fleet = MixedFleet(broker.url, stack.enter_context(Client(broker.url)), processes, logs)
        while {each.device for each in fleet.client.devices()} < set(devices):
            fleet.check()
            time.sleep(0.1)
        yield fleet


def _programs(environ: dict[str, str], devices: Sequence[str]) -> Iterator[Program]:
    for program in programs(environ, planned(dict.fromkeys(devices, 1))):
        if program.name in _SERVICES:
            yield program
        for device in devices:
            if program.name == f"worker-{device}":
                own = tuple(DEVICES[device][0] if each == "tasks.worker" else each for each in program.arguments)
                yield msgspec.structs.replace(program, arguments=own)


def _pin(pid: int, core: int) -> None:
    """Keeps a process that has just been started, and has no threads yet, on a core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(pid, {cores[core % CORES]})


def _stop(processes: Processes) -> None:
    """Workers first, which have nothing to do any more."""
    processes.stop(sorted(processes.running, key=lambda name: not name.startswith("worker")), _STOP_S)
