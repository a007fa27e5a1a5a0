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

from lepton_ai import idempotency, topology, wire
from lepton_ai.errors import InvalidArguments, LeptonError
from lepton_ai.identity import minute_of
from lepton_ai.job import Options, Placement
from lepton_ai.signature import shapes_of

__all__ = ["DeadLetter", "Settled", "Step", "Steps", "listed", "purge", "replay", "those"]

T = TypeVar("T")

#: Entries read at once: each has its message with it.
_AT_ONCE: Final = 20
#: What nobody can read cannot be run either.
_UNREADABLE: Final = "unreadable"
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
    """Its id; empty where nobody could read the message."""
    kernel: str
    code: str
    """`poison`: it killed its workers; `retries`: they are used up; `unreadable`: it is no job."""
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
    """Commands to be sent, while the dead letters are watched.

    Those of a `transaction` are done together; its answer is None, and nothing was done, where the dead letters have
    changed since the first step behind the last one. Others are done one by one.
    """

    commands: Sequence[tuple[Any, ...]]
    transaction: bool = False


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

    A job's old result is forgotten, or its new one would be a duplicate.
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
        (deleted,) = (0,) if entry is None else (yield Step([("XDEL", topology.DEAD, entry)]))
        count += deleted
        if not deleted:
            left[given] = _GONE
    return Settled(count, left)


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
        message, code = fields.get(b"message", b""), _text(fields, b"code") or _UNREADABLE
        if code == _UNREADABLE:
            return f"nobody can read its message: {_text(fields, b'reason')}"
        try:
            commands = _replay_commands(entry, message)
        except LeptonError as error:
            return f"its message cannot be read: {error}"
        if (yield Step(commands, transaction=True)) is not None:
            return None


def _replay_commands(entry: str, message: bytes) -> list[tuple[Any, ...]]:
    envelope = wire.read_envelope(message)
    job, options = envelope.headers.id, _options(envelope)
    lane = wire.lane_of(message)
    minute = minute_of(job)
    notes = topology.jobs(int(time.time()) // 60 if minute is None else minute)
    note = Placement(
        job, envelope.headers.task, "waiting", "a dead letter that was replayed; waits in its lane", 0.0, ""
    )
    return [
        ("XDEL", topology.DEAD, entry),
        ("DEL", topology.result(job)),
        ("HDEL", topology.ATTEMPTS, job),
        ("HSET", notes, job, msgspec.msgpack.encode(note)),
        ("EXPIRE", notes, _NOTED_S, "NX"),
        ("EXPIRE", topology.key(job), idempotency.KEPT_S),
        *([] if lane == topology.LANE else [("SADD", topology.LANES, lane)]),
        ("LPUSH", topology.lane_list(options.urgency, lane), message),
        ("HINCRBY", topology.COUNTERS, "replayed", 1),
    ]


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
