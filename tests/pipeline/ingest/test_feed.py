from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from lepton_ai import event, topology
from lepton_ai.errors import BrokerUnavailable, InvalidArguments, Unavailable
from lepton_ai.event import TYPES, CloudEvent, Cursor, Event
from pipeline.ingest import feed as feed_module
from pipeline.ingest.feed import Feed, Wanted
from pipeline.ingest.redispy import end
from queues.connection import Connection

Found = TypeVar("Found")
ALL = Wanted()
MISSED = "io.lepton.events.missed.v1"


def emit(connection: Connection, *events: Event) -> str:
    """One entry of the stream; its id."""
    added: bytes = connection.call("XADD", topology.EVENTS, "*", event.FIELD, event.encode(*events))
    return added.decode()


def placed(*jobs: str) -> Event:
    return Event("job.placed", "router-1", jobs=jobs, data={"seconds": [1.0] * len(jobs)})


def ended(*jobs: str) -> Event:
    return Event("job.succeeded", "worker-1", "test.double", "cpu", jobs)


def beat() -> Event:
    return Event("device.heartbeat", "worker-1", device="cpu", data={"state": {"load": 0.5}})


def some(connection: Connection) -> None:
    """Entries of one to seven CloudEvents, of one and of several Events."""
    for at in range(12):
        jobs = [f"job-{at}-{number}" for number in range(1 + at % 4)]
        emit(connection, *([beat()] if at % 3 == 0 else []), placed(*jobs), *([ended(*jobs[:2])] if at % 2 else []))


def parse(text: bytes) -> list[CloudEvent]:
    """The CloudEvents of server-sent events, each message checked against its data."""
    found = []
    for block in text.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if "data" in lines:
            each = msgspec.json.decode(lines["data"], type=CloudEvent)
            assert (each.id, each.type) == (lines["id"], lines["event"])
            found.append(each)
    return found


def with_feed(url: str, work: Callable[[Feed], Awaitable[Found]], *, fetching: bool = True) -> Found:
    async def run() -> Found:
        feed = Feed(url)
        task = asyncio.create_task(feed.run() if fetching else asyncio.sleep(0))
        try:
            async with asyncio.timeout(20):
                return await work(feed)
        finally:
            await end([task])
            await feed.close()

    return asyncio.run(run())


@asynccontextmanager
async def following(feed: Feed, since: str | None, wanted: Wanted = ALL, **more: Any) -> AsyncIterator[Reader]:
    told = feed.follow(None if since is None else Cursor.parse(since), wanted, **more)
    async with contextlib.aclosing(told):
        assert await anext(told) == b""
        yield Reader(told)


class Reader:
    def __init__(self, told: AsyncGenerator[bytes, None]) -> None:
        self.told = told
        self.text = b""

    async def take(self, count: int) -> list[CloudEvent]:
        """All that has come, once it is `count` CloudEvents."""
        while len(found := parse(self.text)) < count:
            self.text += await anext(self.told)
        return found

    async def quiet(self, seconds: float = 0.1) -> bool:
        """Whether nothing comes for a while; the stream cannot be read on after that."""

        async def hear() -> None:
            while not parse(await anext(self.told)):
                pass

        hearing = asyncio.create_task(hear())
        done, _ = await asyncio.wait([hearing], timeout=seconds)
        await end([hearing])
        return not done

    async def rest(self) -> list[CloudEvent]:
        async for text in self.told:
            self.text += text
        return parse(self.text)


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 - what it waits for tells nobody
        await asyncio.sleep(0.005)


def ids(events: list[CloudEvent]) -> list[str]:
    return [each.id for each in events]


# -- exactness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["from the stream", "from the shared entries"])
def test_resumed_anywhere_even_within_an_entry_nothing_is_missed_or_repeated(
    broker_url: str, connection: Connection, shared: bool
) -> None:
    async def work(feed: Feed) -> None:
        async with following(feed, "0") as keeper:  # while somebody reads, the latest entries are kept
            if shared:
                await until(lambda: feed._recent_since is not None)
            some(connection)
            everything = await keeper.take(46)
            if shared:
                feed._read = None  # type: ignore[assignment,method-assign]
            assert (len(feed._recent) > 0) == shared
            assert ids(everything) == sorted(set(ids(everything)), key=Cursor.parse)
            for at, each in enumerate(everything):
                async with following(feed, each.id) as reader:
                    assert await reader.take(45 - at) == everything[at + 1 :]
                    assert await reader.quiet(0.002)

    with_feed(broker_url, work, fetching=shared)


def test_behind_a_stream_entry_comes_the_next_one(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        first, second = emit(connection, placed("a", "b")), emit(connection, placed("c"))
        async with following(feed, first) as reader:
            assert ids(await reader.take(1)) == [f"{second}.0"]

    with_feed(broker_url, work)


def test_without_a_cursor_it_begins_with_what_happens_once_it_is_open(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        emit(connection, placed("before"))
        async with following(feed, None) as reader:
            emit(connection, placed("after"))
            assert [each.subject for each in await reader.take(1)] == ["after"]

    with_feed(broker_url, work)


def test_a_comment_comes_at_once_with_the_place_to_go_on_from(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        entry = emit(connection, placed("a", "b"))
        async with following(feed, None) as reader:
            assert await anext(reader.told) == f": connected\nid: {entry}\n\n".encode()
        async with following(feed, f"{entry}.0") as reader:
            assert await anext(reader.told) == f": connected\nid: {entry}.0\n\n".encode()

    with_feed(broker_url, work)


def test_everybody_is_told_everything_and_entries_are_fetched_once(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        async with following(feed, None) as one, following(feed, None) as two, following(feed, None) as three:
            await until(lambda: feed._recent_since is not None)
            some(connection)
            first, *others = await asyncio.gather(one.take(46), two.take(46), three.take(46))
            assert others == [first, first]
        assert reads(connection) < 2 * 12 + 10

    connection.call("CONFIG", "RESETSTAT")
    with_feed(broker_url, work)


def reads(connection: Connection) -> int:
    lines = connection.call("INFO", "commandstats").decode().splitlines()
    return sum(int(line.split("calls=")[1].split(",")[0]) for line in lines if line.startswith("cmdstat_xr"))


def test_an_entry_that_nobody_can_read_is_passed_over(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        async with following(feed, None) as reader:
            connection.call("XADD", topology.EVENTS, "*", "e", b"\xc1")
            connection.call("XADD", topology.EVENTS, "*", "other", b"x")
            odd = Event("job.placed", "r", jobs=("a",), data={"seconds": 7})
            connection.call("XADD", topology.EVENTS, "*", "e", event.encode(odd))
            emit(connection, Event("job.placed\r\nid: 7\n\ndata: {}", "r", jobs=("two\n\nlines",)))
            (told,) = await reader.take(1)
            assert (told.type.count("\n"), told.subject) == (3, "two\n\nlines")

    def strict(text: bytes) -> list[CloudEvent]:
        data = [line[6:] for line in text.split(b"\n") if line.startswith(b"data: ")]
        return [msgspec.json.decode(each, type=CloudEvent) for each in data]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "parse", strict)
        with_feed(broker_url, work)


# -- filters ----------------------------------------------------------------------------------------------------


def test_only_what_is_wanted_is_told(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        emit(connection, beat(), placed("a", "b"), ended("a"))
        emit(connection, beat(), placed("c"))
        emit(connection, ended("b", "c"))
        for types, job, expected in [
            ("job.placed", None, ["placed a", "placed b", "placed c"]),
            (
                "job.placed, device.heartbeat",
                None,
                ["heartbeat cpu", "placed a", "placed b", "heartbeat cpu", "placed c"],
            ),
            (None, "b", ["placed b", "succeeded b"]),
            ("job.succeeded", "a", ["succeeded a"]),
            (None, "cpu", []),
        ]:
            async with following(feed, "0", Wanted.parse(types, job)) as reader:
                found = await reader.take(len(expected))
                assert [f"{each.type.split('.')[3]} {each.subject}" for each in found] == expected
                assert await reader.quiet(0.02)

    with_feed(broker_url, work)


def test_a_type_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(InvalidArguments, match=r"'job\.lost'.*job\.accepted") as raised:
        Wanted.parse("job.placed,job.lost", None)
    assert raised.value.field == "types"
    assert Wanted.parse(",".join(TYPES), "") == Wanted(frozenset(TYPES))


# -- what is no longer kept -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["", ".0"])
def test_what_was_trimmed_is_told_first_and_the_rest_after_it(
    broker_url: str, connection: Connection, number: str
) -> None:
    async def work(feed: Feed) -> None:
        entries = [emit(connection, placed(f"job-{at}", "x")) for at in range(10)]
        connection.call("XTRIM", topology.EVENTS, "MAXLEN", 4)
        async with following(feed, entries[2] + number, Wanted(job="job-7")) as reader:
            gap, rest = await reader.take(2)
            assert (gap.type, gap.id, gap.data) == (MISSED, entries[2], {"after": entries[2], "first": entries[6]})
            assert rest.subject == "job-7"
        for kept in (entries[6], entries[6] + ".0", "0", entries[9]):
            async with following(feed, kept) as reader:
                emit(connection, placed("new"))
                assert MISSED not in {each.type for each in await reader.take(1)}

    with_feed(broker_url, work)


def test_whoever_is_overtaken_by_the_trimming_is_told_and_goes_on(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        async with following(feed, None) as slow, following(feed, None) as quick:
            emit(connection, placed("one"))
            (one,) = await slow.take(1)
            for at in range(100):
                emit(connection, placed(f"job-{at}"))
            await quick.take(101)
            feed._recent, feed._recent_since = [], None  # as if far more had come
            connection.call("XTRIM", topology.EVENTS, "MAXLEN", 10)
            _, gap, *rest = await slow.take(12)
            assert (gap.type, gap.data["after"]) == (MISSED, one.id.partition(".")[0])
            assert [each.subject for each in rest] == [f"job-{at}" for at in range(90, 100)]

    with_feed(broker_url, work)


def test_the_shared_reader_is_not_fooled_by_a_gap(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        async with following(feed, None) as reader:
            await until(lambda: feed._recent_since is not None)
            emit(connection, placed("one"))
            await reader.take(1)
            adds = [("XADD", topology.EVENTS, "*", "e", event.encode(placed(f"job-{at}"))) for at in range(50)]
            connection.many([("MULTI",), *adds, ("XTRIM", topology.EVENTS, "MAXLEN", 2), ("EXEC",)])
            _, gap, *rest = await reader.take(4)
            assert (gap.type, [each.subject for each in rest]) == (MISSED, ["job-48", "job-49"])

    with_feed(broker_url, work)


@pytest.mark.parametrize("since", ["18446744073709551615-18446744073709551615", "9999999999999-5.3"])
def test_a_cursor_beyond_the_end_waits_for_what_comes_after_it(
    broker_url: str, connection: Connection, since: str
) -> None:
    async def work(feed: Feed) -> None:
        async with following(feed, since) as reader:
            emit(connection, placed("a"))
            assert await reader.quiet(0.1)

    with_feed(broker_url, work)


# -- readers ----------------------------------------------------------------------------------------------------


def test_a_slow_reader_holds_little_up_nobody_and_misses_nothing(
    broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_RECENT_BYTES", 50_000)
    jobs, entries = 64, 300

    async def work(feed: Feed) -> None:
        async with following(feed, None) as slow, following(feed, None) as quick:
            await until(lambda: feed._recent_since is not None)
            assert b": connected" in await anext(slow.told)  # and then it does not read on
            await asyncio.to_thread(
                connection.many,
                [
                    ("XADD", topology.EVENTS, "*", "e", event.encode(placed(*(f"{at}-{n}" for n in range(jobs)))))
                    for at in range(entries)
                ],
            )
            seen = 0
            while seen < jobs * entries:
                seen += (await anext(quick.told)).count(b"data: ")
                assert sum(len(entry.raw) for entry in feed._recent) <= 50_000
                held: Any = slow.told.ag_frame.f_locals.get("entries")  # type: ignore[attr-defined]
                assert len(held or []) <= 32
            found = b""
            while found.count(b"data: ") < jobs * entries:
                part = await anext(slow.told)
                assert len(part) < 100_000
                found += part
            assert [each.subject for each in parse(found)] == [
                f"{at}-{n}" for at in range(entries) for n in range(jobs)
            ]

    with_feed(broker_url, work)


def test_a_silent_stream_is_kept_alive_and_moves_its_client_on(
    broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_KEEP_ALIVE_S", 0.1)

    async def work(feed: Feed) -> None:
        async with following(feed, None, Wanted(job="mine")) as reader:
            assert b": connected" in await anext(reader.told)
            assert b": keep-alive" in await anext(reader.told)
            last = ""
            for _ in range(10):  # what is not wanted does not keep it alive
                last = emit(connection, beat())
                await asyncio.sleep(0.02)
            heard = [await anext(reader.told), await anext(reader.told)]
            assert heard[1] == f": keep-alive\nid: {last}\n\n".encode()

    with_feed(broker_url, work)


def test_the_last_reader_closes_the_connections(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        def connected() -> int:
            return int(connection.call("CLIENT", "LIST").count(b"name=lepton-ingest-events"))

        async with following(feed, None) as reader, following(feed, None):
            emit(connection, placed("a"))
            await reader.take(1)
            assert connected() > 0
        assert feed.readers == 0
        await until(lambda: connected() == 0)
        async with following(feed, None) as reader:
            emit(connection, placed("b"))
            await reader.take(1)

    with_feed(broker_url, work)


def test_more_readers_than_there_may_be_are_sent_away(
    broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_MOST_READERS", 2)

    async def work(feed: Feed) -> None:
        async with following(feed, None):
            async with following(feed, None):
                with pytest.raises(Unavailable):
                    await anext(feed.follow(None, ALL))
            async with following(feed, None):
                pass

    with_feed(broker_url, work)


def test_stopping_ends_every_stream_at_once(broker_url: str) -> None:
    async def work(feed: Feed) -> None:
        async with following(feed, None) as one, following(feed, "0") as two:
            both = asyncio.gather(one.rest(), two.rest())
            await asyncio.sleep(0.05)
            feed.stop()
            async with asyncio.timeout(0.5):
                assert not any(await both)

    with_feed(broker_url, work)


# -- the broker is away -----------------------------------------------------------------------------------------


def test_without_a_broker_no_stream_is_opened(tmp_path: Path) -> None:
    async def work(feed: Feed) -> None:
        with pytest.raises(BrokerUnavailable):
            await anext(feed.follow(None, ALL))
        assert feed.readers == 0

    with_feed(f"unix://{tmp_path}/none.sock", work)


def test_a_stream_outlives_its_connections_and_goes_on_from_its_cursor(
    broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_RETRY_S", 0.05)

    async def work(feed: Feed) -> None:
        async with following(feed, None) as one, following(feed, None) as two:
            expected = []
            reading = asyncio.gather(one.take(60), two.take(60))
            for at in range(60):
                expected.append(f"{emit(connection, placed(f'job-{at}'))}.0")
                if at % 7 == 0:
                    connection.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await asyncio.sleep(0.01)
            assert [ids(found) for found in list(await reading)] == [expected, expected]

    with_feed(broker_url, work)


# -- one job ----------------------------------------------------------------------------------------------------


def test_the_events_of_a_job_end_behind_its_last_one(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        async def has_ended() -> bool:
            return False

        emit(connection, placed("mine", "other"))
        async with following(feed, "0", Wanted(job="mine"), ended=has_ended) as reader:
            rest = asyncio.create_task(reader.rest())
            await asyncio.sleep(0.05)
            emit(connection, ended("other"))
            emit(connection, ended("mine"), placed("mine"))
            assert [each.type for each in await rest] == ["io.lepton.job.placed.v1", "io.lepton.job.succeeded.v1"]

    with_feed(broker_url, work)


def test_of_a_job_whose_last_event_is_gone_what_is_left_is_told(broker_url: str, connection: Connection) -> None:
    async def work(feed: Feed) -> None:
        async def has_ended() -> bool:
            return True

        emit(connection, ended("mine"))
        for _ in range(100):
            emit(connection, placed("mine", "other"))
        connection.call("XTRIM", topology.EVENTS, "MAXLEN", 70)
        async with following(feed, "0", Wanted(job="mine"), ended=has_ended) as reader:
            assert len(await reader.rest()) == 70

    with_feed(broker_url, work)


def test_where_a_jobs_last_event_may_have_been_missed_it_is_looked_for_at_once(
    broker_url: str, connection: Connection
) -> None:
    async def work(feed: Feed) -> None:
        looks = iter([False, True])

        async def has_ended() -> bool:
            return next(looks)

        first = emit(connection, placed("mine"))
        emit(connection, ended("mine"))
        emit(connection, beat())
        connection.call("XTRIM", topology.EVENTS, "MAXLEN", 1)
        async with following(feed, first, Wanted(job="mine"), ended=has_ended) as reader, asyncio.timeout(5):
            assert [each.type for each in await reader.rest()] == [MISSED]

    with_feed(broker_url, work)


def test_a_job_that_ends_unseen_is_looked_for(
    broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "_KEEP_ALIVE_S", 0.1)

    async def work(feed: Feed) -> None:
        looked = 0

        async def has_ended() -> bool:
            nonlocal looked
            looked += 1
            if looked == 2:
                raise BrokerUnavailable("away")
            return looked > 3

        async with following(feed, None, Wanted(job="mine"), ended=has_ended) as reader:
            assert await reader.rest() == []
        assert looked == 4

    with_feed(broker_url, work)
