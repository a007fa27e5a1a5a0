"""Plain Celery, two hops: a task that decides sends the job on to a device's queue, as a router written in Celery does.

Two solo workers, one for each queue. The task that decides keeps no result of its own, and sends with an application
that has no result backend, for the reason in `celery.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.load import Load
from bench.peers import celery

_QUEUE = "bench.router"
_DECIDE = "bench.decide"

app = celery.make_app()
_sender = celery.make_app(results=False)


@app.task(name=_DECIDE, ignore_result=True)
def decide(job: str, kernel: str, row: dict[str, Any]) -> None:
    _sender.send_task(kernel, kwargs=row, task_id=job, queue=celery.QUEUE)


class Peer(celery.Peer):
    """A worker that decides before the worker that computes."""

    settings = f"{celery.Peer.settings}; the worker that decides is solo"

    def start(self) -> None:
        super().start()
        self.serve("decider", _QUEUE, 1, __name__)

    def send(self, load: Load, row: Mapping[str, Any], job: str, **options: Any) -> None:
        self.sender.send_task(_DECIDE, args=(job, load.kernel, row), queue=_QUEUE, **options)
