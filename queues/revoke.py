"""What a node of Celery's remote control, a router or a worker, does with a revoke: it marks the jobs as cancelled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

from lepton_ai.settings import Settings
from queues.broker import Broker
from queues.connection import Connection

__all__ = ["revoke"]

#: Jobs in one revoke: each node that hears it marks them all, and must not be held up for long.
_MOST: Final = 50_000


def revoke(
    url: str,
    incarnation: str,
    settings: Settings,
    task_id: Any,
    heed: Callable[[list[str]], None] = lambda jobs: None,
) -> dict[str, str]:
    """Marks the jobs, one id or several, after the node itself has heeded them; returns the reply in Celery's form."""
    jobs = [task_id] if isinstance(task_id, str) else [str(job) for job in task_id]
    if len(jobs) > _MOST:
        return {"error": f"{len(jobs)} tasks at once, {_MOST} are the most"}
    heed(jobs)
    with contextlib.closing(Connection(url, f"{incarnation}-revoke")) as connection:
        Broker(connection, incarnation, settings).cancel(jobs)
    return {"ok": f"tasks flagged as revoked: {len(jobs)}"}
