"""The client's way over HTTP: the same jobs through an ingest, where the broker itself is out of reach."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import httpx

from lepton_ai import idempotency, results, wire
from lepton_ai.accounts import Accounts
from lepton_ai.carried import State
from lepton_ai.dead import DeadLetter, Settled
from lepton_ai.device import Announcement
from lepton_ai.errors import (
    BrokerUnavailable,
    InvalidRequest,
    LeptonError,
    Unavailable,
    UnknownJob,
)
from lepton_ai.event import CloudEvent, Cursor
from lepton_ai.flight import Flight, part, taken
from lepton_ai.handle import JobHandle
from lepton_ai.identity import new_id
from lepton_ai.job import Meta, Placement
from lepton_ai.patience import REFUSALS, Patience, Pause
from lepton_ai.quarantine import Quarantined
from lepton_ai.remote_protocol import (
    DEAD_AT_ONCE,
    MAP_REQUESTS,
    MAP_WAIT_S,
    REQUEST_BYTES,
    WAIT_S,
    Follower,
    JobRequest,
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

__all__ = ["JobRequest", "JobView", "Remote"]

Part = tuple[JobHandle, bytes]
#: The jobs of a map that were posted or looked at, and the batches that are still to be posted.
Answer = tuple[list[JobHandle], list[list[Part]]]


class Remote:
    """A connection to an ingest. Safe for several threads."""

    def __init__(self, url: str, tenant: str | None = None) -> None:
        # A request waits in its thread, so as many connections as there are threads that ask.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._http = httpx.Client(base_url=url, timeout=WAIT_S + 10, limits=limits, headers=headers(tenant))
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
        """Posts one job a row in requests of a few MiB; each is accepted whole or not at all.

        When this returns, the broker has them all; where a row is refused, it may have those before it. One who is
        patient comes again, with less at once, where the ingest takes no more for now.
        """
        requests = (
            (request(kernel, row, terms) for row in rows)
            if keys is None
            else (request(kernel, row, terms, key) for row, key in idempotency.paired(rows, keys))
        )
        handles: list[JobHandle] = []
        patience = Patience(was_there=patient)
        for batch in wire.batches(requests, REQUEST_BYTES):
            left = deque([batch])
            while left:
                try:
                    views = self._posted(left[0], 0.0)
                except REFUSALS as error:
                    time.sleep(patience.spend(error).seconds)
                    left.extendleft(reversed(halves(left.popleft())))
                    continue
                if patient:
                    patience.renew()
                left.popleft()
                handles += map(self._handle, views)
        return handles

    def _handle(self, view: JobView) -> JobHandle:
        job = JobHandle(view.id, view.kernel, self)
        job.meta = final_meta(view)  # one of a key may have ended long ago
        return job

    def map(
        self, kernel: str, rows: Iterable[Mapping[str, Any]], terms: Terms, window: int
    ) -> Generator[JobHandle, None, None]:
        """One job a row, handed out as they end: see `remote_protocol.Stragglers` for what is asked when."""
        return self._map(kernel, rows, terms, Flight(window), chunk_of(window))

    def _map(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        terms: Terms,
        flight: Flight[JobHandle],
        chunk: int,
    ) -> Generator[JobHandle, None, None]:
        def encode(_: str, row: Mapping[str, Any]) -> bytes:
            return request(kernel, row, terms)

        parts = (part(JobHandle(new_id(), kernel, self, number), row, encode) for number, row in enumerate(rows))
        stragglers: Stragglers[JobHandle] = Stragglers()
        answers: SimpleQueue[Future[Answer]] = SimpleQueue()
        posts: set[Future[Answer]] = set()
        sweep: Future[Answer] | None = None
        pool = ThreadPoolExecutor(MAP_REQUESTS + 1, "lepton-map")
        refused: deque[list[Part]] = deque()
        more = True

        def post(batch: list[Part]) -> None:
            posts.add(posted := pool.submit(self._post, batch, MAP_WAIT_S, stragglers.admission))
            posted.add_done_callback(answers.put)

        try:
            while True:
                yield from flight.land()
                if refused and len(posts) < MAP_REQUESTS and answers.empty():
                    post(refused.popleft())
                elif more and len(posts) < MAP_REQUESTS and answers.empty() and (room := flight.room):
                    batch = taken(parts, min(room, chunk), REQUEST_BYTES)
                    more = bool(batch)
                    for job, _ in batch:
                        flight.start(job)
                    if sent := [each for each in batch if each[1]]:
                        post(sent)
                elif stragglers and sweep is None:
                    sweep = pool.submit(self._sweep, *stragglers.turn(), stragglers.patience)
                    sweep.add_done_callback(answers.put)
                elif posts or sweep is not None:
                    answered = answers.get()
                    posts.discard(answered)
                    sweep = None if answered is sweep else sweep
                    jobs, unsent = answered.result()
                    refused.extend(unsent)
                    stragglers.settle(jobs, flight)
                elif not flight.landed:
                    return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def wait(self, job: JobHandle, timeout_s: float | None) -> Meta | None:
        """See JobReader."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        patience = Patience(was_there=self._was_there)
        while True:
            left = WAIT_S if deadline is None else min(WAIT_S, max(0.0, deadline - time.monotonic()))
            try:
                view = self._view(job.id, left)
            except Unavailable as error:
                time.sleep(patience.spend(error, deadline).seconds)
                continue
            patience.renew()
            if (meta := final_meta(view)) is not None:
                return meta
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def look(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        """See JobReader."""
        try:
            return what_is_known(self._view(job_id, 0.0))
        except UnknownJob:
            return None, None

    def cancel(self, job_id: str) -> bool:
        """See JobReader."""
        return final_meta(read_view(self._call("DELETE", path_of(job_id)))) is None

    def events(
        self, since: Cursor | None, job: str | None, timeout_s: float | None
    ) -> Generator[CloudEvent, None, None]:
        """What happens, over a connection of its own; its place in the stream is fixed when this returns."""
        return self._following(follow("/v1/events", place_of(since), job=job, timeout_s=timeout_s))

    def follow(self, job_id: str, timeout_s: float | None) -> Generator[CloudEvent, None, None]:
        """See JobReader."""
        path = f"{path_of(job_id)}/events"
        return self._following(follow(path, "", job=job_id, timeout_s=timeout_s, until_final=True))

    def announcements(self) -> list[Announcement]:
        """Every worker that is alive, in the order of their devices' names."""
        return read_announcements(self._call("GET", "/v1/devices"))

    def dead(self, limit: int, job: str | None) -> list[DeadLetter]:
        """The newest dead letters, newest first, in requests of a few."""
        found: list[DeadLetter] = []
        while len(found) < limit:
            params: dict[str, Any] = {"limit": min(DEAD_AT_ONCE, limit - len(found))}
            params |= {"job": job} if job is not None else {}
            params |= {"after": found[-1].entry} if found else {}
            page = read_dead(self._call("GET", "/v1/dead", params=params))
            found += page
            if len(page) < params["limit"]:
                break
        return found

    def quarantined(self) -> list[Quarantined]:
        """Only what a broker tells."""
        raise of_the_broker("quarantines")

    def lift(self, kernel: str, device: str) -> bool:
        """As `quarantined`."""
        raise of_the_broker("quarantines")

    def state(self, kernel: str, state_key: str) -> State | None:
        """As `quarantined`."""
        raise of_the_broker("states")

    def forget(self, kernel: str, state_key: str) -> bool:
        """As `quarantined`."""
        raise of_the_broker("states")

    def replay(self, ids: Iterable[str] | None) -> Settled:
        of = {"content-type": wire.MSGPACK}
        return read_settled(self._call("POST", "/v1/dead/replay", content=chosen(ids), headers=of))

    def purge(self, ids: Iterable[str] | None) -> Settled:
        if ids is None:
            return read_settled(self._call("DELETE", "/v1/dead"))
        count, left = 0, {}
        for each in ids:
            try:
                count += read_settled(self._call("DELETE", dead_path_of(each))).count
            except UnknownJob as error:
                left[each] = error.message
        return Settled(count, left)

    def accounts(self) -> Accounts:
        return read_accounts(self._call("GET", "/v1/accounts"))

    def close(self) -> None:
        self._http.close()

    def _posted(self, requests: list[bytes], wait_s: float) -> list[JobView]:
        of = {"content-type": wire.MSGPACK}
        params = {"wait_s": f"{wait_s:.3f}"} if wait_s else {}
        return read_views(self._call("POST", "/v1/jobs", content=body_of(requests), headers=of, params=params))

    def _post(self, batch: list[Part], wait_s: float, admission: Patience) -> Answer:
        """Posts jobs of a map; those that are refused for themselves have failed with that."""
        jobs = [job for job, _ in batch]
        try:
            views = self._posted([message for _, message in batch], wait_s)
        except InvalidRequest as error:
            if concerns_every_row(error):
                raise
            if len(batch) > 1:  # accepted whole or not at all: the halves, until the one at fault stands alone
                first, second = (self._post(half, 0.0, admission) for half in halves(batch))
                return first[0] + second[0], first[1] + second[1]
            jobs[0].meta = results.failure(jobs[0].id, error)
            return jobs, []
        except REFUSALS as error:
            time.sleep(admission.spend(error).seconds)
            return [], halves(batch)
        admission.renew()
        for job, view in zip(jobs, views, strict=True):
            job.id, job.meta = view.id, final_meta(view)
        return jobs, []

    def _sweep(self, jobs: list[JobHandle], wait_s: float, patience: Patience) -> Answer:
        """Looks at stragglers of a map: waits for the first, by which time others may have ended too."""
        for job in jobs:
            try:
                job.meta = final_meta(self._view(job.id, wait_s))
            except UnknownJob as error:
                job.meta = results.failure(job.id, error)
            except Unavailable as error:
                time.sleep(patience.spend(error).seconds)
            else:
                patience.renew()
            wait_s = 0.0
        return jobs, []

    def _view(self, job_id: str, wait_s: float) -> JobView:
        return read_view(self._call("GET", path_of(job_id), params={"wait_s": f"{wait_s:.3f}"}))

    def _call(self, method: str, path: str, **more: Any) -> bytes:
        try:
            response = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._away(error) from error
        if response.is_success:
            self._was_there = True
            return response.content
        raise error_of(response.status_code, response.content, response.headers.get("retry-after", ""))

    def _away(self, error: httpx.HTTPError) -> LeptonError:
        return BrokerUnavailable(f"{self._http.base_url} cannot be reached: {error}")

    def _following(self, follower: Follower) -> Generator[CloudEvent, None, None]:
        events = self._drive(follower)
        next(events)  # behind OPENED: whatever happens from here on is told, and closing it closes the connection
        return events

    def _drive(self, follower: Follower) -> Generator[CloudEvent, None, None]:
        stream = _Stream(self._http)
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
                        answer: Any = None
                        if isinstance(step, Open):
                            stream.open(step)
                        elif isinstance(step, Read):
                            answer = stream.read()
                        else:
                            answer = self.look(step.job)[0] is not None
                    except LeptonError as error:
                        step = follower.throw(error)
                    except httpx.HTTPError as error:
                        step = follower.throw(self._away(error))
                    else:
                        step = follower.send(answer)
        except StopIteration:
            return
        finally:
            stream.close()


class _Stream:
    """The answer that events come in, for one iterator of them; opened anew whenever it breaks off."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def open(self, step: Open) -> None:
        self.close()
        timeout = httpx.Timeout(WAIT_S, read=step.silence_s)
        asked = self._http.build_request("GET", step.path, params=step.params, headers=step.headers, timeout=timeout)
        self._response = self._http.send(asked, stream=True)
        if not self._response.is_success:
            raise stream_error(self._response.status_code, self._response.read())
        self._chunks = self._response.iter_bytes()

    def read(self) -> bytes | None:
        """See `remote_protocol.Read`."""
        try:
            return next(self._chunks, None)
        except httpx.ReadTimeout:
            return b""

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
