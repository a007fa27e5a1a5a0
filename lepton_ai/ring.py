"""The ring: arrays of open jobs in memory that a producer and the workers on its host share. One copy in, none out.

The memory is a few files in /dev/shm, the segments, each made and locked by one producer and mapped by whoever reads
from it. A slot begins with a header of 64 bytes, and is used again once its job has ended; then its generation is
another one, so a reader can tell. It is volatile: a reboot or a cleared /dev/shm takes it away (decision 13).
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import re
import stat
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lepton_ai import tensor
from lepton_ai.blob import InRing, Reference, array_of, layout, place_of
from lepton_ai.errors import BlobLost, InvalidArguments

__all__ = ["FOLDER", "Ring", "RingReader", "memory", "sweep"]

FOLDER: Final = Path("/dev/shm")  # noqa: S108 - files there are made anew, 0600, and looked at before they are trusted
#: How long the segment of a producer that is gone is kept for the jobs that it left open.
ORPHANED_S: Final = 3600
#: When the bytes of a job that nobody has seen end are given up, where there is no room for others.
GIVEN_UP_S: Final = 86_400.0
#: A segment's name says nothing, so nobody can guess one.
_SEGMENT: Final = re.compile(r"lepton-([0-9a-f]{32})", re.ASCII)
#: The dtypes that cross the wire as they are: looked up by themselves, whose names are slow to tell.
_WIRE: Final = {dtype: dtype for dtype in tensor.DTYPES.values()}
_LEAST_SEGMENT: Final = 16 * 1024 * 1024
_PAGE: Final = 4096
_HUGE_PAGE: Final = 2 * 1024 * 1024
#: Words of 8 bytes at the start of a slot: a mark, its generation, and how many bytes follow the header.
_HEADER: Final = 64
_MARK: Final = int.from_bytes(b"lepton1\n", "little")
#: Segments that a reader keeps mapped.
_MOST_MAPPED: Final = 64
#: How often a producer says that its segment is still written to.
_TOUCH_S: Final = 60.0


def memory(folder: Path = FOLDER) -> str | None:
    """The name of the memory that this process shares with others; None where it shares none.

    Two processes that find the same name can map each other's segments: it is made of the boot and of a file in the
    folder that the first process of this user there makes, so other hosts, containers with a /dev/shm of their own and
    other users have another one.
    """
    path = folder / f"lepton-memory-{os.geteuid()}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not _is_own(found):
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        boot = ""
    told = f"{boot} {found.st_dev} {found.st_ino} {found.st_mtime_ns} {found.st_uid}"
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def sweep(folder: Path = FOLDER) -> int:
    """Removes the segments whose producers have been gone for ORPHANED_S; returns how many. Anybody may call it.

    A producer that is alive holds a lock on each of its segments, whatever namespace its process id is of.
    """
    removed = 0
    with suppress(OSError):
        for path in folder.iterdir():
            if _SEGMENT.fullmatch(path.name):
                with suppress(OSError):  # somebody else's, or somebody else was quicker
                    removed += _remove_orphan(path)
    return removed


def _remove_orphan(path: Path) -> bool:
    found = path.lstat()
    if not _is_own(found) or time.time() - found.st_mtime < ORPHANED_S:
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)
    return True


def _is_own(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o077 == 0


def _slot_bytes(size_bytes: int) -> int:
    """What an array takes with its header: whole pages."""
    return -(-(_HEADER + size_bytes) // _PAGE) * _PAGE


class _Slot(NamedTuple):
    segment: _Segment
    offset: int
    size: int
    """With its header."""
    generation: int


class _Segment:
    """One file: its mapping, and which parts of it are free. Used under the ring's lock."""

    def __init__(self, folder: Path, size: int) -> None:
        self.name = os.urandom(16).hex()
        self.path = folder / f"lepton-{self.name}"
        self.size = size
        self.free = [(0, size)]
        """Offset and size of each free part, in their order; no two touch."""
        self._generation = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
            # All of it now: a hole would be found missing, as a signal that ends the process, where the memory is full.
            os.posix_fallocate(self.descriptor, 0, size)
            self.map = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        except BaseException:
            self.remove()
            raise
        self._words = memoryview(self.map).cast("Q")
        self._touched = time.monotonic()

    def take(self, size: int) -> _Slot | None:
        """The first free part that is large enough: the lowest, so that the same pages are used over and over."""
        now = time.monotonic()
        if now - self._touched > _TOUCH_S:
            self._touched = now
            os.utime(self.descriptor)
        for at, (offset, room) in enumerate(self.free):
            if room >= size:
                self.free[at : at + 1] = [(offset + size, room - size)] if room > size else []
                self._generation += 1
                return _Slot(self, offset, size, self._generation)
        return None

    @property
    def is_there(self) -> bool:
        """Whether others can still find it: where its user logs out, systemd empties /dev/shm."""
        return os.fstat(self.descriptor).st_nlink > 0

    def give_back(self, slot: _Slot) -> None:
        self._words[slot.offset // 8 + 1] = 0  # before anything else can be written there
        at = next((at for at, (offset, _) in enumerate(self.free) if offset > slot.offset), len(self.free))
        offset, size = slot.offset, slot.size
        if at < len(self.free) and self.free[at][0] == offset + size:
            size += self.free.pop(at)[1]
        if at and sum(self.free[at - 1]) == offset:
            offset, before = self.free.pop(at - 1)
            size, at = before + size, at - 1
        self.free.insert(at, (offset, size))

    def publish(self, slot: _Slot, size_bytes: int) -> None:
        """Says that a slot is written: its generation last."""
        at = slot.offset // 8
        self._words[at], self._words[at + 2] = _MARK, size_bytes
        self._words[at + 1] = slot.generation

    def leave(self) -> None:
        """Gives the segment up: at once where no job needs it, else it is there for them for a while."""
        if self.free == [(0, self.size)]:
            self.remove()
            return
        with suppress(OSError):
            os.utime(self.descriptor)
        os.close(self.descriptor)

    def remove(self) -> None:
        with suppress(FileNotFoundError):
            self.path.unlink()
        os.close(self.descriptor)


class Ring:
    """The arrays of one producer's open jobs. Safe for several threads; a forked child has no part in it.

    Nothing is made before the first `put`. It takes at most `most_bytes`, and never more than half of the folder's
    memory, whoever has the rest.
    """

    def __init__(self, most_bytes: int, folder: Path = FOLDER) -> None:
        self.memory = memory(folder) if most_bytes else None
        self._most_bytes = most_bytes
        self._folder = folder
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._segments: list[_Segment] = []
        self._open: dict[str, list[_Slot]] = {}
        self._since: dict[str, float] = {}
        self._leave = weakref.finalize(self, _leave, self._segments, self._pid)

    def put(self, array: NDArray[Any], job: str) -> Reference | None:
        """Copies an array in, for a job that is to be published. None where there is no room; it never waits for any.

        InvalidArguments where its dtype cannot be sent.
        """
        if self.memory is None or os.getpid() != self._pid or not array.nbytes:
            return None
        dtype = _WIRE.get(array.dtype) or tensor.DTYPES.get(array.dtype.name)
        if dtype is None:
            raise InvalidArguments(f"dtype {array.dtype} cannot be sent; use one of {', '.join(tensor.DTYPES)}")
        size = _slot_bytes(array.nbytes)
        with self._lock:
            slot = self._take(size)
            if slot is None:
                return None
            self._open.setdefault(job, []).append(slot)
            self._since.setdefault(job, time.monotonic())
        segment = slot.segment
        np.copyto(np.ndarray(array.shape, dtype, segment.map, slot.offset + _HEADER), array)
        segment.publish(slot, array.nbytes)
        place = f"ring:{self.memory}:{segment.name}:{slot.offset}:{slot.generation}"
        return Reference(dtype.str, tuple(array.shape), place)

    def has_room(self, sizes_bytes: Iterable[int]) -> bool:
        """Whether arrays of these sizes would find room now. Where none ever do, nobody need wait: so yes."""
        if self.memory is None or os.getpid() != self._pid:
            return True
        with self._lock:
            rooms = [room for segment in self._segments for _, room in segment.free]
            for size in map(_slot_bytes, sizes_bytes):
                at = next((at for at, room in enumerate(rooms) if room >= size), None)
                if at is None:
                    return self._growth(size) >= size or not self._open
                rooms[at] -= size
            return True

    def free(self, job: str) -> None:
        """Takes back what a job's arrays took: it has ended, or it was never published."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._free(job)

    @property
    def jobs(self) -> list[str]:
        """Whose arrays are in it, the oldest first."""
        if os.getpid() != self._pid:
            return []
        with self._lock:
            return list(self._since)

    def close(self) -> None:
        """Gives the memory up. What open jobs need of it stays for ORPHANED_S, then anybody's `sweep` removes it."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self.memory = None
            self._open.clear()
            self._since.clear()
            self._leave()
            self._segments.clear()

    def _take(self, size: int) -> _Slot | None:
        if self.memory is None:  # closed meanwhile
            return None
        if (slot := self._find(size)) is not None:
            return slot
        if (segment := self._grow(size)) is not None:
            return segment.take(size)
        given_up = time.monotonic() - GIVEN_UP_S
        while self._since and (job := next(iter(self._since))) and self._since[job] < given_up:
            self._free(job)
        return self._find(size)

    def _find(self, size: int) -> _Slot | None:
        for segment in list(self._segments):
            if not segment.is_there:
                self._segments.remove(segment)
                segment.remove()
            elif (slot := segment.take(size)) is not None:
                return slot
        return None

    def _grow(self, size: int) -> _Segment | None:
        wanted = self._growth(size)
        if wanted < size:
            return None
        sweep(self._folder)
        try:
            segment = _Segment(self._folder, wanted)
        except OSError:  # full, or not ours to write to
            return None
        self._segments.append(segment)
        return segment

    def _growth(self, size: int) -> int:
        """How large the next segment may be, where it is for a slot of this size; 0 where there may be none."""
        taken = sum(segment.size for segment in self._segments)
        wanted = max(_LEAST_SEGMENT, taken, -(-size // _HUGE_PAGE) * _HUGE_PAGE)
        wanted = min(wanted, (self._most_bytes - taken) // _PAGE * _PAGE)
        try:
            space = os.statvfs(self._folder)
        except OSError:
            return 0
        return wanted if (space.f_bavail - space.f_blocks / 2) * space.f_frsize >= wanted else 0

    def _free(self, job: str) -> None:
        self._since.pop(job, None)
        for slot in self._open.pop(job, ()):
            slot.segment.give_back(slot)


def _leave(segments: list[_Segment], pid: int) -> None:
    if os.getpid() == pid:
        for segment in segments:
            segment.leave()


class _Mapped(NamedTuple):
    bytes: memoryview
    words: memoryview
    """The same, as words of 8 bytes."""


class RingReader:
    """Where a worker finds the arrays of its host's producers. Safe for several threads."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.memory = memory(folder)
        self._folder = folder
        self._lock = threading.Lock()
        self._mapped: dict[str, _Mapped] = {}

    def get(self, reference: Reference, limit_bytes: int, field: str | None = None) -> NDArray[Any]:
        """The array of a reference: a read-only view of the shared memory. `check` it once it has been used.

        Raises BlobLost where its bytes are not there (any more), InvalidArguments and TooLarge where the reference
        itself is wrong.
        """
        place = place_of(reference, field)
        if not isinstance(place, InRing):
            raise InvalidArguments(f"{reference.blob!r} is not in shared memory", field)
        dtype, size_bytes = layout(reference, limit_bytes, field)
        if place.memory != self.memory:
            raise BlobLost(f"{reference.blob} is in memory of another host, boot or user than this worker's", field)
        mapped = self._map(place.segment, reference, field)
        start = place.offset + _HEADER
        if place.offset % _PAGE or start + size_bytes > len(mapped.bytes):
            raise InvalidArguments(f"{reference.blob} is no slot of {size_bytes} bytes", field)
        mark, generation, found = mapped.words[place.offset // 8 : place.offset // 8 + 3]
        if mark != _MARK or generation != place.generation:
            raise BlobLost(f"{reference.blob} has been given up by its producer, and its memory is another's", field)
        if found != size_bytes:
            raise InvalidArguments(f"{reference.blob} has {found} bytes, {size_bytes} are said", field)
        return array_of(reference, dtype, mapped.bytes[start : start + size_bytes])

    def check(self, reference: Reference, field: str | None = None) -> None:
        """Raises BlobLost where the bytes that `get` showed may be others by now: what was made of them is void."""
        self.get(reference, tensor.MOST, field)

    def sweep(self) -> None:
        """Lets go of segments that have been removed, or their memory would stay taken."""
        with self._lock:
            self._let_go()

    def _map(self, name: str, reference: Reference, field: str | None) -> _Mapped:
        with self._lock:
            mapped = self._mapped.get(name)
            if mapped is None:
                self._let_go()
                try:
                    mapped = self._mapped[name] = _open(self._folder / f"lepton-{name}")
                except (OSError, ValueError) as error:
                    raise BlobLost(f"{reference.blob} is gone: {error}", field) from None
            return mapped

    def _let_go(self) -> None:
        """A view of an array keeps what it needs; a segment that is wanted again is mapped again."""
        names = list(self._mapped)
        crowd = names[: max(0, len(names) - _MOST_MAPPED + 1)]
        for name in names:
            if name in crowd or not (self._folder / f"lepton-{name}").exists():
                del self._mapped[name]


def _open(path: Path) -> _Mapped:
    """A segment, mapped for reading. OSError or ValueError where it is none of this user's."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not _is_own(os.fstat(descriptor)):
            raise ValueError("it is another user's")
        data = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        return _Mapped(data, data.cast("Q"))
    finally:
        os.close(descriptor)
