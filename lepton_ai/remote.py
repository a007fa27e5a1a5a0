"""The client's way over HTTP: the same jobs through an ingest, where the broker itself is out of reach."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import httpx

from lepton_ai import wire
from lepton_ai.device import Announcement
from lepton_ai.errors import BrokerUnavailable, InvalidRequest, LeptonError, Unavailable, UnknownJob
from lepton_ai.event import CloudEvent, Cursor
from lepton_ai.flight import Flight, part, taken
from lepton_ai.handle import JobHandle
from lepton_ai.identity import new_id
from lepton_ai.job import Meta, Options, Placement
from lepton_ai.patience import Patience, Pause
from lepton_ai.remote_protocol import (
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
    chunk_of,
    concerns_every_row,
    error_of,
    final_meta,
    follow,
    path_of,
    place_of,
    read_announcements,
    read_view,
    read_views,
    request,
    stream_error,
    what_is_known,
)

__all__ = ["JobRequest", "JobView", "Remote"]


class Remote:
    """A connection to an ingest. Safe for several threads."""

    def __init__(self, url: str) -> None:
        # A request waits in its thread, so as many connections as there are threads that ask.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self._http = httpx.Client(base_url=url, timeout=WAIT_S + 10, limits=limits, headers={"accept": wire.MSGPACK})
        self._was_there = False

    def submit(self, kernel: str, rows: Iterable[Mapping[str, Any]], options: Options) -> list[JobHandle]:
        """Posts one job a row in requests of a few MiB; each is accepted whole or not at all.

        When this returns, the broker has them all; where a row is refused, it may have those before it.
        """
        handles: list[JobHandle] = []
        for batch in wire.batches((request(kernel, row, options) for row in rows), REQUEST_BYTES):
            handles += [JobHandle(view.id, view.kernel, self) for view in self._posted(batch, 0.0)]
        return handles

    def map(
        self, kernel: str, rows: Iterable[Mapping[str, Any]], options: Options, window: int
    ) -> Generator[JobHandle, None, None]:
        """One job a row, handed out as they end: see `remote_protocol.Stragglers` for what is asked when."""
        return self._map(kernel, rows, options, Flight(window), chunk_of(window))

    def _map(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        options: Options,
        flight: Flight[JobHandle],
        chunk: int,
    ) -> Generator[JobHandle, None, None]:
        def encode(_: str, row: Mapping[str, Any]) -> bytes:
            return request(kernel, row, options)

        parts = (part(JobHandle(new_id(), kernel, self, number), row, encode) for number, row in enumerate(rows))
        stragglers: Stragglers[JobHandle] = Stragglers()
        answers: SimpleQueue[Future[list[JobHandle]]] = SimpleQueue()
        posts: set[Future[list[JobHandle]]] = set()
        sweep: Future[list[JobHandle]] | None = None
        pool = ThreadPoolExecutor(MAP_REQUESTS + 1, "lepton-map")
        more = True
        try:
            while True:
                yield from flight.land()
                if more and len(posts) < MAP_REQUESTS and answers.empty() and (room := flight.room):
                    batch = taken(parts, min(room, chunk), REQUEST_BYTES)
                    more = bool(batch)
                    for job, _ in batch:
                        flight.start(job)
                    if sent := [each for each in batch if each[1]]:
                        posts.add(post := pool.submit(self._post, sent, MAP_WAIT_S))
                        post.add_done_callback(answers.put)
                elif stragglers and sweep is None:
                    sweep = pool.submit(self._sweep, *stragglers.turn(), stragglers.patience)
                    sweep.add_done_callback(answers.put)
                elif posts or sweep is not None:
                    answered = answers.get()
                    posts.discard(answered)
                    sweep = None if answered is sweep else sweep
                    stragglers.settle(answered.result(), flight)
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

    def close(self) -> None:
        self._http.close()

    def _posted(self, requests: list[bytes], wait_s: float) -> list[JobView]:
        headers = {"content-type": wire.MSGPACK}
        params = {"wait_s": f"{wait_s:.3f}"} if wait_s else {}
        return read_views(self._call("POST", "/v1/jobs", content=body_of(requests), headers=headers, params=params))

    def _post(self, batch: list[tuple[JobHandle, bytes]], wait_s: float) -> list[JobHandle]:
        """Posts jobs of a map; those that are refused for themselves have failed with that."""
        jobs = [job for job, _ in batch]
        try:
            views = self._posted([message for _, message in batch], wait_s)
        except InvalidRequest as error:
            if concerns_every_row(error):
                raise
            if len(batch) > 1:  # accepted whole or not at all: the halves, until the one at fault stands alone
                half = len(batch) // 2
                return self._post(batch[:half], 0.0) + self._post(batch[half:], 0.0)
            jobs[0].meta = wire.failure(jobs[0].id, error)
            return jobs
        for job, view in zip(jobs, views, strict=True):
            job.id, job.meta = view.id, final_meta(view)
        return jobs

    def _sweep(self, jobs: list[JobHandle], wait_s: float, patience: Patience) -> list[JobHandle]:
        """Looks at stragglers of a map: waits for the first, by which time others may have ended too."""
        for job in jobs:
            try:
                job.meta = final_meta(self._view(job.id, wait_s))
            except UnknownJob as error:
                job.meta = wire.failure(job.id, error)
            except Unavailable as error:
                time.sleep(patience.spend(error).seconds)
            else:
                patience.renew()
            wait_s = 0.0
        return jobs

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
        raise error_of(response.status_code, response.content)

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
