"""The asynchronous client's way straight to the broker. One task pops the results of everybody who waits."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from lepton_ai import blob, cancellation, carried, topology, wire
from lepton_ai.accounts import ASK, Accounts, accounts_of, sizes_command
from lepton_ai.async_events import AsyncEvents, EventWays
from lepton_ai.async_flight import AsyncFlight, Part, Rows, cancelled
from lepton_ai.async_handle import AsyncJobHandle
from lepton_ai.dead import DeadLetter, Settled, Steps, listed, purge, replay
from lepton_ai.device import Announcement, read_workers, worker_keys
from lepton_ai.direct_protocol import (
    CONNECTION,
    FIRST_LOOK_S,
    KEYED_BYTES,
    LAST_LOOK_S,
    PIECE_BYTES,
    POP_AT_ONCE,
    Keyed,
    Lookout,
    answered_to,
    bytes_of,
    key_commands,
    keyed,
    look_commands,
    push,
    read_final,
    read_finals,
    read_look,
    read_replies,
    unknown,
    writer,
)
from lepton_ai.errors import BrokerUnavailable
from lepton_ai.event import Cursor
from lepton_ai.event_stream import Follower, follow, follow_job
from lepton_ai.flight import MOST_TOGETHER, part
from lepton_ai.identity import ids
from lepton_ai.job import Meta, Placement
from lepton_ai.parcel import Blobs, Message, has_blobs
from lepton_ai.patience import Patience
from lepton_ai.quarantine import Quarantined, field
from lepton_ai.quarantine import read as read_quarantine
from lepton_ai.terms import Terms

__all__ = ["AsyncDirect", "settled"]

T = TypeVar("T")

#: Commands at once; further ones wait for a connection.
_CONNECTIONS: Final = 16
#: Who shares our memory is asked so long before it is not known any more.
_EARLY_S: Final = 2.5

Tell = Callable[[Meta | Exception], None]


class AsyncDirect:
    """A connection to the broker for submitting, waiting and looking, for one event loop."""

    def __init__(self, url: str, client_id: str, tenant: str | None = None, ring_bytes: int = 0) -> None:
        self._url = url
        self._client_id = client_id
        self._tenant = tenant
        self._reply_to = topology.reply(client_id)
        pool = redis.BlockingConnectionPool.from_url(url, max_connections=_CONNECTIONS, timeout=None, **CONNECTION)
        self._redis: Any = redis.Redis.from_pool(pool)
        self._replies: Any = redis.Redis.from_url(url, **CONNECTION)
        self._blobs = Blobs(ring_bytes)
        self._pending: weakref.WeakValueDictionary[str, AsyncJobHandle] = weakref.WeakValueDictionary()
        #: Who is told of a job's record, or why it will not come.
        self._listeners: defaultdict[str, list[Tell]] = defaultdict(list)
        self._lookout = Lookout()
        self._pumping: asyncio.Task[None] | None = None
        self._ways = EventWays()
        self._was_there = False

    async def submit(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        terms: Terms,
        keys: Sequence[str] | None = None,
        *,
        patient: bool = False,
    ) -> list[AsyncJobHandle]:
        """Publishes one job a row, many in a command; when this returns, the broker has them all.

        Patience is for an ingest that refuses what is too much: nobody does that here.
        """
        terms = answered_to(terms, self._reply_to)
        handles: list[AsyncJobHandle] = []
        if keys is not None:
            known: dict[str, AsyncJobHandle] = {}
            ready = keyed(kernel, rows, keys, terms, self._tenant, self._blobs)
            for jobs in wire.batches(ready, KEYED_BYTES, bytes_of):
                handles += [known.setdefault(job.id, AsyncJobHandle(job.id, kernel, self)) for job in jobs]
                await self._push_keyed(terms, jobs, known)
            return handles

        def messages() -> Iterator[Message]:
            write = writer(kernel, terms, self._tenant, self._blobs)
            for row, job_id in zip(rows, ids(), strict=False):  # in this order: an id carries the moment of its row
                message = write(job_id, row)
                self._pending[job_id] = handle = AsyncJobHandle(job_id, kernel, self)
                handles.append(handle)
                yield message

        published = 0
        try:
            for batch in wire.batches(messages(), PIECE_BYTES):
                published += len(batch)  # or so it may be, from here on
                await self._push(terms, batch)
        except BaseException:
            for job in handles[published:]:
                self._blobs.free(job.id)
            raise
        return handles

    def map(self, kernel: str, rows: Rows, terms: Terms, window: int) -> AsyncGenerator[AsyncJobHandle, None]:
        """One job a row, handed out as they end."""
        terms = answered_to(terms, self._reply_to)
        flight = AsyncFlight(window, lambda: self._blobs.full)
        write, fresh_ids = writer(kernel, terms, self._tenant, self._blobs), ids()

        def told(job: AsyncJobHandle, found: Meta | Exception) -> None:
            if isinstance(found, Exception):
                flight.fail(found)
            else:
                flight.end(job)

        def begin(number: int, row: Mapping[str, Any]) -> Part:
            job, data = part(AsyncJobHandle(next(fresh_ids), kernel, self, number), row, write)
            if data:
                self._pending[job.id] = job
                self._listen(job.id, partial(told, job))
            return job, data

        async def send() -> None:
            patience = Patience(was_there=self._was_there)
            try:
                while True:
                    messages = [data for _, data in await flight.batch(MOST_TOGETHER, PIECE_BYTES)]
                    while messages:  # perhaps more than once: a job that runs twice ends once
                        try:
                            await self._push(terms, messages)
                            patience.renew()
                            break
                        except BrokerUnavailable as error:
                            await asyncio.sleep(patience.spend(error).seconds)
            finally:
                for job in flight.unsent():
                    self._blobs.free(job.id)

        def forget(job: AsyncJobHandle) -> None:
            self._listeners.pop(job.id, None)

        return flight.jobs(rows, begin, [send], forget)

    async def wait(self, job: AsyncJobHandle, timeout_s: float | None) -> Meta | None:
        """See JobReader."""
        if self._pending.get(job.id) is not job:  # another client's, or a second handle: only the key tells it
            return await self._poll(job.id, timeout_s)
        future: asyncio.Future[Meta | Exception] = asyncio.get_running_loop().create_future()

        def tell(found: Meta | Exception) -> None:
            if not future.done():
                future.set_result(found)

        self._listen(job.id, tell)
        try:
            async with asyncio.timeout(timeout_s):
                found = await future
        except TimeoutError:
            return await self._final(job.id)
        finally:
            self._unlisten(job.id, tell)
        if isinstance(found, Exception):
            raise BrokerUnavailable(f"the result cannot be waited for: {found}") from found
        return found

    async def look(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        """See JobReader."""
        return read_look(job_id, await self._all(look_commands(job_id), transaction=False))

    async def cancel(self, job_id: str) -> bool:
        """See JobReader."""
        if await self._final(job_id) is not None:
            return False
        await self._all(cancellation.mark([job_id], self._client_id), transaction=True)
        return True

    def events(self, since: Cursor | None, job: str | None, timeout_s: float | None) -> AsyncEvents:
        """What happens, over a connection of its own."""
        return self._following(follow(since, job=job, timeout_s=timeout_s))

    def follow(self, job_id: str, timeout_s: float | None) -> AsyncEvents:
        """See JobReader."""
        return self._following(follow_job(job_id, timeout_s=timeout_s))

    async def announcements(self) -> list[Announcement]:
        """Every worker that is alive, in the order of their devices' names, and its state."""
        with self._asking():
            holders = await self._redis.smembers(topology.HOLDERS)
            values = await self._redis.mget(worker_keys(holders))
        return read_workers(values)

    async def dead(self, limit: int, job: str | None) -> list[DeadLetter]:
        with self._asking():
            return await settled(self._redis, listed(limit=limit, job=job))

    async def replay(self, ids: Iterable[str] | None) -> Settled:
        with self._asking():
            return await settled(self._redis, replay(ids))

    async def purge(self, ids: Iterable[str] | None) -> Settled:
        with self._asking():
            return await settled(self._redis, purge(ids))

    async def quarantined(self) -> list[Quarantined]:
        """The kernels that devices may not run."""
        (found,) = await self._all([("HGETALL", topology.QUARANTINE)], transaction=False)
        return read_quarantine(found)

    async def lift(self, kernel: str, device: str) -> bool:
        """Lets a device run a kernel again; False where that was not quarantined."""
        (gone,) = await self._all([("HDEL", topology.QUARANTINE, field(kernel, device))], transaction=False)
        return bool(gone)

    async def state(self, kernel: str, state_key: str) -> carried.State | None:
        """What the last job of a state key left."""
        key = topology.carried(topology.lane(self._tenant), kernel, state_key)
        (value,) = await self._all([("HGET", key, "value")], transaction=False)
        return carried.read(value)

    async def forget(self, kernel: str, state_key: str) -> bool:
        """Drops that; False where there is none."""
        key = topology.carried(topology.lane(self._tenant), kernel, state_key)
        (gone,) = await self._all([("DEL", key)], transaction=False)
        return bool(gone)

    async def accounts(self) -> Accounts:
        """Where every accepted job is, or how it ended."""
        (listed_functions,) = await self._all([ASK], transaction=False)
        (flat,) = await self._all([sizes_command(listed_functions)], transaction=False)
        return accounts_of(flat)

    async def close(self) -> None:
        self._blobs.close()
        if self._pumping is not None:
            await cancelled([self._pumping])
        await self._ways.close_all()
        await self._replies.aclose()
        await self._redis.aclose()

    async def _push(self, terms: Terms, messages: Sequence[Message]) -> None:
        writes, commands, kept = push(messages, terms, self._tenant)
        for each in writes:
            await self._all(each, transaction=False)
        if len(commands) > 1:
            blob.require_published((await self._all(commands, transaction=True))[:kept])
        else:
            with self._asking():
                await self._redis.execute_command(*commands[0])
        if any(map(has_blobs, messages)):
            await self._prepare()

    async def _prepare(self) -> None:
        """Asks the broker for what has to be known before the next array goes into the ring, where that is time.

        A row is written without waiting for anybody, so the first array after a while goes to the broker.
        """
        try:
            if self._blobs.is_stale(_EARLY_S):
                self._blobs.learn(await self.announcements())
            if commands := self._blobs.doubtful():
                self._blobs.answered(commands, await self._all(commands, transaction=False))
        except BrokerUnavailable:  # whoever needs it more will say so
            pass

    async def _push_keyed(self, terms: Terms, jobs: list[Keyed], handles: Mapping[str, AsyncJobHandle]) -> None:
        """Publishes those jobs that the broker does not have: all in one step with their keys, or none."""
        names = [topology.key(each.id) for each in jobs]
        with self._asking():
            async with self._redis.pipeline(transaction=True) as pipeline:
                while True:
                    await pipeline.watch(*names)
                    fresh = unknown(jobs, await pipeline.mget(names))
                    if not fresh:
                        return
                    writes, commands, kept = push([each.message for each in fresh], terms, self._tenant)
                    for each_write in writes:
                        await self._all(each_write, transaction=False)
                    pipeline.multi()
                    for command in commands + key_commands(fresh):
                        pipeline.execute_command(*command)
                    for each in fresh:  # its reply may come before the answer to this does
                        self._pending[each.id] = handles[each.id]
                    try:
                        blob.require_published((await pipeline.execute())[:kept])
                        return
                    except redis.WatchError:  # somebody brings one of them at this moment, or the connection broke
                        for each in fresh:
                            if self._pending.get(each.id) is handles[each.id]:
                                del self._pending[each.id]

    async def _all(self, commands: Iterable[tuple[Any, ...]], *, transaction: bool) -> list[Any]:
        with self._asking():
            async with self._redis.pipeline(transaction=transaction) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return await pipeline.execute()  # type: ignore[no-any-return]

    async def _final(self, job_id: str) -> Meta | None:
        with self._asking():
            found = await self._redis.get(topology.result(job_id))
        if (meta := read_final(found)) is not None:
            self._blobs.free(job_id)
        return meta

    async def _poll(self, job_id: str, timeout_s: float | None) -> Meta | None:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause, patience = FIRST_LOOK_S, Patience(was_there=self._was_there)
        while True:
            try:
                if (meta := await self._final(job_id)) is not None:
                    return meta
            except BrokerUnavailable as error:
                await asyncio.sleep(patience.spend(error, deadline).seconds)
                continue
            patience.renew()
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return None
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, LAST_LOOK_S)

    # -- results ------------------------------------------------------------------------------------------------

    def _listen(self, job_id: str, tell: Tell) -> None:
        loop = asyncio.get_running_loop()
        self._listeners[job_id].append(tell)
        self._lookout.add(job_id, loop.time())
        if self._pumping is None or self._pumping.done():
            self._pumping = loop.create_task(self._pump())
            self._pumping.add_done_callback(self._pump_ended)

    def _unlisten(self, job_id: str, tell: Tell) -> None:
        if tell in (others := self._listeners.get(job_id, [])):
            others.remove(tell)
            if not others:
                del self._listeners[job_id]

    async def _pump(self) -> None:
        """Hands out results for as long as anybody waits for one."""
        loop = asyncio.get_running_loop()
        patience = Patience(was_there=True)  # it has taken the jobs that are waited for
        while self._listeners:
            due = self._lookout.due(loop.time(), self._listeners)
            pause_s = self._lookout.pause_s(loop.time())
            try:
                with self._asking():
                    found = await self._redis.mget([topology.result(job_id) for job_id in due]) if due else ()
                    self._settle(read_finals(due, found))
                    popped = await self._replies.blmpop(pause_s, 1, self._reply_to, direction="LEFT", count=POP_AT_ONCE)
                    self._settle(read_replies(popped))
            except BrokerUnavailable as error:
                await asyncio.sleep(patience.spend(error).seconds)
            else:
                patience.renew()

    def _settle(self, metas: Sequence[Meta]) -> None:
        self._blobs.settle(metas)
        for meta in metas:
            if (job := self._pending.pop(meta.task_id, None)) is not None:
                job.meta = meta
            for tell in self._listeners.pop(meta.task_id, ()):
                tell(meta)

    def _pump_ended(self, pumping: asyncio.Task[None]) -> None:
        """Tells everybody who still waits why that is in vain."""
        error = BrokerUnavailable("the client was closed") if pumping.cancelled() else pumping.exception()
        if isinstance(error, Exception):
            listeners, self._listeners = self._listeners, defaultdict(list)
            for tell in (each for those in listeners.values() for each in those):
                tell(error)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with _broker_errors():
            yield
        self._was_there = True

    def _following(self, follower: Follower) -> AsyncEvents:
        return AsyncEvents(follower, _Way(self._url), self._ways)


async def settled(client: Any, steps: Steps[T]) -> T:
    """The outcome of steps over the dead letters. Raises redis-py's errors."""
    async with client.pipeline(transaction=True) as pipeline:
        answer: Any = None
        try:
            while True:
                step = steps.send(answer)
                if not pipeline.watching:
                    await pipeline.watch(topology.DEAD)
                if step.watch:
                    await pipeline.watch(*step.watch)
                if step.transaction:
                    pipeline.multi()
                    for each in step.commands:
                        pipeline.execute_command(*each)
                    try:
                        answer = await pipeline.execute()
                    except redis.WatchError:
                        answer = None
                else:
                    answer = [await pipeline.execute_command(*each) for each in step.commands]
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]


class _Way:
    """See EventWay."""

    def __init__(self, url: str) -> None:
        self._redis: Any = redis.Redis.from_url(url, **CONNECTION, retry=Retry(NoBackoff(), 0))

    async def perform(self, step: Any) -> Any:
        with _broker_errors():
            return await self._redis.execute_command(*step)

    async def close(self) -> None:
        await self._redis.aclose()


@contextmanager
def _broker_errors() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise BrokerUnavailable(f"the broker cannot be reached or refuses: {error}") from error
