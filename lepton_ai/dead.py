"""Dead letters: the jobs that were given up, to be looked at, run once more, or thrown away. Without any I/O.

Each is an entry of the stream `lepton:dead`. What is asked and done is a generator: it yields Steps, the answers are
sent back, and what it returns is the outcome. `lepton_ai.direct` and `lepton_ai.async_direct` perform them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from lepton_ai import blob, idempotency, results, topology, wire
from lepton_ai.errors import InvalidArguments, JobDead, LeptonError
from lepton_ai.identity import minute_of
from lepton_ai.job import FINAL_STATES, Options, Placement, state_of
from lepton_ai.signature import shapes_of

__all__ = ["DeadLetter", "Settled", "Step", "Steps", "listed", "purge", "replay", "those"]

T = TypeVar("T")

#: Entries read at once: each has its message with it.
_AT_ONCE: Final = 20
#: What nobody can read cannot be run either. A follow-up that could not be sent has this code too.
_UNREADABLE: Final = "unreadable"
#: What `follow` (queues/functions.lua) says of a follow-up whose queue's key held something else.
_UNSENT: Final = re.compile(r"its follow-up has no queue: (.+) is none", re.DOTALL)
#: A key whose job has ended is forgotten long before this, counted from its dead letter; an open one's stands longer.
_OPEN_MS: Final = (idempotency.KEPT_S - 5) * 1000
_ENDS: Final = {
    "succeeded": "has succeeded",
    "cancelled": "was cancelled",
    "expired": "has expired",
    "failed": "has failed in another way",
}
_ENTRY: Final = re.compile(r"\d{1,20}-\d{1,20}", re.ASCII)
#: How long a note of a replayed job stands where it is the first of its minute.
_NOTED_S: Final = 3600
_DECODED_BYTES: Final = 64 * 1024 * 1024
_GONE: Final = "it is not among the dead letters (any more)"


class DeadLetter(msgspec.Struct, frozen=True, omit_defaults=True):
    """One job that was given up."""

    entry: str
    """Its place among the dead letters, newest highest."""
    job: str
    """Its id; empty where nobody could read the message. Of a follow-up that could not be sent, the job before it."""
    kernel: str
    code: str
    """`poison`: it killed its workers; `retries`: they are used up; `unreadable`: it is no job, or it is a follow-up
    whose queue's key holds something else."""
    reason: str
    attempts: int
    died_at: float
    """Seconds since the epoch, by the broker's clock."""
    size_bytes: int
    """Of its message."""
    arguments: dict[str, Any] | None = None
    """The shape of each array, the value of each number; None where they cannot be read."""
    trace: str | None = None
    """The traceback of its last failure."""


class Settled(msgspec.Struct, frozen=True):
    """What came of replaying or purging."""

    count: int
    """Dead letters that were replayed, or purged."""
    left: dict[str, str] = {}
    """Those that were not, by the id that was given, with the reason."""


class Step(NamedTuple):
    """Commands to be sent, while the dead letters are watched, and from this step on the keys of `watch`.

    Those of a `transaction` are done together; its answer is None, and nothing was done, where what is watched has
    changed since the first step behind the last one. Others are done one by one.
    """

    commands: Sequence[tuple[Any, ...]]
    transaction: bool = False
    watch: Sequence[str] = ()


Steps = Generator[Step, Any, T]


def those(ids: Iterable[str], every: bool) -> list[str] | None:
    """The ids that a caller means, None for all; InvalidArguments where both or neither are named."""
    if isinstance(ids, str):
        raise InvalidArguments(f"ids are a list of entries or of jobs, such as [{ids[:60]!r}]", "ids")
    found = list(dict.fromkeys(ids))
    if bool(found) == every:
        raise InvalidArguments("name dead letters by their entry or job id, or say all=True", "ids")
    return None if every else found


def listed(*, limit: int = 100, after: str | None = None, job: str | None = None) -> Steps[list[DeadLetter]]:
    """The newest dead letters, newest first; of `job` alone (a job's id or an entry's); older ones than `after`."""
    if limit < 1:
        raise InvalidArguments(f"limit is 1 or more, not {limit}", "limit")
    if after is not None and not _ENTRY.fullmatch(after):
        raise InvalidArguments(f"after is an entry such as 1700000000000-0, not {after[:60]!r}", "after")
    if job is not None and _ENTRY.fullmatch(job):
        (entries,) = yield Step([("XRANGE", topology.DEAD, job, job)])
        return [_letter(*each) for each in entries]
    found: list[DeadLetter] = []
    while len(found) < limit:
        entries = yield from _page(after)
        letters = [_letter(*each) for each in entries if job in (None, _text(each[1], b"job"))]
        found += letters[: limit - len(found)]
        if len(entries) < _AT_ONCE:
            break
        after = entries[-1][0].decode()
    return found


def replay(ids: Iterable[str] | None) -> Steps[Settled]:
    """Puts dead letters back on their lanes, each once however many ask for it; None stands for all of them.

    A job begins anew, with its attempts, its retries and without its deadline; its old error is forgotten, or its new
    result would be a duplicate. Where the job, or another one of its key, has ended otherwise since or is open, the
    letter is left: there would be two effects.
    """
    count, left = 0, {}
    for given, entry in (yield from _found(ids)):
        reason = _GONE if entry is None else (yield from _replay(entry))
        if reason is None:
            count += 1
        elif ids is not None or reason != _GONE:
            left[given] = reason
    return Settled(count, left)


def purge(ids: Iterable[str] | None) -> Steps[Settled]:
    """Throws dead letters away; None stands for all that there are now."""
    if ids is None:
        (newest,) = yield Step([("XREVRANGE", topology.DEAD, "+", "-", "COUNT", 1)])
        if not newest:
            return Settled(0)
        milliseconds, _, sequence = newest[0][0].decode().partition("-")
        (count,) = yield Step([("XTRIM", topology.DEAD, "MINID", f"{milliseconds}-{int(sequence) + 1}")])
        return Settled(count)
    count, left = 0, {}
    for given, entry in (yield from _found(ids)):
        deleted = 0 if entry is None else (yield from _purge(entry))
        count += deleted
        if not deleted:
            left[given] = _GONE
    return Settled(count, left)


def _purge(entry: str) -> Steps[int]:
    """How many letters that deletes: none where it is gone already. What is left of it goes by itself."""
    (entries,) = yield Step([("XRANGE", topology.DEAD, entry, entry)])
    (deleted,) = yield Step([("XDEL", topology.DEAD, entry)])
    names = _blobs(_mapping(entries[0][1]).get(b"message", b"")) if entries else []
    if deleted and names:
        yield Step([("EXPIRE", name, blob.DROPPED_S) for name in names])
    return int(deleted)


def _page(after: str | None) -> Steps[list[Any]]:
    (entries,) = yield Step(
        [("XREVRANGE", topology.DEAD, "+" if after is None else f"({after}", "-", "COUNT", _AT_ONCE)]
    )
    return list(entries)


def _found(ids: Iterable[str] | None) -> Steps[list[tuple[str, str | None]]]:
    """The entries, oldest first, that are meant, each with what it was asked by; None where there is none."""
    wanted = None if ids is None else dict.fromkeys(ids)
    if wanted is not None and all(map(_ENTRY.fullmatch, wanted)):
        return [(each, each) for each in wanted]
    found: list[tuple[str, str | None]] = []
    after = None
    while entries := (yield from _page(after)):
        for entry_id, fields in entries:
            after, job = entry_id.decode(), _text(fields, b"job")
            if wanted is None or after in wanted:
                found.append((after, after))
            elif job in wanted:
                found.append((job, after))
    found.reverse()
    missing = set(wanted or ()) - {given for given, _ in found}
    return found + [(given, None) for given in wanted or () if given in missing]


def _replay(entry: str) -> Steps[str | None]:
    """Why an entry could not be replayed; None where it was."""
    while True:
        (entries,) = yield Step([("XRANGE", topology.DEAD, entry, entry)])
        if not entries:
            return _GONE
        fields = _mapping(entries[0][1])
        unreadable = (_text(fields, b"code") or _UNREADABLE) == _UNREADABLE
        planned = yield from (_send_on(fields) if unreadable else _run_again(entry, fields))
        if isinstance(planned, str):
            return planned
        commands = [("XDEL", topology.DEAD, entry), *planned, ("HINCRBY", topology.COUNTERS, "replayed", 1)]
        if (yield Step(commands, transaction=True)) is not None:
            return None


def _send_on(fields: Mapping[bytes, bytes]) -> Steps[str | list[tuple[Any, ...]]]:
    """What sends a follow-up that had no queue to where it was meant; of other letters, why they cannot be replayed."""
    unsent = _UNSENT.fullmatch(_text(fields, b"reason"))
    if unsent is None or not _text(fields, b"job"):
        return f"nobody can read its message: {_text(fields, b'reason')}"
    queue = unsent[1]
    (kind,) = yield Step([("TYPE", queue)])
    if kind not in (b"none", b"list"):
        return f"it follows job {_text(fields, b'job')}, and {queue} is still no queue: its key holds a {kind.decode()}"
    return [("LPUSH", queue, fields.get(b"message", b""))]


def _run_again(entry: str, fields: Mapping[bytes, bytes]) -> Steps[str | list[tuple[Any, ...]]]:
    """What runs a job once more; or why it must not be."""
    message = fields.get(b"message", b"")
    try:
        envelope = wire.read_envelope(message)
        anew = wire.replayed(message)
    except LeptonError as error:
        return f"its message cannot be read: {error}"
    job, options, lane = envelope.headers.id, _options(envelope), wire.lane_of(message)
    places = options.blobs or ()
    if any(place.startswith("ring:") for place in places):
        return "its arguments were in memory that its producer shared, and has taken back"
    names = blob.keys(job, places)
    result, key, target = topology.result(job), topology.key(job), topology.lane_list(options.urgency, lane)
    stored, keyed, expires_ms, kind, *there = yield Step(
        [
            *(("GET", result), ("GET", key), ("PEXPIRETIME", key), ("TYPE", target)),
            *([("EXISTS", *names)] if names else []),
        ],
        watch=(result, key, *names),
    )
    if there and there[0] != len(names):
        return "its arguments are gone, which were kept outside its message"
    if kind not in (b"none", b"list"):
        return f"its lane {target} is no queue: its key holds a {kind.decode()}"
    is_keyed = job[14:15] == "5"  # a UUID of version 5: made from a key
    mark = _fingerprint(envelope, options) if is_keyed else None
    failed, reason = _end(fields, stored)
    if reason is None and keyed is not None:
        died_ms = int(entry.partition("-")[0])
        if not failed and (expires_ms == -1 or expires_ms >= died_ms + _OPEN_MS):
            reason = "its key stands for a job that has not ended"
        elif mark is not None and keyed != mark:
            reason = "its key stands for another job by now"
    if reason is not None:
        return reason
    minute = minute_of(job)
    notes = topology.jobs(int(time.time()) // 60 if minute is None else minute)
    note = Placement(
        job, envelope.headers.task, "waiting", "a dead letter that was replayed; waits in its lane", 0.0, ""
    )
    return [
        *(("PERSIST", name) for name in names),
        ("DEL", result),
        ("HDEL", topology.ATTEMPTS, job),
        ("HSET", notes, job, msgspec.msgpack.encode(note)),
        ("EXPIRE", notes, _NOTED_S, "NX"),
        *([] if mark is None else [("SET", key, mark, "EX", idempotency.KEPT_S, "NX")]),
        *([("EXPIRE", key, idempotency.KEPT_S)] if is_keyed else []),
        *([] if lane == topology.LANE else [("SADD", topology.LANES, lane)]),
        ("LPUSH", target, anew),
    ]


def _end(fields: Mapping[bytes, bytes], stored: bytes | None) -> tuple[bool, str | None]:
    """Whether a stored result is the failure that a letter tells of; else why it must not be forgotten, if it must not.

    Only a job that ended after the letter can have another one: what ends a job stands.
    """
    if stored is None:
        return False, None
    try:
        meta = results.read(stored)
    except LeptonError as error:
        return False, f"its job has a result that cannot be read: {error}"
    if meta.status not in FINAL_STATES:
        return False, None
    ended_by = (meta.lepton.error if meta.lepton is not None else None) or {}
    if meta.status == "FAILURE":
        is_poison = _text(fields, b"code") == "poison"
        told, message = _text(fields, b"reason"), ended_by.get("message")
        if ended_by.get("code") == JobDead.code if is_poison else isinstance(message, str) and told.endswith(message):
            return True, None
    return False, f"its job {_ENDS[state_of(meta, None)]} since, and that stands"


def _fingerprint(envelope: wire.Envelope, options: Options) -> bytes | None:
    """What a key says of this job; None where that cannot be told from its message."""
    try:
        body = wire.read_body(envelope, limit_bytes=_DECODED_BYTES)
        return None if body.args else idempotency.fingerprint(envelope.headers.task, body.kwargs, options.device)
    except LeptonError:
        return None


def _blobs(message: bytes) -> list[str]:
    """The keys of a letter's blobs."""
    try:
        headers = wire.read_envelope(message).headers
    except LeptonError:
        return []
    return blob.keys(headers.id, wire.read_places(headers) or ())


def _options(envelope: wire.Envelope) -> Options:
    try:
        return wire.read_options(envelope.headers)
    except LeptonError:  # a router will say what is wrong with them
        return Options()


def _letter(entry_id: bytes, pairs: Any) -> DeadLetter:
    fields = _mapping(pairs)
    entry, message = entry_id.decode(), fields.get(b"message", b"")
    attempts = _text(fields, b"attempts")
    return DeadLetter(
        entry=entry,
        job=_text(fields, b"job"),
        kernel=_text(fields, b"kernel"),
        code=_text(fields, b"code") or _UNREADABLE,
        reason=_text(fields, b"reason"),
        attempts=int(attempts) if attempts.isdecimal() else 0,
        died_at=int(entry.partition("-")[0]) / 1000,
        size_bytes=len(message),
        arguments=_arguments(message),
        trace=_text(fields, b"trace") or None,
    )


def _arguments(message: bytes) -> dict[str, Any] | None:
    try:
        envelope = wire.read_envelope(message)
        shapes = wire.read_options(envelope.headers).shapes
        return shapes_of(wire.read_body(envelope, limit_bytes=_DECODED_BYTES).kwargs) if shapes is None else shapes
    except LeptonError:
        return None


def _mapping(pairs: Any) -> Mapping[bytes, bytes]:
    """The fields of an entry, which redis-py gives as a map, and as a list where it was asked for by a bare command."""
    return pairs if isinstance(pairs, Mapping) else dict(zip(pairs[::2], pairs[1::2], strict=True))


def _text(pairs: Any, field: bytes) -> str:
    return _mapping(pairs).get(field, b"").decode(errors="replace")
