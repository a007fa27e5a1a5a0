"""How a Celery worker serves a device: two bootsteps and a patient consumer.

`DeviceStep` (worker) opens the device, warms its kernels, takes the lease and runs the slots; it starts before
Celery's consumer and stops after it. `DeviceQueueStep` (consumer) takes the device queue over from Celery's
one-message-at-a-time consumer and keeps it listed, so that Flower and `celery inspect` see it. Remote control, revoke,
events and shutdown stay Celery's.
"""

from __future__ import annotations

import contextlib
import gc
import secrets
import time
from typing import Any

import msgspec
import structlog
from celery import bootsteps
from celery.worker import state
from celery.worker.consumer import Consumer

from lepton_ai.device import Announcement
from lepton_ai.errors import BrokerUnavailable, InvalidSettings, LeptonError
from lepton_ai.event import Event, encode
from lepton_ai.quarantine import Quarantined
from lepton_ai.settings import Settings
from lepton_ai.topology import device_of_queue, device_queue
from queues.broker import LISTS_EACH, event_command
from queues.canvas import Canvas
from queues.connection import CommandError, Connection
from tasks.books import Books, install_commands
from tasks.catalogue import load
from tasks.driver import open_device
from tasks.heartbeat import Heartbeat
from tasks.loss import Loss
from tasks.parity import Parity
from tasks.peaks import peaks_of
from tasks.quarantine import Quarantine
from tasks.slots import Slots
from tasks.teller import Teller
from tasks.warmup import warm
from tasks.watchdog import Watchdog

__all__ = ["DeviceQueueStep", "DeviceStep", "PatientConsumer"]

_RETRY_S = (0.1, 2.0)
#: Characters of why a kernel was refused that stand in the lease, which routers read again and again.
_LONGEST_REASON = 300

log = structlog.get_logger()


class _Pause:
    """Pauses that grow. Raises what ends a worker where it is told to stop meanwhile."""

    def __init__(self) -> None:
        self._seconds = _RETRY_S[0]

    def take(self) -> None:
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, _RETRY_S[1])
        state.maybe_shutdown()


class PatientConsumer(Consumer):
    """Celery's consumer, which begins anew where the broker refuses a command; it would do so at once and for ever.

    What Celery itself keeps on a broker (its bindings, replies to remote control) is refused by a full one.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pause = _Pause()

    def on_ready(self) -> None:
        self._pause = _Pause()
        super().on_ready()

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        if not self._refused(exc):
            super().on_connection_error_before_connected(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        super().on_connection_error_after_connected(exc)
        self._refused(exc)

    def _refused(self, error: Exception) -> bool:
        """Whether the broker is there and refuses; takes a pause then."""
        if not isinstance(error, self.channel_errors) or isinstance(error, self.connection_errors):
            return False
        log.warning("celery_refused", reason=str(error))
        self._pause.take()
        return True


class DeviceStep(bootsteps.StartStopStep):
    """Opens the device that the worker's queue names and serves it until the worker stops."""

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self.settings: Settings = worker.app.lepton_settings
        worker.device_slots = None
        self._heartbeat: Heartbeat | None = None
        self._slots: Slots | None = None
        self._teller: Teller | None = None
        self._watchdog: Watchdog | None = None
        self._parity: Parity | None = None

    def start(self, worker: Any) -> None:
        """Everything up to the first job; InvalidSettings where the command line asks for what cannot be."""
        device = _device(worker)
        _check_pool(worker)
        url = self.settings.redis_url
        assert url is not None
        driver = open_device(device, worker.concurrency)
        catalogue = load(self.settings.kernel_modules)
        allowed = [each for name, each in catalogue.kernels.items() if self.settings.allows(name)]
        if catalogue.kernels and not allowed:
            patterns = self.settings.kernels_allowed
            raise InvalidSettings(f"LEPTON_KERNELS_ALLOWED allows none of the kernels: {patterns!r}", "kernels_allowed")
        repertoire = warm(allowed, driver, catalogue.refused)
        incarnation = f"worker-{secrets.token_hex(8)}"
        self._teller = Teller(self.settings, url, incarnation, worker.hostname)
        books = Books(worker.app, worker.hostname, device, incarnation, self._teller)
        canvas = Canvas(self.settings, catalogue.kernels)
        peaks, quarantine = peaks_of(driver, anew=self.settings.peaks == "measure"), Quarantine(device)
        if self.settings.parity_share > 0:
            self._parity = Parity(self.settings, device, driver.kind, peaks, self._quarantine)
        self._slots = worker.device_slots = Slots(
            self.settings, url, incarnation, device, driver, repertoire, books, canvas, quarantine, self._parity
        )
        announcement = Announcement(
            incarnation,
            worker.hostname,
            device,
            driver.kind,
            driver.slots,
            driver.emulated,
            peaks,
            tuple(kernel.spec for kernel in repertoire.kernels.values()),
            time.time(),
            self._slots.ring.memory,
            refused={name: reason[:_LONGEST_REASON] for name, reason in repertoire.refused.items()},
        )
        install_commands(self.settings, url, announcement, books)
        self._heartbeat = Heartbeat(self.settings, url, announcement, self._slots)
        self._slots.lost = Loss(self._slots, self._heartbeat)
        self._take_lease(self._heartbeat)
        self._tell_refused(url, incarnation, device, repertoire.refused)
        # What has been loaded by now stays: the collector would look through all of it again and again.
        gc.collect()
        gc.freeze()
        self._slots.start()
        if self._parity is not None:
            self._parity.start()
        self._watchdog = Watchdog(self.settings, self._slots)
        self._watchdog.start()
        log.info("worker_online", device=device, slots=driver.slots, kernels=sorted(repertoire.kernels))

    def stop(self, worker: Any) -> None:
        """Warm shutdown: what was taken is finished and committed, then the lease is given back."""
        if self._slots is not None and self._heartbeat is not None:
            self._slots.drain()
            self._stop_watchers()
            self._heartbeat.stop()
            self._slots.driver.close()
            self._close_teller()
            log.info("worker_offline", device=self._slots.device)

    def terminate(self, worker: Any) -> None:
        """Cold shutdown: what was taken is given back unrun."""
        if self._slots is not None and self._heartbeat is not None:
            self._stop_watchers()
            self._slots.abandon()  # first: what a slot took after the batches were given back would be lost
            self._heartbeat.abandon()
            self._close_teller()

    def _quarantine(self, found: Quarantined) -> None:
        """A variant is wrong: its device runs that kernel no more, here at once, elsewhere with the next heartbeat."""
        if self._slots is not None and self._heartbeat is not None:
            self._slots.quarantine.add(msgspec.structs.replace(found, worker=self._slots.incarnation))
            self._heartbeat.wake()

    def _stop_watchers(self) -> None:
        if self._parity is not None:
            self._parity.stop()
        if self._watchdog is not None:
            self._watchdog.stop()

    def _close_teller(self) -> None:
        if self._teller is not None:
            self._teller.close()

    @staticmethod
    def _take_lease(heartbeat: Heartbeat) -> None:
        """Returns once the broker has given a lease: one that is away, or full, is waited for."""
        pause = _Pause()
        while True:
            try:
                heartbeat.start()
                return
            except (BrokerUnavailable, CommandError) as error:
                log.warning("lease_not_given", reason=error.message)
                pause.take()

    def _tell_refused(self, url: str, incarnation: str, device: str, refused: dict[str, str]) -> None:
        """Tells the fleet which kernels this device cannot run, if the broker lets us: the log has it too."""
        if not refused:
            return
        events = [
            Event("kernel.refused", incarnation, kernel=kernel, device=device, data={"reason": reason})
            for kernel, reason in refused.items()
        ]
        try:
            with contextlib.closing(Connection(url, incarnation)) as connection:
                connection.call(*event_command(encode(*events), self.settings.events_kept))
        except LeptonError as error:
            log.warning("refused_kernels_not_told", reason=error.message)


class DeviceQueueStep(bootsteps.StartStopStep):
    """Keeps Celery from popping the device queue itself, and lets its control commands pause and resume the slots."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        slots: Slots = consumer.controller.device_slots
        listed = consumer.task_consumer
        cancel_by_queue = listed.cancel_by_queue

        def consume(no_ack: bool | None = None) -> None:
            if device_queue(slots.device) in listed._queues:
                slots.resume()

        def cancel(queue: Any) -> None:
            cancel_by_queue(queue)
            if getattr(queue, "name", queue) == device_queue(slots.device):
                slots.pause()

        listed.consume = consume
        listed.cancel_by_queue = cancel


def _device(worker: Any) -> str:
    queues = list(worker.app.amqp.queues.consume_from)
    devices = [device for device in map(device_of_queue, queues) if device is not None]
    if len(queues) != 1 or len(devices) != 1:
        raise InvalidSettings(f"a worker serves one device queue, such as -Q lepton.cpu, not {', '.join(queues)}", "-Q")
    return devices[0]


def _check_pool(worker: Any) -> None:
    if worker.autoscale:
        raise InvalidSettings("slots are fixed: leave out --autoscale", "--autoscale")
    pool = worker.pool_cls.__module__.rpartition(".")[2]
    if pool != "thread":
        raise InvalidSettings(f"slots are threads: start the worker with -P threads, not {pool}", "-P")
    if not 1 <= worker.concurrency < LISTS_EACH:
        raise InvalidSettings(f"-c is 1 to {LISTS_EACH - 1} slots, not {worker.concurrency}", "-c")
