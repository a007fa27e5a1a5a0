"""Accepting over the broker: specs to check against, jobs onto the lane, replies to those who wait."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import redis.asyncio as redis
import structlog

from lepton_ai import topology, wire
from lepton_ai.device import Announcement, read_leases
from lepton_ai.errors import BrokerUnavailable, LeptonError, TooLarge, UnknownJob, UnknownKernel
from lepton_ai.identity import minute_of, new_id, new_ids
from lepton_ai.job import FINAL_STATES, Meta, Options, Placement, Record, state_of
from lepton_ai.kernel import KernelSpec
from lepton_ai.remote import JobRequest, JobView
from lepton_ai.settings import Settings
from lepton_ai.signature import Signature, shapes_of

__all__ = ["Door"]

_REFRESH_S = 1.0
_LOOK_EVERY_S = (0.05, 1.0)
#: Connections of one ingest, and how long a request waits for one.
_CONNECTIONS, _CONNECTION_S = 32, 10
#: How many minutes of placements back a foreign id (one that carries no minute) is looked for.
_MINUTES_BACK = 60
_POP_AT_ONCE = 256
_POP_S = 5.0
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
        self._reply_to = topology.reply(f"ingest-{new_id()}")
        self._kernels: dict[str, tuple[KernelSpec, Signature]] = {}
        """Every kernel ever seen: one whose workers are just restarting is still accepted, and parked."""
        self._waiters: defaultdict[str, set[asyncio.Future[Meta]]] = defaultdict(set)

    @asynccontextmanager
    async def open(self, _: object = None) -> AsyncIterator[None]:
        """Refreshes what is announced and hands out replies until it is closed."""
        tasks = [asyncio.create_task(self._refresh_always()), asyncio.create_task(self._pump())]
        try:
            yield
        finally:
            running = set(tasks)
            while running:  # redis-py may swallow a cancellation while it connects, so once is not enough
                for task in running:
                    task.cancel()
                _, running = await asyncio.wait(running, timeout=0.1)
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._redis.aclose()
            await self._redis.connection_pool.disconnect()
            await self._replies.aclose()

    def stop_waiting(self) -> None:
        """Answers everybody who waits with what is known now, so that the service can end."""
        self._closing = True
        for waiters in list(self._waiters.values()):
            for future in waiters:
                future.cancel()

    async def accept(self, requests: list[JobRequest], wait_s: float) -> list[JobView]:
        """Checks every job, then publishes all of them; a list is accepted whole or not at all.

        Waits up to `wait_s` seconds for the results. Raises what is wrong with the first job that does not fit.
        """
        options = [await self._check(request, index, len(requests)) for index, request in enumerate(requests)]
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
        async with _broker_errors():
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
        async with _broker_errors():
            await self._redis.ping()

    # -- accept -------------------------------------------------------------------------------------------------

    async def _check(self, request: JobRequest, index: int, count: int) -> Options:
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
            if count > 1:
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

    async def _publish(self, ids: list[str], requests: list[JobRequest], options: list[Options]) -> None:
        messages = [
            wire.envelope(job_id, request.kernel, request.arguments, each)
            for job_id, request, each in zip(ids, requests, options, strict=True)
        ]
        for index, message in enumerate(messages):
            # What JSON said in few characters may be long in a message, and the worker has the same limit.
            if len(message) * 3 // 4 > self._limit_bytes:
                raise TooLarge(f"job {index} has about {len(message) * 3 // 4} bytes, the limit is {self._limit_bytes}")
        async with _broker_errors(), self._redis.pipeline(transaction=True) as pipeline:
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
            await pipeline.execute()

    async def _find(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        minute, now = minute_of(job_id), int(time.time()) // 60
        minutes = [minute] if minute is not None else range(now, now - _MINUTES_BACK, -1)
        async with _broker_errors(), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.get(topology.result(job_id))
            for each in minutes:
                pipeline.hget(topology.jobs(each), job_id)
            found, *placements = await pipeline.execute()
        try:
            meta = wire.read_meta(found) if found else None
            placement = next((_PLACEMENT.decode(raw) for raw in placements if raw), None)
        except (LeptonError, msgspec.DecodeError):
            raise UnknownJob(f"what is stored for {job_id!r} is no job of ours", "id") from None
        if meta is not None and meta.status == "SUCCESS" and not isinstance(meta.result, dict):
            raise UnknownJob(f"{job_id!r} is a task of Celery's own, and no job of ours", "id")
        return meta, placement

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
                async with _broker_errors():
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


@contextlib.asynccontextmanager
async def _broker_errors() -> AsyncIterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise BrokerUnavailable(f"the broker cannot be reached or refuses: {error}") from error


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
