"""What happens, told to any number of HTTP readers as server-sent events: one reader of the stream for all of them.

A reader has no buffer, only a cursor. What is new it takes from the latest entries, which are fetched and written out
once for everybody. Where it is behind those (it came with a cursor, its client is slow, the broker was away) it reads
the stream itself from its cursor, a few entries at a time. So a slow reader costs a few entries and nobody else
anything, and loses nothing until the stream is trimmed past its cursor; then it is told so (`events.missed`).
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import redis.asyncio as redis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from lepton_ai import event, topology
from lepton_ai.errors import BrokerUnavailable, InvalidArguments, Unavailable
from lepton_ai.event import FINAL_EVENTS, TYPES, CloudEvent, Cursor, Event, cloud_events, missed
from pipeline.ingest.redispy import broker_errors

__all__ = ["Feed", "Wanted"]

#: Readers at once: each may hold a few entries, and one connection of a client.
_MOST_READERS = 200
_KEEP_ALIVE_S = 15.0
_RETRY_S = 0.5
_BLOCK_MS = 250
#: Connections to the broker: one that waits for what comes next, the others for readers that are behind.
_CONNECTIONS = 5
#: What is kept for readers that are up to date. Written out, an entry is about ten times as large.
_RECENT_ENTRIES, _RECENT_BYTES = 1024, 2 * 1024 * 1024
#: What one reader takes at a time, and writes at a time.
_ENTRIES_AT_ONCE, _BYTES_AT_ONCE = 32, 64 * 1024
_CHUNK_BYTES = 64 * 1024
_START = Cursor()

log = structlog.get_logger()


class Wanted(msgspec.Struct, frozen=True):
    """Which events a reader asked for."""

    types: frozenset[str] = frozenset()
    """As in the table of lepton_ai/event.py; none for all."""
    job: str | None = None

    @classmethod
    def parse(cls, types: str | None, job: str | None) -> Wanted:
        """What a query asks for; InvalidArguments names a type that does not exist."""
        names = frozenset(name for part in (types or "").split(",") if (name := part.strip()))
        if unknown := names.difference(TYPES):
            raise InvalidArguments(f"no type of event: {min(unknown)[:60]!r}; known: {', '.join(TYPES)}", "types")
        return cls(names, job or None)

    def covers(self, each: Event, subject: str) -> bool:
        """Whether an Event, as it concerns one subject, is wanted."""
        return (not self.types or each.type in self.types) and (
            self.job is None or (subject == self.job and bool(each.jobs))
        )

    def may_cover(self, entry: _Entry) -> bool:
        """False where nothing of the entry can be wanted, without decoding it: ids stand in it as they are."""
        return self.job is None or self.job.encode("utf-8", "replace") in entry.raw


class _Message(NamedTuple):
    event: Event
    told: CloudEvent
    text: bytes


class _Entry:
    """One entry of the stream; what it tells is written out when somebody first wants it."""

    def __init__(self, entry_id: bytes, fields: Any) -> None:
        self.id = entry_id.decode()
        self.cursor = Cursor.parse(self.id)
        self.raw: bytes = (fields or {}).get(event.FIELD, b"")

    @cached_property
    def messages(self) -> list[_Message]:
        try:
            events = event.decode(self.raw)
            owners = [each for each in events for _ in each.jobs or (None,)]
            told = cloud_events(self.id, events)
            return [_Message(owner, each, _sse(each)) for owner, each in zip(owners, told, strict=True)]
        except Exception as error:  # noqa: BLE001 - whoever writes to the broker must not end everybody's stream
            log.warning("event_unreadable", entry=self.id, reason=f"{type(error).__name__}: {error}")
            return []

    def after(self, cursor: Cursor, wanted: Wanted) -> Iterator[_Message]:
        """What is wanted of it and stands behind the cursor."""
        if not wanted.may_cover(self):
            return iter(())
        messages = self.messages
        if cursor.entry == self.id:
            unseen = sum(1 for _ in cursor.unseen(message.told for message in messages))
            messages = messages[len(messages) - unseen :]
        return (message for message in messages if wanted.covers(message.event, message.told.subject))


class Feed:
    """The event stream of one broker for the readers of one ingest."""

    def __init__(self, url: str) -> None:
        # Readers try again by themselves: a connection that did would hold up their keep-alives and the end of service.
        once: Any = {"retry": Retry(NoBackoff(), 0), "socket_timeout": 5, "socket_connect_timeout": 2}
        pool = redis.BlockingConnectionPool.from_url(
            url, max_connections=_CONNECTIONS, timeout=5, client_name="lepton-ingest-events", **once
        )
        self._redis: Any = redis.Redis(connection_pool=pool)
        self._needed = asyncio.Event()
        """There are readers."""
        self._news = asyncio.Event()
        """Set, and replaced, whenever readers should look again."""
        self._closing = False
        self._recent: list[_Entry] = []
        self._recent_since: Cursor | None = None
        """`_recent` is all that came after this; None while nobody fetches."""
        self.readers = 0

    async def run(self) -> None:
        """Fetches what is new for as long as there are readers; for ever."""
        while True:
            await self._needed.wait()
            try:
                await self._fetch()
                if not self.readers:
                    self._needed.clear()
                    await self._redis.connection_pool.disconnect(inuse_connections=False)
            except BrokerUnavailable as error:
                log.warning("broker_unavailable", reason=error.message)
                await asyncio.sleep(_RETRY_S)
            except Exception:  # a defect of ours must not end it: every reader would wait for ever
                log.exception("feed_failed")
                await asyncio.sleep(_RETRY_S)
            finally:
                self._recent, self._recent_since = [], None

    def stop(self) -> None:
        """Ends every stream."""
        self._closing = True
        self._wake()

    async def close(self) -> None:
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def follow(
        self,
        since: Cursor | None,
        wanted: Wanted,
        ended: Callable[[], Awaitable[bool]] | None = None,
        *,
        was_kept: bool = True,
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events behind a cursor, or from now on. First yields b"": it is open, and will raise no more.

        With `ended` (whether the wanted job has) it stops behind the job's last event, or where that came no more.
        `was_kept`: `since` stood in the stream, so where that begins later by now, something was missed.
        Raises BrokerUnavailable, and Unavailable where there are too many readers already.
        """
        if self.readers >= _MOST_READERS:
            raise Unavailable(f"{_MOST_READERS} clients follow the events of this ingest already")
        loop = asyncio.get_running_loop()
        self.readers += 1
        self._needed.set()
        try:
            until = await self._newest() if ended is not None and await ended() else None
            cursor = since if since is not None else await self._newest()
            was_kept = was_kept and cursor > _START
            yield b""
            yield _comment("connected", cursor)
            quiet_at = check_at = loop.time() + _KEEP_ALIVE_S
            while not self._closing:
                news, look_at, buffer = self._news, quiet_at, bytearray()
                try:
                    entries, first = await self._after(cursor)
                except BrokerUnavailable:
                    entries, first, look_at = [], None, loop.time() + _RETRY_S
                if was_kept and first is not None:
                    buffer += _sse(missed(cursor, first))
                    check_at = 0.0  # the job's last event may be among what was missed
                up_to_date = not entries
                while entries:
                    entry = entries.pop(0)
                    for message in entry.after(cursor, wanted):
                        buffer += message.text
                        if ended is not None and message.told.type in FINAL_EVENTS:
                            yield bytes(buffer)
                            return
                        if len(buffer) >= _CHUNK_BYTES:
                            yield bytes(buffer)
                            buffer.clear()
                            quiet_at = loop.time() + _KEEP_ALIVE_S
                    cursor, was_kept = entry.cursor, True
                if buffer:
                    yield bytes(buffer)
                    quiet_at = loop.time() + _KEEP_ALIVE_S
                if until is not None and cursor >= until:
                    return
                if ended is not None and until is None and loop.time() >= check_at:
                    until, check_at = await self._end(ended), loop.time() + _KEEP_ALIVE_S
                elif up_to_date:
                    await _wait(news, min(look_at, quiet_at))
                if loop.time() >= quiet_at and not self._closing:
                    yield _comment("keep-alive", cursor)
                    quiet_at = loop.time() + _KEEP_ALIVE_S
        finally:
            self.readers -= 1

    async def event_at(self, cursor: Cursor) -> CloudEvent | None:
        """The CloudEvent that the cursor stands behind, if it is kept."""
        async with broker_errors():
            found = await self._redis.xrange(topology.EVENTS, cursor.entry, cursor.entry)
        told = [message.told for each in found for message in _Entry(*each).messages]
        return next((each for each in told if Cursor.parse(each.id) == cursor), None)

    async def has_forgotten(self, cursor: Cursor) -> bool:
        """Whether entries behind the cursor may have been trimmed: the stream begins later, and not by itself."""
        async with broker_errors():
            oldest = await self._redis.xrange(topology.EVENTS, count=1)
            if not oldest or _Entry(*oldest[0]).cursor <= cursor:
                return False
            stream = await self._redis.xinfo_stream(topology.EVENTS)
        return bool(stream["entries-added"] > stream["length"])

    # -- reading ------------------------------------------------------------------------------------------------

    async def _fetch(self) -> None:
        """Keeps `_recent` complete from now on, until there are no readers or something may be lacking."""
        position = self._recent_since = await self._newest()
        self._wake()
        while self.readers:
            async with broker_errors():
                came = await self._redis.xread({topology.EVENTS: position.entry}, count=1, block=_BLOCK_MS)
            if not came:
                continue
            # What came is read together with what is oldest, so that nothing is trimmed between unseen.
            entries, first = await self._read(position)
            if first is not None and position > _START:
                return
            self._recent += entries
            position = entries[-1].cursor if entries else position
            self._forget()
            self._wake()

    def _forget(self) -> None:
        size, keep = 0, 0
        for entry in reversed(self._recent[-_RECENT_ENTRIES:]):
            size += len(entry.raw)
            if size > _RECENT_BYTES and keep:
                break
            keep += 1
        if gone := self._recent[: len(self._recent) - keep]:
            self._recent_since = gone[-1].cursor
            del self._recent[: len(gone)]

    async def _after(self, cursor: Cursor) -> tuple[list[_Entry], str | None]:
        """The next entries behind a cursor; and the first that is kept, where those before it are gone."""
        position = Cursor.parse(cursor.before)
        if self._recent_since is None or position < self._recent_since:
            return await self._read(cursor)
        at = bisect_right(self._recent, position, key=lambda entry: entry.cursor)
        entries, size = [], 0
        for entry in self._recent[at : at + _ENTRIES_AT_ONCE]:
            entries.append(entry)
            size += len(entry.raw)
            if size >= _BYTES_AT_ONCE:
                break
        return entries, None

    async def _read(self, cursor: Cursor) -> tuple[list[_Entry], str | None]:
        """As `_after`, from the stream itself."""
        async with broker_errors(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xrange(topology.EVENTS, count=1)
            pipeline.xrange(topology.EVENTS, min=f"({cursor.before}", count=_ENTRIES_AT_ONCE)
            oldest, found = await pipeline.execute()
        first = _Entry(*oldest[0]) if oldest else None
        lacking = first is not None and first.cursor > Cursor(cursor.milliseconds, cursor.sequence)
        return [_Entry(*each) for each in found], first.id if first is not None and lacking else None

    async def _newest(self) -> Cursor:
        async with broker_errors():
            found = await self._redis.xrevrange(topology.EVENTS, count=1)
        return _Entry(*found[0]).cursor if found else _START

    async def _end(self, ended: Callable[[], Awaitable[bool]]) -> Cursor | None:
        """Where the events of a job end that has ended; its last one came in the same step as its result."""
        try:
            return await self._newest() if await ended() else None
        except BrokerUnavailable:
            return None

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


async def _wait(news: asyncio.Event, until: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            await news.wait()


def _sse(each: CloudEvent) -> bytes:
    """One event as a message; its type is on one line whatever stands in it."""
    kind = "".join(each.type.splitlines())
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (each.id.encode(), kind.encode(), msgspec.json.encode(each))


def _comment(text: str, cursor: Cursor) -> bytes:
    """A comment with the id to go on from: a client keeps it and is told of no event."""
    place = cursor.entry if cursor.number == _START.number else f"{cursor.entry}.{cursor.number}"
    return f": {text}\nid: {place}\n\n".encode()
