"""Celery's books, kept by the slots: what `celery inspect`, `celery control` and Flower read of a worker.

Celery's own sets hold its requests, and ours are light stand-ins. Its sets are meant for one thread and the slots are
several, so an iteration over them looks at a copy.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
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


class _SteadySet(WeakSet):  # type: ignore[type-arg]
    """A WeakSet that other threads may change while it is looked through."""

    def __iter__(self) -> Iterator[Any]:
        found = (reference() for reference in self.__dict__["data"].copy())
        return iter([each for each in found if each is not None])


class _Request:
    """What Celery's remote control wants to know of a job that a slot has taken."""

    def __init__(self, job: str, kernel: str, hostname: str, queue: str, backend: Any) -> None:
        self.id = job
        self.name = kernel
        self.time_start: float | None = None
        self.acknowledged = False
        # A commit is what acknowledges: to Celery such a task is acknowledged late.
        self.task = SimpleNamespace(name=kernel, backend=backend, acks_late=True)
        self._hostname = hostname
        self._queue = queue

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
        for requests in (state.reserved_requests, state.active_requests):
            requests.__class__ = _SteadySet

    def taken(self, jobs: Sequence[tuple[str, str]], shown: Collection[str]) -> None:
        """Jobs are reserved; Celery counts a task as accepted from here on."""
        now, queue = time.time(), device_queue(self._device)
        with self._lock:
            for job, kernel in jobs:
                state.task_reserved(_Request(job, kernel, self._hostname, queue, self._app.backend))
                state.total_count[kernel] += 1
            state.all_total_count[0] += len(jobs)
            self._shown.update(job for job, _ in jobs if job in shown)
        self._teller.tell([task_event("received", job, now, name=kernel) for job, kernel in jobs if job in shown])

    def started(self, jobs: Sequence[str]) -> None:
        """Jobs are active."""
        now = time.time()
        with self._lock:
            for job in jobs:
                if (request := state.requests.get(job)) is not None:
                    request.time_start = now
                    state.active_requests.add(request)
        self._teller.tell([task_event("started", job, now) for job in jobs if job in self._shown])

    def ended(self, endings: Sequence[Ending]) -> None:
        """Jobs have ended."""
        self._teller.tell([_event(ending) for ending in endings if ending.job in self._shown])
        self.lost([ending.job for ending in endings])

    def lost(self, jobs: Sequence[str]) -> None:
        """Jobs are this worker's no longer."""
        with self._lock:
            for job in jobs:
                if (request := state.requests.pop(job, None)) is not None:
                    state.reserved_requests.discard(request)
                    state.active_requests.discard(request)
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


def install_commands(settings: Settings, url: str, announcement: Announcement) -> None:
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

    def registered(panel: Any, taskinfoitems: Any = None, builtins: bool = False, **_: Any) -> list[str]:
        return sorted(spec.name for spec in announcement.kernels)

    control.Panel.data.update(revoke=revoke, terminate=terminate, stats=stats, registered=registered)
