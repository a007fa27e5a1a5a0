"""The router as a node of Celery's: what Flower, `celery events` and `celery inspect` see of it.

It tells of the jobs that it claims, places and ends, while somebody listens; answers remote control (`ping`, `stats`,
`active_queues`, `reserved`); and takes a revoke, so that a waiting job can be revoked where no worker is alive.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from kombu import Connection as KombuConnection
from kombu import Queue
from kombu.pidbox import Mailbox

from lepton_ai import topology, wire
from lepton_ai.errors import LeptonError
from lepton_ai.identity import made_at
from lepton_ai.settings import Settings
from pipeline.window import ClaimedJob, Window
from queues.addresses import celery_addresses, transport_options
from queues.celery_events import Audience, EventMessage, node_name, task_event, worker_event
from queues.connection import Command, Connection
from queues.revoke import revoke

__all__ = ["Narrator", "RemoteControl"]

_SOFTWARE: Final = {"sw_ident": "lepton-router", "sw_sys": os.uname().sysname}
_LISTED: Final = 100
_RETRY_S: Final = 1.0

log = structlog.get_logger()


class Narrator:
    """Tells Celery's event listeners of jobs while they are the router's. Used by the router's thread."""

    def __init__(
        self, url: str, settings: Settings, connection: Connection, now: Callable[[], float] = time.time
    ) -> None:
        self._connection = connection
        self._message = EventMessage(url, node_name("router"))
        self._audience = Audience(settings.celery_events_hz)
        self._period_s = settings.heartbeat_s
        self._now = now
        self._placed = 0

    def beat(self, waiting: int, kind: str = "heartbeat") -> None:
        """Once a heartbeat: looks whether anybody listens, and tells them that the router lives."""
        now = self._now()
        if not self._audience.listening and not self._audience.should_ask(now):
            return
        beat = worker_event(
            kind,
            now,
            freq=self._period_s,
            active=waiting,
            processed=self._placed,
            loadavg=[round(load, 2) for load in os.getloadavg()],
            **_SOFTWARE,
        )
        # Celery's own workers may listen to the heartbeats, for gossip: only those who want tasks count.
        heard, _ = self._connection.many([self._message.tasks([]), self._message.worker(beat)])
        self._audience.heard_by(heard, now)

    def shows(self, jobs: int) -> bool:
        """Whether somebody listens who would be shown the next jobs, if they were so many."""
        return self._audience.has_room(self._now(), jobs)

    def sent(self, jobs: Sequence[tuple[ClaimedJob, wire.Headers]]) -> None:
        """Jobs have been claimed: those that there is room to show wait from here on."""
        now = self._now()
        shown = jobs[: self._audience.room(now, len(jobs))]
        if not shown:
            return
        events = []
        for job, headers in shown:
            job.sent_at = made_at(job.id) or now
            events.append(_sent(job.id, job.sent_at, headers, topology.LANE))
        self._audience.heard_by(self._connection.call(*self._message.tasks(events)), now)

    def placed(self, jobs: Mapping[str, Sequence[ClaimedJob]]) -> Command | None:
        """The message that shows on which device's queue jobs wait now; `jobs` by device."""
        events = []
        for device, here in jobs.items():
            self._placed += len(here)
            queue = topology.device_queue(device)
            for job in here:
                if job.sent_at:
                    where = {"name": job.kernel, "queue": queue, "routing_key": queue}
                    events.append(task_event("sent", job.id, job.sent_at, **where))
        return self._message.tasks(events) if events else None

    def ended(
        self,
        refused: Sequence[tuple[wire.Headers, LeptonError]],
        revoked: Sequence[ClaimedJob],
        *,
        expired: bool = False,
    ) -> Command | None:
        """The message that tells of jobs that the router itself ended; `expired` says why the revoked ones were."""
        now = self._now()
        events: list[dict[str, Any]] = []
        for headers, error in refused[: self._audience.room(now, len(refused))]:
            told = f"{type(error).__name__}({error.message!r})"
            ended = task_event("failed", headers.id, now, name=headers.task, exception=told, traceback=None)
            events += (_sent(headers.id, now, headers, topology.LANE), ended)
        for job in revoked:
            if job.sent_at:
                how = {"terminated": False, "signum": None, "expired": expired, "name": job.kernel}
                events.append(task_event("revoked", job.id, now, **how))
        return self._message.tasks(events) if events else None


def _sent(job: str, at: float, headers: wire.Headers, queue: str) -> dict[str, Any]:
    texts = {"args": headers.argsrepr, "kwargs": headers.kwargsrepr}
    return task_event(
        "sent",
        job,
        at,
        name=headers.task,
        retries=headers.retries or 0,
        queue=queue,
        exchange="",
        routing_key=queue,
        root_id=job,
        parent_id=None,
        **{name: text if isinstance(text, str) else "" for name, text in texts.items()},
    )


class _Handlers(dict[str, Callable[..., Any]]):
    def __missing__(self, name: str) -> Callable[..., Any]:
        return lambda _, **__: {"error": "a router does not do this"}


class RemoteControl:
    """Answers Celery's remote control for a router, from a thread of its own, until it is closed."""

    def __init__(self, url: str, settings: Settings, window: Window, incarnation: str) -> None:
        self._settings = settings
        self._url = url
        self._window = window
        self._incarnation = incarnation
        self._started_at = time.time()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="remote-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answers nothing more."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._serve()
            # kombu lets through whatever the socket, redis-py or a message raises; none of it may end the router.
            except Exception as error:  # noqa: BLE001
                log.debug("remote_control_lost", reason=str(error))
                self._stopping.wait(_RETRY_S)

    def _serve(self) -> None:
        broker, _ = celery_addresses(self._url)
        with KombuConnection(broker, transport_options=transport_options(self._url)) as connection:
            mailbox = Mailbox("celery", type="fanout", accept=["json"])(connection)
            node = mailbox.Node(node_name("router"), channel=connection.channel(), handlers=self._handlers())
            node.listen()
            while not self._stopping.is_set():
                try:
                    connection.drain_events(timeout=_RETRY_S)
                except TimeoutError:
                    continue

    def _handlers(self) -> Mapping[str, Callable[..., Any]]:
        known = {
            "ping": lambda _, **__: {"ok": "pong"},
            "stats": lambda _, **__: self._stats(),
            "active_queues": lambda _, **__: [Queue(topology.LANE, routing_key=topology.LANE).as_dict(recurse=True)],
            "reserved": lambda _, **__: self._reserved(),
            "active": lambda _, **__: [],
            "scheduled": lambda _, **__: [],
            "revoked": lambda _, **__: [],
            "registered": lambda _, **__: [],
            "conf": lambda _, **__: {},
            "revoke": self._revoke,
            "terminate": self._revoke,
        }
        return _Handlers(known)

    def _stats(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "uptime": round(time.time() - self._started_at),
            "total": {},
            "lepton": {"router": self._incarnation, "window": len(self._window)},
        }

    def _reserved(self) -> list[dict[str, Any]]:
        jobs = [(each, job.kernel) for job in self._window.jobs()[:_LISTED] for each in job.ids][:_LISTED]
        return [{"id": job, "name": kernel, "type": kernel, "args": [], "kwargs": {}} for job, kernel in jobs]

    def _revoke(self, _: Any, task_id: Any = (), **__: Any) -> dict[str, str]:
        return revoke(self._url, self._incarnation, self._settings, task_id)
