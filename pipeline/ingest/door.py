"""Accepting over the broker: specs to check against, jobs onto the lane, replies to those who wait."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import redis.asyncio as redis
import structlog

from lepton_ai import cancellation, event, topology, wire
from lepton_ai.device import Announcement, read_leases
from lepton_ai.errors import BrokerUnavailable, LeptonError, TooLarge, UnknownJob, UnknownKernel
from lepton_ai.event import FINAL_EVENTS, Cursor, Event
from lepton_ai.identity import made_at, minute_of, new_id, new_ids
from lepton_ai.job import FINAL_STATES, Meta, Options, Placement, Record, state_of
from lepton_ai.kernel import KernelSpec
from lepton_ai.remote import JobRequest, JobView
from lepton_ai.settings import Settings
from lepton_ai.signature import Signature, shapes_of
from pipeline.ingest.feed import Feed, Wanted
from pipeline.ingest.redispy import broker_errors, end

__all__ = ["Door"]

_REFRESH_S = 1.0
_LOOK_EVERY_S = (0.05, 1.0)
#: Connections of one ingest, and how long a request waits for one.
_CONNECTIONS, _CONNECTION_S = 32, 10
#: How many minutes of placements back a foreign id (one that carries no minute) is looked for.
_MINUTES_BACK = 60
_POP_AT_ONCE = 256
_POP_S = 5.0
_FIND_AT_ONCE = 256
#: Jobs that one entry of the event stream tells of at most: whoever follows the stream holds an entry whole.
_JOBS_IN_ENTRY = 4096
#: An id carries its maker's clock, an event the broker's: so far apart they may be for a job's first event to be found.
_CLOCKS_APART_S = 10.0
_PLACEMENT = msgspec.msgpack.Decoder(Placement)

log = structlog.get_logger()


class Door:
    """One ingest's connection to the broker. Every method raises BrokerUnavailable while it is out of reach."""

    def __init__(self, settings: Settings, url: str) -> None:
        self._ttl_s = max(1, round(settings.result_ttl_s))
        self._limit_bytes = settings.body_limit_bytes
        # Requests wait for a connection rather than fail; replies come over one that they cannot take away.
        times: Any = {"socket_timeout": 30, "socket_connect_timeout": 2}
        pool = redis.BlockingConnectionPool.from_url(url, max_connections=_CONNECTIONS, timeout=_CONNECTION_S, **times)
        self._redis: Any = redis.Redis(connection_pool=pool)
        self._replies: Any = redis.Redis.from_url(url, **times)
        self._closing = False
        self._source = f"ingest-{new_id()}"
        self._reply_to = topology.reply(self._source)
        self._events_kept = settings.events_kept
        self.feed = Feed(url)
        self._kernels: dict[str, tuple[KernelSpec, Signature]] = {}
        """Every kernel ever seen: one whose workers are just restarting is still accepted, and parked."""
        self._waiters: defaultdict[str, set[asyncio.Future[Meta]]] = defaultdict(set)

    @asynccontextmanager
    async def open(self, _: object = None) -> AsyncIterator[None]:
        """Refreshes what is announced and hands out replies until it is closed."""
        tasks = [asyncio.create_task(each) for each in (self._refresh_always(), self._pump(), self.feed.run())]
        try:
            yield
        finally:
            await end(tasks)
            await self._redis.aclose()
            await self._redis.connection_pool.disconnect()
            await self._replies.aclose()
            await self.feed.close()

    def stop_waiting(self) -> None:
        """Answers everybody who waits with what is known now and ends every stream, so that the service can end."""
        self._closing = True
        self.feed.stop()
        for waiters in list(self._waiters.values()):
            for future in waiters:
                future.cancel()

    async def accept(self, requests: Sequence[JobRequest], wait_s: float) -> list[JobView]:
        """Checks every job, then publishes all of them; a list is accepted whole or not at all.

        Waits up to `wait_s` seconds for the results. Raises what is wrong with the first job that does not fit, with
        its `index`.
        """
        options = [await self._check(request, index) for index, request in enumerate(requests)]
        ids = new_ids(len(requests))
        with self._waiting(ids if wait_s > 0 else []) as waiters:
            await self._publish(ids, requests, options)
            if waiters:
                await asyncio.wait(waiters, timeout=wait_s)
        answered = (each.result() for each in waiters if each.done() and not each.cancelled())
        done = {meta.task_id: meta for meta in answered}
        return [
            _view(job_id, request.kernel, done.get(job_id), None) for job_id, request in zip(ids, requests, strict=True)
        ]

    async def accept_each(
        self, requests: Sequence[JobRequest], wait_s: float
    ) -> AsyncGenerator[list[tuple[int, JobView]], None]:
        """As `accept`, but tells of each job, with its index, when it ends; after `wait_s` of the others as they stand.

        First yields [], once all are accepted; only until then does it raise.
        """
        options = [await self._check(request, index) for index, request in enumerate(requests)]
        ids = new_ids(len(requests))
        with self._waiting(ids) as waiters:
            ended: asyncio.Queue[int] = asyncio.Queue()
            for index, waiter in enumerate(waiters):
                waiter.add_done_callback(functools.partial(_put, ended, index))
            await self._publish(ids, requests, options)
            yield []
            left, deadline = set(range(len(ids))), asyncio.get_running_loop().time() + wait_s
            while left and not self._closing:
                try:
                    async with asyncio.timeout_at(deadline):
                        now = [await ended.get()]
                except TimeoutError:
                    break
                now += [ended.get_nowait() for _ in range(ended.qsize())]
                told = [each for each in now if not waiters[each].cancelled()]
                left.difference_update(told)
                if told:
                    yield [
                        (each, _view(ids[each], requests[each].kernel, waiters[each].result(), None)) for each in told
                    ]
        rest = sorted(left)
        for at in range(0, len(rest), _FIND_AT_ONCE):
            some = rest[at : at + _FIND_AT_ONCE]
            found = await self._find_all([ids[each] for each in some])
            yield [(each, _view(ids[each], requests[each].kernel, *found[ids[each]])) for each in some]

    async def cancel(self, job_id: str, wait_s: float) -> JobView:
        """Asks whoever holds a job to end it, unless it has ended; then as `look`."""
        view = await self.look(job_id, 0)
        if view.state in FINAL_STATES.values():
            return view
        async with broker_errors(), self._redis.pipeline(transaction=True) as pipeline:
            for command in cancellation.mark([job_id], self._source, events_kept=self._events_kept):
                pipeline.execute_command(*command)
            await pipeline.execute()
        return await self.look(job_id, wait_s) if wait_s > 0 else view

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
                return (await self.look(job_id, 0)).state in FINAL_STATES.values()
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
        with self._waiting([job_id]) as waiters:
            while True:
                meta, placement = await self._find(job_id)
                left = deadline - loop.time()
                if left <= 0 or self._closing or (meta is not None and meta.status in FINAL_STATES):
                    break
                # Our own jobs' replies wake us; another door's job is looked for now and then.
                await asyncio.wait(waiters, timeout=min(left, pause_s))
                pause_s = min(2 * pause_s, _LOOK_EVERY_S[1])
        if meta is None and placement is None:
            raise UnknownJob(f"no job {job_id!r}: the id is wrong, or its result has expired", "id")
        if placement is None and meta is not None and meta.lepton is not None:
            placement = meta.lepton.placement
        return _view(job_id, placement.kernel if placement else "", meta, placement)

    async def announcements(self) -> list[Announcement]:
        """Every worker that is alive."""
        async with broker_errors():
            names = await self._redis.smembers(topology.HOLDERS)
            leases = (
                await self._redis.mget([topology.lease(name.decode(errors="replace")) for name in names])
                if names
                else []
            )
        return read_leases(leases)

    async def kernels(self) -> list[KernelSpec]:
        """Every kernel that has been announced, by name."""
        await self._refresh()
        return [self._kernels[name][0] for name in sorted(self._kernels)]

    async def ping(self) -> None:
        """Returns where the broker answers."""
        async with broker_errors():
            await self._redis.ping()

    # -- accept -------------------------------------------------------------------------------------------------

    async def _check(self, request: JobRequest, index: int) -> Options:
        try:
            options = Options(
                priority=request.priority,
                device=request.device,
                reply_to=self._reply_to,
                shapes=shapes_of(request.arguments),
                result="msgpack",
            ).checked()
            _, signature = await self._spec(request.kernel)
            signature.bind(request.arguments)
        except LeptonError as error:
            error.index = index  # type: ignore[attr-defined]
            raise
        return options

    async def _spec(self, kernel: str) -> tuple[KernelSpec, Signature]:
        if kernel not in self._kernels:
            await self._refresh()
        if (known := self._kernels.get(kernel)) is None:
            names = ", ".join(sorted(self._kernels)) or "no worker is online"
            raise UnknownKernel(f"no live worker announces {kernel!r}; known: {names}", "kernel")
        return known

    async def _publish(self, ids: list[str], requests: Sequence[JobRequest], options: list[Options]) -> None:
        messages = [
            wire.envelope(job_id, request.kernel, request.arguments, each)
            for job_id, request, each in zip(ids, requests, options, strict=True)
        ]
        for index, message in enumerate(messages):
            # What JSON said in few characters may be long in a message, and the worker has the same limit.
            if len(message) * 3 // 4 > self._limit_bytes:
                size = len(message) * 3 // 4
                error = TooLarge(f"job {index} has about {size} bytes, the limit is {self._limit_bytes}")
                error.index = index  # type: ignore[attr-defined]
                raise error
        async with broker_errors(), self._redis.pipeline(transaction=True) as pipeline:
            waiting: dict[int, dict[str, bytes]] = {}
            for job_id, request, each, message in zip(ids, requests, options, messages, strict=True):
                pipeline.lpush(topology.lane_list(each.urgency), message)
                note = Placement(job_id, request.kernel, "waiting", "waits in its lane for a router", 0.0, "")
                waiting.setdefault(minute_of(job_id) or 0, {})[job_id] = msgspec.msgpack.encode(note)
            for minute, notes in waiting.items():
                for job_id, note_bytes in notes.items():
                    # A router may have placed the job by now: its placement must stand.
                    pipeline.hsetnx(topology.jobs(minute), job_id, note_bytes)
                pipeline.expire(topology.jobs(minute), self._ttl_s)
            for at in range(0, len(ids), _JOBS_IN_ENTRY):
                told = self._accepted(ids[at : at + _JOBS_IN_ENTRY], requests[at : at + _JOBS_IN_ENTRY])
                pipeline.execute_command(
                    "XADD", topology.EVENTS, "MAXLEN", "~", self._events_kept, "*", event.FIELD, told
                )
            await pipeline.execute()

    def _accepted(self, ids: Sequence[str], requests: Sequence[JobRequest]) -> bytes:
        by_kernel: defaultdict[str, list[str]] = defaultdict(list)
        for job_id, request in zip(ids, requests, strict=True):
            by_kernel[request.kernel].append(job_id)
        return event.encode(
            *(Event("job.accepted", self._source, kernel, jobs=tuple(jobs)) for kernel, jobs in by_kernel.items())
        )

    async def _find(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        minute, now = minute_of(job_id), int(time.time()) // 60
        minutes = [minute] if minute is not None else range(now, now - _MINUTES_BACK, -1)
        async with broker_errors(), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.get(topology.result(job_id))
            for each in minutes:
                pipeline.hget(topology.jobs(each), job_id)
            found, *placements = await pipeline.execute()
        return _read(job_id, found, placements)

    async def _find_all(self, ids: Sequence[str]) -> dict[str, tuple[Meta | None, Placement | None]]:
        """As `_find`, for jobs of ours at once; nothing of each where the broker cannot say."""
        nothing: dict[str, tuple[Meta | None, Placement | None]] = dict.fromkeys(ids, (None, None))
        try:
            async with broker_errors(), self._redis.pipeline(transaction=False) as pipeline:
                for job_id in ids:
                    pipeline.get(topology.result(job_id))
                    pipeline.hget(topology.jobs(minute_of(job_id) or 0), job_id)
                found = await pipeline.execute()
        except BrokerUnavailable:
            return nothing
        return nothing | {job_id: _read(job_id, found[2 * at], [found[2 * at + 1]]) for at, job_id in enumerate(ids)}

    @contextlib.contextmanager
    def _waiting(self, ids: Iterable[str]) -> Iterator[list[asyncio.Future[Meta]]]:
        """Futures for the replies of these jobs, forgotten at the end."""
        loop = asyncio.get_running_loop()
        waiters: dict[str, asyncio.Future[Meta]] = {job_id: loop.create_future() for job_id in ids}
        for job_id, future in waiters.items():
            self._waiters[job_id].add(future)
        try:
            yield list(waiters.values())
        finally:
            for job_id, future in waiters.items():
                others = self._waiters.get(job_id)
                if others is not None:
                    others.discard(future)
                    if not others:
                        del self._waiters[job_id]

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
            except BrokerUnavailable as error:
                log.warning("broker_unavailable", reason=error.message)
            except Exception:  # a defect of ours must not end it: kernels announced later would never be known
                log.exception("refresh_failed")
            await asyncio.sleep(_REFRESH_S)

    async def _pump(self) -> None:
        """Hands each reply to the request that waits for it; the others are read from their keys when asked for."""
        while True:
            try:
                async with broker_errors():
                    popped = await self._replies.blmpop(_POP_S, 1, self._reply_to, direction="LEFT", count=_POP_AT_ONCE)
            except BrokerUnavailable:
                await asyncio.sleep(_REFRESH_S)
                continue
            for raw in popped[1] if popped else ():
                try:
                    meta = wire.read_meta(raw)
                except LeptonError as error:
                    log.error("reply_unreadable", reason=error.message)
                    continue
                for future in self._waiters.pop(meta.task_id, ()):
                    if not future.done():
                        future.set_result(meta)


def _put(queue: asyncio.Queue[int], index: int, _: object) -> None:
    queue.put_nowait(index)


def _read(job_id: str, found: bytes | None, placements: Iterable[bytes | None]) -> tuple[Meta | None, Placement | None]:
    """What is stored of a job; UnknownJob where that is none of ours."""
    try:
        meta = wire.read_meta(found) if found else None
        placement = next((_PLACEMENT.decode(raw) for raw in placements if raw), None)
    except (LeptonError, msgspec.DecodeError):
        raise UnknownJob(f"what is stored for {job_id!r} is no job of ours", "id") from None
    if meta is not None and meta.status == "SUCCESS" and not isinstance(meta.result, dict):
        raise UnknownJob(f"{job_id!r} is a task of Celery's own, and no job of ours", "id")
    return meta, placement


def _view(job_id: str, kernel: str, meta: Meta | None, placement: Placement | None) -> JobView:
    record = meta.lepton if meta is not None else None
    if record is not None and record.placement is not None:
        placement = record.placement
    if placement is not None and record is None and placement.state != "waiting":
        record = Record(placement)
    view = JobView(job_id, kernel or (placement.kernel if placement else ""), state_of(meta, placement), record=record)
    if meta is None or meta.status not in FINAL_STATES:
        return view
    if meta.status == "SUCCESS":
        return msgspec.structs.replace(view, result=_outputs(meta.result))
    return msgspec.structs.replace(view, error=record.error if record is not None else None)


def _outputs(result: Mapping[str, Any] | Any) -> dict[str, Any]:
    return {name: wire.to_value(value) for name, value in result.items()}
