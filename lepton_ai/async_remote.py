"""The asynchronous client's way over HTTP."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, cast

import httpx

from lepton_ai import idempotency, results, wire
from lepton_ai.accounts import Accounts
from lepton_ai.async_events import AsyncEvents, EventWays
from lepton_ai.async_flight import AsyncFlight, Part, Rows
from lepton_ai.async_handle import AsyncJobHandle
from lepton_ai.carried import State
from lepton_ai.dead import DeadLetter, Settled
from lepton_ai.device import Announcement
from lepton_ai.errors import BrokerUnavailable, InvalidRequest, Unavailable, UnknownJob
from lepton_ai.event import Cursor
from lepton_ai.flight import part
from lepton_ai.identity import new_id
from lepton_ai.job import Meta, Placement
from lepton_ai.patience import REFUSALS, Patience
from lepton_ai.quarantine import Quarantined
from lepton_ai.remote_protocol import (
    DEAD_AT_ONCE,
    MAP_REQUESTS,
    MAP_WAIT_S,
    REQUEST_BYTES,
    WAIT_S,
    Follower,
    JobView,
    Open,
    Read,
    Stragglers,
    body_of,
    chosen,
    chunk_of,
    concerns_every_row,
    dead_path_of,
    error_of,
    final_meta,
    follow,
    halves,
    headers,
    of_the_broker,
    path_of,
    place_of,
    read_accounts,
    read_announcements,
    read_dead,
    read_settled,
    read_view,
    read_views,
    request,
    stream_error,
    what_is_known,
)
from lepton_ai.terms import Terms

__all__ = ["AsyncRemote"]

#: Requests at once, apart from those that wait for one job each; and so many of these. More are slower: what httpx does
#: for each request takes as long as it has connections (300 jobs one by one: 0.9 s with 8 of each, 4.7 s with 64).
_REQUESTS: Final = 8
_WAITING: Final = 16
#: Where more jobs are waited for than requests may wait, they take turns, and each has one about so often.
_ROUND_S: Final = 2.0

Look = Callable[[str], Awaitable[tuple[Meta | None, Placement | None]]]


class AsyncRemote:
    """A connection to an ingest, for one event loop."""

    def __init__(self, url: str, tenant: str | None = None) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=_REQUESTS + _WAITING)
        self._http = httpx.AsyncClient(base_url=url, timeout=WAIT_S + 10, limits=limits, headers=headers(tenant))
        self._asking, self._waiting = asyncio.Semaphore(_REQUESTS), asyncio.Semaphore(_WAITING)
        self._waiters = 0
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
        """Posts one job a row in requests of a few MiB; each is accepted whole or not at all: see `Remote.submit`."""
        requests = (
            (request(kernel, row, terms) for row in rows)
            if keys is None
            else (request(kernel, row, terms, key) for row, key in idempotency.paired(rows, keys))
        )
        handles: list[AsyncJobHandle] = []
        patience = Patience(was_there=patient)
        for batch in wire.batches(requests, REQUEST_BYTES):
            left = deque([batch])
            while left:
                try:
                    views = await self._posted(left[0], 0.0)
                except REFUSALS as error:
                    await asyncio.sleep(patience.spend(error).seconds)
                    left.extendleft(reversed(halves(left.popleft())))
                    continue
                if patient:
                    patience.renew()
                left.popleft()
                handles += map(self._handle, views)
        return handles

    def _handle(self, view: JobView) -> AsyncJobHandle:
        job = AsyncJobHandle(view.id, view.kernel, self)
        job.meta = final_meta(view)  # one of a key may have ended long ago
        return job

    def map(self, kernel: str, rows: Rows, terms: Terms, window: int) -> AsyncGenerator[AsyncJobHandle, None]:
        """One job a row, handed out as they end: see `remote_protocol.Stragglers` for what is asked when."""
        flight, chunk = AsyncFlight(window), chunk_of(window)
        stragglers: Stragglers[AsyncJobHandle] = Stragglers()
        has_stragglers = asyncio.Event()

        def encode(_: str, row: Mapping[str, Any]) -> bytes:
            return request(kernel, row, terms)

        def begin(number: int, row: Mapping[str, Any]) -> Part:
            return part(AsyncJobHandle(new_id(), kernel, self, number), row, encode)

        def settle(jobs: list[AsyncJobHandle]) -> None:
            stragglers.settle(jobs, flight)
            if stragglers:
                has_stragglers.set()

        async def post() -> None:
            while True:
                left = deque([await flight.batch(chunk, REQUEST_BYTES)])
                while left:
                    jobs, refused = await self._post(left.popleft(), MAP_WAIT_S, stragglers.admission)
                    left.extendleft(reversed(refused))
                    settle(jobs)

        async def sweep() -> None:
            while True:
                await has_stragglers.wait()
                settle(await self._sweep(*stragglers.turn(), stragglers.patience))
                if not stragglers:
                    has_stragglers.clear()

        return flight.jobs(rows, begin, [*[post] * MAP_REQUESTS, sweep], lambda job: None)

    async def wait(self, job: AsyncJobHandle, timeout_s: float | None) -> Meta | None:
        """See JobReader."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        patience = Patience(loop.time, was_there=self._was_there)
        self._waiters += 1
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        await self._waiting.acquire()
                except TimeoutError:
                    return None
                try:
                    most_s = WAIT_S if self._waiters <= _WAITING else _ROUND_S * _WAITING / self._waiters
                    left_s = most_s if deadline is None else min(most_s, max(0.0, deadline - loop.time()))
                    meta = final_meta(await self._view(job.id, left_s))
                    patience.renew()
                except Unavailable as error:
                    await asyncio.sleep(patience.spend(error, deadline).seconds)
                    continue
                finally:
                    self._waiting.release()
                if meta is not None or (deadline is not None and loop.time() >= deadline):
                    return meta
        finally:
            self._waiters -= 1

    async def look(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        """See JobReader."""
        try:
            async with self._asking:
                return what_is_known(await self._view(job_id, 0.0))
        except UnknownJob:
            return None, None

    async def cancel(self, job_id: str) -> bool:
        """See JobReader."""
        async with self._asking:
            return final_meta(read_view(await self._call("DELETE", path_of(job_id)))) is None

    def events(self, since: Cursor | None, job: str | None, timeout_s: float | None) -> AsyncEvents:
        """What happens, over a connection of its own."""
        return self._following(follow("/v1/events", place_of(since), job=job, timeout_s=timeout_s))

    def follow(self, job_id: str, timeout_s: float | None) -> AsyncEvents:
        """See JobReader."""
        path = f"{path_of(job_id)}/events"
        return self._following(follow(path, "", job=job_id, timeout_s=timeout_s, until_final=True))

    async def announcements(self) -> list[Announcement]:
        """Every worker that is alive, in the order of their devices' names."""
        async with self._asking:
            return read_announcements(await self._call("GET", "/v1/devices"))

    async def dead(self, limit: int, job: str | None) -> list[DeadLetter]:
        """The newest dead letters, newest first, in requests of a few."""
        found: list[DeadLetter] = []
        while len(found) < limit:
            params: dict[str, Any] = {"limit": min(DEAD_AT_ONCE, limit - len(found))}
            params |= {"job": job} if job is not None else {}
            params |= {"after": found[-1].entry} if found else {}
            page = read_dead(await self._call("GET", "/v1/dead", params=params))
            found += page
            if len(page) < params["limit"]:
                break
        return found

    async def replay(self, ids: Iterable[str] | None) -> Settled:
        of = {"content-type": wire.MSGPACK}
        return read_settled(await self._call("POST", "/v1/dead/replay", content=chosen(ids), headers=of))

    async def purge(self, ids: Iterable[str] | None) -> Settled:
        if ids is None:
            return read_settled(await self._call("DELETE", "/v1/dead"))
        count, left = 0, {}
        for each in ids:
            try:
                count += read_settled(await self._call("DELETE", dead_path_of(each))).count
            except UnknownJob as error:
                left[each] = error.message
        return Settled(count, left)

    async def quarantined(self) -> list[Quarantined]:
        """Only what a broker tells."""
        raise of_the_broker("quarantines")

    async def lift(self, kernel: str, device: str) -> bool:
        """As `quarantined`."""
        raise of_the_broker("quarantines")

    async def state(self, kernel: str, state_key: str) -> State | None:
        """As `quarantined`."""
        raise of_the_broker("states")

    async def forget(self, kernel: str, state_key: str) -> bool:
        """As `quarantined`."""
        raise of_the_broker("states")

    async def accounts(self) -> Accounts:
        return read_accounts(await self._call("GET", "/v1/accounts"))

    async def close(self) -> None:
        await self._ways.close_all()
        await self._http.aclose()

    async def _posted(self, requests: list[bytes], wait_s: float) -> list[JobView]:
        of = {"content-type": wire.MSGPACK}
        params = {"wait_s": f"{wait_s:.3f}"} if wait_s else {}
        async with self._asking:
            answer = await self._call("POST", "/v1/jobs", content=body_of(requests), headers=of, params=params)
        return read_views(answer)

    async def _post(
        self, batch: list[Part], wait_s: float, admission: Patience
    ) -> tuple[list[AsyncJobHandle], list[list[Part]]]:
        """Posts jobs of a map; those that are refused for themselves have failed with that.

        Returns them, and the batches that are still to be posted because the ingest took no more.
        """
        jobs = [job for job, _ in batch]
        try:
            views = await self._posted([cast(bytes, message) for _, message in batch], wait_s)
        except InvalidRequest as error:
            if concerns_every_row(error):
                raise
            if len(batch) > 1:  # accepted whole or not at all: the halves, until the one at fault stands alone
                first, second = [await self._post(half, 0.0, admission) for half in halves(batch)]
                return first[0] + second[0], first[1] + second[1]
            jobs[0].meta = results.failure(jobs[0].id, error)
            return jobs, []
        except REFUSALS as error:
            await asyncio.sleep(admission.spend(error).seconds)
            return [], halves(batch)
        admission.renew()
        for job, view in zip(jobs, views, strict=True):
            job.id, job.meta = view.id, final_meta(view)
        return jobs, []

    async def _sweep(self, jobs: list[AsyncJobHandle], wait_s: float, patience: Patience) -> list[AsyncJobHandle]:
        """Looks at stragglers of a map: waits for the first, by which time others may have ended too."""
        for job in jobs:
            try:
                job.meta = final_meta(await self._view(job.id, wait_s))
            except UnknownJob as error:
                job.meta = results.failure(job.id, error)
            except Unavailable as error:
                await asyncio.sleep(patience.spend(error).seconds)
            else:
                patience.renew()
            wait_s = 0.0
        return jobs

    async def _view(self, job_id: str, wait_s: float) -> JobView:
        return read_view(await self._call("GET", path_of(job_id), params={"wait_s": f"{wait_s:.3f}"}))

    async def _call(self, method: str, path: str, **more: Any) -> bytes:
        try:
            response = await self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise _away(self._http, error) from error
        if response.is_success:
            self._was_there = True
            return response.content
        raise error_of(response.status_code, response.content, response.headers.get("retry-after", ""))

    def _following(self, follower: Follower) -> AsyncEvents:
        return AsyncEvents(follower, _Way(self._http, self.look), self._ways)


class _Way:
    """See EventWay: the answer that events come in, opened anew whenever it breaks off."""

    def __init__(self, http: httpx.AsyncClient, look: Look) -> None:
        self._http = http
        self._look = look
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None

    async def perform(self, step: Any) -> Any:
        try:
            if isinstance(step, Open):
                return await self._open(step)
            if isinstance(step, Read):
                return await self._read()
        except httpx.HTTPError as error:
            raise _away(self._http, error) from error
        return (await self._look(step.job))[0] is not None

    async def close(self) -> None:
        if self._response is not None:
            await self._response.aclose()

    async def _open(self, step: Open) -> None:
        await self.close()
        timeout = httpx.Timeout(WAIT_S, read=step.silence_s)
        asked = self._http.build_request("GET", step.path, params=step.params, headers=step.headers, timeout=timeout)
        self._response = await self._http.send(asked, stream=True)
        if not self._response.is_success:
            raise stream_error(self._response.status_code, await self._response.aread())
        self._chunks = self._response.aiter_bytes()

    async def _read(self) -> bytes | None:
        """See `remote_protocol.Read`."""
        assert self._chunks is not None
        try:
            return await anext(self._chunks, None)
        except httpx.ReadTimeout:
            return b""


def _away(http: httpx.AsyncClient, error: httpx.HTTPError) -> BrokerUnavailable:
    return BrokerUnavailable(f"{http.base_url} cannot be reached: {error}")
