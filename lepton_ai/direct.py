"""The client's way straight to the broker: envelopes onto the lane in pipelines, results from one reply list."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from lepton_ai import blob, cancellation, carried, topology, wire
from lepton_ai.accounts import ASK, Accounts, accounts_of, sizes_command
from lepton_ai.dead import DeadLetter, Settled, Steps, listed, purge, replay
from lepton_ai.device import Announcement, read_workers, worker_keys
from lepton_ai.direct_protocol import (
    CONNECTION,
    FIRST_LOOK_S,
    KEYED_BYTES,
    LAST_LOOK_S,
    LOOK_EVERY_S,
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
from lepton_ai.event import CloudEvent, Cursor
from lepton_ai.event_stream import Follower, follow, follow_job
from lepton_ai.flight import Flight, part, taken
from lepton_ai.handle import JobHandle
from lepton_ai.identity import ids
from lepton_ai.job import Meta, Placement
from lepton_ai.line import Line
from lepton_ai.packer import Packer
from lepton_ai.parcel import Blobs, Message, has_blobs
from lepton_ai.patience import Patience, Pause
from lepton_ai.quarantine import Quarantined, field
from lepton_ai.quarantine import read as read_quarantine
from lepton_ai.terms import Terms

__all__ = ["Direct"]

T = TypeVar("T")


class Direct:
    """A connection to the broker for submitting, waiting and looking. Safe for several threads."""

    def __init__(self, url: str, client_id: str, tenant: str | None = None, ring_bytes: int = 0) -> None:
        self._url = url
        self._client_id = client_id
        self._tenant = tenant
        self._reply_to = topology.reply(client_id)
        self._redis: redis.Redis = redis.Redis.from_url(url, **CONNECTION, command_packer=Packer())
        self._line = Line(self._redis)
        self._blobs = Blobs(ring_bytes)
        self._pending: weakref.WeakValueDictionary[str, JobHandle] = weakref.WeakValueDictionary()
        #: Who else is told when a job of ours has its record: the map that it belongs to.
        self._told: dict[str, Callable[[JobHandle], None]] = {}
        self._arrived = threading.Condition()
        self._popping = False
        self._was_there = False

    def submit(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        terms: Terms,
        keys: Sequence[str] | None = None,
        *,
        patient: bool = False,
    ) -> list[JobHandle]:
        """Publishes one job a row, many in a command; when this returns, the broker has them all.

        Patience is for an ingest that refuses what is too much: nobody does that here.
        """
        terms = answered_to(terms, self._reply_to)
        handles: list[JobHandle] = []
        if keys is not None:
            known: dict[str, JobHandle] = {}
            ready = keyed(kernel, rows, keys, terms, self._tenant, self._blobs)
            for jobs in wire.batches(ready, KEYED_BYTES, bytes_of):
                handles += [known.setdefault(job.id, JobHandle(job.id, kernel, self)) for job in jobs]
                self._push_keyed(terms, jobs, known)
            return handles

        def messages() -> Iterator[Message]:
            write = writer(kernel, terms, self._tenant, self._blobs, self._prepare)
            for row, job_id in zip(rows, ids(), strict=False):  # in this order: an id carries the moment of its row
                message = write(job_id, row)
                self._pending[job_id] = handle = JobHandle(job_id, kernel, self)
                handles.append(handle)
                yield message

        published = 0
        try:
            for batch in wire.batches(messages(), PIECE_BYTES):
                published += len(batch)  # or so it may be, from here on
                self._push(terms, batch)
        except BaseException:
            for job in handles[published:]:
                self._blobs.free(job.id)
            raise
        return handles

    def map(
        self, kernel: str, rows: Iterable[Mapping[str, Any]], terms: Terms, window: int
    ) -> Generator[JobHandle, None, None]:
        """One job a row, handed out as they end: by the reply list, and their keys looked at once a second."""
        flight: Flight[JobHandle] = Flight(window, self._is_full)
        return self._map(kernel, rows, answered_to(terms, self._reply_to), flight)

    def _map(
        self, kernel: str, rows: Iterable[Mapping[str, Any]], terms: Terms, flight: Flight[JobHandle]
    ) -> Generator[JobHandle, None, None]:
        lookout, patience = Lookout(), Patience(was_there=self._was_there)
        unsent: list[tuple[JobHandle, Message]] = []
        write = writer(kernel, terms, self._tenant, self._blobs, self._prepare)
        gathered: list[str] = []  # whose arrays are somewhere, and nobody knows of them yet

        def each_part() -> Iterator[tuple[JobHandle, Message]]:
            for (number, row), job_id in zip(enumerate(rows), ids(), strict=False):
                job, message = part(JobHandle(job_id, kernel, self, number), row, write)
                if has_blobs(message):
                    gathered.append(job_id)
                yield job, message

        parts, more = each_part(), True
        try:
            while True:
                yield from flight.land()
                # A push whose answer was lost may have arrived all the same, and so may all of its jobs' results.
                unsent = [(job, data) for job, data in unsent if job.meta is None]
                if more and not unsent and (room := flight.room):
                    batch = taken(parts, room, PIECE_BYTES, held=self._is_full)
                    more = bool(batch)
                    for job, _ in batch:
                        flight.start(job)
                        if job.meta is None:
                            self._pending[job.id], self._told[job.id] = job, flight.end
                            lookout.add(job.id, time.monotonic())
                    unsent = [each for each in batch if each[1]]
                    gathered.clear()
                if not flight and not more:
                    return
                now = time.monotonic()
                try:
                    if unsent:  # perhaps once more: a job that runs twice ends once
                        self._push(terms, [data for _, data in unsent])
                        unsent = []
                        self._pump(lambda: flight.landed, 0.0)  # rows that are slow to come hold up no results
                    else:
                        if more and flight.is_held:
                            self._prepare()
                        self._look_at(lookout.due(now, self._told))
                        self._pump(lambda: flight.landed, lookout.pause_s(now))
                    patience.renew()
                except BrokerUnavailable as error:
                    time.sleep(patience.spend(error).seconds)
        finally:
            for job in flight:
                self._told.pop(job.id, None)
            for job_id in gathered:
                self._blobs.free(job_id)

    def wait(self, job: JobHandle, timeout_s: float | None) -> Meta | None:
        """See JobReader."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        patience = Patience(was_there=self._was_there)
        while job.meta is None:
            try:
                if self._pending.get(job.id) is job:
                    return self._await_reply(job, deadline, patience)
                # Another client's, or a second handle: only the key tells of it.
                return self._poll(job.id, deadline, patience)
            except BrokerUnavailable as error:
                time.sleep(patience.spend(error, deadline).seconds)
        return job.meta

    def _await_reply(self, job: JobHandle, deadline: float | None, patience: Patience) -> Meta | None:
        look_at = time.monotonic() + LOOK_EVERY_S
        while job.meta is None:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return self._final(job.id)
            if now >= look_at:
                look_at = now + LOOK_EVERY_S
                if (meta := self._final(job.id)) is not None:
                    return meta
            until = look_at if deadline is None else min(look_at, deadline)
            self._pump(lambda: job.meta is not None, max(0.001, until - now))
            patience.renew()
        return job.meta

    def look(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        """See JobReader."""
        return read_look(job_id, self._all(look_commands(job_id), transaction=False))

    def cancel(self, job_id: str) -> bool:
        """See JobReader."""
        if self._final(job_id) is not None:
            return False
        self._all(cancellation.mark([job_id], self._client_id), transaction=True)
        return True

    def events(
        self, since: Cursor | None, job: str | None, timeout_s: float | None
    ) -> Generator[CloudEvent, None, None]:
        """What happens, over a connection of its own; its place in the stream is fixed when this returns."""
        return self._following(follow(since, job=job, timeout_s=timeout_s))

    def follow(self, job_id: str, timeout_s: float | None) -> Generator[CloudEvent, None, None]:
        """See JobReader."""
        return self._following(follow_job(job_id, timeout_s=timeout_s))

    def announcements(self) -> list[Announcement]:
        """Every worker that is alive, in the order of their devices' names, and its state."""
        with self._asking():
            holders: Any = self._redis.smembers(topology.HOLDERS)
            values: Any = self._redis.mget(worker_keys(holders))
        return read_workers(values)

    def dead(self, limit: int, job: str | None) -> list[DeadLetter]:
        return self._settled(listed(limit=limit, job=job))

    def replay(self, ids: Iterable[str] | None) -> Settled:
        return self._settled(replay(ids))

    def purge(self, ids: Iterable[str] | None) -> Settled:
        return self._settled(purge(ids))

    def quarantined(self) -> list[Quarantined]:
        """The kernels that devices may not run."""
        (found,) = self._all([("HGETALL", topology.QUARANTINE)], transaction=False)
        return read_quarantine(found)

    def lift(self, kernel: str, device: str) -> bool:
        """Lets a device run a kernel again; False where that was not quarantined."""
        (gone,) = self._all([("HDEL", topology.QUARANTINE, field(kernel, device))], transaction=False)
        return bool(gone)

    def state(self, kernel: str, state_key: str) -> carried.State | None:
        """What the last job of a state key left."""
        key = topology.carried(topology.lane(self._tenant), kernel, state_key)
        (value,) = self._all([("HGET", key, "value")], transaction=False)
        return carried.read(value)

    def forget(self, kernel: str, state_key: str) -> bool:
        """Drops that; False where there is none."""
        key = topology.carried(topology.lane(self._tenant), kernel, state_key)
        (gone,) = self._all([("DEL", key)], transaction=False)
        return bool(gone)

    def accounts(self) -> Accounts:
        """Where every accepted job is, or how it ended."""
        (listed_functions,) = self._all([ASK], transaction=False)
        (flat,) = self._all([sizes_command(listed_functions)], transaction=False)
        return accounts_of(flat)

    def close(self) -> None:
        self._blobs.close()
        self._redis.close()

    def _settled(self, steps: Steps[T]) -> T:
        """The outcome of steps over the dead letters."""
        with self._asking(), self._redis.pipeline(transaction=True) as pipeline:
            answer: Any = None
            try:
                while True:
                    step = steps.send(answer)
                    if not pipeline.watching:
                        pipeline.watch(topology.DEAD)  # type: ignore[no-untyped-call]
                    if step.watch:
                        pipeline.watch(*step.watch)  # type: ignore[no-untyped-call]
                    if step.transaction:
                        pipeline.multi()
                    answer = [pipeline.execute_command(*each) for each in step.commands]  # type: ignore[no-untyped-call]
                    if step.transaction:
                        try:
                            answer = pipeline.execute()
                        except redis.WatchError:
                            answer = None
            except StopIteration as ended:
                return ended.value  # type: ignore[no-any-return]

    def _push(self, terms: Terms, messages: Sequence[Message]) -> None:
        writes, commands, kept = push(messages, terms, self._tenant)
        for each in writes:
            self._all(each, transaction=False)
        with self._asking():
            if len(commands) == 1:
                self._line.ask(*commands[0])
                return
            answers = self._line.transact(commands)
        blob.require_published(answers[:kept])

    def _is_full(self) -> bool:
        return self._blobs.full

    def _prepare(self) -> None:
        """Asks the broker for what has to be known before an array goes into the ring, where that is time."""
        try:
            if self._blobs.is_stale():
                self._blobs.learn(self.announcements())
            if commands := self._blobs.doubtful():
                self._blobs.answered(commands, self._all(commands, transaction=False))
        except BrokerUnavailable:  # then it goes to the broker, or waits for it like everything else
            pass

    def _push_keyed(self, terms: Terms, jobs: list[Keyed], handles: Mapping[str, JobHandle]) -> None:
        """Publishes those jobs that the broker does not have: all in one step with their keys, or none."""
        names = [topology.key(each.id) for each in jobs]
        with self._asking(), self._redis.pipeline(transaction=True) as pipeline:
            while True:
                pipeline.watch(*names)  # type: ignore[no-untyped-call]
                found: Any = pipeline.mget(names)
                fresh = unknown(jobs, found)
                if not fresh:
                    return
                writes, commands, kept = push([each.message for each in fresh], terms, self._tenant)
                for each_write in writes:
                    self._all(each_write, transaction=False)
                pipeline.multi()
                for command in commands + key_commands(fresh):
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
                for each in fresh:  # its reply may come before the answer to this does
                    self._pending[each.id] = handles[each.id]
                try:
                    blob.require_published(pipeline.execute()[:kept])
                    return
                except redis.WatchError:  # somebody brings one of them at this moment, or the connection broke
                    for each in fresh:
                        if self._pending.get(each.id) is handles[each.id]:
                            del self._pending[each.id]

    def _all(self, commands: Iterable[tuple[Any, ...]], *, transaction: bool) -> list[Any]:
        with self._asking(), self._redis.pipeline(transaction=transaction) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            return pipeline.execute()

    def _final(self, job_id: str) -> Meta | None:
        with self._asking():
            found: Any = self._redis.get(topology.result(job_id))
        if (meta := read_final(found)) is not None:
            self._blobs.free(job_id)
        return meta

    def _look_at(self, jobs: list[str]) -> None:
        """Takes the records of these jobs from their keys, where they have ended."""
        if not jobs:
            return
        with self._asking():
            found: Any = self._redis.mget([topology.result(job_id) for job_id in jobs])
        with self._arrived:
            self._settle(read_finals(jobs, found))

    def _poll(self, job_id: str, deadline: float | None, patience: Patience) -> Meta | None:
        pause = FIRST_LOOK_S
        while (meta := self._final(job_id)) is None:
            patience.renew()
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(pause, left))
            pause = min(pause * 2, LAST_LOOK_S)
        return meta

    def _pump(self, has_arrived: Callable[[], bool], seconds: float) -> None:
        """Pops what has arrived for anybody, or waits while another thread does; does not wait for 0 seconds."""
        with self._arrived:
            if has_arrived():
                return
            if self._popping:
                self._arrived.wait(seconds)
                return
            self._popping = True
        metas: list[Meta] = []
        try:
            with self._asking():
                pop = ("BLMPOP", seconds) if seconds else ("LMPOP",)
                popped = self._line.ask(*pop, 1, self._reply_to, "LEFT", "COUNT", POP_AT_ONCE)
            metas = read_replies(popped)
        finally:
            with self._arrived:
                self._popping = False
                self._settle(metas)

    def _settle(self, metas: Sequence[Meta]) -> None:
        """Hands each record to its handle, and wakes whoever waits. The lock is held."""
        self._blobs.settle(metas)
        for meta in metas:
            handle = self._pending.pop(meta.task_id, None)
            tell = self._told.pop(meta.task_id, None)
            if handle is not None:
                handle.meta = meta
                if tell is not None:
                    tell(handle)
        self._arrived.notify_all()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with _broker_errors():
            yield
        self._was_there = True

    def _following(self, follower: Follower) -> Generator[CloudEvent, None, None]:
        events = self._drive(follower)
        next(events)  # behind OPENED: whatever happens from here on is told, and closing it closes the connection
        return events

    def _drive(self, follower: Follower) -> Generator[CloudEvent, None, None]:
        own: Any = redis.Redis.from_url(self._url, **CONNECTION, command_packer=Packer(), retry=Retry(NoBackoff(), 0))
        try:
            step = next(follower)
            while True:
                if isinstance(step, CloudEvent):
                    yield step
                    step = next(follower)
                elif isinstance(step, Pause):
                    time.sleep(step.seconds)
                    step = next(follower)
                else:
                    try:
                        with _broker_errors():
                            answer = own.execute_command(*step)
                    except BrokerUnavailable as error:
                        step = follower.throw(error)
                    else:
                        step = follower.send(answer)
        except StopIteration:
            return
        finally:
            own.close()


@contextmanager
def _broker_errors() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise BrokerUnavailable(f"the broker cannot be reached or refuses: {error}") from error
