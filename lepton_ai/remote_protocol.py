"""What is said to an ingest and read from it, without doing either: both clients' way over HTTP."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from typing import Any, Final, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import msgspec

from lepton_ai import sse, wire
from lepton_ai.accounts import Accounts
from lepton_ai.dead import DeadLetter, Settled
from lepton_ai.device import Announcement
from lepton_ai.errors import (
    BrokerUnavailable,
    InvalidArguments,
    JobExpired,
    LeptonError,
    OptionNotSupported,
    Unavailable,
    UnknownKernel,
    from_wire,
)
from lepton_ai.event import FINAL_EVENTS, CloudEvent, Cursor
from lepton_ai.event_stream import OPENED, wanted
from lepton_ai.flight import Flight
from lepton_ai.handle import Handle
from lepton_ai.job import FINAL_STATES, Meta, Placement, Record
from lepton_ai.patience import Clock, Patience, Pause
from lepton_ai.terms import Terms

__all__ = [
    "DEAD_AT_ONCE",
    "MAP_REQUESTS",
    "MAP_WAIT_S",
    "REQUEST_BYTES",
    "TENANT",
    "WAIT_S",
    "Chosen",
    "Follower",
    "HasEnded",
    "JobRequest",
    "JobView",
    "Open",
    "Read",
    "Stragglers",
    "body_of",
    "chosen",
    "chunk_of",
    "concerns_every_row",
    "dead_path_of",
    "error_of",
    "final_meta",
    "follow",
    "halves",
    "headers",
    "of_the_broker",
    "path_of",
    "place_of",
    "read_accounts",
    "read_announcements",
    "read_dead",
    "read_settled",
    "read_view",
    "read_views",
    "request",
    "stream_error",
    "what_is_known",
]

H = TypeVar("H", bound=Handle)
P = TypeVar("P")

#: The longest that one request waits; a longer wait is several requests.
WAIT_S: Final = 20.0
REQUEST_BYTES: Final = 4 * 1024 * 1024
#: A map's requests: so many at a time, of so many rows, each answered once its rows have ended or after so long.
MAP_REQUESTS: Final = 4
_MAP_CHUNK: Final = 250
MAP_WAIT_S: Final = 1.0
#: Jobs that outlive their request are looked at so many at a time.
_SWEEP_AT_ONCE: Final = 64
#: The header that says for whom a request is.
TENANT: Final = "lepton-tenant"
#: The most dead letters that one answer holds.
DEAD_AT_ONCE: Final = 100
_SERVER_ERROR: Final = 500
#: An event stream that has been silent for so long, without even a comment, is opened anew.
_SILENCE_S: Final = 45.0
_LEAST_READ_S: Final = 0.5


class JobRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One job as `POST /v1/jobs` takes it: see `Client.submit` for what its fields ask."""

    kernel: str
    arguments: dict[str, wire.Value]
    priority: int | None = None
    device: str | None = None
    key: str | None = None
    delay_s: float | None = None
    deadline_s: float | None = None
    limit_s: float | None = None
    must_meet: bool | None = None
    state_key: str | None = None


class Chosen(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The dead letters that `POST /v1/dead/replay` means: these, by entry or job id, or all."""

    entries: list[str] | None = None
    all: bool = False


class JobView(msgspec.Struct, omit_defaults=True):
    """One job as `/v1/jobs` answers it. `result` and `error` are there once it has ended."""

    id: str
    kernel: str
    state: str
    result: dict[str, wire.Value] | None = None
    error: dict[str, Any] | None = None
    record: Record | None = None


read_view: Final = msgspec.msgpack.Decoder(JobView).decode
read_views: Final = msgspec.msgpack.Decoder(list[JobView]).decode
read_accounts: Final = msgspec.msgpack.Decoder(Accounts).decode
read_dead: Final = msgspec.msgpack.Decoder(list[DeadLetter]).decode
read_settled: Final = msgspec.msgpack.Decoder(Settled).decode
read_announcements: Final = msgspec.msgpack.Decoder(list[Announcement]).decode
_EVENT = msgspec.json.Decoder(CloudEvent)
_STATUS: Final = {ours: celerys for celerys, ours in FINAL_STATES.items()} | {"expired": "REVOKED"}


# -- jobs -------------------------------------------------------------------------------------------------------------


def headers(tenant: str | None) -> dict[str, str]:
    """What every request says."""
    return {"accept": wire.MSGPACK} | ({} if tenant is None else {TENANT: tenant})


def request(kernel: str, row: Mapping[str, Any], terms: Terms, key: str | None = None) -> bytes:
    """One job, packed; InvalidArguments where it cannot be."""
    options = terms.options
    asked = {
        "priority": options.priority,
        "device": options.device,
        "key": key,
        "delay_s": terms.delay_s,
        "deadline_s": terms.deadline_s,
        "limit_s": options.limit_s,
        "must_meet": options.must_meet or None,
        "state_key": options.state_key,
    }
    return wire.pack(
        {
            "kernel": kernel,
            "arguments": {name: _sent(name, value) for name, value in row.items()},
            **{name: value for name, value in asked.items() if value is not None},
        }
    )


def _sent(name: str, value: Any) -> Any:
    try:
        return wire.to_value(value)
    except wire.Oversize:
        told = f"argument {name!r} is on a store: that takes a client of the broker (redis://), not of HTTP"
        raise InvalidArguments(told, name) from None


def body_of(requests: list[bytes]) -> bytes:
    """The body of a POST of these jobs."""
    return wire.pack([msgspec.Raw(each) for each in requests])


def final_meta(view: JobView) -> Meta | None:
    """The final record of a job, where it has ended."""
    if view.state not in _STATUS:
        return None
    record = view.record or Record()
    error = {"code": JobExpired.code} if view.state == "expired" and view.error is None else view.error
    if error is not None:
        record = msgspec.structs.replace(record, error=error)
    result = {name: wire.decode_value(value) for name, value in (view.result or {}).items()}
    return Meta(_STATUS[view.state], result, task_id=view.id, lepton=record)


def what_is_known(view: JobView) -> tuple[Meta | None, Placement | None]:
    """The record of a job that has ended, and the placement of one that has been placed."""
    return final_meta(view), view.record.placement if view.record else None


def path_of(job_id: str) -> str:
    """Where a job is found."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


def dead_path_of(entry: str) -> str:
    """Where a dead letter is found, by its entry or its job's id."""
    return f"/v1/dead/{quote(entry, safe='')}"


def error_of(status: int, content: bytes, retry_after: str = "") -> LeptonError:
    """The error that an answer tells of, and when to try again, where its header Retry-After names seconds."""
    try:
        problem = msgspec.json.decode(content, type=dict[str, Any])
    except msgspec.DecodeError:
        problem = {}
    code = problem.get("code", "internal")
    message = problem.get("detail") or f"HTTP {status}"
    error = from_wire({**problem, "code": code, "message": message})
    if isinstance(error, Unavailable) and retry_after.isdecimal():
        error.retry_after_s = float(retry_after[:9])
    return error


def chosen(ids: Iterable[str] | None) -> bytes:
    """The body that names dead letters."""
    return wire.pack(Chosen(all=True) if ids is None else Chosen(list(ids)))


# -- map --------------------------------------------------------------------------------------------------------------


def chunk_of(window: int) -> int:
    """How many rows of a map one request carries, so that several are under way."""
    return max(1, min(_MAP_CHUNK, window // MAP_REQUESTS))


def concerns_every_row(error: LeptonError) -> bool:
    """Whether a request is refused for what it says of all its rows: then the others would be refused as well."""
    return isinstance(error, UnknownKernel | OptionNotSupported)


def of_the_broker(what: str) -> OptionNotSupported:
    """What an ingest is asked for in vain."""
    return OptionNotSupported(f"{what} are the broker's to tell: name its address, not an ingest's", "url")


def halves(batch: list[P]) -> list[list[P]]:
    """What to post instead of a batch that was too much at once."""
    half = (len(batch) + 1) // 2
    return [each for each in (batch[:half], batch[half:]) if each]


class Stragglers(Generic[H]):
    """The jobs of a map that have outlived the request they came with.

    A map posts its rows in up to 4 requests at a time, each answered once all its jobs have ended or after a second.
    Whoever has not ended by then is a straggler. They are looked at by turns, some at a time, one request after the
    other, the first of which waits a little: each is looked at about once in a tenth of its age, 0.1 to 2 s.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._turns: deque[H] = deque()
        self._since: dict[int | None, float] = {}
        #: With an ingest that is away while they are looked at: it has been there, for it has taken them.
        self.patience = Patience(clock, was_there=True)
        #: With one that takes no more rows for now: it is spent where none is accepted and no job ends either.
        self.admission = Patience(clock, was_there=True)

    def __len__(self) -> int:
        return len(self._turns)

    def settle(self, jobs: Iterable[H], flight: Flight[H]) -> None:
        """Those that have ended land; the others wait for their next turn."""
        for job in jobs:
            if job.meta is not None:
                self._since.pop(job.row, None)
                self.admission.renew()
                flight.end(job)
            else:
                self._since.setdefault(job.row, self._clock())
                self._turns.append(job)

    def turn(self) -> tuple[list[H], float]:
        """Whose turn it is, and how long to wait for the first of them."""
        among = len(self._turns)
        jobs = [self._turns.popleft() for _ in range(min(_SWEEP_AT_ONCE, among))]
        age_s = self._clock() - self._since[jobs[0].row]
        return jobs, min(2.0, max(0.1, age_s / 10)) * len(jobs) / among


# -- events -----------------------------------------------------------------------------------------------------------


def place_of(since: Cursor | None) -> str:
    """A cursor as Last-Event-ID."""
    if since is None:
        return ""
    return since.entry if since.number == Cursor().number else f"{since.entry}.{since.number}"


class Open(NamedTuple):
    """To ask for the events after `last_id`, giving up where nothing comes for `silence_s`."""

    path: str
    params: dict[str, str]
    last_id: str
    silence_s: float

    @property
    def headers(self) -> dict[str, str]:
        headers = {"accept": "text/event-stream", "cache-control": "no-store"}
        return headers | ({"last-event-id": self.last_id} if self.last_id else {})


class Read(NamedTuple):
    """To take the next bytes: None where the answer has ended, b"" where nothing came in time and it was given up."""


class HasEnded(NamedTuple):
    """To look whether a job has ended."""

    job: str


Follower = Generator[Open | Read | HasEnded | Pause | CloudEvent, Any, None]


def follow(
    path: str,
    last_id: str,
    *,
    job: str | None = None,
    timeout_s: float | None = None,
    until_final: bool = False,
    clock: Clock = time.monotonic,
) -> Follower:
    """The events that a path streams, from behind `last_id`, as `event_stream.follow` does; other steps, same rules.

    With `until_final` the path tells of one job alone, and the ingest ends the stream after its last event.
    """
    params = {"job": job} if job is not None and not until_final else {}
    patience = Patience(clock)
    has_opened = has_ended = False
    quiet_since = clock()
    while True:
        try:
            left = _SILENCE_S if timeout_s is None else timeout_s - (clock() - quiet_since)
            yield Open(path, params, last_id, min(_SILENCE_S, max(_LEAST_READ_S, left)))
            if not has_opened:
                has_opened = True
                patience.renew()
                yield OPENED
                quiet_since = clock()
            parser = sse.Parser(last_id)
            while data := (yield Read()):
                patience.renew()
                for message in parser.feed(data):
                    last_id = message.id
                    each = _EVENT.decode(message.data) if message.data else None
                    if each is None or not wanted(each, job):
                        continue
                    yield each
                    quiet_since = clock()
                    if until_final and each.type in FINAL_EVENTS:
                        return
                if timeout_s is not None and clock() - quiet_since >= timeout_s:
                    return
            if timeout_s is not None and clock() - quiet_since >= timeout_s:
                return
            if until_final:
                if has_ended:  # and had before this stream began, which told of no end: that is no longer kept
                    return
                has_ended = yield HasEnded(job or "")
            if data is None:
                yield patience.spend(BrokerUnavailable(f"{path} ended"))
        except Unavailable as error:
            yield patience.spend(error)


def stream_error(status: int, content: bytes) -> LeptonError:
    """The error of an event stream that was not opened; what goes wrong over there may be over in a moment."""
    error = error_of(status, content)
    return error if status < _SERVER_ERROR or isinstance(error, Unavailable) else BrokerUnavailable(error.message)
