"""The watchdog: ends the worker's process when a kernel runs past its limit, since a thread cannot be ended.

Before that it gives back what the others hold, so that the culprit alone is found in the list of a dead worker, and
counts an attempt. A supervisor (`lepton up`, systemd, Kubernetes) starts the next process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import structlog

from lepton_ai import event, wire
from lepton_ai.errors import Fenced, LeptonError, TimeLimitExceeded
from lepton_ai.event import Event
from lepton_ai.settings import Settings
from queues.broker import Broker
from queues.steps import Commit, Outcome
from tasks.runner import Running
from tasks.slots import Slots

__all__ = ["EXIT_CODE", "Watchdog"]

#: How the process ends: sysexits.h calls it a temporary failure.
EXIT_CODE: Final = 75
_LOOK_S: Final = 0.25
#: So long it may take to give things back; then the process ends as it is, and all it held is under suspicion.
_PATIENCE_S: Final = 5.0

log = structlog.get_logger()


class Watchdog:
    """Looks at the running launches until it is stopped."""

    def __init__(self, settings: Settings, slots: Slots, end: Callable[[int], object] = os._exit) -> None:
        self._settings = settings
        self._slots = slots
        self._end = end
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_S):
            now = time.monotonic()
            for running in self._slots.running:
                if now - running.started > running.kill_after_s:
                    self._bark(running)
                    return

    def _bark(self, culprit: Running) -> None:
        log.error(
            "kernel_over_its_limit",
            jobs=culprit.jobs,
            slot=culprit.slot,
            limit_s=round(culprit.kill_after_s, 3),
            ending="this process; what else it holds is given back",
        )
        # The broker may be what is slow: nothing of it may keep a hung process alive.
        threading.Timer(_PATIENCE_S, self._end, (EXIT_CODE,)).start()
        with suppress(LeptonError):
            broker = self._slots.connect("watchdog")
            for slot, messages in self._slots.holding.items():
                if slot == culprit.slot:
                    flags = "".join(_flag(message, culprit) for message in messages)
                else:
                    flags = ("!" if slot == self._slots.count else ".") * len(messages)
                with suppress(Fenced):  # it has committed a moment ago
                    broker.release(slot, flags)
            if len(culprit.jobs) == 1 and culprit.by_own_limit:
                self._refuse(broker, culprit)
            broker.resign_as_dead()
        self._end(EXIT_CODE)

    def _refuse(self, broker: Broker, culprit: Running) -> None:
        """A job that asked for its limit itself has had it, and is not tried again."""
        (message,) = broker.held(culprit.slot)
        headers = wire.read_envelope(message).headers
        options = wire.read_options(headers)
        error = TimeLimitExceeded(f"it ran on after its limit; its worker was ended after {culprit.kill_after_s:g} s")
        record = wire.encode_meta(wire.failure(headers.id, error), options.result or self._settings.result_serializer)
        told = Event(
            "job.failed", self._slots.incarnation, headers.task, self._slots.device, (headers.id,), data=error.to_wire()
        )
        outcome = Outcome(headers.id, "failed", b"" if headers.ignore_result else record, options.reply_to or "")
        broker.commit(Commit(culprit.slot, 1, [outcome], event.encode(told)))


def _flag(message: bytes, culprit: Running) -> str:
    """What becomes of a message of the culprit's batch: see Broker.release."""
    if wire.read_envelope(message).headers.id not in culprit.jobs:
        return "."
    return "=" if len(culprit.jobs) == 1 else "!"
