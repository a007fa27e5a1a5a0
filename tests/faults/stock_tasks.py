"""The same kernel as a task of plain Celery, with the settings that its documentation recommends for losing nothing."""

from __future__ import annotations

import os
import select
import time

from celery import Celery

from tests.faults.fault_kernels import misbehave

__all__ = ["make_app"]


def make_app(url: str) -> Celery:
    """Late acknowledgement, nothing prefetched, and redelivery after 3 s, looked for every second."""
    app = Celery("stock", broker=url, backend=url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        broker_transport_options={
            "visibility_timeout": 3,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        result_backend_always_retry=True,
        result_backend_max_retries=20,
        result_expires=3600,
    )
    return app


def _run(n: int, ms: int, how: int) -> dict[str, list[int]]:
    descriptor = os.open(os.environ["FAULT_RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, b"%d %.4f\n" % (n, time.time()))
    os.close(descriptor)
    if ms:
        select.select([], [], [], ms / 1000)
    misbehave(how, n)
    return {"n": [n]}


if url := os.environ.get("STOCK_URL"):  # in a worker
    app = make_app(url)
    app.task(name="fault.run")(_run)
