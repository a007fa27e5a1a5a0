"""What `lepton up` is to start: asked for on the command line, completed from the machine, and checked beforehand."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from io import RawIOBase
from pathlib import Path

import msgspec

from lepton_ai.errors import BrokerUnavailable, InvalidSettings
from lepton_ai.placement import policies
from lepton_ai.settings import Settings
from pipeline.fleet_file import read_fleet
from pipeline.machine import (
    CPU,
    Found,
    WorkerPlan,
    checked,
    default_workers,
    look_for_devices,
    parse_workers,
    planned,
)
from pipeline.processes import Program, environment
from pipeline.supervisor import free_port, programs
from queues import guardian
from queues.connection import CommandError, Connection
from queues.server import address, find_server

__all__ = ["FLOWER", "Setup", "set_up"]

FLOWER = "flower"


class Setup(msgspec.Struct, frozen=True):
    """What is to be started."""

    settings: Settings
    broker_url: str
    server: Path | None
    """The program of the embedded broker; None where the broker is somebody else's."""
    data: Path | None
    """Where the embedded broker keeps its data."""
    http_url: str
    flower_url: str | None
    workers: tuple[WorkerPlan, ...]
    found: tuple[Found, ...]

    @property
    def openapi_url(self) -> str:
        return f"{self.http_url}/openapi/openapi.json"

    def guardian(self) -> tuple[str, ...] | None:
        """The command line, after the interpreter, of the embedded broker, if that is to be started."""
        if self.server is None or self.data is None:
            return None
        return guardian.command(self.server, self.settings.durability, _home(self.data))

    def programs(self) -> list[Program]:
        """Everything but the broker."""
        own = {
            "LEPTON_REDIS_URL": self.broker_url,
            "LEPTON_HTTP_PORT": self.http_url.rpartition(":")[2],
            "LEPTON_LOG": self.settings.log,
        }
        environ = environment(own)
        found = programs(environ, self.workers)
        if self.flower_url:
            port = self.flower_url.rpartition(":")[2]
            arguments = f"-m celery -A queues.monitor flower --address=127.0.0.1 --port={port} --logging=warning"
            found.append(Program(FLOWER, tuple(arguments.split()), environ))
        return found


def set_up(arguments: Sequence[str], held: ExitStack) -> Setup:
    """Everything that can be seen to be wrong before a process is started, as a LeptonError; usage ends the program.

    `held` gets the lock on the data.
    """
    options = _parser().parse_args(arguments)
    asked = {"LEPTON_REDIS_URL": options.broker, "LEPTON_LOG": options.log, "LEPTON_HTTP_PORT": options.http_port}
    given = {name: str(value) for name, value in asked.items() if value is not None}
    settings = Settings.read(os.environ | given)
    policies.load(settings.policy)
    if options.fleet and options.workers:
        raise InvalidSettings("--fleet and --workers both name the workers: leave one out", "--fleet")
    fleet = read_fleet(options.fleet.expanduser()) if options.fleet else None
    workers = parse_workers(options.workers) if options.workers else {}
    found: tuple[Found, ...] = ()
    devices = fleet.devices if fleet is not None else list(workers)
    if not devices or any(device.partition(".")[0] != "cpu" for device in devices):
        found = look_for_devices()
        checked(workers, found)
    plans = fleet.planned(found or (CPU,)) if fleet is not None else planned(workers or default_workers(found), found)
    broker_url, server, data = settings.redis_url, None, None
    if broker_url:
        if options.data is not None:
            raise InvalidSettings(
                "--data is for the broker that comes along; LEPTON_REDIS_URL names one that keeps its own"
            )
        _check_broker(broker_url)
    else:
        server = find_server(settings)
        data = (options.data or _default_data()).expanduser().absolute()
        held.enter_context(_locked(data))
        broker_url = address(_home(data))
    host = f"[{settings.http_host}]" if ":" in settings.http_host else settings.http_host
    http_url = f"http://{host}:{_port(settings.http_host, settings.http_port, '--http-port')}"
    flower_url = None
    if options.flower:
        if find_spec("flower") is None:
            raise InvalidSettings("Flower is not installed: pip install 'lepton-ai[flower]'", "--flower")
        flower_url = f"http://127.0.0.1:{_port('127.0.0.1', options.flower_port, '--flower-port')}"
    return Setup(settings, broker_url, server, data, http_url, flower_url, plans, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lepton up", allow_abbrev=False)
    parser.add_argument("--broker", metavar="URL")
    parser.add_argument("--workers", metavar="DEVICE[:SLOTS],...")
    parser.add_argument("--fleet", type=Path, metavar="FILE")
    parser.add_argument("--flower", action="store_true")
    parser.add_argument("--flower-port", type=int, default=5555, metavar="PORT")
    parser.add_argument("--data", type=Path, metavar="DIR")
    parser.add_argument("--http-port", type=int, metavar="PORT")
    parser.add_argument("--log", choices=("console", "json"))
    return parser


def _default_data() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    return Path(state if state.startswith("/") else "~/.local/state") / "lepton"


def _home(data: Path) -> Path:
    return data / "broker"


@contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Keeps a second `lepton up` off the same data; the lock ends with this process."""
    with ExitStack() as held:
        try:
            data.mkdir(mode=0o700, parents=True, exist_ok=True)
            _take(held.enter_context((data / "up.lock").open("a+b", buffering=0)), data)
        except OSError as error:
            raise InvalidSettings(
                f"{data} cannot hold the data ({error.strerror}): choose another with --data"
            ) from error
        yield


def _take(lock: RawIOBase, data: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = (lock.read(32) or b"").decode().strip() or "unknown"
        raise InvalidSettings(
            f"another lepton up (pid {holder}) is using {data}: stop it, or choose another folder with --data"
        ) from None
    lock.truncate(0)
    lock.write(b"%d\n" % os.getpid())


def _check_broker(url: str) -> None:
    with contextlib.closing(Connection(url, "up")) as connection:
        try:
            connection.call("PING")
        except CommandError as error:
            raise BrokerUnavailable(f"the broker refuses us: {error.message}") from error


def _port(host: str, port: int, option: str) -> int:
    """The port where it can be listened on, a free one for 0."""
    try:
        if port == 0:
            return free_port(host)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return port
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidSettings(
            f"port {port} of {host} cannot be had ({reason}): choose another with {option}, 0 for any free one", option
        ) from error
