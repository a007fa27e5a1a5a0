"""Celery's books, kept by the slots: what `celery inspect`, `celery control` and Flower read of a worker.

In the places of Celery's sets of requests stand views of what the slots hold: a request is made when somebody looks.
Slots are several threads, so whoever looks gets a copy.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

from celery.worker import control, state

from lepton_ai.device import Announcement
from lepton_ai.event import Event
from lepton_ai.settings import Settings
from lepton_ai.topology import device_queue
from queues.celery_events import task_event
from queues.revoke import revoke as mark_revoked
from tasks.runner import Ending
from tasks.teller import Teller

__all__ = ["Books", "install_commands"]

_ENDINGS = {
    "succeeded": "succeeded",
    "failed": "failed",
    "dead": "failed",
    "cancelled": "revoked",
    "expired": "revoked",
    "retried": "retried",
}


class _Seen(WeakSet):  # type: ignore[type-arg]
    """One of Celery's sets of requests, as a view of the jobs that `jobs` names. Celery changes nothing in it."""

    jobs: Collection[str]
    request: Callable[[str], _Request | None]

    def __iter__(self) -> Iterator[Any]:
        found = map(self.request, list(self.jobs))
        return iter([each for each in found if each is not None])

    def __len__(self) -> int:
        return len(self.jobs)

    def __contains__(self, item: Any) -> bool:
        return item.id in self.jobs

    def copy(self) -> set[Any]:  # type: ignore[override]
        """What differences are made of, as `inspect reserved` does."""
        return set(self)

    def add(self, item: Any) -> None: ...

    def discard(self, item: Any) -> None: ...

    def update(self, other: Any) -> None: ...

    def clear(self) -> None: ...


class _Request:
    """What Celery's remote control wants to know of a job that a slot has taken."""

    def __init__(
        self, job: str, kernel: str, time_start: float | None, hostname: str, queue: str, backend: Any
    ) -> None:
        self.id = job
        self.name = kernel
        self.time_start = time_start
        self.acknowledged = False
        # A commit is what acknowledges: to Celery such a task is acknowledged late.
        self.task = SimpleNamespace(name=kernel, backend=backend, acks_late=True)
        self._hostname = hostname
        self._queue = queue

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Request) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """As Celery's own Request.info, without the arguments: they may be large, and are nobody's business."""
        return {
            "id": self.id,
            "name": self.name,
            "args": [],
            "kwargs": {},
            "type": self.name,
            "hostname": self._hostname,
            "time_start": self.time_start,
            "acknowledged": False,
            "delivery_info": {"exchange": "", "routing_key": self._queue, "priority": None, "redelivered": False},
            "worker_pid": os.getpid(),
        }

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown has begun: `DeviceStep.terminate` gives the batch back."""

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """A slot is a thread and cannot be killed: the job is told that it is cancelled and may stop."""
        state.revoked.add(self.id)


class Books:
    """Celery's sets and totals, and what its event listeners are told. See tasks.runner.Observer."""

    def __init__(self, app: Any, hostname: str, device: str, incarnation: str, teller: Teller) -> None:
        self._app = app
        self._hostname = hostname
        self._device = device
        self._incarnation = incarnation
        self._teller = teller
        self._lock = threading.Lock()
        self._shown: set[str] = set()
        self._taken: dict[str, str] = {}
        """The kernel of each job that a slot holds."""
        self._started: dict[str, float] = {}
        """When each of them that runs, or has run, was started."""
        for requests, jobs in ((state.reserved_requests, self._taken), (state.active_requests, self._started)):
            requests.__class__ = _Seen
            requests.jobs, requests.request = jobs, self.request

    def request(self, job: str) -> _Request | None:
        """What Celery may know of a job, None where no slot holds it."""
        if (kernel := self._taken.get(job)) is None:
            return None
        queue = device_queue(self._device)
        return _Request(job, kernel, self._started.get(job), self._hostname, queue, self._app.backend)

    def taken(self, jobs: Sequence[tuple[str, str]], shown: Collection[str]) -> None:
        """Jobs are reserved; Celery counts a task as accepted from here on."""
        self._taken.update(jobs)
        with self._lock:
            state.total_count.update(kernel for _, kernel in jobs)
            state.all_total_count[0] += len(jobs)
        if shown:
            self._shown.update(shown)
            now = time.time()
            self._teller.tell([task_event("received", job, now, name=kernel) for job, kernel in jobs if job in shown])

    def started(self, jobs: Sequence[str]) -> None:
        """Jobs are active."""
        now = time.time()
        for job in jobs:
            self._started[job] = now
        if self._shown:
            self._teller.tell([task_event("started", job, now) for job in jobs if job in self._shown])

    def ended(self, endings: Sequence[Ending]) -> None:
        """Jobs have ended."""
        if self._shown:
            self._teller.tell([_event(ending) for ending in endings if ending.job in self._shown])
        self.lost([ending.job for ending in endings])

    def lost(self, jobs: Sequence[str]) -> None:
        """Jobs are this worker's no longer."""
        for job in jobs:
            self._started.pop(job, None)
            self._taken.pop(job, None)
        if self._shown:
            self._shown.difference_update(jobs)

    def progressed(self, jobs: Sequence[str], kernel: str, fraction: float) -> None:
        data = {"fraction": fraction}
        self._teller.tell([Event("job.progressed", self._incarnation, kernel, self._device, tuple(jobs), data=data)])

    def revoke(self, jobs: Collection[str]) -> None:
        # Not those that are in it: to add one again takes it out for a moment, in which it would count as not revoked.
        state.revoked.update([job for job in jobs if job not in state.revoked])

    def is_revoked(self, job: str) -> bool:
        return job in state.revoked


def _event(ending: Ending) -> dict[str, Any]:
    kind = _ENDINGS[ending.status]
    if kind == "succeeded":
        return task_event(kind, ending.job, ending.at, result=ending.result, runtime=ending.run_s)
    if kind in ("failed", "retried"):
        return task_event(kind, ending.job, ending.at, exception=ending.error, traceback=ending.trace)
    return task_event(kind, ending.job, ending.at, terminated=False, signum=None, expired=ending.status == "expired")


def install_commands(settings: Settings, url: str, announcement: Announcement, books: Books) -> None:
    """Puts our remote control commands in the places of Celery's, which know nothing of devices and kernels.

    Celery's revoke writes a result itself where a job waits, and forgets what it was told when the worker restarts:
    ours leaves a mark on the broker, and whoever holds the job ends it.
    """
    celery_stats = control.Panel.data["stats"]

    def heed(jobs: list[str]) -> None:
        state.revoked.update([job for job in jobs if job not in state.revoked])

    def revoke(panel: Any, task_id: Any, **_: Any) -> dict[str, str]:
        return mark_revoked(url, announcement.incarnation, settings, task_id, heed)

    def terminate(panel: Any, signal: Any = None, task_id: Any = (), **_: Any) -> dict[str, str]:
        return revoke(panel, task_id)

    def stats(panel: Any, **_: Any) -> dict[str, Any]:
        found: dict[str, Any] = celery_stats(panel)
        if "broker" in found:  # kombu takes the whole of a socket's URL, password and all, for a host
            found["broker"]["hostname"] = str(found["broker"].get("hostname")).rpartition("@")[2]
        kernels = [spec.name for spec in announcement.kernels]
        return {
            **found,
            "lepton": {
                "incarnation": announcement.incarnation,
                "device": announcement.device,
                "emulated": announcement.emulated,
                "slots": announcement.slots,
                "kernels": kernels,
            },
        }

    def query_task(panel: Any, ids: Any = (), **_: Any) -> dict[str, tuple[str, dict[str, Any]]]:
        asked = [ids] if isinstance(ids, str) else ids
        found = [request for job in asked or () if (request := books.request(job)) is not None]
        return {each.id: ("reserved" if each.time_start is None else "active", each.info()) for each in found}

    def registered(panel: Any, taskinfoitems: Any = None, builtins: bool = False, **_: Any) -> list[str]:
        return sorted(spec.name for spec in announcement.kernels)

    ours = (revoke, terminate, stats, query_task, registered)
    control.Panel.data.update({each.__name__: each for each in ours})
