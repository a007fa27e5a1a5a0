"""The AsyncClient straight on a broker, as test_client.py; each test ends with a loop that left nothing behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import numpy as np
import pytest

from lepton_ai import AsyncClient, AsyncJobHandle, bundle, event, results, topology, wire
from lepton_ai.errors import (
    BrokerUnavailable,
    InvalidArguments,
    InvalidSettings,
    JobCancelled,
    KernelFailed,
    NoBroker,
    OptionNotSupported,
    ResultTimeout,
)
from lepton_ai.event import Event, cloud_events
from lepton_ai.event_stream import MISSED
from lepton_ai.identity import minute_of
from lepton_ai.job import Meta, Placement
from queues.connection import Connection

Main = Callable[[], Coroutine[Any, Any, Any]]


@pytest.fixture
def run(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[Main], None]:
    """Runs a test on a loop of its own; fails where tasks, coroutines or connections were left behind."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append((args.exc_value, args.object)))

    def run(main: Main) -> None:
        with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.WARNING, "asyncio"):
            warnings.simplefilter("always")
            asyncio.run(main())
            gc.collect()
        left = [str(each.message) for each in warned if each.category in {ResourceWarning, RuntimeWarning}]
        logged = [each.message for each in caplog.records if each.name == "asyncio"]
        assert (left, logged, unraisable) == ([], [], [])

    return run


def waiting(connection: Connection) -> list[wire.Envelope]:
    """The messages of the lane, oldest first."""
    found = connection.call("LRANGE", topology.LANE, 0, -1)[::-1]
    return [wire.read_envelope(each) for message in found for each in bundle.singles(message)]


def reply_list(connection: Connection) -> str:
    """Where the client of the oldest waiting job waits for its results."""
    found = wire.read_options(waiting(connection)[0].headers).reply_to
    assert found is not None
    return found


def finish(connection: Connection, metas: Sequence[Meta], *, reply: str | None = None) -> None:
    """What a commit leaves: each record in its key, and on the reply list where there is one."""
    records = [(meta.task_id, results.encode(meta, "msgpack")) for meta in metas]
    commands: list[tuple[str | bytes, ...]] = [("SET", topology.result(job), record) for job, record in records]
    if reply is not None:
        commands.append(("RPUSH", reply, *(record for _, record in records)))
    connection.many(commands)


def succeeded(job: AsyncJobHandle, value: Any) -> Meta:
    return results.success(job.id, {"x": wire.to_value(value)}, None)


def cut_off(connection: Connection) -> None:
    """Breaks every connection that is not a test's own (those have names)."""
    for line in connection.call("CLIENT", "LIST", "TYPE", "NORMAL").split(b"\n"):
        if b" name= " in line:
            connection.call("CLIENT", "KILL", "ID", line.split()[0].removeprefix(b"id="))


Answer = Callable[[str, dict[str, Any]], Meta | None]


def echoed(job_id: str, arguments: dict[str, Any]) -> Meta:
    return results.success(job_id, {"x": arguments["x"]}, None)


@contextmanager
def answering(url: str, answer: Answer = echoed, *, replies: bool = True) -> Iterator[None]:
    """In the place of router and worker: takes every job of the lane and answers it."""
    stopped = threading.Event()

    def work() -> None:
        connection = Connection(url, "answering")
        while not stopped.is_set():
            taken = connection.call("BLMPOP", 0.05, 1, topology.LANE, "RIGHT", "COUNT", 100)
            for raw in (each for message in (taken[1] if taken else ()) for each in bundle.singles(message)):
                found = wire.read_envelope(raw)
                meta = answer(found.headers.id, wire.read_body(found, limit_bytes=10_000).kwargs)
                if meta is not None:
                    finish(connection, [meta], reply=wire.read_options(found.headers).reply_to if replies else None)
        connection.close()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            stopped.set()
        working.result(10)


def clients(connection: Connection) -> set[bytes]:
    """Everybody who is connected, by number."""
    return {line.split()[0] for line in connection.call("CLIENT", "LIST", "TYPE", "NORMAL").splitlines()}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what the broker knows sets no asyncio.Event
        await asyncio.sleep(0)


async def waits(connection: Connection, command: bytes = b"blmpop") -> None:
    await until(lambda: b"cmd=" + command in connection.call("CLIENT", "LIST"))


Run = Callable[[Main], None]


# -- submit and result ------------------------------------------------------------------------------------------------


def test_a_job_that_is_awaited_gives_its_result(run: Run, broker_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            job = await lepton.submit("a.b", {"x": np.arange(3)}, priority=5)
            np.testing.assert_array_equal((await job)["x"], np.arange(3))
            np.testing.assert_array_equal((await job.result(timeout=0))["x"], np.arange(3))
            assert (await job.state(), await job.done(), await job.why()) == ("succeeded", True, None)

    with answering(broker_url):
        run(main)


def test_many_jobs_wait_in_the_order_of_their_rows(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            jobs = await lepton.submit_many("a.b", ({"x": at} for at in range(1000)), device="gpu")
            assert [each.headers.id for each in waiting(connection)] == [job.id for job in jobs]
            assert await jobs[0].state() == "waiting"
            assert await lepton.submit_many("a.b", []) == []

    run(main)


def test_thousands_that_wait_cost_one_connection_that_waits(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            before = len(clients(connection))
            jobs = await lepton.submit_many("a.b", ({"x": at} for at in range(3000)))
            results = asyncio.gather(*(job.result(timeout=60) for job in jobs))
            await waits(connection)
            found = connection.call("CLIENT", "LIST")
            assert (found.count(b"cmd=blmpop"), len(clients(connection)) - before) == (1, 2)
            metas = [succeeded(job, at) for at, job in enumerate(jobs)][::-1]
            finish(connection, metas, reply=reply_list(connection))
            assert [each["x"] for each in await results] == list(range(3000))

    run(main)


def test_a_thousand_tasks_may_each_submit_and_wait(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            before = len(clients(connection))

            async def one(at: int) -> int:
                job = await lepton.submit("a.b", {"x": at})
                found: int = (await job.result(timeout=60))["x"]
                return found

            assert await asyncio.gather(*map(one, range(1000))) == list(range(1000))
            assert len(clients(connection)) - before < 20

    with answering(broker_url):
        run(main)


def test_whoever_waits_is_woken_at_once(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            job = await lepton.submit("a.b", {"x": 1})
            result = asyncio.ensure_future(job.result(timeout=10))
            await waits(connection)
            start = time.monotonic()
            finish(connection, [succeeded(job, 1)], reply=reply_list(connection))
            assert await result == {"x": 1}
            assert time.monotonic() - start < 0.5

    run(main)


def test_one_of_several_who_wait_for_a_job_may_be_cancelled(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            job, other = await lepton.submit_many("a.b", [{"x": 1}, {"x": 2}])
            results = [asyncio.ensure_future(each.result()) for each in (job, job, other)]
            await waits(connection)
            results[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await results[0]
            finish(connection, [succeeded(job, 1), succeeded(other, 2)], reply=reply_list(connection))
            assert [await each for each in results[1:]] == [{"x": 1}, {"x": 2}]

    run(main)


def test_who_was_cancelled_may_wait_again(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            job = await lepton.submit("a.b", {"x": 1})
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(job.result(), 0.01)
            assert not lepton._connection._listeners  # type: ignore[attr-defined]
            finish(connection, [succeeded(job, 1)], reply=reply_list(connection))
            assert await job.result(timeout=5) == {"x": 1}

    run(main)


def test_cancelled_commands_leave_no_answers_to_others(run: Run, broker_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            steps = random.Random(1)
            for _ in range(150):
                ask = steps.choice([lambda: lepton.submit("c.d", {"x": 1}), lepton.devices])
                asked: asyncio.Future[Any] = asyncio.ensure_future(ask())
                for _ in range(steps.randrange(12)):
                    await asyncio.sleep(0)
                asked.cancel()
                await asyncio.wait([asked])
            jobs = await lepton.submit_many("a.b", ({"x": at} for at in range(100)))
            assert [await job.state() for job in jobs] == ["waiting"] * 100
            assert await lepton.devices() == []

    run(main)


def test_a_result_that_does_not_come_in_time_raises_with_the_state(run: Run, broker_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            job = await lepton.submit("a.b", {"x": 1})
            for each in (job, lepton.job(job.id)):
                with pytest.raises(ResultTimeout, match=f"{job.id} is waiting after 0.05 s"):
                    await each.result(timeout=0.05)
                with pytest.raises(ResultTimeout):
                    await each.result(timeout=0)

    run(main)


@pytest.mark.parametrize(
    "error", [KernelFailed("by nought"), InvalidArguments("'b' is missing", "b"), JobCancelled("no")]
)
def test_a_failed_job_raises_its_own_error(
    run: Run, broker_url: str, error: KernelFailed | InvalidArguments | JobCancelled
) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            job = await lepton.submit("a.b", {"x": 1})
            with pytest.raises(type(error)):
                await job

    with answering(broker_url, lambda job_id, _: results.failure(job_id, error)):
        run(main)


def test_a_result_that_reached_its_key_alone_is_found(run: Run, broker_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            jobs = await lepton.submit_many("a.b", ({"x": at} for at in range(600)))
            assert [each["x"] for each in await asyncio.gather(*jobs)] == list(range(600))

    with answering(broker_url, replies=False):
        run(main)


def test_another_clients_job_and_a_second_handle_are_waited_for(
    run: Run, broker_url: str, connection: Connection
) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton, AsyncClient(broker_url) as other:
            job = await lepton.submit("a.b", {"x": 1})
            results = asyncio.gather(other.job(job.id), lepton.job(job.id), job)
            finish(connection, [succeeded(job, 1)], reply=reply_list(connection))
            assert await results == [{"x": 1}] * 3

    run(main)


def test_a_result_for_a_handle_that_was_dropped_disturbs_nobody(
    run: Run, broker_url: str, connection: Connection
) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            dropped, kept = await lepton.submit_many("a.b", [{"x": 1}, {"x": 2}])
            metas = [succeeded(dropped, 1), succeeded(kept, 2)]
            del dropped
            finish(connection, metas, reply=reply_list(connection))
            assert await kept.result(timeout=5) == {"x": 2}

    run(main)


def test_a_broken_connection_is_made_again_under_those_who_wait(
    run: Run, broker_url: str, connection: Connection
) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            jobs = await lepton.submit_many("a.b", ({"x": at} for at in range(20)))
            results = asyncio.gather(*jobs)
            await waits(connection)
            cut_off(connection)
            finish(connection, [succeeded(job, at) for at, job in enumerate(jobs)], reply=reply_list(connection))
            assert [each["x"] for each in await results] == list(range(20))

    run(main)


def test_whoever_waits_when_the_client_is_closed_is_told(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        lepton = AsyncClient(broker_url)
        jobs = await lepton.submit_many("a.b", [{"x": 1}, {"x": 2}])
        results = [asyncio.ensure_future(job.result()) for job in jobs]
        await waits(connection)
        await lepton.close()
        for each in results:
            with pytest.raises(BrokerUnavailable, match="the client was closed"):
                await each
        await lepton.close()

    run(main)


def test_a_loop_that_ends_under_a_client_ends_quietly(run: Run, broker_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            job = await lepton.submit("a.b", {"x": 1})
            waiting = asyncio.ensure_future(job.result())
            await asyncio.sleep(0.05)
            assert not waiting.done()
        with pytest.raises(BrokerUnavailable):
            await waiting

    run(main)


def test_leaving_closes_every_connection(run: Run, broker_url: str, connection: Connection) -> None:
    before = clients(connection)

    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            async for job in lepton.map("a.b", [{"x": 1}]):
                await job
            events = lepton.events("0")
            connection.call("XADD", topology.EVENTS, "*", "e", event.encode(Event("router.online", "r")))
            await anext(events)
            assert len(clients(connection) - before) >= 3

    with answering(broker_url):
        run(main)
    while clients(connection) != before:
        pass


# -- map --------------------------------------------------------------------------------------------------------------


async def some(count: int) -> AsyncIterator[dict[str, int]]:
    for at in range(count):
        yield {"x": at}
        await asyncio.sleep(0)


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["at hand", "to come"])
def test_each_row_comes_back_once_with_its_own_result(run: Run, broker_url: str, window: int, kind: str) -> None:
    count = 1200 if window > 1 else 60

    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            rows = some(count) if kind == "to come" else ({"x": at} for at in range(count))
            found = [
                (job.row, (await job.result(timeout=0))["x"]) async for job in lepton.map("a.b", rows, window=window)
            ]
            assert sorted(found) == [(at, at) for at in range(count)]
            assert not lepton._connection._listeners  # type: ignore[attr-defined]

    with answering(broker_url):
        run(main)


def test_no_more_than_the_window_are_under_way(run: Run, broker_url: str) -> None:
    async def main() -> None:
        taken, handed_out, most = 0, 0, 0

        def rows() -> Iterator[dict[str, int]]:
            nonlocal taken, most
            for at in itertools.count():
                taken += 1
                most = max(most, taken - handed_out)
                yield {"x": at}

        async with AsyncClient(broker_url) as lepton, aclosing(lepton.map("a.b", rows(), window=20)) as jobs:
            async for _ in jobs:
                handed_out += 1
                if handed_out == 500:
                    break
        assert most == 20

    with answering(broker_url):
        run(main)


def test_rows_that_are_slow_to_come_hold_up_nothing(run: Run, broker_url: str) -> None:
    async def main() -> None:
        handed_out = asyncio.Event()

        async def rows() -> AsyncIterator[dict[str, int]]:
            for at in range(20):
                yield {"x": at}
                await handed_out.wait()  # the next comes only once this one has been handed out
                handed_out.clear()

        async with AsyncClient(broker_url) as lepton:
            found = []
            async for job in lepton.map("a.b", rows()):
                found.append(job.row)
                handed_out.set()
            assert found == list(range(20))

    with answering(broker_url):
        run(main)


def test_failed_jobs_and_rows_that_cannot_be_sent_are_handed_out(run: Run, broker_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            rows = [{"x": 0}, {"x": object()}, {"x": 2}]
            jobs = {job.row: job async for job in lepton.map("a.b", rows)}
            assert [await jobs[row].state() for row in range(3)] == ["failed", "failed", "succeeded"]
            with pytest.raises(KernelFailed):
                await jobs[0]
            with pytest.raises(InvalidArguments):
                await jobs[1]
            (only,) = [job async for job in lepton.map("a.b", [{"x": object()}])]
            assert await only.state() == "failed"
            assert [job async for job in lepton.map("a.b", [])] == []

    def answer(job_id: str, given: dict[str, Any]) -> Meta:
        return echoed(job_id, given) if given["x"] else results.failure(job_id, KernelFailed("by nought"))

    with answering(broker_url, answer):
        run(main)


def test_mapped_results_that_reached_their_keys_alone_are_found(run: Run, broker_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            assert len([job async for job in lepton.map("a.b", some(300))]) == 300

    with answering(broker_url, replies=False):
        run(main)


@pytest.mark.parametrize("way", ["closed", "dropped", "cancelled"])
def test_leaving_a_map_early_leaves_its_jobs_and_forgets_them(run: Run, broker_url: str, way: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            jobs = lepton.map("a.b", some(100), window=10)
            await anext(jobs)
            if way == "closed":
                await jobs.aclose()
            elif way == "cancelled":
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(jobs), 0.05)
            else:
                del jobs
            await until(lambda: not lepton._connection._listeners)  # type: ignore[attr-defined]
            assert (await (await lepton.submit("a.b", {"x": 0})).result(timeout=5)) == {"x": 0}

    with answering(broker_url, lambda job_id, given: echoed(job_id, given) if given["x"] < 1 else None):
        run(main)


def test_a_connection_that_breaks_ends_neither_a_map_nor_a_wait(
    run: Run, broker_url: str, connection: Connection
) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            held = await lepton.submit("a.b", {"x": -1})
            results = asyncio.gather(held, lepton.job(held.id))
            found = {job.row async for job in lepton.map("a.b", ({"x": at} for at in range(400)), window=100)}
            assert found == set(range(400))
            finish(connection, [succeeded(held, 5)])
            assert await results == [{"x": 5}] * 2

    def answer(job_id: str, given: dict[str, Any]) -> Meta | None:
        if given["x"] % 50 == 0:
            cut_off(connection)
        return echoed(job_id, given) if given["x"] >= 0 else None

    with answering(broker_url, answer):
        run(main)


def test_an_error_of_the_rows_ends_the_map(run: Run, broker_url: str) -> None:
    async def rows() -> AsyncIterator[dict[str, int]]:
        yield {"x": 1}
        raise ZeroDivisionError

    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            with pytest.raises(ZeroDivisionError):
                async for _ in lepton.map("a.b", rows()):
                    pass

    with answering(broker_url):
        run(main)


def test_a_map_ends_with_its_client(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        lepton = AsyncClient(broker_url)
        jobs = lepton.map("a.b", [{"x": 1}])
        first = asyncio.ensure_future(anext(jobs))
        await waits(connection)
        await lepton.close()
        with pytest.raises(BrokerUnavailable, match="the client was closed"):
            await first

    run(main)


def test_maps_and_results_do_not_disturb_each_other(run: Run, broker_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:

            async def mapped(first: int) -> list[int]:
                rows = ({"x": first + at} for at in range(300))
                return sorted([(await job)["x"] async for job in lepton.map("a.b", rows, window=40)])

            async def submitted(first: int) -> list[int]:
                return [(await (await lepton.submit("a.b", {"x": first + at})))["x"] for at in range(100)]

            found = await asyncio.gather(mapped(0), mapped(1000), submitted(2000), submitted(3000))
            assert found == [
                list(range(first, first + many))
                for first, many in zip((0, 1000, 2000, 3000), (300, 300, 100, 100), strict=True)
            ]

    with answering(broker_url):
        run(main)


def test_each_job_of_a_bundle_that_was_placed_says_where_it_went_itself(
    run: Run, broker_url: str, connection: Connection
) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            jobs = await lepton.submit_many("a.b", [{"x": 1}] * 9)
            placed = Placement(jobs[0].id, "a.b", "placed", "because", 1.0, "router-1", "cpu")
            note = bundle.shared_note(msgspec.msgpack.encode(placed), 6)
            connection.call("HSET", topology.jobs(minute_of(jobs[0].id) or 0), jobs[0].id[:-3], note)
            assert [found and found.job for found in [await job.why() for job in jobs]] == [
                *(job.id for job in jobs[:6]),
                *[None] * 3,
            ]

    run(main)


# -- cancel -----------------------------------------------------------------------------------------------------------


def test_cancelling_leaves_a_mark_where_the_job_has_not_ended(
    run: Run, broker_url: str, connection: Connection
) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            job, ended = await lepton.submit_many("a.b", [{"x": 1}, {"x": 2}])
            finish(connection, [succeeded(ended, 2)], reply=reply_list(connection))
            assert (await job.cancel(), await lepton.cancel(job.id), await lepton.cancel(ended.id)) == (
                True,
                True,
                False,
            )
            await ended
            assert not await ended.cancel()
            assert connection.call("ZRANGE", topology.CANCELLED, 0, -1) == [job.id.encode()]
            assert [each.subject async for each in lepton.events("0", timeout=0)] == [job.id] * 2

    run(main)


# -- events -----------------------------------------------------------------------------------------------------------


def happened(connection: Connection, *jobs: str, kind: str = "job.placed") -> str:
    entry: bytes = connection.call("XADD", topology.EVENTS, "*", "e", event.encode(Event(kind, "w", jobs=jobs)))
    return entry.decode()


def test_events_are_told_from_where_the_body_begins(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            happened(connection, "before")
            async with lepton.events(timeout=0) as events:
                happened(connection, "a", "b")
                assert [each.subject async for each in events] == ["a", "b"]
            assert [each.subject async for each in lepton.events(timeout=0)] == []

    run(main)


def test_wherever_a_reader_goes_on_it_misses_and_repeats_nothing(
    run: Run, broker_url: str, connection: Connection
) -> None:
    for at in range(4):
        happened(connection, *(f"{at}.{job}" for job in range(3)))

    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            every = [each async for each in lepton.events("0", timeout=0)]
            assert len(every) == 12
            for at, each in enumerate(every):
                assert [later async for later in lepton.events(each.id, timeout=0)] == every[at + 1 :]

    run(main)


def test_a_step_that_was_cancelled_is_taken_again(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton, lepton.events() as events:
            for at in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(events), 0.02)
                happened(connection, f"{at}.0", f"{at}.1")
                assert [(await anext(events)).subject for _ in range(2)] == [f"{at}.0", f"{at}.1"]

    run(main)


def test_a_reader_that_is_cut_off_or_left_behind_is_told_what_it_should_be(
    run: Run, broker_url: str, connection: Connection
) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton, lepton.events() as events:
            happened(connection, "a", "b")
            assert (await anext(events)).subject == "a"
            cut_off(connection)
            happened(connection, "c")
            assert [(await anext(events)).subject for _ in range(2)] == ["b", "c"]
            happened(connection, "d")
            connection.call("XTRIM", topology.EVENTS, "MINID", happened(connection, "e"))
            assert [(await anext(events)).type, (await anext(events)).subject] == [MISSED, "e"]

    run(main)


@pytest.mark.parametrize("way", ["left", "closed", "dropped"])
def test_a_reader_closes_its_connection(run: Run, broker_url: str, connection: Connection, way: str) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            before = clients(connection)
            events = lepton.events()
            async with events:
                (opened,) = clients(connection) - before
                if way != "left":
                    events = lepton.events()
                    await events.__aenter__()
                    (opened,) = clients(connection) - before - {opened}
            if way == "closed":
                await events.aclose()
                await events.aclose()
            del events
            await until(lambda: opened not in clients(connection))

    run(main)


def test_a_reader_that_was_closed_tells_nothing_more(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            events, unbegun = lepton.events("0"), lepton.events("0")
            happened(connection, "a", "b")
            await anext(events)
            for each in (events, unbegun):
                await each.aclose()
                assert [found async for found in each] == []

    run(main)


def test_a_reader_that_is_closed_while_it_waits_ends(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            events = lepton.events()
            following = asyncio.ensure_future(anext(events, None))
            await waits(connection, b"xread")
            await events.aclose()
            assert await following is None

    run(main)


def test_a_reader_that_waits_when_the_client_is_closed_is_told(
    run: Run, broker_url: str, connection: Connection
) -> None:
    async def main() -> None:
        before = clients(connection)
        lepton = AsyncClient(broker_url)
        following = asyncio.ensure_future(anext(lepton.events()))
        await waits(connection, b"xread")
        await lepton.close()
        with pytest.raises(BrokerUnavailable, match="the client was closed"):
            await following
        await until(lambda: clients(connection) == before)

    run(main)


def test_a_jobs_events_end_with_its_last(run: Run, broker_url: str, connection: Connection) -> None:
    async def main() -> None:
        async with AsyncClient(broker_url) as lepton:
            job, trimmed = await lepton.submit_many("a.b", [{"x": 1}, {"x": 2}])
            happened(connection, job.id, trimmed.id)
            happened(connection, job.id, kind="job.failed")
            finish(connection, [succeeded(trimmed, 1)])
            assert [each.type for each in [each async for each in job.events()]] == [
                "io.lepton.job.placed.v1",
                "io.lepton.job.failed.v1",
            ]
            assert len([each async for each in trimmed.events()]) == 1

    run(main)


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "unix:///no/such/socket", "http://127.0.0.1:1"])
def test_every_question_to_a_broker_that_is_not_there_is_answered_so(run: Run, url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url) as lepton:
            job = lepton.job("x")
            asks: list[Callable[[], Awaitable[Any]]] = [
                lambda: lepton.submit("a.b", {"x": 1}),
                lambda: anext(lepton.map("a.b", [{"x": 1}])),
                lambda: anext(lepton.events()),
                lambda: lepton.events("0").__aenter__(),
                lambda: anext(job.events()),
                lepton.devices,
                lepton.kernels,
                job.state,
                job.why,
                job.cancel,
                lambda: job.result(timeout=1),
            ]
            for ask in asks:
                with pytest.raises(BrokerUnavailable):
                    await ask()

    run(main)


def test_what_cannot_be_asked_is_refused_at_the_call(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with AsyncClient("redis://127.0.0.1:1/0") as lepton:
            with pytest.raises(OptionNotSupported, match="window"):
                lepton.map("a.b", [], window=0)
            with pytest.raises(OptionNotSupported, match="priority"):
                lepton.map("a.b", [], priority=0)
            with pytest.raises(OptionNotSupported, match="priority"):
                await lepton.submit("a.b", {}, priority=0)
            with pytest.raises(InvalidArguments, match="not the id of an event"):
                lepton.events("now")

    run(main)
    with pytest.raises(InvalidSettings, match="amqp"):
        AsyncClient("amqp://host")
    monkeypatch.delenv("LEPTON_REDIS_URL", raising=False)
    with pytest.raises(NoBroker):
        AsyncClient()


# -- over HTTP --------------------------------------------------------------------------------------------------------


@contextmanager
def ingest(*streams: bytes) -> Iterator[tuple[str, list[str | None]]]:
    """A server that answers each request with the next event stream; and from where they asked.

    The first breaks off; the others are silent at the end, until the other side leaves.
    """
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["last-event-id"])
            self.send_response(200)
            self.send_header("content-length", "5000")
            self.end_headers()
            self.wfile.write(streams[len(asked) - 1])
            if len(asked) > 1:
                self.rfile.read(1)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def message(number: int) -> bytes:
    (each,) = cloud_events(f"{number}-0", [Event("job.placed", "w", jobs=("job",))])
    return b"id: %b\ndata: %b\n\n" % (each.id.encode(), msgspec.json.encode(each))


def test_events_over_http_go_on_after_a_break_and_after_a_cancelled_step(run: Run) -> None:
    async def main() -> None:
        async with AsyncClient(url) as lepton, lepton.events() as events:
            assert [(await anext(events)).id for _ in range(3)] == ["5-0.0", "6-0.0", "7-0.0"]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 0.05)
            assert (await anext(events)).id == "8-0.0"

    first = b": connected\nid: 4-0\n\n" + message(5) + message(6)[:30]
    with ingest(first, message(6) + message(7), message(8)) as (url, asked):
        run(main)
    assert asked == [None, "5-0.0", "7-0.0"]


def test_events_over_http_end_after_a_time_without_one(run: Run) -> None:
    async def main() -> None:
        async with AsyncClient(url) as lepton:
            assert [each.id async for each in lepton.events("4-0", timeout=0.1)] == ["5-0.0"]

    with ingest(message(5), b"", b"") as (url, asked):
        run(main)
    assert asked == ["4-0", "5-0.0"]
