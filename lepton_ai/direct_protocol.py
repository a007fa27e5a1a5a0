"""What is said to the broker and read from it, without doing either: both clients' way straight there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain, groupby
from typing import Any, Final, NamedTuple

import msgspec

from lepton_ai import blob, idempotency, results, topology, wire
from lepton_ai.bundle import Row, bundled, note_of
from lepton_ai.errors import LeptonError
from lepton_ai.identity import minute_of, shared_by
from lepton_ai.job import FINAL_STATES, Meta, Placement
from lepton_ai.parcel import Blobs, Message, Parcel, pack
from lepton_ai.terms import Terms

__all__ = [
    "CONNECTION",
    "FIRST_LOOK_S",
    "KEYED_BYTES",
    "LAST_LOOK_S",
    "LOOK_EVERY_S",
    "PIECE_BYTES",
    "POP_AT_ONCE",
    "Keyed",
    "Lookout",
    "Push",
    "answered_to",
    "bytes_of",
    "key_commands",
    "keyed",
    "look_commands",
    "noted_as",
    "push",
    "push_commands",
    "read_final",
    "read_finals",
    "read_look",
    "read_note",
    "read_replies",
    "unknown",
    "writer",
]

#: How each connection is made. (redis-py 8 would wait 5 s for an answer, which is less than our blocking commands do.)
CONNECTION: Final[dict[str, Any]] = {"socket_timeout": 30, "socket_connect_timeout": 5, "health_check_interval": 30}
#: What is published at once: while more is encoded, router and workers begin, and the memory of it is used again.
#: (Measured with jobs of 1.3 kB, CPU a job to send them: 1.2 us in pieces of 100 to 250 KiB, 4 us above, 2.5 in 40.)
PIECE_BYTES: Final = 160 * 1024
#: Blobs are written in pipelines of so many bytes: redis-py makes one string of each.
PIPELINE_BYTES: Final = 2 * 1024 * 1024
#: Jobs with keys, which are looked up before: fewer round trips.
KEYED_BYTES: Final = 4 * 1024 * 1024
POP_AT_ONCE: Final = 256
#: A result may reach its key and not the reply list (which expires when nobody pops it), so the key is looked at too.
LOOK_EVERY_S: Final = 1.0
#: A job that another client submitted does not reach our reply list: its key is looked at, at growing intervals.
FIRST_LOOK_S: Final = 0.002
LAST_LOOK_S: Final = 0.1
#: How many minutes of placements back a foreign id (one that carries no minute) is looked for.
_MINUTES_BACK: Final = 60
_PLACEMENT = msgspec.msgpack.Decoder(Placement)


Command = tuple[Any, ...]
#: A job's id and arguments to its message.
Writer = Callable[[str, Mapping[str, Any]], Message]

# -- submitting -------------------------------------------------------------------------------------------------------


def answered_to(terms: Terms, reply_to: str) -> Terms:
    """The terms of a job whose result comes to a reply list, with arrays as arrays."""
    options = msgspec.structs.replace(terms.options, reply_to=reply_to, result=terms.options.result or "msgpack")
    return msgspec.structs.replace(terms, options=options)


def writer(
    kernel: str,
    terms: Terms,
    tenant: str | None,
    blobs: Blobs,
    prepare: Callable[[], object] | None = None,
    *,
    in_ring: bool = True,
    may_share: bool = True,
) -> Writer:
    """What writes jobs for the lane of a tenant, each submitted when it is written, with ids that follow one another.

    Where they `may_share` messages with others, `push` makes bundles of them.
    Large arrays leave their message, into the ring where they may. `prepare` is called before one is placed.
    """
    template = wire.Template(kernel, terms.options, topology.lane(tenant), blob.WORTH_BYTES)
    # A job that waits for its time may outlive its producer, and so the ring.
    ring = (kernel, terms.options.device) if in_ring and not terms.delay_s else None
    is_timed = bool(terms.times())
    own = (terms.options.limit_s, terms.options.shapes, terms.options.state_key)
    may_share = may_share and not is_timed and all(each is None for each in own)

    def write(job_id: str, row: Mapping[str, Any]) -> Message:
        times: Mapping[str, Any] = terms.times() if is_timed else {}
        try:
            if may_share:
                return Row(job_id, *template.row(row), template)
            return template.envelope(job_id, row, **times)
        except wire.Oversize:
            if prepare is not None and ring is not None:
                prepare()
            return pack(template, job_id, row, times, blobs, ring, may_share=may_share)

    return write


def push_commands(messages: Iterable[bytes], terms: Terms, tenant: str | None, extra: int = 0) -> list[Command]:
    """What puts messages, one or more, on the lane of a tenant: all or none; several commands are one transaction.

    `extra` is how many more jobs than messages these are.
    """
    lane = topology.lane(tenant)
    commands: list[Command] = [("LPUSH", topology.lane_list(terms.options.urgency, lane), *messages)]
    if extra:
        commands.append(("HINCRBY", topology.BUNDLED, lane, extra))
    return commands if tenant is None else [("SADD", topology.LANES, lane), *commands]


class Push(NamedTuple):
    """What publishes jobs: first what is written, pipeline by pipeline, then the commands, all or none of them."""

    writes: Sequence[Sequence[Command]]
    commands: list[Command]
    kept: int
    """How many of the commands' answers, the first ones, are for `blob.require_published`."""


def push(messages: Sequence[Message], terms: Terms, tenant: str | None) -> Push:
    """What publishes messages and parcels, one or more."""
    parcels = [each for each in messages if isinstance(each, Parcel)]
    plain: list[bytes] = []
    extra = 0
    for is_row, group in groupby(messages, lambda each: isinstance(each, Row)):
        if not is_row:
            plain += [each.message if isinstance(each, Parcel) else each for each in group]  # type: ignore[misc]
            continue
        for message, count in bundled(list(group)):  # type: ignore[arg-type]
            plain.append(message)
            extra += count - 1
    if not parcels:
        return Push((), push_commands(plain, terms, tenant, extra), 0)
    writes = wire.batches((each for one in parcels for each in one.writes), PIPELINE_BYTES, _bytes_written)
    kept = blob.publish_commands([name for each in parcels for name in each.names])
    return Push(list(writes), kept + push_commands(plain, terms, tenant, extra), len(kept))


def _bytes_written(command: Command) -> int:
    return len(command[2])


class Keyed(NamedTuple):
    """A job with an idempotency key, ready to be sent."""

    id: str
    key: str
    fingerprint: bytes
    message: Message


def bytes_of(job: Keyed) -> int:
    """What a job takes on the way."""
    return len(job.message)


def keyed(
    kernel: str,
    rows: Iterable[Mapping[str, Any]],
    keys: Sequence[str],
    terms: Terms,
    tenant: str | None,
    blobs: Blobs,
) -> Iterator[Keyed]:
    """The jobs of these rows, one for each key. Raises KeyConflict where rows that differ have the same one."""
    seen: dict[str, bytes] = {}
    # Not in the ring: what is submitted again has the same id, and may be one job or none.
    write = writer(kernel, terms, tenant, blobs, in_ring=False, may_share=False)
    for row, key in idempotency.paired(rows, keys):
        job_id = idempotency.job_id(key, tenant)
        fingerprint = idempotency.fingerprint(kernel, row, terms.options.device)
        if seen.setdefault(job_id, fingerprint) != fingerprint:
            raise idempotency.conflict(key)
        yield Keyed(job_id, key, fingerprint, write(job_id, row))


def unknown(jobs: Iterable[Keyed], found: Iterable[bytes | None]) -> list[Keyed]:
    """Those of these jobs that the broker does not have, each once, by what stands in their keys' place.

    Raises KeyConflict where that is another job.
    """
    fresh: dict[str, Keyed] = {}
    for job, fingerprint in zip(jobs, found, strict=True):
        if fingerprint is None:
            fresh[job.id] = job
        elif fingerprint != job.fingerprint:
            raise idempotency.conflict(job.key)
    return list(fresh.values())


def key_commands(jobs: Iterable[Keyed]) -> list[Command]:
    """What makes the broker remember these jobs' keys, in the transaction that brings the jobs."""
    return [("SET", topology.key(each.id), each.fingerprint, "EX", idempotency.KEPT_S) for each in jobs]


# -- looking ----------------------------------------------------------------------------------------------------------


def look_commands(job_id: str) -> list[Command]:
    """What to ask for all that is known of a job."""
    minute, now = minute_of(job_id), int(time.time()) // 60
    minutes = [minute] if minute is not None else range(now, now - _MINUTES_BACK, -1)
    placements = (("HMGET", topology.jobs(each), *noted_as(job_id)) for each in minutes)
    return [("GET", topology.result(job_id)), ("ZSCORE", topology.ETA, job_id), *placements]


def noted_as(job_id: str) -> list[str]:
    """The fields of a minute's hash in which the placement of a job may stand: its own, and that of its run."""
    shared = shared_by(job_id)
    return [job_id] if shared is None else [job_id, shared]


def read_note(job_id: str, found: Sequence[bytes | None]) -> Placement | None:
    """What the fields named by `noted_as` say of a job. Raises DecodeError where that is no placement."""
    *values, shared = [*found, None] if shared_by(job_id) is None else found
    raw = next(filter(None, values), None) or (None if shared is None else note_of(job_id, shared))
    return None if raw is None else msgspec.structs.replace(_PLACEMENT.decode(raw), job=job_id)


def read_look(job_id: str, replies: Sequence[Any]) -> tuple[Meta | None, Placement | None]:
    """The answers to `look_commands`."""
    found, due_ms, *noted = replies
    placement = read_note(job_id, list(chain.from_iterable(noted)))
    if due_ms is not None and (placement is None or placement.state != "scheduled"):
        due = datetime.fromtimestamp(float(due_ms) / 1000, UTC).isoformat(timespec="seconds")
        placement = placement or Placement(job_id, "", "", "", 0.0, "")  # a note does not last so long
        placement = msgspec.structs.replace(placement, state="scheduled", reason=f"it is due at {due}")
    return (results.read(found) if found else None), placement


def read_final(found: bytes | None) -> Meta | None:
    """What a result's key holds, where that is a job's end."""
    meta = results.read(found) if found else None
    return meta if meta is not None and meta.status in FINAL_STATES else None


def read_finals(jobs: Iterable[str], found: Iterable[bytes | None]) -> list[Meta]:
    """The ends among what many jobs' keys hold; one that cannot be read is a failure that says so."""
    metas = []
    for job_id, raw in zip(jobs, found, strict=True):
        try:
            meta = read_final(raw)
        except LeptonError as error:
            meta = results.failure(job_id, error)
        if meta is not None:
            metas.append(meta)
    return metas


def read_replies(popped: Any) -> list[Meta]:
    """What BLMPOP has brought. One that cannot be read is passed over: its key says the same to whoever waits."""
    metas = []
    for raw in popped[1] if popped else ():
        try:
            metas.append(results.reply(raw))
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
