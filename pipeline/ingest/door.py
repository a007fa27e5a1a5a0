"""Accepting over the broker: specs to check against, jobs onto the lane, answers to those who wait or ask."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import redis.asyncio as redis
import structlog

from lepton_ai import cancellation, idempotency, topology, wire
from lepton_ai.accounts import Accounts, accounts_of
from lepton_ai.async_direct import settled
from lepton_ai.carried import check_state
from lepton_ai.dead import DeadLetter, Settled, Steps, listed, purge, replay
from lepton_ai.device import Announcement, read_workers, worker_keys
from lepton_ai.errors import BrokerUnavailable, LeptonError, TooLarge, UnknownJob, UnknownKernel
from lepton_ai.event import FINAL_EVENTS, Cursor
from lepton_ai.identity import made_at, new_id, new_ids
from lepton_ai.job import ENDED, FINAL_STATES, Meta, Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.remote import JobRequest, JobView
from lepton_ai.settings import Settings
from lepton_ai.signature import Signature, shapes_of
from lepton_ai.terms import Terms, check_tenant
from pipeline.ingest import functions, metrics
from pipeline.ingest.admission import Admission, Arrival
from pipeline.ingest.feed import Feed, Wanted
from pipeline.ingest.outlook import Outlook
from pipeline.ingest.redispy import broker_errors, end
from pipeline.ingest.replies import Replies
from pipeline.ingest.view import Known, find, placed, view

__all__ = ["Door"]

T = TypeVar("T")

_REFRESH_S = 1.0
_LOOK_EVERY_S = (0.05, 1.0)
#: Connections of one ingest, and how long a request waits for one.
_CONNECTIONS, _CONNECTION_S = 32, 10
_FIND_AT_ONCE = 256
#: An id carries its maker's clock, an event the broker's: so far apart they may be for a job's first event to be found.
_CLOCKS_APART_S = 10.0

log = structlog.get_logger()


class Door:
    """One ingest's connection to the broker. Every method raises BrokerUnavailable while it is out of reach."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._limit_bytes = settings.body_limit_bytes
        # Requests wait for a connection rather than fail; replies come over one that they cannot take away.
        times: Any = {"socket_timeout": 30, "socket_connect_timeout": 2}
        pool = redis.BlockingConnectionPool.from_url(url, max_connections=_CONNECTIONS, timeout=_CONNECTION_S, **times)
        self._redis: Any = redis.Redis(connection_pool=pool)
        self._closing = False
        self._source = f"ingest-{new_id()}"
        self._events_kept = settings.events_kept
        self.feed = Feed(url)
        self.replies = Replies(redis.Redis.from_url(url, **times), self._source)
        self._outlook = Outlook(self._redis)
        self._admission = Admission(self._redis, settings, self._source)
        self._kernels: dict[str, tuple[KernelSpec, Signature]] = {}
        """Every kernel ever seen: one whose workers are just restarting is still accepted, and parked."""

    @asynccontextmanager
    async def open(self, _: object = None) -> AsyncIterator[None]:
        """Refreshes what is announced and hands out replies until it is closed."""
        tasks = [asyncio.create_task(each) for each in (self._refresh_always(), self.replies.run(), self.feed.run())]
        try:
            yield
        finally:
            await end(tasks)
            await self._redis.aclose()
            await self._redis.connection_pool.disconnect()
            await self.replies.close()
            await self.feed.close()

    def stop_waiting(self) -> None:
        """Answers everybody who waits with what is known now and ends every stream, so that the service can end."""
        self._closing = True
        self.feed.stop()
        self.replies.cancel()

    async def accept(self, requests: Sequence[JobRequest], wait_s: float, tenant: str | None = None) -> list[JobView]:
        """Checks every job, then publishes all of them; a list is accepted whole or not at all.

        Waits up to `wait_s` seconds for the results. Raises what is wrong with the first job that does not fit, with
        its `index`. A job whose key is known already is not published again, and answered as it stands.
        """
        jobs = await self._arrivals(requests, tenant)
        ids = [job.id for job in jobs]
        async with self._published(jobs, tenant, is_waited_for=wait_s > 0) as (waiters, known):
            if waiters:
                await asyncio.wait(waiters.values(), timeout=wait_s)
        done = {job_id: each.result() for job_id, each in waiters.items() if each.done() and not each.cancelled()}
        standing = await self._known(sorted(known - done.keys())) | await placed(self._redis, done)
        return [
            view(job_id, request.kernel, *standing.get(job_id, (None, None)))
            for job_id, request in zip(ids, requests, strict=True)
        ]

    async def accept_each(
        self, requests: Sequence[JobRequest], wait_s: float, tenant: str | None = None
    ) -> AsyncGenerator[list[tuple[int, JobView]], None]:
        """As `accept`, but tells of each job, with its index, when it ends; after `wait_s` of the others as they stand.

        First yields [], once all are accepted; only until then does it raise.
        """
        jobs = await self._arrivals(requests, tenant)
        ids = [job.id for job in jobs]
        ended: asyncio.Queue[int] = asyncio.Queue()
        async with self._published(jobs, tenant, is_waited_for=True) as (waiters, _):
            for index, job_id in enumerate(ids):
                waiters[job_id].add_done_callback(functools.partial(_put, ended, index))
            yield []
            left, deadline = set(range(len(ids))), asyncio.get_running_loop().time() + wait_s
            while left and not self._closing:
                try:
                    async with asyncio.timeout_at(deadline):
                        now = [await ended.get()]
                except TimeoutError:
                    break
                now += [ended.get_nowait() for _ in range(ended.qsize())]
                told = [each for each in now if not waiters[ids[each]].cancelled()]
                left.difference_update(told)
                if told:
                    known = await placed(self._redis, {ids[each]: waiters[ids[each]].result() for each in told})
                    yield [(each, view(ids[each], requests[each].kernel, *known[ids[each]])) for each in told]
        rest = sorted(left)
        for at in range(0, len(rest), _FIND_AT_ONCE):
            some = rest[at : at + _FIND_AT_ONCE]
            found = await self._known([ids[each] for each in some])
            yield [(each, view(ids[each], requests[each].kernel, *found[ids[each]])) for each in some]

    async def cancel(self, job_id: str, wait_s: float) -> JobView:
        """Asks whoever holds a job to end it, unless it has ended; then as `look`."""
        found = await self.look(job_id, 0)
        if found.state in ENDED:
            return found
        async with broker_errors(), self._redis.pipeline(transaction=True) as pipeline:
            for command in cancellation.mark([job_id], self._source, events_kept=self._events_kept):
                pipeline.execute_command(*command)
            await pipeline.execute()
        return await self.look(job_id, wait_s) if wait_s > 0 else found

    async def job_events(self, job_id: str, since: Cursor | None) -> AsyncGenerator[bytes, None] | None:
        """The events of a job, to be read as `Feed.follow`'s; None where `since` stands behind its last one.

        From its beginning where `since` is None. UnknownJob where nothing is known of the job.
        """
        await self.look(job_id, 0)
        if since is not None:
            seen = await self.feed.event_at(since)
            if seen is not None and seen.subject == job_id and seen.type in FINAL_EVENTS:
                return None

        async def ended() -> bool:
            try:
                return (await self.look(job_id, 0)).state in ENDED
            except UnknownJob:  # its result has expired
                return True

        start, was_kept = since, True
        if start is None:
            made = made_at(job_id)
            start = Cursor() if made is None else Cursor(max(0, round((made - _CLOCKS_APART_S) * 1000)))
            was_kept = made is not None and await self.feed.has_forgotten(Cursor(round(made * 1000)))
        told = self.feed.follow(start, Wanted(job=job_id), ended, was_kept=was_kept)
        await anext(told)
        return told

    async def look(self, job_id: str, wait_s: float) -> JobView:
        """One job as it stands, at the latest after `wait_s` seconds; UnknownJob where nothing is known of it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        pause_s = _LOOK_EVERY_S[0]
        with self.replies.waiting([job_id]) as waiters:
            while True:
                found = (await find(self._redis, [job_id]))[job_id]
                if isinstance(found, UnknownJob):
                    raise found
                meta, placement = found
                left = deadline - loop.time()
                if left <= 0 or self._closing or (meta is not None and meta.status in FINAL_STATES):
                    break
                # Our own jobs' replies wake us; another door's job is looked for now and then.
                await asyncio.wait(waiters.values(), timeout=min(left, pause_s))
                pause_s = min(2 * pause_s, _LOOK_EVERY_S[1])
        if meta is None and placement is None and not await self._has_key(job_id):
            raise UnknownJob(f"no job {job_id!r}: the id is wrong, or its result has expired", "id")
        if placement is None and meta is not None and meta.lepton is not None:
            placement = meta.lepton.placement
        return view(job_id, placement.kernel if placement else "", meta, placement)

    async def dead(self, limit: int, after: str | None, job: str | None) -> list[DeadLetter]:
        """The newest dead letters: see `lepton_ai.dead`."""
        return await self._settled(listed(limit=limit, after=after, job=job))

    async def dead_letter(self, entry: str) -> DeadLetter:
        """One of them, by its entry or its job's id; UnknownJob where there is none."""
        for each in await self.dead(1, None, entry):
            return each
        raise UnknownJob(f"no dead letter is {entry!r}", "entry")

    async def replay(self, ids: list[str] | None) -> Settled:
        """Runs dead letters once more, all of them for None."""
        return await self._settled(replay(ids))

    async def purge(self, ids: list[str] | None) -> Settled:
        """Throws dead letters away, all of them for None."""
        return await self._settled(purge(ids))

    async def _settled(self, steps: Steps[T]) -> T:
        async with broker_errors():
            return await settled(self._redis, steps)

    async def accounts(self) -> Accounts:
        """Where every accepted job is, or how it ended, at one moment."""
        async with broker_errors():
            return accounts_of(await functions.call(self._redis, "sizes", read=True))

    async def metrics(self) -> bytes:
        """The accounts, the lanes and the regret, for Prometheus."""
        lanes, regret = await metrics.lanes(self._redis), await metrics.regret(self._redis)
        return metrics.text(await self.accounts(), lanes, regret)

    async def announcements(self) -> list[Announcement]:
        """Every worker that is alive, and its state."""
        async with broker_errors():
            holders = await self._redis.smembers(topology.HOLDERS)
            values = await self._redis.mget(worker_keys(holders))
        return read_workers(values)

    async def kernels(self) -> list[KernelSpec]:
        """Every kernel that has been announced, by name."""
        await self._refresh()
        return [self._kernels[name][0] for name in sorted(self._kernels)]

    async def ping(self) -> None:
        """Returns where the broker answers, and is as durable as it should be."""
        async with broker_errors():
            await self._redis.ping()
            await self._admission.ready()

    # -- accept -------------------------------------------------------------------------------------------------

    async def _arrivals(self, requests: Sequence[JobRequest], tenant: str | None) -> list[Arrival]:
        """The jobs of a request, each checked and ready to be published."""
        check_tenant(tenant)
        checked = [await self._check(request, index, tenant) for index, request in enumerate(requests)]
        lane, fresh = topology.lane(tenant), iter(new_ids(len(requests)))
        jobs = []
        for index, (request, terms) in enumerate(zip(requests, checked, strict=True)):
            with _of(index):
                fingerprint, job_id = b"", next(fresh)
                if request.key is not None:
                    job_id = idempotency.job_id(request.key, tenant)
                    fingerprint = idempotency.fingerprint(request.kernel, request.arguments, request.device)
                options = terms.options
                message = wire.envelope(job_id, request.kernel, request.arguments, options, lane=lane, **terms.times())
                # What JSON said in few characters may be long in a message, and the worker has the same limit.
                if (size := len(message) * 3 // 4) > self._limit_bytes:
                    raise TooLarge(f"job {index} has about {size} bytes, the limit is {self._limit_bytes}")
            jobs.append(Arrival(job_id, request.kernel, options.urgency, message, request.key, fingerprint))
        return jobs

    async def _check(self, request: JobRequest, index: int, tenant: str | None) -> Terms:
        with _of(index):
            options = Options(
                priority=request.priority,
                device=request.device,
                reply_to=self.replies.name,
                shapes=shapes_of(request.arguments),
                result="msgpack",
                limit_s=request.limit_s,
                must_meet=bool(request.must_meet),
                state_key=request.state_key,
            )
            terms = Terms(options, request.delay_s, request.deadline_s).checked()
            spec, signature = await self._spec(request.kernel)
            check_state(request.kernel, spec.carries, request.state_key, request.arguments)
            signature.bind(request.arguments)
            if terms.options.must_meet:
                terms = await self._meeting(request, terms, tenant, index)
        return terms

    async def _meeting(self, request: JobRequest, terms: Terms, tenant: str | None, before: int) -> Terms:
        """The terms of a job that can meet its deadline: once it is accepted nobody refuses it for that any more.

        DeadlineUnattainable where it cannot, unless it is there already.
        """
        error = await self._outlook.unattainable(request.kernel, terms, before)
        is_there = error and request.key and await self._has_key(idempotency.job_id(request.key, tenant))
        if error is not None and not is_there:
            raise error
        return msgspec.structs.replace(terms, options=msgspec.structs.replace(terms.options, must_meet=False))

    async def _spec(self, kernel: str) -> tuple[KernelSpec, Signature]:
        if kernel not in self._kernels:
            await self._refresh()
        if (known := self._kernels.get(kernel)) is None:
            names = ", ".join(sorted(self._kernels))
            known_ones = f"known: {names}" if names else "no worker is online yet; `lepton doctor` says who is alive"
            raise UnknownKernel(f"no live worker announces {kernel!r}; {known_ones}", "kernel")
        return known

    @asynccontextmanager
    async def _published(
        self, jobs: Sequence[Arrival], tenant: str | None, *, is_waited_for: bool
    ) -> AsyncIterator[tuple[Mapping[str, asyncio.Future[Meta]], set[str]]]:
        """Accepts jobs; meanwhile, futures for the results of all of them, and which were there already."""
        with self.replies.waiting([job.id for job in jobs] if is_waited_for else []) as waiters:
            accepted = await self._admission.accept(jobs, tenant)
            known = {job.id for job, is_new in zip(jobs, accepted, strict=True) if not is_new}
            known -= {job.id for job, is_new in zip(jobs, accepted, strict=True) if is_new}
            watching = asyncio.create_task(self._watch(known)) if known and is_waited_for else None
            try:
                yield waiters, known
            finally:
                if watching is not None:
                    await end([watching])

    async def _watch(self, ids: set[str]) -> None:
        """Looks for the results of jobs that another door or client has published: their replies go there."""
        left, pause_s = sorted(ids), _LOOK_EVERY_S[0]
        while left:
            for job_id, (meta, _) in (await self._known(left)).items():
                if meta is not None and meta.status in FINAL_STATES:
                    self.replies.hand_out(msgspec.structs.replace(meta, task_id=job_id))
                    left.remove(job_id)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_EVERY_S[1])

    async def _known(self, ids: Sequence[str]) -> dict[str, Known]:
        """What is known of each of these jobs; nothing where that is none of ours, or the broker cannot say."""
        known: dict[str, Known] = dict.fromkeys(ids, (None, None))
        with contextlib.suppress(BrokerUnavailable):  # the jobs are accepted, and that is what must be told
            for at in range(0, len(ids), _FIND_AT_ONCE):
                found = await find(self._redis, ids[at : at + _FIND_AT_ONCE])
                known |= {job_id: each for job_id, each in found.items() if not isinstance(each, UnknownJob)}
        return known

    async def _has_key(self, job_id: str) -> bool:
        """Whether an idempotency key stands for the job: then it is there, though nobody has noted where."""
        async with broker_errors():
            return bool(await self._redis.exists(topology.key(job_id)))

    # -- in the background --------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        for each in await self.announcements():
            for spec in each.kernels:
                if spec.name not in self._kernels or self._kernels[spec.name][0] != spec:
                    with contextlib.suppress(LeptonError):  # of another release: it cannot be checked here
                        self._kernels[spec.name] = spec, spec.signature()

    async def _refresh_always(self) -> None:
        while True:
            try:
                await self._refresh()
                await self._admission.measure()
            except BrokerUnavailable as error:
                log.warning("broker_unavailable", reason=error.message)
            except Exception:  # a defect of ours must not end it: kernels announced later would never be known
                log.exception("refresh_failed")
            await asyncio.sleep(_REFRESH_S)


@contextlib.contextmanager
def _of(index: int) -> Iterator[None]:
    """What is wrong in here is wrong with the job number `index`."""
    try:
        yield
    except LeptonError as error:
        error.index = index  # type: ignore[attr-defined]
        raise


def _put(queue: asyncio.Queue[int], index: int, _: object) -> None:
    queue.put_nowait(index)
