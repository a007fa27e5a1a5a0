"""A whole Lepton on one machine: which processes it is, when it is ready, and one for a while with a private broker."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import msgspec

from lepton_ai.device import Announcement
from lepton_ai.errors import BrokerUnavailable, Unavailable
from lepton_ai.settings import Settings
from pipeline.machine import Unit
from pipeline.processes import Processes, Program, ending, environment
from queues.broker import announcements
from queues.connection import CommandError, Connection
from queues.embedded import EmbeddedBroker

__all__ = [
    "SERVICES",
    "Arrival",
    "Fleet",
    "Post",
    "free_port",
    "posts",
    "programs",
    "run_fleet",
    "worker_arguments",
    "worker_name",
]

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
        for program in programs(environment(own), workers):
            processes.start(program)
        tell("warming the kernels (the first start compiles them)")
        arrival = Arrival(fleet.broker_url, fleet.http_url, workers)
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


class Post(msgspec.Struct, frozen=True):
    """A worker that is to be here."""

    name: str
    """Its device's name, and a number where several share that; its Celery node is called so, `@` this host."""
    device: str
    slots: int
    environ: dict[str, str] = {}


def posts(workers: Mapping[str, int], units: Sequence[Unit] = ()) -> list[Post]:
    """A worker for each device, which `workers` maps to its slots, or for each of the units that go by its name."""
    found: list[Post] = []
    for device, slots in workers.items():
        own = [unit.environ for unit in units if unit.serves(device)] or [{}]
        for number, environ in enumerate(own, 1):
            found.append(Post(device if len(own) == 1 else f"{device}-{number}", device, slots, environ))
    return found


def programs(environ: dict[str, str], workers: Mapping[str, int], units: Sequence[Unit] = ()) -> list[Program]:
    """The services and the workers: see `posts`."""
    return [
        *(Program(name, ("-m", "pipeline", name), environ) for name in SERVICES),
        *(
            Program(worker_name(post.name), tuple(_worker_arguments(post)), environ | post.environ)
            for post in posts(workers, units)
        ),
    ]


def worker_name(post: str) -> str:
    """The name of the process of a worker here."""
    return f"worker-{post}"


def worker_arguments(device: str, slots: int) -> list[str]:
    """The command line, after the interpreter, of a real Celery worker that serves a device."""
    return _worker_arguments(Post(device, device, slots))


def _worker_arguments(post: Post) -> list[str]:
    queue = f"lepton.{post.device}"
    arguments = f"-m celery -q -A tasks.worker worker -P threads --without-gossip --without-mingle -Q {queue}"
    return [*arguments.split(), "-c", str(post.slots), "-n", f"{post.name}@%h", "--loglevel", "WARNING"]


class Arrival:
    """Looks who has come up since it was made: the workers by their announcements, the ingest by its own word."""

    def __init__(self, broker_url: str, http_url: str, posts: Iterable[str]) -> None:
        self.online: set[str] = set()
        self._broker_url = broker_url
        self._http_url = http_url
        self._nodes = {f"{post}@{socket.gethostname()}": post for post in posts}
        self._since = time.time()
        self._told: set[str] = set()

    def complete(self) -> bool:
        """Looks once; whether every worker is online and the ingest ready."""
        with contextlib.suppress(BrokerUnavailable):
            self.online |= {self.post(each) for each in self.announced()}
        return self.online.issuperset(self._nodes.values()) and _is_ready(self._http_url)

    def news(self) -> list[str]:
        """The workers that have come online since the last call, by the names of their posts."""
        news = sorted(self.online - self._told)
        self._told |= self.online
        return news

    def announced(self) -> list[Announcement]:
        """Our workers that are online now; BrokerUnavailable while the broker is."""
        try:
            with contextlib.closing(Connection(self._broker_url, "supervisor")) as connection:
                found = announcements(connection)
        except CommandError as error:
            raise BrokerUnavailable(error.message) from error
        # Not what an earlier run has left: a lease outlives its worker for a while.
        return [each for each in found if each.worker in self._nodes and each.started_at >= self._since]

    def post(self, worker: Announcement) -> str:
        """The name of the post of a worker of ours."""
        return self._nodes[worker.worker]


def _tell(arrival: Arrival, tell: Callable[[str], None]) -> None:
    for post in arrival.news():
        tell(f"{post} is online")


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
