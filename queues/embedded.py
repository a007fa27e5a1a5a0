"""The broker that comes along: a private Valkey for one machine, which ends with the process that started it.

A guardian (queues/guardian.py), a process of its own, keeps the server; it sees to the end however we end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from lepton_ai.errors import NoBroker
from lepton_ai.settings import Settings
from queues import guardian
from queues.guardian import Status
from queues.server import find_server

__all__ = ["EmbeddedBroker"]


class EmbeddedBroker:
    """A running embedded broker; use it in a `with`. `url` is its `unix://` address, password and all.

    With a `directory` its data stay there between runs, and so does its address; without one everything is removed at
    the end.
    """

    def __init__(self, settings: Settings, directory: Path | None = None) -> None:
        server = find_server(settings)
        self._private: Path | None = None
        self._guardian = subprocess.Popen(
            # -P: not a `queues.py` of the folder we are in
            [sys.executable, "-P", *guardian.command(server, settings.durability, directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=_environ(),
        )
        assert self._guardian.stdout is not None
        try:
            line = self._guardian.stdout.readline()
        except BaseException:  # Ctrl-C while it starts: the guardian cleans up, and we wait for it
            self.close()
            raise
        answer = Status.read(line)
        if answer.event != "started":
            self.close()
            raise NoBroker(f"{server} did not start: {answer.reason or 'see the lines above'}")
        self.url = answer.url
        self.directory = Path(answer.directory)
        """Private to this user (0700); goes with the broker unless it was given."""
        if directory is None:
            self._private = self.directory

    def close(self) -> None:
        """Stops the server and, where it was a private one, removes its directory."""
        assert self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guardian.stdin.close()
        try:
            self._guardian.wait(guardian.STOP_S + 5)
        except subprocess.TimeoutExpired:
            self._guardian.kill()
            self._guardian.wait()
        if self._guardian.stdout is not None:
            self._guardian.stdout.close()
        if self._private is not None:  # the guardian did it, unless it was killed
            shutil.rmtree(self._private, ignore_errors=True)

    def __enter__(self) -> EmbeddedBroker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _environ() -> dict[str, str]:
    """The guardian finds `queues` where this process found it."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
