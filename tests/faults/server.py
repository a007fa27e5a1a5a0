"""The broker of a play: a Valkey of its own on a port of this machine, killed and started again on the same data."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from lepton_ai.errors import BrokerUnavailable
from lepton_ai.settings import Settings
from pipeline.supervisor import free_port
from queues.connection import Connection
from queues.embedded import find_server
from tests.faults.actors import Actor, Stage

__all__ = ["Server"]

_START_S = 20.0
#: As the embedded broker is configured, but on a port, so that a proxy can stand before it.
_OPTIONS = {
    "bind": "127.0.0.1",
    "save": "",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "auto-aof-rewrite-min-size": "256mb",
    "maxmemory-policy": "noeviction",
    "client-output-buffer-limit": "pubsub 256mb 64mb 60",
}


class Server:
    """The server's process, and connections to it that no proxy sees."""

    def __init__(self, stage: Stage, folder: Path, options: dict[str, str], *, file_bytes: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.folder = folder
        settings = {**_OPTIONS, "port": str(self.port), "dir": str(folder), **options}
        config = stage.folder / "broker.conf"
        config.write_text("".join(name + " " + (value or '""') + "\n" for name, value in settings.items()))
        program = str(find_server(Settings()))
        self.actor: Actor = stage.cast("broker", [program, str(config)], {}, file_bytes=file_bytes)

    def start(self) -> float:
        """Returns once it answers, and how many seconds that took."""
        began = time.monotonic()
        self.actor.start()
        self.actor.wanted = False  # the play alone starts it again: a supervisor would hide that it had to
        while True:
            with contextlib.suppress(BrokerUnavailable), contextlib.closing(self.connect()):
                return time.monotonic() - began
            if self.actor.ended is not None or time.monotonic() - began > _START_S:
                raise BrokerUnavailable(f"the broker does not come up: {self.actor.said[-500:]}")
            time.sleep(0.01)

    def connect(self) -> Connection:
        """A connection of the harness's own."""
        return Connection(self.url, "harness")

    def set(self, name: str, value: str) -> None:
        """Changes one of its settings while it runs."""
        with contextlib.closing(self.connect()) as connection:
            connection.call("CONFIG", "SET", name, value)
