"""The worker's lease and heartbeat, from a thread of its own, so that no kernel and no event loop can hold them up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import msgspec
import structlog

from lepton_ai import event, ring, topology
from lepton_ai.device import Announcement, ResourceState
from lepton_ai.errors import LeptonError
from lepton_ai.event import Event
from lepton_ai.quarantine import Quarantined
from lepton_ai.settings import Settings
from queues.broker import Broker
from queues.connection import CommandError, Connection
from tasks.resources import Resources
from tasks.siblings import Siblings
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
        self._slots = slots
        self._told: dict[str, str] = {}
        """What the lease says of kernels that are quarantined."""
        self._stopping = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._broker: Broker | None = None
        self._announced = False
        self._resources = Resources(settings, announcement, slots)
        self._siblings = Siblings(announcement.incarnation, settings.lease_s)
        self._swept_at = time.monotonic()

    def start(self) -> None:
        """Takes the lease and tells the fleet; the worker can be given jobs once this returns.

        Call it again where it raises: BrokerUnavailable (the broker is away) or CommandError (it refuses a lease).
        """
        self._beat()
        self._thread.start()

    def wake(self) -> None:
        """Beats at once: there is something that the fleet should know now."""
        self._woken.set()

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

    def lose(self, reason: str, *, as_dead: bool) -> None:
        """Gives the lease back, and all that is held, since the device is lost; `as_dead` leaves that to a sweep."""
        self._halt()
        try:
            broker = self._connected()
            if as_dead:
                broker.resign_as_dead()
            else:
                log.warning("batches_given_back", messages=broker.resign())
            self._emit(broker, "device.lost", {"worker": self._announcement.worker, "reason": reason})
            self._emit(broker, "device.offline", {"worker": self._announcement.worker})
        except LeptonError as error:
            log.warning("lease_left", reason=error.message)
        self._disconnect()

    def _halt(self) -> None:
        self._stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(self._settings.lease_s)

    def _run(self) -> None:
        while True:
            self._woken.wait(self._settings.heartbeat_s)
            self._woken.clear()
            if self._stopping:
                return
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
        quarantined = self._look_at_quarantine(broker)
        is_news = self._slots.quarantine.reasons != self._told
        if broker.renew():
            if is_news:
                self._announce(broker)
            self._tell_of(broker, quarantined)
            state = self._resources.read(self._siblings.processors)
            self._emit(broker, "device.heartbeat", {"state": msgspec.to_builtins(state)})
            self._keep(broker, state)
            self._siblings.tell(broker, state.own_cpu * self._resources.processors)
            self._slots.heed(broker)
            return
        if self._announced:
            log.warning("lease_lapsed", worker=self._announcement.worker)
        self._announce(broker)
        self._announced = True
        self._tell_of(broker, quarantined)
        self._emit(broker, "device.online", {"worker": self._announcement.worker})

    def _look_at_quarantine(self, broker: Broker) -> list[Quarantined]:
        """What is new in the fleet's list by us. A broker that is full, or where a foreign hand was, tells nothing."""
        try:
            return self._slots.quarantine.look(broker.connection)
        except CommandError as error:
            log.warning("quarantine_unread", reason=error.message)
            return []

    def _announce(self, broker: Broker) -> None:
        """Writes the lease: what this worker serves, without the kernels that are quarantined."""
        reasons, found = self._slots.quarantine.reasons, self._announcement
        if reasons:
            serves = tuple(spec for spec in found.kernels if spec.name not in reasons)
            barred = {spec.name: reasons[spec.name] for spec in found.kernels if spec.name in reasons}
            found = msgspec.structs.replace(found, kernels=serves, quarantined=barred)
        broker.announce(msgspec.msgpack.encode(found))
        if reasons != self._told:
            log.warning("quarantine_changed", kernels=sorted(reasons))
        self._told = reasons

    def _tell_of(self, broker: Broker, quarantined: Iterable[Quarantined]) -> None:
        for each in quarantined:
            data = msgspec.to_builtins(each)
            told = {name: data[name] for name in ("reason", "difference", "tolerance", "shapes", "job")}
            self._emit(broker, "device.quarantined", told, each.kernel, each.device)

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

    def _emit(
        self, broker: Broker, kind: str, data: dict[str, object], kernel: str | None = None, device: str | None = None
    ) -> None:
        """Tells the fleet; a lease does not depend on it."""
        told = Event(kind, self._announcement.incarnation, kernel, device or self._announcement.device, data=data)
        try:
            broker.emit(event.encode(told))
        except CommandError as error:
            log.warning("event_not_told", type=kind, reason=error.message)

    def _keep(self, broker: Broker, state: ResourceState) -> None:
        """Keeps the state where it can be looked up; a broker that is full does without."""
        command = ("SET", topology.state(self._announcement.incarnation), msgspec.msgpack.encode(state), "PX")
        lease_ms = round(self._settings.lease_s * 1000)
        broker.connection.receive(broker.connection.send([(*command, lease_ms)]))
