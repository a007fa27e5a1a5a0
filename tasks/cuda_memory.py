"""Memory of a CUDA device for one thread: blocks that are used again, and pinned host memory that copies go through.

Everything here belongs to one thread and its stream. A block that a launch may still read goes back to that thread
alone, whose next launch comes after it on the same stream; so nobody waits for a block to be free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lease", "Memory", "Staging", "size_class"]

#: CUDA aligns what it allocates to this many bytes, and so do we within pinned memory.
_ALIGNED = 256
#: Pinned host memory of a thread: while one segment is on its way the next is filled.
_SEGMENT_BYTES, _SEGMENTS = 4 * 2**20, 4


def size_class(size_bytes: int) -> int:
    """The size of the block for so many bytes: four sizes between a power of two and the next, so a fifth is lost."""
    size = max(size_bytes, _ALIGNED)
    step = max(1 << (size.bit_length() - 3), _ALIGNED)
    return -(-size // step) * step


class Lease:
    """A block in use. When nothing refers to it any more the block goes back to the thread that it came from."""

    __slots__ = ("_home", "block", "size_bytes")

    def __init__(self, block: Any, size_bytes: int, home: deque[tuple[int, Any]]) -> None:
        self.block = block
        self.size_bytes = size_bytes
        self._home = home

    def __del__(self) -> None:
        # The garbage collector may run this in any thread and amid anything: it takes no lock.
        self._home.append((self.size_bytes, self.block))


class Memory:
    """The blocks of one thread. `allocate` gives a new one of so many bytes."""

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self._allocate = allocate
        self._returned: deque[tuple[int, Any]] = deque()
        self._free: dict[int, list[Any]] = {}

    def take(self, size_bytes: int) -> Lease:
        """A block of at least so many bytes; what stands in it is whatever stood there before."""
        size = size_class(size_bytes)
        self._collect()
        with suppress(KeyError, IndexError):  # another thread may have given it up meanwhile
            return Lease(self._free[size].pop(), size, self._returned)
        return Lease(self._allocate(size), size, self._returned)

    def give_up(self) -> None:
        """Drops the blocks that are not in use. Any thread may ask, once the device has finished what it runs."""
        self._collect()
        for blocks in list(self._free.values()):
            blocks.clear()

    @property
    def kept_bytes(self) -> int:
        """The size of the blocks that are not in use."""
        self._collect()
        return sum(size * len(blocks) for size, blocks in self._free.items())

    def _collect(self) -> None:
        with suppress(IndexError):
            while True:
                size, block = self._returned.popleft()
                self._free.setdefault(size, []).append(block)


class Staging:
    """Copies between any host memory and the device, through pinned memory and in order of one stream.

    A device copies by itself only from pinned memory, and pinning an array costs more than copying it. Large arrays go
    in pieces, the next being copied into (or out of) a segment while the device moves the last.
    """

    def __init__(self, cuda: Any, stream: Any) -> None:
        from numba.cuda.cudadrv import driver

        self._cuda = cuda
        self._stream = stream
        self._to_device, self._to_host = driver.host_to_device, driver.device_to_host
        self._segments: list[NDArray[np.uint8]] = []
        self._events: list[Any] = []
        self._at, self._used = 0, _SEGMENT_BYTES

    def upload(self, source: NDArray[np.uint8], target: Any) -> None:
        """Bytes of the host to those of the device (which has as many). Returns once `source` may change."""
        start = 0
        while start < source.size:
            room = self._room(source.size - start)
            stop = start + room.size
            np.copyto(room, source[start:stop])
            self._to_device(_part(target, start, stop), room, room.size, stream=self._stream)
            start = stop

    def download(self, source: Any) -> NDArray[np.uint8]:
        """Bytes of the device as new memory of the host."""
        size = source.size
        found = np.empty(size, np.uint8)
        moving: deque[tuple[Any, NDArray[np.uint8], int]] = deque()
        start = 0
        while start < size or moving:
            if start < size and len(moving) < _SEGMENTS - 1:
                room = self._room(size - start)
                stop = start + room.size
                self._to_host(room, _part(source, start, stop), room.size, stream=self._stream)
                event = self._cuda.event()
                event.record(self._stream)
                moving.append((event, room, start))
                start = stop
            else:
                event, room, first = moving.popleft()
                event.synchronize()
                np.copyto(found[first : first + room.size], room)
        return found

    def _room(self, size_bytes: int) -> NDArray[np.uint8]:
        """Up to so many pinned bytes that nothing moves."""
        if self._used >= _SEGMENT_BYTES:
            self._advance()
        start = self._used
        stop = min(start + size_bytes, _SEGMENT_BYTES)
        self._used = -(-stop // _ALIGNED) * _ALIGNED
        return self._segments[self._at][start:stop]

    def _advance(self) -> None:
        """On to the next segment, once the device has moved what was last put there."""
        if self._segments:
            self._events[self._at].record(self._stream)
            self._at = (self._at + 1) % _SEGMENTS
        if self._at == len(self._segments):
            self._segments.append(self._cuda.pinned_array(_SEGMENT_BYTES, np.uint8))
            self._events.append(self._cuda.event())
        else:
            self._events[self._at].synchronize()
        self._used = 0


def _part(array: Any, start: int, stop: int) -> Any:
    return array if stop - start == array.size else array[start:stop]
