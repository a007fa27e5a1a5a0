"""Where compiled kernels are kept, and who compiles one at a time.

Numba keeps an index and a file for each function, and replaces each of them whole. But of two processes that write one
index the last wins, and both may have named their files alike: then an entry leads to the other's machine code. And it
writes the index first: a process that dies between the two leaves an entry that leads to whatever stood there before.
So each file of kernels is compiled under a lock (flock, which a death releases), and who finds that the last one died
there begins anew.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from tasks.driver import cache_folder

__all__ = ["Lock", "choose", "compiling", "lock_of", "private_folder"]

_VARIABLE: Final = "NUMBA_CACHE_DIR"
#: Whoever has compiled one kernel for longer than that is not waited for.
_PATIENCE_S: Final = 300.0
_LOOK_S: Final = 0.02
_MARK: Final = b"compiling"

log = structlog.get_logger()


def private_folder(*parts: str) -> Path:
    """A folder in the user's own cache, or where that cannot be written a temporary one that nobody else can write."""
    with suppress(OSError, RuntimeError):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        folder = home.joinpath(*parts)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return _temporary("-".join(parts))


def _of_our_own(name: str) -> Path:
    """A folder for compiled code in the user's cache, or a temporary one."""
    return cache_folder(name) or _temporary(name)


def _temporary(name: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"lepton-{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder if folder.lstat().st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix=f"lepton-{name}-"))


def choose(sources: Iterable[Path]) -> Path | None:
    """Sees to it that Numba can keep what it makes of these files; returns the folder, or None for beside each of them.

    What the operator has set stays. Numba reads the variable as it loads, and its own copy afterwards.
    """
    if given := os.environ.get(_VARIABLE):
        return Path(given)
    if all(_is_writable(folder) for folder in {source.parent / "__pycache__" for source in sources}):
        return None
    folder = _of_our_own("numba")
    os.environ[_VARIABLE] = str(folder)
    if (config := sys.modules.get("numba.core.config")) is not None:
        config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
    log.info("compile_cache", folder=str(folder), reason="a package's own __pycache__ cannot be written")
    return folder


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


class Lock:
    """Of one file of kernels and one kind of device, among all processes that share a cache."""

    def __init__(self, path: Path, source: Path | None = None) -> None:
        self._path = path
        self._source = source
        self._descriptor: int | None = None

    def take(self, *, wait: bool) -> bool:
        """Whether it is ours now. Where it cannot be made at all nobody is kept out, and the log says so."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.warning("compile_lock_missing", path=str(self._path), reason=str(error))
            return True
        until = time.monotonic() + (_PATIENCE_S if wait else 0.0)
        while not _is_locked(descriptor):
            if time.monotonic() >= until:
                os.close(descriptor)
                if wait:
                    log.warning("compile_lock_held", path=str(self._path), waited_s=_PATIENCE_S)
                return wait
            select.select([], [], [], _LOOK_S)  # time.sleep fails under a clock that somebody sets (libfaketime)
        self._descriptor = descriptor
        if os.pread(descriptor, len(_MARK), 0) == _MARK:
            self._begin_anew()
        os.pwrite(descriptor, _MARK, 0)
        return True

    def give(self) -> None:
        """It is free; what was compiled under it is whole."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _begin_anew(self) -> None:
        """Whoever had it last died before it was whole: its index is forgotten, and what that led to."""
        if self._source is None:
            return
        found = [*self._path.parent.rglob(f"{self._source.stem}.*.nbi")]
        for index in found:
            index.unlink(missing_ok=True)
        log.warning("compile_cache_forgotten", source=str(self._source), files=len(found))


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def lock_of(name: str, kind: str, source: Path | None) -> Lock:
    """The lock of a kernel's variant, in the folder where what is compiled of its file is kept.

    Kernels of one file have one lock: they may share functions, and with them an index.
    """
    given = os.environ.get(_VARIABLE)
    folder = Path(given) if given else source.parent / "__pycache__" if source is not None else None
    if folder is None or not _is_writable(folder):
        folder = _of_our_own("locks")
    return Lock(folder / f"lepton-{source.stem if source is not None else name}.{kind}.lock", source)


@contextmanager
def compiling(lock: Lock) -> Iterator[None]:
    """Nobody else compiles it meanwhile."""
    lock.take(wait=True)
    try:
        yield
    finally:
        lock.give()
