"""A whole Lepton on one machine: embedded broker, services and workers as child processes that end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import msgspec

from lepton_ai import Client, services
from lepton_ai.errors import Unavailable
from lepton_ai.settings import Settings
from queues.embedded import EmbeddedBroker

__all__ = ["Fleet", "run_fleet", "worker_arguments"]

_STOP_S = 20.0
_LOG_LINES = 12
_PR_SET_PDEATHSIG = 1


class Fleet(msgspec.Struct, frozen=True):
    """A running Lepton: where to reach it, and its processes by name."""

    broker_url: str
    http_url: str
    processes: dict[str, subprocess.Popen[bytes]]
    logs: Path

    def check(self) -> None:
        """Raises Unavailable, with the end of its log, where a process has ended by itself."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise Unavailable(f"{name} ended with exit code {process.returncode}:\n{_tail(self.logs / name)}")


@contextmanager
def run_fleet(settings: Settings, workers: Mapping[str, int], tell: Callable[[str], None]) -> Iterator[Fleet]:
    """Starts everything on a free port in a private directory, and leaves nothing behind however it ends.

    `workers` maps a device (`cpu.big`) to its slots. Yields once each worker has announced itself and the ingest is
    ready; `tell` hears of each step. Raises Unavailable where a process does not come up.
    """
    with ExitStack() as stack:
        tell("starting the broker")
        broker = stack.enter_context(EmbeddedBroker(settings))
        port = _free_port()
        own = {"LEPTON_REDIS_URL": broker.url, "LEPTON_HTTP_PORT": str(port), "LEPTON_HTTP_HOST": "127.0.0.1"}
        environ = services.environ(os.environ | own)
        logs = broker.directory / "logs"
        logs.mkdir()
        fleet = Fleet(broker.url, f"http://127.0.0.1:{port}", {}, logs)
        stack.callback(_stop, fleet.processes)
        for service in ("router", "telemetry", "ingest"):
            _start(fleet, service, ["-m", "pipeline", service], environ)
        for device, slots in workers.items():
            _start(fleet, f"worker-{device}", worker_arguments(device, slots), environ)
        _await_ready(fleet, len(workers), tell)
        yield fleet


def worker_arguments(device: str, slots: int) -> list[str]:
    """The command line, after the interpreter, of a real Celery worker that serves a device."""
    arguments = f"-m celery -A tasks.worker worker -P threads --without-gossip --without-mingle -Q lepton.{device}"
    return [*arguments.split(), "-c", str(slots), "-n", f"{device}@%h", "--loglevel", "WARNING"]


def _start(fleet: Fleet, name: str, arguments: list[str], environ: Mapping[str, str]) -> None:
    with (fleet.logs / name).open("wb") as log:
        fleet.processes[name] = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # Ctrl-C is ours to handle
            preexec_fn=_end_with_parent(),  # noqa: PLW1509 - it only calls prctl
        )


def _await_ready(fleet: Fleet, workers: int, tell: Callable[[str], None]) -> None:
    """Waits without a limit of its own (a first start compiles every kernel), but not for a process that has ended."""
    online: set[str] = set()
    tell("warming the kernels (the first start compiles them)")
    with Client(fleet.broker_url) as client:
        while len(online) < workers or not _is_ready(fleet.http_url):
            fleet.check()
            found = {each.device for each in client.devices()}
            for device in sorted(found - online):
                tell(f"{device} is online")
            online |= found
            time.sleep(0.1)


def _is_ready(http_url: str) -> bool:
    try:
        return httpx.get(f"{http_url}/readyz", timeout=2).is_success
    except httpx.HTTPError:
        return False


def _stop(processes: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Ends every process: workers first, so that they can commit what they run; whoever does not end is killed."""
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half of them behind
    try:
        for name in sorted(processes, key=lambda name: not name.startswith("worker")):
            processes[name].terminate()
        deadline = time.monotonic() + _STOP_S
        for process in processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        signal.signal(signal.SIGINT, held)


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    return "\n".join(lines[-_LOG_LINES:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux a child is told to end when the thread that started it does; elsewhere only a clean end stops it."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
