"""A whole Lepton on one machine: which processes it is, when it is ready, and one for a while with a private broker."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import msgspec

from lepton_ai.device import Announcement
from lepton_ai.errors import BrokerUnavailable, Unavailable
from lepton_ai.settings import Settings
from pipeline.machine import WorkerPlan, planned
from pipeline.processes import Processes, Program, ending, environment
from queues.broker import announcements
from queues.connection import CommandError, Connection
from queues.embedded import EmbeddedBroker

__all__ = ["SERVICES", "Arrival", "Fleet", "free_port", "programs", "run_fleet", "worker_arguments"]

SERVICES = ("router", "telemetry", "ingest")
_STOP_S = 20.0
_LOG_LINES = 12


class Fleet(msgspec.Struct, frozen=True):
    """A running Lepton: where to reach it, and its processes by name."""

    broker_url: str
    http_url: str
    processes: dict[str, subprocess.Popen[bytes]]
    logs: Path

    def check(self) -> None:
        """Raises Unavailable, with the end of its log, where a process has ended by itself."""
        for name, process in self.processes.items():
            if (code := process.poll()) is not None:
                raise Unavailable(f"{name} ended with {ending(code)}:\n{_tail(self.logs / name)}")


@contextmanager
def run_fleet(
    settings: Settings,
    workers: Mapping[str, int],
    tell: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> Iterator[Fleet]:
    """Starts everything on a free port in a private directory, and leaves nothing behind however it ends.

    `workers` maps a device (`cpu.big`) to its slots. Yields once each worker has announced itself and the ingest is
    ready, without a limit of its own (a first start compiles every kernel); `tell` hears of each step, and `check` is
    called while it waits: it may raise. Raises Unavailable where a process does not come up.
    """
    with ExitStack() as stack:
        tell("starting the broker")
        broker = stack.enter_context(EmbeddedBroker(settings))
        port = free_port()
        own = {"LEPTON_REDIS_URL": broker.url, "LEPTON_HTTP_PORT": str(port), "LEPTON_HTTP_HOST": "127.0.0.1"}
        logs = broker.directory / "logs"
        logs.mkdir()
        processes = Processes(lambda name: (logs / name).open("wb"), lambda *_, **__: None, restart=False)
        fleet = Fleet(broker.url, f"http://127.0.0.1:{port}", processes.running, logs)
        stack.callback(_stop, processes)
        plans = planned(workers)
        for program in programs(environment(own), plans):
            processes.start(program)
        tell("warming the kernels (the first start compiles them)")
        arrival = Arrival(fleet.broker_url, fleet.http_url, plans)
        try:
            while not arrival.complete():
                fleet.check()
                check()
                _tell(arrival, tell)
                time.sleep(0.1)
            _tell(arrival, tell)
        except BaseException:
            processes.kill(list(processes.running))  # nobody has a job yet; a worker that warms up would end late
            raise
        yield fleet


def programs(environ: dict[str, str], workers: Iterable[WorkerPlan]) -> list[Program]:
    """The services and the workers."""
    return [
        *(Program(name, ("-m", "pipeline", name), environ) for name in SERVICES),
        *(
            Program(each.process, tuple(worker_arguments(each.device, each.slots, each.name)), environ | each.environ)
            for each in workers
        ),
    ]


def worker_arguments(device: str, slots: int, name: str | None = None) -> list[str]:
    """The command line, after the interpreter, of a real Celery worker that serves a device, by its name if none."""
    arguments = f"-m celery -q -A tasks.worker worker -P threads --without-gossip --without-mingle -Q lepton.{device}"
    return [*arguments.split(), "-c", str(slots), "-n", f"{name or device}@%h", "--loglevel", "WARNING"]


class Arrival:
    """Looks who has come up since it was made: the workers by their announcements, the ingest by its own word."""

    def __init__(self, broker_url: str, http_url: str, workers: Iterable[WorkerPlan]) -> None:
        self.online: set[str] = set()
        self._broker_url = broker_url
        self._http_url = http_url
        self._nodes = {f"{each.name}@{socket.gethostname()}": each.name for each in workers}
        self._since = time.time()
        self._told: set[str] = set()

    def complete(self) -> bool:
        """Looks once; whether every worker is online and the ingest ready."""
        with contextlib.suppress(BrokerUnavailable):
            self.online |= set(self.announced())
        return self.online >= set(self._nodes.values()) and _is_ready(self._http_url)

    def news(self) -> list[str]:
        """The workers that have come online since the last call, by name."""
        news = sorted(self.online - self._told)
        self._told |= self.online
        return news

    def announced(self) -> dict[str, Announcement]:
        """Our workers that are online now, by name; BrokerUnavailable while the broker is."""
        try:
            with contextlib.closing(Connection(self._broker_url, "supervisor")) as connection:
                found = announcements(connection)
        except CommandError as error:
            raise BrokerUnavailable(error.message) from error
        # Not what an earlier run has left: a lease outlives its worker for a while.
        return {
            self._nodes[each.worker]: each
            for each in found
            if each.worker in self._nodes and each.started_at >= self._since
        }


def _tell(arrival: Arrival, tell: Callable[[str], None]) -> None:
    for name in arrival.news():
        tell(f"{name} is online")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _is_ready(http_url: str) -> bool:
    try:
        return httpx.get(f"{http_url}/readyz", timeout=2).is_success
    except httpx.HTTPError:
        return False


def _stop(processes: Processes) -> None:
    """Ends every process: workers first, so that they can commit what they run; whoever does not end is killed."""
    processes.stop(sorted(processes.running, key=lambda name: not name.startswith("worker")), _STOP_S)


def _tail(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    return "\n".join(lines[-_LOG_LINES:])
