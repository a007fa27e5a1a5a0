"""Parcels: messages whose large arrays are blobs, and where one client has them. Without any I/O on the broker.

An array goes into the ring where every live worker that may run its job shares that memory, and to the broker where not
(decision 13). What is in the ring is free again once its job has ended.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_ai import blob, topology
from lepton_ai.blob import Command, InStore, Reference
from lepton_ai.bundle import Row
from lepton_ai.device import Announcement
from lepton_ai.errors import InvalidArguments
from lepton_ai.job import Meta
from lepton_ai.ring import Ring
from lepton_ai.tensor import TensorMap
from lepton_ai.wire import Template

__all__ = ["Blobs", "Message", "Parcel", "has_blobs", "pack", "shared"]

#: How long it is known who shares our memory, and how long it is left alone whose arrays fill the ring.
_KNOWN_S: Final = 5.0
_ASKED_EVERY_S: Final = 1.0
_ASKED_AT_ONCE: Final = 256
#: An array in the ring is there already: of those, so many times the bytes of messages are published at once (16 MiB).
_LIGHTER: Final = 100
#: Where in a result its state is looked for; one that only a Celery worker has revoked goes on.
_STATE: Final = re.compile(rb"status[^A-Z]*([A-Z]+)")
_STATE_WITHIN: Final = 200
_ENDED: Final = frozenset({b"SUCCESS", b"FAILURE"})


class Parcel(msgspec.Struct, frozen=True, eq=False):
    """A message whose large arrays are blobs, and what has to be written before it is published."""

    message: bytes
    writes: Sequence[Command]
    names: Sequence[str]
    """The keys that these make."""
    size: int

    def __len__(self) -> int:
        """What it counts for on the way, in bytes."""
        return self.size


#: As it is on a list, a parcel with it, or a job that may share its message with others.
Message = bytes | Parcel | Row


def has_blobs(message: Message) -> bool:
    """Whether arrays of its job have left it."""
    return isinstance(message, Parcel) or (isinstance(message, Row) and bool(message.places))


class Blobs:
    """The blobs of one client's jobs. Safe for several threads."""

    def __init__(self, ring_bytes: int) -> None:
        self._ring_bytes = ring_bytes
        self._ring: Ring | None = None
        self._lock = threading.Lock()
        self._announcements: Sequence[Announcement] = ()
        self._shared: dict[tuple[str, str | None], bool] = {}
        self._learned_at = self._asked_at = float("-inf")
        self._last_job = ""
        self._last_bytes: list[int] = []
        """What the arrays of the last job took that were to go into the ring."""

    def is_stale(self, within_s: float = 0.0) -> bool:
        """Whether it is not known, or will not be soon, who shares our memory: nothing goes into the ring then."""
        return self._opened().memory is not None and time.monotonic() > self._learned_at + _KNOWN_S - within_s

    def learn(self, announcements: Sequence[Announcement]) -> None:
        """Who is alive now."""
        self._announcements, self._shared, self._learned_at = announcements, {}, time.monotonic()

    @property
    def full(self) -> bool:
        """Whether the ring has no room for one more job such as the last whose arrays were to go into it."""
        return self._ring is not None and bool(self._last_bytes) and not self._ring.has_room(self._last_bytes)

    def doubtful(self) -> list[Command]:
        """What asks the broker how it is with those who have had a full ring for longest; nothing twice in a second."""
        now = time.monotonic()
        if not self.full or now < self._asked_at + _ASKED_EVERY_S:
            return []
        self._asked_at = now
        jobs = self._opened().jobs[:_ASKED_AT_ONCE]
        return [("GETRANGE", topology.result(job), 0, _STATE_WITHIN) for job in jobs]

    def answered(self, commands: Sequence[Command], answers: Iterable[bytes]) -> None:
        """The answers to `doubtful`."""
        for command, start in zip(commands, answers, strict=True):
            found = _STATE.search(start)
            if found is not None and found[1] in _ENDED:
                self.free(str(command[1]).removeprefix(topology.result("")))

    def free(self, job: str) -> None:
        """A job has ended, or was never published."""
        if self._ring is not None:
            self._ring.free(job)

    def settle(self, metas: Iterable[Meta]) -> None:
        """These jobs have ended."""
        if self._ring is not None:
            for meta in metas:
                self._ring.free(meta.task_id)

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()

    def put(self, array: NDArray[Any], job: str, kernel: str, device: str | None) -> Reference | None:
        """An array in the ring; None where it cannot go there."""
        ring = self._opened()
        if self.is_stale() or not self._is_shared(kernel, device, ring.memory):
            self._last_bytes = []
            return None
        if job != self._last_job:
            self._last_job, self._last_bytes = job, []
        self._last_bytes = [*self._last_bytes, array.nbytes]
        return ring.put(array, job)

    def _is_shared(self, kernel: str, device: str | None, memory: str | None) -> bool:
        known = self._shared.get((kernel, device))
        if known is None:
            known = self._shared[kernel, device] = shared(self._announcements, kernel, device, memory)
        return known

    def _opened(self) -> Ring:
        if self._ring is None:
            with self._lock:
                if self._ring is None:
                    self._ring = Ring(self._ring_bytes)
        return self._ring


def shared(announcements: Iterable[Announcement], kernel: str, device: str | None, memory: str | None) -> bool:
    """Whether some worker may run a job of this kernel, pinned to this device, and all that may share this memory."""
    memories = [
        each.memory
        for each in announcements
        if device in (None, each.device, each.kind) and any(spec.name == kernel for spec in each.kernels)
    ]
    return memory is not None and bool(memories) and all(each == memory for each in memories)


def pack(
    template: Template,
    job: str,
    row: Mapping[str, Any],
    times: Mapping[str, Any],
    blobs: Blobs,
    ring: tuple[str, str | None] | None,
    *,
    may_share: bool = False,
) -> Parcel | Row:
    """The parcel of a row with arrays that leave its message. `ring` is the kernel and device where the ring will do.

    A Row where none of them goes to the broker and it `may_share` its message. What does is copied first: its caller
    may write to the array as soon as it has been taken.
    """
    values = dict(row)
    places: list[str] = []
    writes: list[Command] = []
    size = 0
    try:
        for name, value in row.items():
            if isinstance(value, Reference):
                values[name] = _stored(value, name)
                places.append(value.blob)
                continue
            if not isinstance(value, np.ndarray) or not blob.is_worth(value):
                continue
            reference = None if ring is None else blobs.put(value, job, *ring)
            if reference is None:
                reference, commands = blob.write_commands(np.array(value, order="C"), job)
                writes += commands
                size += value.nbytes
            else:
                size += value.nbytes // _LIGHTER
            places.append(reference.blob)
            values[name] = TensorMap(reference.dtype, list(reference.shape), blob=reference.blob)
        blob.check_places(places)
        if may_share and not writes:
            return Row(job, *template.row(values), template, tuple(places), size)
        message = template.envelope(job, values, blobs=places, **times)
    except BaseException:
        blobs.free(job)
        raise
    return Parcel(message, writes, blob.keys(job, places) if writes else (), len(message) + size)


def _stored(reference: Reference, name: str) -> TensorMap:
    """An array on a store, as it crosses the wire; the other places are those of one job, and no caller names them."""
    if not isinstance(blob.place_of(reference, name), InStore):
        raise InvalidArguments(f"{reference.blob!r} is not on a store", name)
    return TensorMap(reference.dtype, list(reference.shape), blob=reference.blob)
