"""The processes of a play, by name: real ones, each started, killed, frozen, thawed, ended and started again.

All are started by one thread, the one that made the stage. Each is killed by the kernel when that thread ends, however
it ends (PR_SET_PDEATHSIG), and the stage kills whoever is left when it closes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Actor", "Stage"]

_END_S = 20.0
#: Asks to be killed with its parent, takes a limit for its files, and becomes the program.
_LEASH = """
import ctypes, os, resource, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
if int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
os.execv(sys.argv[3], sys.argv[3:])
"""


class Actor:
    """One process of a play. What it says is in its `log`."""

    def __init__(
        self, name: str, command: Sequence[str], environ: Mapping[str, str], log: Path, *, file_bytes: int = 0
    ) -> None:
        self.name = name
        self.log = log
        self.started_at = 0.0
        """Seconds since the epoch, of the last start."""
        self.wanted = False
        """It is to run: who ends by itself meanwhile is started again by its supervisor."""
        self._command = list(command)
        self._environ = dict(environ)
        self._file_bytes = file_bytes
        self._spoken = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """Its exit code, as subprocess has it; None while it runs, and before it has been started."""
        return None if self._process is None else self._process.poll()

    @property
    def said(self) -> str:
        """Everything that it has said, over all of its lives."""
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    @property
    def said_now(self) -> str:
        """What it has said since its last start."""
        return self.log.read_bytes()[self._spoken :].decode("utf-8", "replace") if self.log.exists() else ""

    def start(self) -> None:
        self.wanted = True
        self.started_at = time.time()
        self._spoken = self.log.stat().st_size if self.log.exists() else 0
        leash = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), str(self._file_bytes)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*leash, *self._command],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its children go with it, and Ctrl-C is ours
            )

    def signal(self, number: signal.Signals) -> None:
        """To it and its children. From any thread."""
        if self._process is not None and self._process.returncode is None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and it is gone when this returns."""
        self.wanted = False
        self.signal(signal.SIGKILL)
        self.wait()

    def die(self) -> None:
        """SIGKILL from another thread, such as a trap's: whoever plays sees it end, and starts it again."""
        self.wanted = False
        self.signal(signal.SIGKILL)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        """SIGTERM: it finishes what it does."""
        self.wanted = False
        self.signal(signal.SIGTERM)

    def wait(self, limit_s: float = _END_S) -> int:
        """Its exit code, once it is gone; it is killed where it takes too long."""
        assert self._process is not None
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            return self._process.wait()


class Stage:
    """All actors of a play. Use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.actors: dict[str, Actor] = {}
        self.exits: list[tuple[str, int]] = []
        """Who has ended without being told to, and how."""

    def cast(self, name: str, command: Sequence[str], environ: Mapping[str, str], *, file_bytes: int = 0) -> Actor:
        """A new actor, not started yet."""
        actor = Actor(name, command, environ, self.folder / f"{name}.log", file_bytes=file_bytes)
        self.actors[name] = actor
        return actor

    def supervise(self) -> None:
        """Starts whoever has ended by itself again, as `lepton up` would."""
        for actor in self.actors.values():
            if actor.wanted and (code := actor.ended) is not None:
                self.exits.append((actor.name, code))
                actor.start()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self.actors.values():
            actor.die()
        for actor in self.actors.values():
            if actor.started_at:
                actor.wait()
