"""The guardian of an embedded broker: `python -m queues.guardian SERVER DURABILITY [DIRECTORY]`.

It owns server and directory, and starts the server again where it dies: on the same data, with the same address. It
holds the read end of a pipe from its parent, so whatever ends the parent, even SIGKILL, also ends the server and
removes a private directory; should the guardian itself be killed, the kernel ends the server (PR_SET_PDEATHSIG, Linux),
and the next guardian of a directory waits until it is gone: both of them hold the directory's lock. On its standard
output the guardian says what happens, a `Status` a line.

A server that must have each write on the disk before it answers (LEPTON_DURABILITY=fsync) ends where the disk is full:
it is started again as soon as there is room, however long that takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal, cast, get_args
from urllib.parse import urlsplit

import msgspec

from lepton_ai.errors import BrokerUnavailable, LeptonError
from queues.connection import CommandError, Connection
from queues.server import Durability, address, configure

__all__ = ["STOP_S", "Status", "command"]

#: How long a server may take to end.
STOP_S = 10.0
_START_S = 20.0
_PR_SET_PDEATHSIG = 1
#: Ends in a row without an answer between them, at which the guardian gives up.
_STARTS = 5
#: Pauses before a start grow where the server has run for less than so long, and while its disk is full.
_STEADY_S = 10.0
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
#: What a disk that was full must take.
_PROBE_BYTES = 1 << 20
#: What a server writes into its log before it ends because the disk takes no more (or nothing: the log is there too).
_DISK_REFUSES = re.compile("AOF write error|AOF for fsync error|No space left on device|Disk quota exceeded")
_LOG_TAIL_BYTES = 1 << 16


class Status(msgspec.Struct, frozen=True):
    """What a guardian says on its standard output: the server answers, or has ended.

    Then it is started again: at once, when the disk takes something again (waiting), or never (failed).
    """

    event: Literal["started", "ended", "waiting", "failed"]
    pid: int = 0
    """Of the server."""
    url: str = ""
    directory: str = ""
    code: int = 0
    """As subprocess has it: negative for a signal."""
    reason: str = ""

    @classmethod
    def read(cls, line: bytes) -> Status:
        """A line of its output; what is none counts as a failure with that reason."""
        try:
            return msgspec.json.decode(line, type=cls)
        except msgspec.DecodeError:
            return cls("failed", reason=line.decode("utf-8", "replace").strip())


def command(server: Path, durability: Durability, directory: Path | None) -> tuple[str, ...]:
    """The command line, after the interpreter, of a guardian; it ends once its standard input does.

    Without a directory it makes a private one and removes it at the end.
    """
    return ("-m", "queues.guardian", str(server), durability, *([str(directory)] if directory else []))


class _Guardian:
    """One server on one directory. Leaves by SystemExit as soon as the parent is gone."""

    def __init__(self, server: str, durability: Durability, home: Path) -> None:
        self._server = server
        self._durability = durability
        self._home = home
        self._log = home / "broker.log"
        self._log_at = 0
        """Where in the log the running server began."""
        self._lock = -1
        self._socket: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._said = os.dup(1)
        os.set_blocking(self._said, False)  # a parent that does not listen must not hold us up
        # What cuts a wait short: the end of the pipe from the parent, and the end of the server.
        self._ended, wakeup = os.pipe()
        os.set_blocking(self._ended, False)
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Keeps a server running; raises BrokerUnavailable where it does not start, at first or several times in a row.

        One that answers and is killed, however often, is started again, after longer and longer pauses.
        """
        self._take_lock()
        url = address(self._home)
        config = configure(self._home, url, self._durability)
        ends = 0
        self._start(config, url)
        while True:
            began = time.monotonic()
            code = self._await_end()
            ends = 1 if time.monotonic() - began >= _STEADY_S else ends + 1
            failures = 1
            while True:
                reason = f"{_ending(code)}: {self._last_line()}"
                refused = self._disk_refuses(code)
                if not refused and failures >= _STARTS:
                    raise BrokerUnavailable(f"{self._server} ended {failures} times in a row; {reason}")
                self._say(Status("ended", code=code, reason=reason))
                pause_s = min(_LONGEST_PAUSE_S, _PAUSE_S * 2.0 ** min(ends - 2, 16)) if ends > 1 else 0.0
                if refused:
                    self._say(Status("waiting", reason=refused))
                    self._await_room(max(_PAUSE_S, pause_s))
                    failures = 0
                else:
                    self._rest(pause_s)
                try:
                    self._start(config, url)
                    break
                except BrokerUnavailable:
                    code = self._stop()
                    failures += 1
                    ends += 1

    def close(self) -> None:
        """Ends the server, giving it the time to write what it has."""
        self._stop()
        if self._socket is not None and self._socket.parent != self._home.resolve():
            shutil.rmtree(self._socket.parent, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)

    def fail(self, reason: str) -> None:
        self._say(Status("failed", reason=reason))

    def _start(self, config: Path, url: str) -> None:
        self._socket = Path(urlsplit(url).path)
        self._socket.unlink(missing_ok=True)  # of a server that was killed
        self._log_at = self._log.stat().st_size if self._log.exists() else 0
        self._process = subprocess.Popen(
            [self._server, str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(self._lock,),  # as long as it lives, nobody else starts one here
            preexec_fn=_die_with_parent(),  # noqa: PLW1509 - one thread here, and it only calls prctl
        )
        deadline = time.monotonic() + _START_S
        while True:
            if (code := self._process.poll()) is not None:
                raise BrokerUnavailable(f"{_ending(code)}: {self._last_line()}")
            try:
                with contextlib.closing(Connection(url, "guardian")) as connection:
                    connection.call("PING")
                break
            except CommandError as error:  # it reads what the last run left, which takes as long as it takes
                if not error.message.startswith("LOADING"):
                    raise
                self._rest(0.05)
            except BrokerUnavailable as error:
                if "LOADING" not in error.message and time.monotonic() > deadline:
                    raise
                self._rest(0.01)
        self._say(Status("started", self._process.pid, url, str(self._home)))

    def _await_end(self) -> int:
        assert self._process is not None
        while (code := self._process.poll()) is None:
            self._rest(None)
        return code

    def _disk_refuses(self, code: int) -> str:
        """Why a server that ended so could not go on writing; empty where the disk is not to blame."""
        if code < 0:  # killed
            return ""
        refused = self._probe()
        if not refused and not _DISK_REFUSES.search(self._logged()):
            return ""
        free = shutil.disk_usage(self._home).free >> 20
        return f"the disk of {self._home} takes no more ({refused or self._last_line()}; {free} MiB are free)"

    def _await_room(self, pause_s: float) -> None:
        """Returns once the disk takes something, after `pause_s` at least: what was refused may be larger."""
        while True:
            self._rest(pause_s)
            if not self._probe():
                return
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    def _probe(self) -> str:
        """Why the disk takes nothing now; empty where it does."""
        path = self._home / "broker.probe"
        try:
            with path.open("wb") as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            return error.strerror or str(error)
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        return ""

    def _logged(self) -> str:
        """What the server has written into its log since its start, or the end of that."""
        if not self._log.exists():
            return ""
        with self._log.open("rb") as file:
            file.seek(max(self._log_at, self._log.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode("utf-8", "replace")

    def _last_line(self) -> str:
        return (self._logged().splitlines() or ["nothing in its log"])[-1]

    def _rest(self, seconds: float | None) -> None:
        """Waits, at the longest until the server ends; leaves where the parent is gone."""
        readable, _, _ = select.select([0, self._ended], [], [], seconds)
        if self._ended in readable:
            os.read(self._ended, 4096)
        if 0 in readable and not os.read(0, 4096):
            raise SystemExit(0)

    def _stop(self) -> int:
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _take_lock(self) -> None:
        """Holds the directory for this guardian and its server; waits for those of a parent that was just killed."""
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._home / "broker.lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + STOP_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() or "?"
                    raise BrokerUnavailable(
                        f"another broker (its guardian has pid {holder}) still uses {self._home}"
                    ) from None
                self._rest(0.02)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _say(self, status: Status) -> None:
        with contextlib.suppress(OSError):  # the parent may be what is gone
            os.write(self._said, msgspec.json.encode(status) + b"\n")


def _guard(server: str, durability: str, directory: str | None) -> int:
    assert durability in get_args(Durability)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the pipe
    home = Path(directory or tempfile.mkdtemp(prefix="lepton-")).absolute()
    guard = _Guardian(server, cast(Durability, durability), home)
    try:
        guard.serve()
    except SystemExit:
        return 0  # SIGTERM, or the end of the pipe
    except (LeptonError, OSError) as error:
        guard.fail(str(error).replace("\n", " "))
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        guard.close()
        if directory is None:
            shutil.rmtree(home, ignore_errors=True)
    return 0


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # most of the real-time signals have no name
        return f"killed by signal {-code}"


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _die_with_parent() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def leash() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before the line above
            os._exit(1)

    return leash


if __name__ == "__main__":
    raise SystemExit(_guard(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None))
