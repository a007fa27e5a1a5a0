"""Events: what happened, in the past tense. One entry of the stream `lepton:events` holds the Events of one step.

| type               | from    | jobs | data                                                                        |
|--------------------|---------|------|-----------------------------------------------------------------------------|
| job.accepted       | ingest  | yes  | (a client that publishes straight to the broker tells nobody)               |
| job.placed         | router  | yes  | seconds: predicted transfer and run time of each job; messages: in how many |
|                    |         |      | they are, where these are fewer                                             |
| job.parked         | router  | yes  | (the reason is in each job's Placement)                                     |
| job.rejected       | router  | yes  | dead: how many more were no messages (the error is in each job's result)    |
| job.scheduled      | router  | yes  | due_at: seconds since the epoch, of each job                                |
| job.progressed     | worker  | yes  | fraction: 0 to 1, as the kernel tells it                                    |
| job.cancel_asked   | anybody | yes  | (whoever holds the job ends it, unless it ends before)                      |
| job.succeeded      | worker  | yes  | observation of the launch (see `Observation`)                               |
| job.failed         | worker  | yes  | code, message, field: the error (see `LeptonError.to_wire`)                 |
| job.cancelled      | who held| yes  | code, message                                                               |
| job.expired        | who held| yes  | code, message: its deadline has passed                                      |
| job.retried        | worker  | yes  | code, message; delay_s: after which it runs again; retries: before this one |
| job.released       | worker  | yes  | code, message, delay_s: this device may not or cannot run it; it goes on    |
| job.dead           | who held| yes  | code, message; attempts: it is among the dead letters                       |
| device.online      | worker  |      | worker                                                                      |
| device.heartbeat   | worker  |      | state: ResourceState                                                        |
| device.offline     | worker  |      | worker                                                                      |
| device.lost        | worker  |      | worker, reason: its process ends, and what it held has been given back      |
| device.quarantined | worker  |      | reason, difference, tolerance, shapes, job: `kernel` runs on `device` no    |
|                    |         |      | more, until somebody lifts that (see `Quarantined`)                         |
| kernel.refused     | worker  |      | reason (`kernel` is the kernel, or the module that was refused)             |
| router.online      | router  |      |                                                                             |
| router.offline     | router  |      |                                                                             |

The time of an event is the id of its stream entry: the server's clock, never a client's. To the outside each event of
each job is a CloudEvent of its own (`cloud_events`), and its id is where a reader goes on after it (`Cursor`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from lepton_ai.errors import InvalidArguments

__all__ = [
    "FINAL_EVENTS",
    "TYPES",
    "CloudEvent",
    "Cursor",
    "Event",
    "Observation",
    "cloud_events",
    "decode",
    "encode",
    "missed",
]


class Observation(msgspec.Struct, frozen=True):
    """What one launch taught: the measured times of `jobs` jobs of one kernel, compilation not counted.

    `flops` and `bytes` are the Work of all its jobs, `transfer_bytes` the size of their array arguments. `transfer_s`
    is everything between message and device: decoding, upload, download and encoding. Of launches that were alike the
    mean is told.
    """

    kernel: str
    device: str
    jobs: int
    flops: float
    bytes: float
    transfer_s: float
    run_s: float
    transfer_bytes: float = 0.0
    dims: tuple[float, ...] = ()
    """`Work.dims` of each job; where they differ, the mean."""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that happened. `source` is the incarnation of the process that saw it."""

    type: str
    source: str
    kernel: str | None = None
    device: str | None = None
    jobs: tuple[str, ...] = ()
    observation: Observation | None = None
    data: dict[str, Any] = {}


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(tuple[Event, ...])

#: The one field of a stream entry.
FIELD = b"e"


def encode(*events: Event) -> bytes:
    """The Events of one step as one stream value."""
    return _ENCODER.encode(events)


def decode(data: bytes) -> tuple[Event, ...]:
    """The Events of a stream value."""
    return _DECODER.decode(data)


# -- to the outside -------------------------------------------------------------------------------------------------

_TYPE: Final = "io.lepton.{}.v1"
#: Every type in the table above.
TYPES: Final = (
    *("job.accepted", "job.placed", "job.parked", "job.rejected", "job.scheduled", "job.progressed"),
    *("job.cancel_asked", "job.succeeded", "job.failed", "job.cancelled", "job.expired", "job.retried", "job.released"),
    "job.dead",
    *("device.online", "device.heartbeat", "device.offline", "device.lost", "device.quarantined"),
    *("kernel.refused", "router.online", "router.offline"),
)
#: After one of these a job has no more events.
_FINAL: Final = ("succeeded", "failed", "cancelled", "expired", "dead", "rejected")
FINAL_EVENTS: Final = frozenset(_TYPE.format(f"job.{end}") for end in _FINAL)
_CURSOR = re.compile(r"(\d{1,20})(?:-(\d{1,20})(?:\.(\d{1,9}))?)?")
_LAST: Final = 2**64 - 1


#: What is told for other routers, and otherwise or not at all to the outside.
_ROUTERS_OWN: Final = ("seconds", "messages")


class CloudEvent(msgspec.Struct, frozen=True):
    """One event of one job, device or router, with the attributes of CloudEvents 1.0 (github.com/cloudevents/spec)."""

    id: str
    """`<stream entry>.<number in it>`: the position after which to go on, see `Cursor`."""
    source: str
    """`/lepton/<incarnation>` of the process that saw it."""
    type: str
    """`io.lepton.<type>.v1`, the type as in the table above."""
    subject: str
    """The job's id; else the device, kernel or router that it is about."""
    time: str
    """RFC 3339, by the broker's clock."""
    data: dict[str, Any]
    """`kernel` and `device` where they are known, and what the table above says of the type."""
    specversion: str = "1.0"
    datacontenttype: str = "application/json"


class Cursor(msgspec.Struct, frozen=True, order=True):
    """A place in the event stream: behind one CloudEvent, so that a reader who goes on misses and repeats nothing."""

    milliseconds: int = 0
    sequence: int = 0
    number: int = _LAST
    """Of the CloudEvent within its entry; by default behind all of them."""

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The cursor of a CloudEvent's id, of a stream entry's (behind it), or of `0`: the oldest that is kept.

        Raises InvalidArguments where it is none of these.
        """
        match = _CURSOR.fullmatch(text)
        if match is None or any(int(part) > _LAST for part in match.groups() if part):
            raise InvalidArguments(f"not the id of an event (such as 1700000000000-0.0, or 0): {text[:60]!r}", "since")
        return cls(*(int(part) for part in match.groups() if part is not None))

    @property
    def entry(self) -> str:
        """The entry that the cursor stands in or behind."""
        return f"{self.milliseconds}-{self.sequence}"

    @property
    def before(self) -> str:
        """The XREAD position from which `entry` itself is read again, because some of it may not have been seen."""
        if self.number == _LAST or (self.milliseconds, self.sequence) == (0, 0):
            return self.entry
        if self.sequence:
            return f"{self.milliseconds}-{self.sequence - 1}"
        return f"{self.milliseconds - 1}-{_LAST}"

    def unseen(self, events: Iterable[CloudEvent]) -> Iterator[CloudEvent]:
        """Those of these CloudEvents that come after the cursor."""
        return (each for each in events if Cursor.parse(each.id) > self)


def cloud_events(entry: str, events: Iterable[Event]) -> Iterator[CloudEvent]:
    """What one entry of the stream tells, as CloudEvents: one for each job of each Event."""
    time = datetime.fromtimestamp(int(entry.partition("-")[0]) / 1000, UTC).isoformat(timespec="milliseconds")
    number = 0
    for each in events:
        for at, subject in enumerate(each.jobs or (each.device or each.kernel or each.source,)):
            yield CloudEvent(
                f"{entry}.{number}",
                f"/lepton/{each.source}",
                _TYPE.format(each.type),
                subject,
                time.replace("+00:00", "Z"),
                _data(each, at),
            )
            number += 1


def missed(cursor: Cursor, first: str) -> CloudEvent:
    """Tells a reader that events after its cursor are no longer kept: the oldest is the entry `first`."""
    data = {"after": cursor.entry, "first": first}
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return CloudEvent(cursor.entry, "/lepton/events", _TYPE.format("events.missed"), "events", now, data)


def _data(each: Event, at: int) -> dict[str, Any]:
    """What one Event says of its job number `at`."""
    data: dict[str, Any] = {
        name: value for name, value in (("kernel", each.kernel), ("device", each.device)) if value is not None
    }
    data |= {name: value for name, value in each.data.items() if name not in _ROUTERS_OWN}
    if at < len(seconds := each.data.get("seconds", ())):
        data["predicted_s"] = seconds[at]
    if each.observation is not None:
        launch = each.observation
        data |= {
            "transfer_s": launch.transfer_s / launch.jobs,
            "run_s": launch.run_s / launch.jobs,
            "batch": launch.jobs,
        }
    return data
