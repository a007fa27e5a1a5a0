"""The worker's lease and heartbeat, from a thread of its own, so that no kernel and no event loop can hold them up."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import psutil
import structlog

from lepton_ai import event, ring
from lepton_ai.device import Announcement, ResourceState
from lepton_ai.errors import LeptonError
from lepton_ai.event import Event
from lepton_ai.settings import Settings
from queues.broker import Broker
from queues.connection import CommandError, Connection
from tasks.slots import Slots

__all__ = ["Heartbeat"]

#: How often memory is given back that producers who are gone have left, and what we hold of it.
_SWEEP_S = 60.0

log = structlog.get_logger()


class Heartbeat:
    """Announces a worker and keeps its lease until it is stopped."""

    def __init__(self, settings: Settings, url: str, announcement: Announcement, slots: Slots) -> None:
        self._settings = settings
        self._url = url
        self._announcement = announcement
        self._value = msgspec.msgpack.encode(announcement)
        self._slots = slots
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._broker: Broker | None = None
        self._announced = False
        self._seen = (time.monotonic(), 0.0, 0)
        self._swept_at = time.monotonic()

    def start(self) -> None:
        """Takes the lease and tells the fleet; the worker can be given jobs once this returns.

        Call it again where it raises: BrokerUnavailable (the broker is away) or CommandError (it refuses a lease).
        """
        psutil.cpu_percent(None)
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Gives the lease back; call it once the slots hold nothing any more."""
        self._halt()
        try:
            broker = self._connected()
            broker.resign()
            self._emit(broker, "device.offline", {"worker": self._announcement.worker})
        except LeptonError as error:
            log.warning("lease_left", reason=error.message)
        self._disconnect()

    def abandon(self) -> None:
        """Gives the lease and everything still held back at once; commits of this worker are refused from here on."""
        self._halt()
        try:
            broker = self._connected()
            log.warning("batches_given_back", messages=broker.resign())
            self._emit(broker, "device.offline", {"worker": self._announcement.worker})
        except LeptonError as error:
            log.warning("lease_left", reason=error.message)
        self._disconnect()

    def _halt(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(self._settings.lease_s)

    def _run(self) -> None:
        while not self._stopping.wait(self._settings.heartbeat_s):
            try:
                self._sweep()
                self._beat()
            except CommandError as error:  # a full broker: it renews a lease, and takes no new one
                log.warning("heartbeat_refused", reason=error.message)
            except LeptonError as error:
                self._disconnect()
                log.warning("heartbeat_missed", reason=error.message)
            except Exception:  # a defect of ours must not cost the worker its lease
                log.exception("heartbeat_failed")

    def _beat(self) -> None:
        broker = self._connected()
        if broker.renew():
            self._emit(broker, "device.heartbeat", {"state": msgspec.to_builtins(self._state())})
            self._slots.heed(broker)
            return
        if self._announced:
            log.warning("lease_lapsed", worker=self._announcement.worker)
        broker.announce(self._value)
        self._announced = True
        self._emit(broker, "device.online", {"worker": self._announcement.worker})

    def _sweep(self) -> None:
        now = time.monotonic()
        if now >= self._swept_at + _SWEEP_S:
            self._swept_at = now
            if removed := ring.sweep():
                log.info("segments_removed", count=removed)
            self._slots.ring.sweep()

    def _connected(self) -> Broker:
        if self._broker is None:
            incarnation = self._announcement.incarnation
            self._broker = Broker(Connection(self._url, f"{incarnation}-lease"), incarnation, self._settings)
        return self._broker

    def _disconnect(self) -> None:
        if self._broker is not None:
            self._broker.connection.close()
            self._broker = None

    def _emit(self, broker: Broker, kind: str, data: dict[str, object]) -> None:
        """Tells the fleet; a lease does not depend on it."""
        told = Event(kind, self._announcement.incarnation, device=self._announcement.device, data=data)
        try:
            broker.emit(event.encode(told))
        except CommandError as error:
            log.warning("event_not_told", type=kind, reason=error.message)

    def _state(self) -> ResourceState:
        now, busy_s = time.monotonic(), self._slots.busy_s
        counters: Any = psutil.net_io_counters()  # None where the machine has no network at all
        moved = counters.bytes_sent + counters.bytes_recv if counters else 0
        then, busy_before, moved_before = self._seen
        self._seen = (now, busy_s, moved)
        elapsed = max(1e-6, now - then)
        memory = psutil.virtual_memory()
        return ResourceState(
            busy_slots=self._slots.busy,
            utilization=min(1.0, (busy_s - busy_before) / elapsed / self._slots.count),
            host_cpu=psutil.cpu_percent(None) / 100,
            memory_used_bytes=memory.total - memory.available,
            memory_total_bytes=memory.total,
            network_bytes_per_s=max(0.0, (moved - moved_before) / elapsed) if moved_before else 0.0,
        )
