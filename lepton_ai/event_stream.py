"""Following the event stream: which command comes next, and what its answer tells. Without any I/O.

A follower is a generator. It yields commands (the answer is sent back, BrokerUnavailable thrown in), Pauses, and the
CloudEvents it has found; the first of these is OPENED, which only says that its place in the stream is fixed.

It reads from the entry that it stands in, that one included: where the answer does not begin with it, entries have been
trimmed since, and some may never have been read.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Final

from lepton_ai import event, topology
from lepton_ai.direct_protocol import LOOK_EVERY_S, read_final
from lepton_ai.errors import Unavailable
from lepton_ai.event import FINAL_EVENTS, CloudEvent, Cursor, cloud_events, missed
from lepton_ai.identity import made_at
from lepton_ai.patience import Clock, Patience, Pause

__all__ = ["MISSED", "OPENED", "Follower", "follow", "follow_job", "wanted"]

OPENED: Final = CloudEvent("0-0", "", "", "", "", {})
#: Tells a reader that events after its cursor are no longer kept.
MISSED: Final = missed(Cursor(), "0-0").type
_READ_AT_ONCE: Final = 100
_BLOCK_S: Final = 5.0
#: The clock of a job's submitter and the broker's may differ by so much.
_SKEW_S: Final = 10.0

Command = tuple[Any, ...]
Follower = Generator[Command | Pause | CloudEvent, Any, None]


def wanted(each: CloudEvent, job: str | None) -> bool:
    """Whether a reader who asked for the events of `job` wants this one."""
    return job is None or each.subject == job or each.type == MISSED


def follow(
    since: Cursor | None, *, job: str | None = None, timeout_s: float | None = None, clock: Clock = time.monotonic
) -> Follower:
    """Everything after a cursor, or from now on, until nothing has come for `timeout_s`."""
    if since is None:
        newest = yield ("XREVRANGE", topology.EVENTS, "+", "-", "COUNT", 1)
        since = Cursor.parse(_entry(newest[0])) if newest else Cursor()
    else:
        yield ("PING",)  # a broker that is not there is told of now
    yield OPENED
    yield from _follow(since, since.entry != Cursor().entry, job, timeout_s, clock)


def follow_job(job: str, *, timeout_s: float | None = None, clock: Clock = time.monotonic) -> Follower:
    """The events of one job from its first to its last. Those of a foreign id are looked for in all that is kept."""
    made_s = made_at(job)
    begin = Cursor() if made_s is None else Cursor(max(0, round((made_s - _SKEW_S) * 1000)), 0)
    oldest = yield ("XRANGE", topology.EVENTS, "-", "+", "COUNT", 1)
    told = None
    if oldest and made_s is not None and Cursor.parse(_entry(oldest[0])) > Cursor(round(made_s * 1000)):
        # Nothing so old is there: has it been trimmed, or was the stream begun later?
        stream = yield ("XINFO STREAM", topology.EVENTS)
        if stream["entries-added"] > stream["length"]:
            told = missed(begin, _entry(oldest[0]))
    yield OPENED
    if told is not None:
        yield told
    yield from _follow(begin, False, job, timeout_s, clock, until_final=True)


def _follow(
    cursor: Cursor, was_kept: bool, job: str | None, timeout_s: float | None, clock: Clock, *, until_final: bool = False
) -> Follower:
    """`was_kept`: an entry of the cursor's id has been in the stream, so where it is gone, it was trimmed."""
    patience = Patience(clock, was_there=True)
    quiet_since = looked_at = clock()
    has_ended = False
    while True:
        entries = yield from _ask(patience, "XRANGE", topology.EVENTS, cursor.entry, "+", "COUNT", _READ_AT_ONCE)
        if entries and was_kept and _entry(entries[0]) != cursor.entry:
            yield missed(cursor, _entry(entries[0]))
            quiet_since = clock()
        for each in _unseen(entries, cursor, job):
            yield each
            quiet_since = clock()
            if until_final and each.type in FINAL_EVENTS:
                return
        if entries:
            cursor, was_kept = Cursor.parse(_entry(entries[-1])), True
        if len(entries) >= _READ_AT_ONCE:
            continue
        now = clock()
        if has_ended or (timeout_s is not None and now - quiet_since >= timeout_s):
            return
        if until_final and now - max(quiet_since, looked_at) >= LOOK_EVERY_S:
            looked_at = now
            has_ended = read_final((yield from _ask(patience, "GET", topology.result(job or "")))) is not None
            if has_ended:  # its last event comes with its result, so it is in the stream by now, or no longer
                continue
        block_s = LOOK_EVERY_S if until_final else _BLOCK_S
        if timeout_s is not None:
            block_s = min(block_s, timeout_s - (now - quiet_since))
        # Only to be woken: what has come is read above, with whatever else has come and been trimmed.
        block = ("BLOCK", max(1, round(block_s * 1000)))
        yield from _ask(patience, "XREAD", "COUNT", 1, *block, "STREAMS", topology.EVENTS, cursor.entry)


def _ask(patience: Patience, *command: Any) -> Generator[Command | Pause, Any, Any]:
    """The answer to a command, asked again while the broker is away."""
    while True:
        try:
            answer = yield command
        except Unavailable as error:
            yield patience.spend(error)
        else:
            patience.renew()
            return answer


def _unseen(entries: Sequence[Any], cursor: Cursor, job: str | None) -> Iterator[CloudEvent]:
    """The CloudEvents of entries that come after the cursor. An entry that is none of ours tells nothing."""
    subject = None if job is None else job.encode(errors="replace")
    for entry_id, fields in entries:
        raw = fields.get(event.FIELD, b"")
        if subject is not None and subject not in raw:  # a subject stands in the bytes as it is
            continue
        entry = entry_id.decode()
        try:
            found: Iterable[CloudEvent] = list(cloud_events(entry, event.decode(raw)))
        except Exception:  # noqa: BLE001, S112 - whoever writes to the broker must not end everybody's reading
            continue
        if entry == cursor.entry:
            found = cursor.unseen(found)
        yield from (each for each in found if wanted(each, job))


def _entry(entry: Any) -> str:
    return entry[0].decode()  # type: ignore[no-any-return]
