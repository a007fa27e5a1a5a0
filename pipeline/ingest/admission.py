"""Admission: jobs onto the lane of their tenant, all of a request or none, as long as there is room for them."""

from __future__ import annotations

import asyncio
import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
import redis.asyncio as redis
import structlog

from lepton_ai import event, idempotency, topology
from lepton_ai.durability import Barrier
from lepton_ai.durability import barrier as barrier_of
from lepton_ai.errors import LeptonError, Overloaded, QuotaExceeded, TooLarge, Unavailable
from lepton_ai.event import Event
from lepton_ai.job import Placement
from lepton_ai.settings import Settings
from pipeline.ingest import functions
from pipeline.ingest.redispy import broker_errors

__all__ = ["Admission", "Arrival", "Drain"]

#: Jobs that one entry of the event stream tells of at most: whoever follows the stream holds an entry whole.
_JOBS_IN_ENTRY = 4096
#: Jobs of one request: they are accepted in one step of the broker, which does nothing else meanwhile.
_MOST_JOBS: Final = 50_000
#: How far below a limit the backlog should be when whoever was refused comes again, and how late that is at most.
_HEADROOM: Final = 0.05
_LONGEST_RETRY_AFTER_S: Final = 60
#: Requests of so many jobs at most, without keys, are accepted with those that come at the same moment: in one step,
#: which has so many jobs at most.
_FEW, _TOGETHER = 16, 1024
_ENDS: Final = ("succeeded", "failed", "cancelled", "expired", "dead")

log = structlog.get_logger()


class Arrival(msgspec.Struct, frozen=True):
    """A job that has been checked, and its message."""

    id: str
    kernel: str
    priority: int
    message: bytes
    key: str | None = None
    fingerprint: bytes = b""


class _Gathered(msgspec.Struct, eq=False):
    """A request that is accepted together with others."""

    jobs: Sequence[Arrival]
    answer: asyncio.Future[list[bool]]


class Admission:
    """What one ingest lets in."""

    def __init__(self, client: Any, settings: Settings, source: str) -> None:
        self._redis = client
        self._source = source
        self._ttl_s = max(1, round(settings.result_ttl_s))
        self._events_kept = settings.events_kept
        self._limits = (settings.waiting_jobs, settings.waiting_bytes, settings.tenant_jobs, settings.tenant_bytes)
        self._durability = settings.durability
        self._barrier: Barrier | None = None
        self._gathered: dict[str | None, list[_Gathered]] = {}
        """By tenant, what has come while the step before was under way."""
        self._steps: dict[str | None, asyncio.Task[None]] = {}
        self.drain = Drain()

    async def accept(self, jobs: Sequence[Arrival], tenant: str | None) -> list[bool]:
        """For each job whether it is new; the others are there already, with the same key and the same meaning.

        Raises KeyConflict, with the `index` of the job whose key stands for another one, QuotaExceeded or Overloaded,
        and then nothing has been accepted. After BrokerUnavailable they may have been.
        """
        if len(jobs) > _MOST_JOBS:
            raise TooLarge(f"a request has at most {_MOST_JOBS} jobs, this one {len(jobs)}")
        if not jobs:
            return []
        if len(jobs) > _FEW or any(job.key is not None for job in jobs):
            return await self._accept(jobs, tenant)
        each = _Gathered(jobs, asyncio.get_running_loop().create_future())
        self._gathered.setdefault(tenant, []).append(each)
        if tenant not in self._steps:
            self._steps[tenant] = asyncio.create_task(self._accept_gathered(tenant))
        return await each.answer

    async def _accept_gathered(self, tenant: str | None) -> None:
        """Accepts what has been gathered, step after step until there is nothing more; waits for nobody."""
        try:
            while gathered := self._gathered.pop(tenant, None):
                for some in _steps(gathered):
                    await self._accept_together(some, tenant)
        finally:
            del self._steps[tenant]

    async def _accept_together(self, gathered: Sequence[_Gathered], tenant: str | None) -> None:
        """Each request is accepted or refused whole: where there is no room for all, each is tried by itself."""
        try:
            found = await self._accept([job for each in gathered for job in each.jobs], tenant)
        except (QuotaExceeded, Overloaded) as error:
            if len(gathered) > 1:
                for each in gathered:
                    await self._accept_together([each], tenant)
                return
            _settle(gathered, error)
        except BaseException as error:  # nobody may wait for ever
            _settle(gathered, error)
            if not isinstance(error, Exception):
                raise
        else:
            accepted = iter(found)
            for each in gathered:
                own = [next(accepted) for _ in each.jobs]
                if not each.answer.done():
                    each.answer.set_result(own)

    async def _accept(self, jobs: Sequence[Arrival], tenant: str | None) -> list[bool]:
        once, places = _each_once(jobs)
        lane = topology.lane(tenant)
        told, more_told = self._told(once)
        arguments: list[Any] = [self._ttl_s, self._events_kept, *self._limits, lane, told, len(once)]
        for at, job in enumerate(once):
            arguments += (
                topology.lane_list(job.priority, lane),
                job.id,
                job.fingerprint,
                _note(job),
                more_told.get(at, b""),
                job.message,
            )
        async with broker_errors():
            try:
                keys = (topology.EVENTS, topology.LANES)
                barrier = await self.ready()
                found = await functions.call(self._redis, "accept", keys, arguments, barrier=barrier)
                if 0 in found and barrier.commands():
                    # An earlier try, whose answer was lost, may not be on the disk yet: a write behind it will show.
                    job = once[found.index(0)]
                    await functions.written(self._redis, _touch(job), barrier)
            except redis.OutOfMemoryError:
                raise self._overloaded("the broker's memory is full", "memory", 0, 0) from None
            except redis.ResponseError as error:
                refusal = self._refusal(str(error), jobs, once, tenant)
                if refusal is None:
                    raise
                raise refusal from None
        return [found[place] == 1 for place in places]

    async def ready(self) -> Barrier:
        """What an acceptance waits for. Raises redis-py's errors.

        InvalidSettings where the broker cannot be as durable as LEPTON_DURABILITY asks.
        """
        if self._barrier is None:
            self._barrier = await barrier_of(self._redis, self._durability)
        return self._barrier

    async def measure(self) -> None:
        """Looks how fast jobs end, by which is reckoned when there will be room."""
        async with broker_errors():
            counts = await self._redis.hmget(topology.COUNTERS, _ENDS)
        self.drain.observe(sum(int(count or 0) for count in counts))

    def _told(self, jobs: Sequence[Arrival]) -> tuple[bytes, dict[int, bytes]]:
        """The entries of the event stream: the last, and the others by the job that each comes with.

        A job with a key tells of itself, for only the broker knows whether it is accepted now.
        """
        others = {at: self._accepted([job]) for at, job in enumerate(jobs) if job.key is not None}
        plain = [at for at, job in enumerate(jobs) if job.key is None]
        while len(plain) > _JOBS_IN_ENTRY:
            some, plain = plain[:_JOBS_IN_ENTRY], plain[_JOBS_IN_ENTRY:]
            others[some[0]] = self._accepted([jobs[at] for at in some])
        return self._accepted([jobs[at] for at in plain]) if plain else b"", others

    def _accepted(self, jobs: Iterable[Arrival]) -> bytes:
        by_kernel: defaultdict[str, list[str]] = defaultdict(list)
        for job in jobs:
            by_kernel[job.kernel].append(job.id)
        return event.encode(
            *(Event("job.accepted", self._source, kernel, jobs=tuple(ids)) for kernel, ids in by_kernel.items())
        )

    def _refusal(
        self, text: str, jobs: Sequence[Arrival], once: Sequence[Arrival], tenant: str | None
    ) -> LeptonError | None:
        """The error that the function's answer stands for."""
        match text.split(" "):
            case ["KEYCONFLICT", number]:
                job = once[int(number)]
                return _at(idempotency.conflict(job.key or ""), jobs.index(job))
            case ["QUOTA", what, have, limit]:
                whose = "without a tenant" if tenant is None else f"of the tenant {tenant}"
                told = f"too much {whose} waits already: {_amount(what, have)}, and {_amount(what, limit)} may"
                return self._with_time(QuotaExceeded(told), what, int(have), int(limit))
            case ["OVERLOADED", "memory", have, limit]:
                told = f"the broker's memory is nearly full: {_amount('bytes', have)} of {_amount('bytes', limit)}"
                return self._overloaded(told, "memory", int(have), int(limit))
            case ["OVERLOADED", what, have, limit]:
                told = f"too much waits already: {_amount(what, have)}, and {_amount(what, limit)} may"
                return self._overloaded(told, what, int(have), int(limit))
        return None

    def _overloaded(self, told: str, what: str, have: int, limit: int) -> Unavailable:
        return self._with_time(Overloaded(told), what, have, limit)

    def _with_time(self, error: Unavailable, what: str, have: int, limit: int) -> Unavailable:
        error.retry_after_s = self.drain.until(have, limit) if what == "jobs" else 1.0
        log.info("jobs_refused", code=error.code, what=what, have=have, limit=limit, retry_after_s=error.retry_after_s)
        return error


class Drain:
    """How fast jobs end lately, in jobs a second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[float, int] | None = None
        self.rate_hz = 0.0

    def observe(self, ended: int) -> None:
        """So many jobs have ended since the counters began."""
        now = self._clock()
        if self._last is not None and now > self._last[0]:
            then, before = self._last
            rate_hz = max(0, ended - before) / (now - then)
            self.rate_hz += (rate_hz - self.rate_hz) * min(1.0, (now - then) / 10)
        self._last = now, ended

    def until(self, have: int, limit: int) -> float:
        """Seconds until a backlog has some room again: whole ones, 1 to 60."""
        excess = have - (1 - _HEADROOM) * limit
        if excess <= 0 or self.rate_hz * _LONGEST_RETRY_AFTER_S <= 0:
            return 1.0
        return float(min(_LONGEST_RETRY_AFTER_S, max(1, math.ceil(excess / self.rate_hz))))


def _steps(gathered: Sequence[_Gathered]) -> Iterator[list[_Gathered]]:
    """Requests in steps of few enough jobs."""
    some: list[_Gathered] = []
    count = 0
    for each in gathered:
        if some and count + len(each.jobs) > _TOGETHER:
            yield some
            some, count = [], 0
        some.append(each)
        count += len(each.jobs)
    yield some


def _settle(gathered: Iterable[_Gathered], error: BaseException) -> None:
    for each in gathered:
        if not each.answer.done():  # else whoever asked has gone
            if isinstance(error, Exception):
                each.answer.set_exception(copy.copy(error) if isinstance(error, LeptonError) else error)
            else:
                each.answer.cancel()


def _each_once(jobs: Sequence[Arrival]) -> tuple[list[Arrival], list[int]]:
    """The jobs without those whose key stands before them already, and the place of each job among them."""
    once: dict[str, int] = {}
    found: list[Arrival] = []
    for index, job in enumerate(jobs):
        if job.id not in once:
            once[job.id] = len(found)
            found.append(job)
        elif found[once[job.id]].fingerprint != job.fingerprint:
            raise _at(idempotency.conflict(job.key or ""), index)
    return found, [once[job.id] for job in jobs]


def _at(error: LeptonError, index: int) -> LeptonError:
    error.index = index  # type: ignore[attr-defined]
    return error


def _note(job: Arrival) -> bytes:
    """What is known of a job until a router has seen it."""
    return msgspec.msgpack.encode(Placement(job.id, job.kernel, "waiting", "waits in its lane for a router", 0.0, ""))


def _touch(job: Arrival) -> tuple[str | bytes, ...]:
    return ("SET", topology.key(job.id), job.fingerprint, "XX", "KEEPTTL")


def _amount(what: str, count: str) -> str:
    return f"{int(count) / 2**20:,.1f} MiB" if what == "bytes" else f"{int(count):,} jobs"
