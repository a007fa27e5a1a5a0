"""The Client: submit jobs, wait for them, ask why they went where they went."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from lepton_ai.accounts import Accounts
from lepton_ai.carried import State
from lepton_ai.dead import DeadLetter, Settled, those
from lepton_ai.device import Announcement
from lepton_ai.errors import InvalidArguments, InvalidSettings, NoBroker
from lepton_ai.event import CloudEvent, Cursor
from lepton_ai.handle import JobHandle, JobReader
from lepton_ai.identity import new_id
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.quarantine import Quarantined
from lepton_ai.settings import Settings
from lepton_ai.terms import Terms, check_tenant

__all__ = ["Client", "asked", "checked_key", "connect", "ring_bytes"]

C = TypeVar("C")

_DIRECT = ("redis", "rediss", "unix")
_REMOTE = ("http", "https")


class _Connection(JobReader, Protocol):
    def submit(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        terms: Terms,
        keys: Sequence[str] | None = None,
        *,
        patient: bool = False,
    ) -> list[JobHandle]: ...
    def map(
        self, kernel: str, rows: Iterable[Mapping[str, Any]], terms: Terms, window: int
    ) -> Generator[JobHandle, None, None]: ...
    def events(
        self, since: Cursor | None, job: str | None, timeout_s: float | None
    ) -> Generator[CloudEvent, None, None]: ...
    def announcements(self) -> list[Announcement]: ...
    def dead(self, limit: int, job: str | None) -> list[DeadLetter]: ...
    def replay(self, ids: Iterable[str] | None) -> Settled: ...
    def purge(self, ids: Iterable[str] | None) -> Settled: ...
    def quarantined(self) -> list[Quarantined]: ...
    def lift(self, kernel: str, device: str) -> bool: ...
    def state(self, kernel: str, state_key: str) -> State | None: ...
    def forget(self, kernel: str, state_key: str) -> bool: ...
    def accounts(self) -> Accounts: ...
    def close(self) -> None: ...


class Client:
    """A connection to Lepton, straight to the broker or through an ingest.

    `redis://`, `rediss://` and `unix://` are a broker, `http(s)://` is an ingest; without a URL it takes
    `LEPTON_REDIS_URL`. Safe for several threads; close it, or use it in a `with`.
    Raises BrokerUnavailable from any call while the other side cannot be reached. Only who waits (for a result, a map,
    events) and has reached it before goes on trying, for 30 s.

    `tenant` is for whom jobs are submitted: 1 to 63 of a-z, 0-9, `_` and `-`. They wait in a lane of that tenant's own,
    and its idempotency keys are its own. It is what the caller says: nobody checks it yet.
    """

    def __init__(self, url: str | None = None, *, tenant: str | None = None) -> None:
        check_tenant(tenant)
        self._connection = connect(url, partial(_direct, tenant=tenant), partial(_remote, tenant=tenant))

    def submit(
        self,
        kernel: str,
        arguments: Mapping[str, Any],
        *,
        priority: int | None = None,
        device: str | None = None,
        key: str | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
        limit_s: float | None = None,
        must_meet: bool = False,
        state_key: str | None = None,
    ) -> JobHandle:
        """Submits one job; when this returns, the broker has it.

        `arguments` are arrays, numbers or nested lists by name. `priority` is 1 (low) to 9 (high), unset is the
        middle. `device` pins the job to a device (`gpu.h100`) or a kind of device (`cpu`).

        `delay_s`: it is not run before (at most 30 days from now). `deadline_s`: where it has not begun to run by then,
        it expires, and `result()` raises JobExpired. `limit_s`: where it runs longer, TimeLimitExceeded.

        `must_meet` refuses the job where it is estimated not to have ended by its `deadline_s`: DeadlineUnattainable,
        over HTTP raised here, straight to the broker by `result()`. The estimate is what is exceeded once in twenty on
        the device where the job would end soonest, with what waits before it. Where a device that can run it has not
        been measured twice, nobody can say, and it is accepted.

        `state_key` is for kernels that carry state from job to job (`stream.window`): the job goes on with what the
        last job of that key, kernel and tenant left, and leaves its own to the next. Each counts once, whatever dies
        meanwhile. Leave out what is carried, on both sides. Jobs of one key that are under way together run one after
        the other, in no order that is promised.

        `key` makes it the only job of that idempotency key (1 to 255 characters): whoever submits the same job with the
        same key, before, now or later, gets the same id and result. So what was perhaps accepted (BrokerUnavailable)
        may be submitted again. A key is remembered until its job's result is forgotten. Raises KeyConflict where it
        stands for another kernel, other arguments or another device: see `lepton_ai.idempotency.fingerprint`.

        Over HTTP raises QuotaExceeded where too much of this tenant waits already, and Overloaded where too much does
        altogether; their `retry_after_s` says when to try again.
        """
        terms = asked(priority, device, delay_s, deadline_s, limit_s, must_meet=must_meet, state_key=state_key)
        return self._connection.submit(kernel, [arguments], terms, None if key is None else [key])[0]

    def submit_many(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        priority: int | None = None,
        device: str | None = None,
        keys: Sequence[str] | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
        limit_s: float | None = None,
        must_meet: bool = False,
        state_key: str | None = None,
    ) -> list[JobHandle]:
        """Submits one job for each row of arguments, many of them to a round trip: see `submit`.

        `keys` are one for each row. When this returns, the broker has them all. Where a row cannot be sent or is
        refused, the error is raised, and rows before it may have been accepted. Where an ingest takes no more for now
        (QuotaExceeded, Overloaded), it goes on trying until nothing was accepted for 30 s.
        """
        terms = asked(priority, device, delay_s, deadline_s, limit_s, must_meet=must_meet, state_key=state_key)
        return self._connection.submit(kernel, rows, terms, keys, patient=True)

    def job(self, job_id: str) -> JobHandle:
        """The handle of a job by its id, whoever submitted it."""
        return JobHandle(job_id, None, self._connection)

    def map(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        window: int = 1000,
        priority: int | None = None,
        device: str | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
        limit_s: float | None = None,
        must_meet: bool = False,
        state_key: str | None = None,
    ) -> Generator[JobHandle, None, None]:
        """Submits a job for each row as there is room, and hands out each job once it has ended, in any order.

        `rows` may be endless: they are taken as they are needed, and at most `window` jobs are under way or ended and
        not yet handed out. Each handle has the number of its row in `row`, and its result at hand: `result()` does
        not wait. A job that failed is handed out like any other, and its `result()` raises; so is a row that cannot be
        sent or that the ingest refuses (its id is then known to nobody else).

        Nothing is submitted before the first is asked for. Rows are taken in the caller's thread: while a row is slow
        to come, so is what has ended. Over HTTP a job that outlives its request (1 s) is looked at by turns, and
        handed out up to 2 s after it ended. Leaving early (`close()`, or dropping the iterator) forgets what is under
        way; those jobs run on. So does every error that is raised here: the rows' own, BrokerUnavailable after 30 s
        (over HTTP at once where rows are just being sent), and over HTTP UnknownKernel, and QuotaExceeded or Overloaded
        where for 30 s no row was accepted and no job ended.
        """
        terms = asked(priority, device, delay_s, deadline_s, limit_s, must_meet=must_meet, state_key=state_key)
        return self._connection.map(kernel, rows, terms, window)

    def cancel(self, job_id: str) -> bool:
        """Asks for a job to be cancelled, whoever submitted it; False where it has ended, and its result stands.

        After True, whoever holds the job ends it: one that waits in its lane, the router or the parking at once, one on
        a device's queue when its turn comes, and a running kernel where it looks.
        Then `result()` raises JobCancelled; but a job may still end by itself before that.
        Over HTTP raises UnknownJob where nothing is known of the id; straight to the broker nobody can say that.
        """
        return self._connection.cancel(job_id)

    def events(
        self, since: str | None = None, *, job: str | None = None, timeout: float | None = None
    ) -> Generator[CloudEvent, None, None]:
        """What happens to every job, device and router, as it happens.

        `since` is the id of the last event seen, to go on exactly after it; `"0"` for the oldest that is kept; None
        for what happens after this call. `job` leaves only the events whose `subject` it is. Ends after `timeout`
        seconds without an event (over HTTP no less than half a second); never by itself without one.

        The stream is limited. Where events after `since` are not kept any more, an event of the type
        `io.lepton.events.missed.v1` comes before the first that is. While the broker or the ingest is away it is
        tried again for 30 s, and nothing is lost by that; then BrokerUnavailable is raised.

        The iterator has a connection of its own, which is closed with it (`close()`, or when it is dropped).
        Raises InvalidArguments where `since` is no place in the stream.
        """
        return self._connection.events(None if since is None else Cursor.parse(since), job, timeout)

    def devices(self) -> list[Announcement]:
        """Every worker that is alive: its device, slots, measured peaks and kernels."""
        return self._connection.announcements()

    def kernels(self) -> dict[str, KernelSpec]:
        """Every kernel that a live worker announces, by name."""
        specs = {spec.name: spec for each in self._connection.announcements() for spec in each.kernels}
        return dict(sorted(specs.items()))

    def quarantined(self) -> list[Quarantined]:
        """The kernels that devices may not run, since what they computed differed: by kernel and device."""
        return self._connection.quarantined()

    def lift(self, kernel: str, device: str) -> bool:
        """Lets a device, or a kind of device, run a kernel again, from its workers' next heartbeat on.

        False where that was not quarantined; an ingest raises OptionNotSupported, as this is the broker's to say.
        """
        return self._connection.lift(kernel, device)

    def state(self, kernel: str, state_key: str) -> State | None:
        """What the last job of a state key has left, by name, for this client's tenant; None where there is nothing.

        An ingest raises OptionNotSupported, as this is the broker's to say.
        """
        return self._connection.state(kernel, checked_key(state_key))

    def forget(self, kernel: str, state_key: str) -> bool:
        """Drops what the last job of a state key has left, so that the next one begins anew; False where it is nothing.

        A job that is under way meanwhile runs once more, from nothing.
        """
        return self._connection.forget(kernel, checked_key(state_key))

    def dead(self, *, limit: int = 100, job: str | None = None) -> list[DeadLetter]:
        """The newest jobs that were given up, newest first: they killed their workers, or their retries are used up.

        `job` leaves only one: a job's id, or the entry of a dead letter.
        """
        if limit < 1:
            raise InvalidArguments(f"limit is 1 or more, not {limit}", "limit")
        return self._connection.dead(limit, job)

    def replay(self, ids: Iterable[str] = (), *, all: bool = False) -> Settled:  # noqa: A002 - as the command line
        """Runs dead letters once more: these, by entry or job id, or `all`. Returns how many, and why others were not.

        Each goes back to its lane once, however many ask for it, and begins anew: no attempt or retry is used up, its
        old error is forgotten, and a deadline that it had holds no more. What was to follow it in a chain or a chord
        has failed already. Left are those that nobody can read, and those whose job, or another of the same key, has
        ended otherwise since or is open.
        """
        return self._connection.replay(those(ids, all))

    def purge(self, ids: Iterable[str] = (), *, all: bool = False) -> Settled:  # noqa: A002
        """Throws dead letters away: these, by entry or job id, or `all`. Their jobs keep their error."""
        return self._connection.purge(those(ids, all))

    def accounts(self) -> Accounts:
        """Where every accepted job is, or how it ended, at one moment: a `difference` other than 0 is a defect."""
        return self._connection.accounts()

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(url: str | None, direct: Callable[[str], C], remote: Callable[[str], C]) -> C:
    """Whichever of the two the address asks for; InvalidSettings or NoBroker where it asks for neither."""
    url = url or os.environ.get("LEPTON_REDIS_URL")
    if not url:
        raise NoBroker(
            "no address: pass Client('http://localhost:8780') where `lepton up` runs, else "
            "Client('redis://host:6379/0'), or set LEPTON_REDIS_URL"
        )
    try:
        parts = urlsplit(url)
        scheme, _ = parts.scheme, parts.port
        if scheme in _DIRECT:
            return direct(url)
        if scheme in _REMOTE:
            return remote(url)
    except ValueError as error:  # what stands before the @ is a secret
        raise InvalidSettings(f"{url.rpartition('@')[2]!r} is not an address: {error}", "url") from None
    raise InvalidSettings(f"an address is one of {', '.join((*_DIRECT, *_REMOTE))}, not {url!r}", "url")


def checked_key(state_key: str) -> str:
    """A state key; OptionNotSupported where none could be so."""
    Options(state_key=state_key).checked()
    return state_key


def asked(
    priority: int | None,
    device: str | None,
    delay_s: float | None,
    deadline_s: float | None,
    limit_s: float | None,
    *,
    must_meet: bool = False,
    state_key: str | None = None,
) -> Terms:
    """What a caller of either client asks; OptionNotSupported names what is out of range."""
    options = Options(priority=priority, device=device, limit_s=limit_s, must_meet=must_meet, state_key=state_key)
    return Terms(options, delay_s, deadline_s).checked()


def ring_bytes() -> int:
    """What the large arrays of a client's open jobs may take of the memory that it shares with workers of its host."""
    name = "LEPTON_RING_BYTES"
    return Settings.read({name: os.environ[name]} if name in os.environ else {}).ring_bytes


def _direct(url: str, tenant: str | None) -> _Connection:
    from lepton_ai.direct import Direct  # redis-py is loaded only by those who talk to the broker

    return Direct(url, new_id(), tenant, ring_bytes())


def _remote(url: str, tenant: str | None) -> _Connection:
    from lepton_ai.remote import Remote  # and httpx by those who talk HTTP

    return Remote(url, tenant)
