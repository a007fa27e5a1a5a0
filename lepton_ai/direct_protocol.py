"""What is said to the broker and read from it, without doing either: both clients' way straight there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Container, Iterable, Sequence
from typing import Any, Final

import msgspec

from lepton_ai import topology, wire
from lepton_ai.errors import LeptonError
from lepton_ai.identity import minute_of
from lepton_ai.job import FINAL_STATES, Meta, Options, Placement

__all__ = [
    "CONNECTION",
    "FIRST_LOOK_S",
    "LAST_LOOK_S",
    "LOOK_EVERY_S",
    "PIPELINE_BYTES",
    "POP_AT_ONCE",
    "Lookout",
    "answered_to",
    "look_commands",
    "read_final",
    "read_finals",
    "read_look",
    "read_replies",
]

#: How each connection is made. (redis-py 8 would wait 5 s for an answer, which is less than our blocking commands do.)
CONNECTION: Final[dict[str, Any]] = {"socket_timeout": 30, "socket_connect_timeout": 5, "health_check_interval": 30}
PIPELINE_BYTES: Final = 4 * 1024 * 1024
POP_AT_ONCE: Final = 256
#: A result may reach its key and not the reply list (which expires when nobody pops it), so the key is looked at too.
LOOK_EVERY_S: Final = 1.0
#: A job that another client submitted does not reach our reply list: its key is looked at, at growing intervals.
FIRST_LOOK_S: Final = 0.002
LAST_LOOK_S: Final = 0.1
#: How many minutes of placements back a foreign id (one that carries no minute) is looked for.
_MINUTES_BACK: Final = 60
_PLACEMENT = msgspec.msgpack.Decoder(Placement)


def answered_to(options: Options, reply_to: str) -> Options:
    """The options of a job whose result comes to a reply list, with arrays as arrays."""
    return msgspec.structs.replace(options, reply_to=reply_to, result=options.result or "msgpack")


def look_commands(job_id: str) -> list[tuple[Any, ...]]:
    """What to ask for all that is known of a job."""
    minute, now = minute_of(job_id), int(time.time()) // 60
    minutes = [minute] if minute is not None else range(now, now - _MINUTES_BACK, -1)
    return [("GET", topology.result(job_id)), *(("HGET", topology.jobs(each), job_id) for each in minutes)]


def read_look(replies: Sequence[Any]) -> tuple[Meta | None, Placement | None]:
    """The answers to `look_commands`."""
    found, *placements = replies
    placement = next((_PLACEMENT.decode(raw) for raw in placements if raw), None)
    return (wire.read_meta(found) if found else None), placement


def read_final(found: bytes | None) -> Meta | None:
    """What a result's key holds, where that is a job's end."""
    meta = wire.read_meta(found) if found else None
    return meta if meta is not None and meta.status in FINAL_STATES else None


def read_finals(jobs: Iterable[str], found: Iterable[bytes | None]) -> list[Meta]:
    """The ends among what many jobs' keys hold; one that cannot be read is a failure that says so."""
    metas = []
    for job_id, raw in zip(jobs, found, strict=True):
        try:
            meta = read_final(raw)
        except LeptonError as error:
            meta = wire.failure(job_id, error)
        if meta is not None:
            metas.append(meta)
    return metas


def read_replies(popped: Any) -> list[Meta]:
    """What BLMPOP has brought. One that cannot be read is passed over: its key says the same to whoever waits."""
    metas = []
    for raw in popped[1] if popped else ():
        try:
            metas.append(wire.read_meta(raw))
        except LeptonError:
            continue
    return metas


class Lookout:
    """Whose keys to look at although their replies should come by themselves: everybody's, once a second."""

    def __init__(self) -> None:
        self._queue: deque[tuple[float, str]] = deque()
        self._listed: set[str] = set()

    def add(self, job_id: str, now: float) -> None:
        if job_id not in self._listed:
            self._listed.add(job_id)
            self._queue.append((now + LOOK_EVERY_S, job_id))

    def due(self, now: float, waiting: Container[str]) -> list[str]:
        """Those whose turn it is, a few hundred at most; who is not waiting any more is forgotten."""
        found: list[str] = []
        while self._queue and self._queue[0][0] <= now and len(found) < POP_AT_ONCE:
            _, job_id = self._queue.popleft()
            if job_id in waiting:
                found.append(job_id)
                self._queue.append((now + LOOK_EVERY_S, job_id))
            else:
                self._listed.discard(job_id)
        return found

    def pause_s(self, now: float) -> float:
        """How long until somebody's turn comes; never nothing, for the broker takes that for ever."""
        due_at = self._queue[0][0] if self._queue else now + LOOK_EVERY_S
        return min(LOOK_EVERY_S, max(0.001, due_at - now))
