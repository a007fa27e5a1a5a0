"""The client's way straight to the broker: envelopes onto the lane in pipelines, results from one reply list."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import redis

from lepton_ai import topology, wire
from lepton_ai.device import Announcement, read_leases
from lepton_ai.errors import BrokerUnavailable
from lepton_ai.handle import JobHandle
from lepton_ai.identity import minute_of, new_id
from lepton_ai.job import FINAL_STATES, Meta, Options, Placement

__all__ = ["Direct"]

#: How many minutes of placements back a foreign id (one that carries no minute) is looked for.
_MINUTES_BACK = 60
#: A result may reach its key and not the reply list (which expires when nobody pops it), so the key is looked at too.
_LOOK_EVERY_S = 1.0
#: A job that another client submitted does not reach our reply list: its key is looked at, at growing intervals.
_FIRST_LOOK_S, _LAST_LOOK_S = 0.002, 0.1
_POP_AT_ONCE = 256
_PIPELINE_BYTES = 4 * 1024 * 1024
_PLACEMENT = msgspec.msgpack.Decoder(Placement)


class Direct:
    """A connection to the broker for submitting, waiting and looking. Safe for several threads."""

    def __init__(self, url: str, client_id: str) -> None:
        self._reply_to = topology.reply(client_id)
        self._redis: redis.Redis = redis.Redis.from_url(
            url, socket_timeout=30, socket_connect_timeout=5, health_check_interval=30
        )
        self._pending: weakref.WeakValueDictionary[str, JobHandle] = weakref.WeakValueDictionary()
        self._arrived = threading.Condition()
        self._popping = False

    def submit(self, kernel: str, rows: Iterable[Mapping[str, Any]], options: Options) -> list[JobHandle]:
        """Publishes one job a row in pipelines of a few MiB; when this returns, the broker has them all."""
        options = msgspec.structs.replace(options, reply_to=self._reply_to, result=options.result or "msgpack")
        lane = topology.lane_list(options.urgency)
        handles: list[JobHandle] = []

        def messages() -> Iterator[bytes]:
            for row in rows:
                handle = JobHandle(new_id(), kernel, self)
                yield wire.envelope(handle.id, kernel, row, options)
                self._pending[handle.id] = handle
                handles.append(handle)

        with _broker_errors():
            for batch in wire.batches(messages(), _PIPELINE_BYTES):
                with self._redis.pipeline(transaction=False) as pipeline:
                    for message in batch:
                        pipeline.lpush(lane, message)
                    pipeline.execute()
        return handles

    def wait(self, job: JobHandle, timeout_s: float | None) -> Meta | None:
        """See JobReader."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._pending.get(job.id) is not job:  # another client's, or a second handle: only the key tells it
            return self._poll(job.id, deadline)
        look_at = time.monotonic() + _LOOK_EVERY_S
        while job.meta is None:
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return self._final(job.id)
            if now >= look_at:
                look_at = now + _LOOK_EVERY_S
                if (meta := self._final(job.id)) is not None:
                    return meta
            until = look_at if deadline is None else min(look_at, deadline)
            self._pump(job, max(0.001, until - now))
        return job.meta

    def look(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        """See JobReader."""
        minute = minute_of(job_id)
        now = int(time.time()) // 60
        minutes = [minute] if minute is not None else range(now, now - _MINUTES_BACK, -1)
        with _broker_errors(), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.get(topology.result(job_id))
            for each in minutes:
                pipeline.hget(topology.jobs(each), job_id)
            found, *placements = pipeline.execute()
        placement = next((_PLACEMENT.decode(raw) for raw in placements if raw), None)
        return (wire.read_meta(found) if found else None), placement

    def announcements(self) -> list[Announcement]:
        """Every worker that is alive, in the order of their devices' names."""
        with _broker_errors():
            incarnations: Any = self._redis.smembers(topology.HOLDERS)
            leases: Any = self._redis.mget(
                [topology.lease(name.decode(errors="replace")) for name in incarnations] or [topology.LANE]
            )
        return read_leases(leases)

    def close(self) -> None:
        self._redis.close()

    def _final(self, job_id: str) -> Meta | None:
        with _broker_errors():
            found: Any = self._redis.get(topology.result(job_id))
        meta = wire.read_meta(found) if found else None
        return meta if meta is not None and meta.status in FINAL_STATES else None

    def _poll(self, job_id: str, deadline: float | None) -> Meta | None:
        pause = _FIRST_LOOK_S
        while (meta := self._final(job_id)) is None:
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(pause, left))
            pause = min(pause * 2, _LAST_LOOK_S)
        return meta

    def _pump(self, job: JobHandle, seconds: float) -> None:
        """Pops what has arrived for anybody, or waits while another thread does."""
        with self._arrived:
            if job.meta is not None:
                return
            if self._popping:
                self._arrived.wait(seconds)
                return
            self._popping = True
        metas: list[Meta] = []
        try:
            with _broker_errors():
                popped: Any = self._redis.blmpop(seconds, 1, self._reply_to, direction="LEFT", count=_POP_AT_ONCE)
            metas = [wire.read_meta(raw) for raw in popped[1]] if popped else []
        finally:
            with self._arrived:
                self._popping = False
                for meta in metas:
                    if (handle := self._pending.pop(meta.task_id, None)) is not None:
                        handle.meta = meta
                self._arrived.notify_all()


@contextmanager
def _broker_errors() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise BrokerUnavailable(f"the broker cannot be reached or refuses: {error}") from error
