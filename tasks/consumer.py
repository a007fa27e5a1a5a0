"""How a Celery worker serves a device: two bootsteps.

`DeviceStep` (worker) opens the device, warms its kernels, takes the lease and runs the slots; it starts before
Celery's consumer and stops after it. `DeviceQueueStep` (consumer) takes the device queue over from Celery's
one-message-at-a-time consumer and keeps it listed, so that Flower and `celery inspect` see it. Remote control, revoke,
events and shutdown stay Celery's.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import structlog
from celery import bootsteps

from lepton_ai.device import Announcement
from lepton_ai.errors import InvalidSettings
from lepton_ai.event import Event, encode
from lepton_ai.settings import Settings
from lepton_ai.topology import device_of_queue, device_queue
from queues.broker import LISTS_EACH, Broker
from queues.canvas import Canvas
from queues.connection import Connection
from tasks.books import Books, install_commands
from tasks.catalogue import load
from tasks.driver import open_device
from tasks.heartbeat import Heartbeat
from tasks.slots import Slots
from tasks.teller import Teller
from tasks.warmup import warm
from tasks.watchdog import Watchdog

__all__ = ["DeviceQueueStep", "DeviceStep"]

log = structlog.get_logger()


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

    def start(self, worker: Any) -> None:
        """Everything up to the first job; InvalidSettings where the command line asks for what cannot be."""
        device = _device(worker)
        _check_pool(worker)
        url = self.settings.redis_url
        assert url is not None
        driver = open_device(device, worker.concurrency)
        catalogue = load(self.settings.kernel_modules)
        repertoire = warm(catalogue.kernels.values(), driver, catalogue.refused)
        incarnation = f"worker-{secrets.token_hex(8)}"
        self._teller = Teller(self.settings, url, incarnation, worker.hostname)
        books = Books(worker.app, worker.hostname, device, incarnation, self._teller)
        canvas = Canvas(self.settings, catalogue.kernels)
        self._slots = worker.device_slots = Slots(
            self.settings, url, incarnation, device, driver, repertoire, books, canvas
        )
        announcement = Announcement(
            incarnation,
            worker.hostname,
            device,
            driver.kind,
            driver.slots,
            driver.emulated,
            driver.peaks(),
            tuple(kernel.spec for kernel in repertoire.kernels.values()),
            time.time(),
        )
        self._tell_refused(url, incarnation, device, repertoire.refused)
        install_commands(self.settings, url, announcement)
        self._heartbeat = Heartbeat(self.settings, url, announcement, self._slots)
        self._heartbeat.start()
        self._slots.start()
        self._watchdog = Watchdog(self.settings, self._slots)
        self._watchdog.start()
        log.info("worker_online", device=device, slots=driver.slots, kernels=sorted(repertoire.kernels))

    def stop(self, worker: Any) -> None:
        """Warm shutdown: what was taken is finished and committed, then the lease is given back."""
        if self._slots is not None and self._heartbeat is not None:
            self._slots.drain()
            self._stop_watchdog()
            self._heartbeat.stop()
            self._slots.driver.close()
            self._close_teller()
            log.info("worker_offline", device=self._slots.device)

    def terminate(self, worker: Any) -> None:
        """Cold shutdown: what was taken is given back unrun."""
        if self._slots is not None and self._heartbeat is not None:
            self._stop_watchdog()
            self._slots.abandon()  # first: what a slot took after the batches were given back would be lost
            self._heartbeat.abandon()
            self._close_teller()

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()

    def _close_teller(self) -> None:
        if self._teller is not None:
            self._teller.close()

    def _tell_refused(self, url: str, incarnation: str, device: str, refused: dict[str, str]) -> None:
        if not refused:
            return
        broker = Broker(Connection(url, incarnation), incarnation, self.settings)
        events = [
            Event("kernel.refused", incarnation, kernel=kernel, device=device, data={"reason": reason})
            for kernel, reason in refused.items()
        ]
        broker.emit(encode(*events))
        broker.connection.close()


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
