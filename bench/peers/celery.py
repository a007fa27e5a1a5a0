"""Plain Celery, one hop: the client sends to the queue of the worker that computes.

What made it faster, each measured: a solo pool (jobs that take no time), one producer for all that is sent, and an
application without a result backend to send with, because one with it subscribes to each task's channel, which is as
dear as all the rest of the sending. Results are then read by `get_many`, 500 at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from celery import Celery
from celery.utils import uuid

from bench import peer, synthetic
from bench.load import Load
from queues.addresses import celery_addresses

QUEUE = "bench.device"
_AT_ONCE = 500
_LOOK_S = 0.005
_WAIT_S = 300


def make_app(*, results: bool = True) -> Celery:
    """The application, in the same settings everywhere; without results it only sends."""
    broker, backend = celery_addresses(peer.broker_url())
    app = Celery("bench", broker=broker, backend=backend if results else "disabled://", set_as_current=False)
    app.conf.update(
        task_serializer="msgpack",
        result_serializer="msgpack",
        accept_content=["msgpack"],
        result_expires=3600,
        worker_prefetch_multiplier=64,
        worker_disable_rate_limits=True,
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
    )
    return app


app = make_app()
for _name, _function in synthetic.FUNCTIONS.items():
    app.task(name=_name)(_function)


class Peer(peer.Peer):
    """One worker, and a client that sends and reads."""

    settings = "solo pool where nothing is to run at once, else prefork; msgpack; sent without subscribing; get_many"

    def start(self) -> None:
        self.serve("worker", QUEUE, self.place.parallel)
        self._reader, self.sender = app, make_app(results=False)

    def serve(self, name: str, queue: str, parallel: int, application: str = __name__) -> None:
        pool = ["-P", "solo"] if parallel == 1 else ["-P", "prefork", "-c", str(parallel)]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "ERROR"]
        self.work(name, "celery", "-q", "-A", application, "worker", *pool, *quiet, "-Q", queue, "-n", name)

    def send(self, load: Load, row: Mapping[str, Any], job: str, **options: Any) -> None:
        self.sender.send_task(load.kernel, kwargs=row, task_id=job, queue=QUEUE, **options)

    def run(self, load: Load, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        jobs = [uuid() for _ in rows]
        with self.sender.producer_pool.acquire(block=True) as producer:
            for job, row in zip(jobs, rows, strict=True):
                self.send(load, row, job, producer=producer)
        return list(self._results(jobs))

    def one(self, load: Load, row: Mapping[str, Any]) -> float:
        job = uuid()
        result = self._reader.AsyncResult(job)
        self.send(load, row, job)
        return float(result.get(timeout=_WAIT_S))

    def _results(self, jobs: list[str]) -> Iterator[float]:
        for first in range(0, len(jobs), _AT_ONCE):
            part = jobs[first : first + _AT_ONCE]
            found = dict(self._reader.backend.get_many(part, timeout=_WAIT_S, interval=_LOOK_S))
            for job in part:
                if found[job]["status"] != "SUCCESS":
                    raise ValueError(f"{job}: {found[job]}")
                yield found[job]["result"]
